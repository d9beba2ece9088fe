"""Errors that a user can cause and fix. Each message names the value and the limit. Any other exception is a bug."""


class CSMError(ValueError):
    """Base class of all errors caused by a user's input."""


class ListError(CSMError):
    """Several faults of one file, one on each line of the message after the first."""


class CheckpointError(CSMError):
    """A checkpoint cannot be found, downloaded or read. The message names the file and, if known, the tensor."""


class UnavailableError(CheckpointError):
    """A checkpoint cannot be downloaded: gated, no network, unknown name, disk full. The message says what to do."""


class PromptError(CSMError):
    """Invalid text, speaker or context turns."""


class PromptTooLongError(PromptError):
    """The prompt has more positions than the backbone."""


class CheckpointWarning(UserWarning):
    """A checkpoint is used although something about it may change the speech. The message names the file."""


class RoomWarning(UserWarning):
    """The prompt leaves fewer positions than the requested audio length, so the audio may be cut short."""


class VoiceError(CSMError):
    """A voice has a bad name, does not exist, or its file cannot be read or written."""


class VoiceFileError(VoiceError):
    """A voice's file cannot be read or written, or holds no voice. The message names the file."""


class FallbackWarning(UserWarning):
    """A fast path failed its self-check on this device, so a slower one is used."""


class SamplingError(CSMError):
    """A sampling parameter is out of range."""


class QueueFullError(CSMError):
    """More requests are waiting than the engine's queue holds. Try again later."""


class AudioError(CSMError):
    """Audio or codes cannot be read, encoded or decoded."""
