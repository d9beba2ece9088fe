"""Benchmarks: ``python bench.py``. One module a purpose; ``command`` holds the options.

``model_setup`` the model to measure, ``rows`` the timed configurations, ``peers`` those that other software runs,
``end_to_end`` a generator from text to audio, ``launches`` what a frame launches, ``machine_code`` what the kernels
compile to, ``tune`` launch configurations, ``report`` tables and plots, ``stepping`` the step as a frame runner.
"""
