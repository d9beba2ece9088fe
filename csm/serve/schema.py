"""Bodies of requests and responses, for ``/openapi.json`` too.

Unknown fields are refused: a misspelt ``sed`` must not go unnoticed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, model_validator

from csm.formats import MEDIA_TYPES
from csm.serve.settings import MAX_FIELDS, MAX_INPUT, MAX_JSON

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


def _encodable(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text has a lone surrogate, which is no character")
    return text


def _speakable(text: str) -> str:
    if not text.strip():
        raise ValueError("there is no text to speak")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Speaker = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _FailFast(FailFast):
    __hash__ = object.__hash__  # a union hashes its members


# pydantic makes an error for each wrong value, which takes seconds for a million: the first one ends the validation.
_FAIL_FAST = _FailFast()
Codes = Annotated[list[Annotated[list[int], _FAIL_FAST]], _FAIL_FAST]


class StrictModel(BaseModel):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        """An error is made for each unknown field, which takes seconds for many."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object has more than {MAX_FIELDS} fields")
        return value


class VoiceId(StrictModel):
    """A voice by its id."""

    id: str = Field(min_length=1)


class Turn(StrictModel):
    """An earlier turn of the conversation: its text, and its audio as a Base64 file or as codes (T, K)."""

    text: Text = Field(max_length=MAX_INPUT)
    speaker: Speaker = 0
    audio: str | None = Field(None, max_length=MAX_JSON)
    codes: Codes | None = Field(None, max_length=2048)


class SpeechBody(StrictModel):
    """``POST /v1/audio/speech``: OpenAI's fields, then this server's own."""

    model: str = Field(min_length=1, max_length=200)
    input: Annotated[Text, AfterValidator(_speakable)] = Field(min_length=1, max_length=MAX_INPUT)
    voice: str | VoiceId
    instructions: str | None = Field(None, max_length=MAX_INPUT, description="accepted, and without effect")
    response_format: Format | None = None
    speed: float | None = Field(None, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float | None = Field(None, ge=0, le=5)
    top_k: int | None = Field(None, ge=1)
    speaker: Speaker | None = None
    context: list[Turn] = Field(default_factory=list, max_length=32)
    watermark: bool = Field(False, description="mark the audio as generated")
    session: str | None = Field(None, pattern="^[A-Za-z0-9._:-]{1,128}$")

    @property
    def voice_id(self) -> str:
        """The voice's id, however it was given."""
        return self.voice if isinstance(self.voice, str) else self.voice.id


# OpenAPI's description of what no model above describes. itemSchema is that of one event.
_EVENT = {
    "type": "object",
    "properties": {
        "type": {"enum": ["speech.audio.delta", "speech.audio.done", "error"]},
        "audio": {"type": "string", "contentEncoding": "base64", "description": "of a delta"},
        "usage": {"type": "object", "additionalProperties": {"type": "integer"}, "description": "tokens, of done"},
        "error": {"type": "object", "description": "as in the body of an error"},
    },
    "required": ["type"],
    "additionalProperties": False,
}
_EVENT_DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": _EVENT}
_EVENTS = {"itemSchema": {"type": "object", "properties": {"data": _EVENT_DATA}, "required": ["data"]}}
_AUDIO = {"schema": {"type": "string", "format": "binary"}}
SPEECH_RESPONSE: dict[str, Any] = {
    "description": "the audio in response_format, or server-sent events",
    "content": {**dict.fromkeys(MEDIA_TYPES.values(), _AUDIO), "text/event-stream": _EVENTS},
}
_VOICE_FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "the voice's id, of letters, digits, '_', '-' and '.'"},
        "audio_sample": {"type": "string", "format": "binary", "description": "the recording"},
        "text": {"type": "string", "maxLength": MAX_INPUT, "description": "what is said in the recording"},
        "consent": {"type": "string", "maxLength": MAX_INPUT, "description": "who allowed its use, and how"},
        "speaker": {"type": "string", "pattern": "^[0-9]{1,9}$", "default": "0"},
        "type": {"type": "string", "const": "audio_sample"},
    },
    "required": ["name", "audio_sample", "text", "consent"],
    "additionalProperties": False,
}
VOICE_REQUEST: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _VOICE_FORM}}}
}
