"""Benchmarks: ``python bench.py``. One module a purpose; ``command`` holds the options.

Timing: ``model_setup`` the model to measure, ``stepping`` the step as a frame runner, ``peers`` other software's,
``end_to_end`` a generator from text to audio, ``rows`` the table of them all, ``tune`` launch configurations,
``accuracy`` the kernels' logits beside PyTorch's ops. Without a GPU: ``launches`` what a frame launches,
``machine_code`` what its kernels compile to, ``predict`` what it may take. ``report`` writes tables, files and a plot.
``gpu`` runs all of it on a GPU (``make gpu``).
"""
