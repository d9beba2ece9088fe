"""Checkpoints: find or download them, check their tensors, and convert them to the model's state dict.

Installed as ``csm.weights``. Depends on shapes (``csm.config``) and files, never on the model.
"""

from csm.weights.checkpoint import Checkpoint, open_checkpoint, read_codec, read_model
from csm.weights.generation_config import GenerationDefaults, read_generation_defaults

__all__ = [
    "Checkpoint",
    "GenerationDefaults",
    "open_checkpoint",
    "read_codec",
    "read_generation_defaults",
    "read_model",
]
