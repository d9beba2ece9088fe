"""Checkpoints: where they are, how their tensors are called, and how they become the model's own state dict.

Installed as ``csm.weights``. Knows shapes (``csm.config``) and files; knows no model.
"""

from csm.weights.checkpoint import Checkpoint, open_checkpoint, read_codec, read_model

__all__ = ["Checkpoint", "open_checkpoint", "read_codec", "read_model"]
