"""Evaluation of generated speech: ``python -m csm eval``.

``words`` counts word errors, ``listen`` has the speech recogniser and the speaker encoder, ``measure`` applies both to
recordings and generated speech, ``report`` summarises the results, and ``command`` is the command line.
"""
