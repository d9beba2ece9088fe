"""Check what this machine has, and what CSM-1B needs: Python, PyTorch, GPU, compilers, memory, disk, hub and sound.

Exit code: 0 if all is well, 1 if there are warnings, 2 if there are errors. An error means that CSM-1B cannot run here
as things are; a warning means that something is slower or missing.
"""

from csm.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
