"""Text to a WAV file: ``python generate.py --text "Hello."``. ``--help`` lists the options.

The same as ``csm generate`` of the installed package, for a checkout.
"""

from __future__ import annotations

import signal
import sys

from csm.generate_command import main, parse_arguments

__all__ = ["main", "parse_arguments"]

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: what is half written goes
    sys.exit(main())
