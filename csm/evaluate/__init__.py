"""Measuring speech: ``python -m csm eval``.

``words`` counts wrong words, ``listen`` hears them and knows voices, ``measure`` puts speech before both, ``report``
says what came of it.
"""
