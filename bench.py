"""Measure frames a second on this machine: ``python bench.py``; ``--help`` lists the options. Code: ``csm/bench``."""

import sys

from csm.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
