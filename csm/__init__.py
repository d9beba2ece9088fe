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
    VoiceFileError,
)
from csm.generator import DEFAULT_MODEL, Generator, load_csm_1b
from csm.guards import GuardEvent, Guards
from csm.metrics import GenerationMetrics, Meter
from csm.prompt import Segment
from csm.request import SpeechRequest
from csm.sampling import SamplingParams
from csm.stream import Speech
from csm.voices import Voice
from csm.watermark import WATERMARKS, Watermark, load_watermark

__all__ = [
    "DEFAULT_MODEL",
    "WATERMARKS",
    "AudioError",
    "CSMError",
    "CheckpointError",
    "CheckpointWarning",
    "Conversation",
    "FallbackWarning",
    "GenerationMetrics",
    "Generator",
    "GuardEvent",
    "Guards",
    "Meter",
    "PromptError",
    "PromptTooLongError",
    "QueueFullError",
    "RoomWarning",
    "SamplingError",
    "SamplingParams",
    "Segment",
    "Speech",
    "SpeechRequest",
    "UnavailableError",
    "Voice",
    "VoiceError",
    "VoiceFileError",
    "Watermark",
    "WavWriter",
    "load_csm_1b",
    "load_watermark",
    "read_audio",
]
