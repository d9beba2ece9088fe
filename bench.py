"""Measure frames a second on this machine: ``python bench.py``; ``--help`` lists the options. Code: ``csm/bench``."""

import os
import sys

os.environ.setdefault("CSM_TRITON", "1")  # kernels are counted and predicted without a GPU, too

from csm.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
