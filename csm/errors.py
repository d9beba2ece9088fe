"""Errors that a user can cause and mend: each names the value and the limit. Anything else is a bug."""


class CSMError(ValueError):
    """Base of every error that a user's input can raise."""


class CheckpointError(CSMError):
    """A checkpoint that cannot be found, fetched or read. Names the file, and the tensor where there is one."""


class UnavailableError(CheckpointError):
    """A checkpoint on the hub that cannot be had: gated, no network, no such name, no space. Says what to do."""


class PromptError(CSMError):
    """Text, a speaker or context turns that cannot be spoken."""


class PromptTooLongError(PromptError):
    """A prompt of more positions than the backbone has."""


class RoomWarning(UserWarning):
    """A prompt so long that speech may be cut before the limit that was asked for."""


class SamplingError(CSMError):
    """A sampling parameter out of range."""


class QueueFullError(CSMError):
    """More requests are waiting than the engine's queue holds. Try again later."""


class AudioError(CSMError):
    """Audio or codes that cannot be read, encoded or decoded."""
