"""Training: ``python -m csm finetune``.

``manifest``, ``codes`` and ``data`` turn recordings into examples, ``batches`` turns these into batches; ``forward``,
``loss`` and ``initial`` are the mathematics; ``train`` is the loop, with ``options``, ``optimizer``, ``distributed``,
``checkpoint`` and ``monitor``; ``export`` writes the trained model, and ``command`` is the command line.
"""
