"""Training: ``python -m csm finetune``.

``forward`` and ``loss`` are the mathematics, ``batches`` what they read; ``manifest``, ``codes`` and ``data`` make
sequences of recordings; ``train`` is the loop, over ``options``, ``optimise``, ``checkpoint``, ``processes`` and
``logs``; ``export`` writes what was learned.
"""
