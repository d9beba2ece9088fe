"""CSM, from scratch: Sesame's CSM-1B text-to-speech in plain PyTorch."""

from csm.audio import WavWriter, read_audio
from csm.errors import (
    AudioError,
    CheckpointError,
    CSMError,
    FallbackWarning,
    PromptError,
    PromptTooLongError,
    RoomWarning,
    SamplingError,
    UnavailableError,
)
from csm.generator import DEFAULT_MODEL, Generator, load_csm_1b
from csm.prompt import Segment
from csm.sampling import SamplingParams

__all__ = [
    "DEFAULT_MODEL",
    "AudioError",
    "CSMError",
    "CheckpointError",
    "FallbackWarning",
    "Generator",
    "PromptError",
    "PromptTooLongError",
    "RoomWarning",
    "SamplingError",
    "SamplingParams",
    "Segment",
    "UnavailableError",
    "WavWriter",
    "load_csm_1b",
    "read_audio",
]
