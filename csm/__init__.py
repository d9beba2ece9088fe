"""CSM, from scratch: Sesame's CSM-1B text-to-speech in plain PyTorch."""

from csm.errors import (
    AudioError,
    CheckpointError,
    CSMError,
    PromptError,
    PromptTooLongError,
    SamplingError,
    UnavailableError,
)
from csm.generator import Generator, load_csm_1b
from csm.prompt import Segment
from csm.sampling import SamplingParams

__all__ = [
    "AudioError",
    "CSMError",
    "CheckpointError",
    "Generator",
    "PromptError",
    "PromptTooLongError",
    "SamplingError",
    "SamplingParams",
    "Segment",
    "UnavailableError",
    "load_csm_1b",
]
