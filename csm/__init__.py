"""CSM, from scratch: Sesame's CSM-1B text-to-speech in plain PyTorch."""

from csm.audio import WavWriter, read_audio
from csm.conversation import Conversation
from csm.errors import (
    AudioError,
    CheckpointError,
    CheckpointWarning,
    CSMError,
    FallbackWarning,
    PromptError,
    PromptTooLongError,
    QueueFullError,
    RoomWarning,
    SamplingError,
    UnavailableError,
    VoiceError,
)
from csm.generator import DEFAULT_MODEL, Generator, load_csm_1b
from csm.guards import GuardEvent, Guards
from csm.prompt import Segment
from csm.request import SpeechRequest
from csm.sampling import SamplingParams
from csm.voices import Voice

__all__ = [
    "DEFAULT_MODEL",
    "AudioError",
    "CSMError",
    "CheckpointError",
    "CheckpointWarning",
    "Conversation",
    "FallbackWarning",
    "Generator",
    "GuardEvent",
    "Guards",
    "PromptError",
    "PromptTooLongError",
    "QueueFullError",
    "RoomWarning",
    "SamplingError",
    "SamplingParams",
    "Segment",
    "SpeechRequest",
    "UnavailableError",
    "Voice",
    "VoiceError",
    "WavWriter",
    "load_csm_1b",
    "read_audio",
]
