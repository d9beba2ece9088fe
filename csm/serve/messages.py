"""What a client of the WebSocket may send (docs/websocket.md). Unknown types and fields are refused."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from csm.serve.errors import ApiError
from csm.serve.schema import Speaker, SpeechBody, StrictModel, Text, Turn, VoiceId
from csm.serve.settings import MAX_INPUT, MAX_VALUES

MAX_SEED = 2**63


class Start(StrictModel):
    """Begin a turn. ``context``: earlier turns that are not generated here, such as what the user said."""

    type: Literal["start"]
    voice: str | VoiceId
    model: str | None = Field(None, min_length=1, max_length=200)
    split: Literal["clause", "sentence"] = "clause"
    speed: float | None = Field(None, ge=0.25, le=4)
    seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    temperature: float | None = Field(None, ge=0, le=5)
    top_k: int | None = Field(None, ge=1)
    speaker: Speaker | None = None
    context: list[Turn] = Field(default_factory=list, max_length=32)
    watermark: bool = False

    def body(self, text: str, seed: int) -> SpeechBody:
        """The request for speech that generates ``text``, as ``POST /v1/audio/speech`` would take it."""
        fields = self.model_dump(include={"voice", "speed", "temperature", "top_k", "speaker", "watermark"})
        fields |= {"model": self.model or "csm", "input": text, "response_format": "pcm", "seed": seed % MAX_SEED}
        return SpeechBody.model_validate(fields)


class Piece(StrictModel):
    """A piece of the turn's text."""

    type: Literal["text"]
    text: Text = Field(max_length=MAX_INPUT)


class Flush(StrictModel):
    """Generate the text so far, complete or not."""

    type: Literal["flush"]


class End(StrictModel):
    """The turn's text is complete."""

    type: Literal["end"]


class Cancel(StrictModel):
    """Stop the turn. ``played``: seconds of it that the listener has heard; None is all that was sent."""

    type: Literal["cancel"]
    played: float | None = Field(None, ge=0)


ClientMessage = Start | Piece | Flush | End | Cancel
_ADAPTER: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])
TYPES = ("start", "text", "flush", "end", "cancel")


class ProtocolError(Exception):
    """A frame that is not part of the protocol: the socket is closed with this code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def parse(text: str) -> ClientMessage:
    """A client's message.

    Raises ProtocolError for what is no message of the protocol, and ApiError for a message with a field that is wrong.
    """
    if text.count(",") > MAX_VALUES:
        raise ProtocolError(1009, f"the message has more than {MAX_VALUES} commas, so it may have too many values")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(1008, "the message is not JSON") from error
    if not isinstance(value, dict) or value.get("type") not in TYPES:
        raise ProtocolError(1008, f"a message is an object whose type is one of {', '.join(TYPES)}")
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise _field_error(error) from error


def _field_error(error: ValidationError) -> ApiError:
    first = error.errors(include_input=False, include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"][1:])[:200] or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param, "unknown_parameter")
    return ApiError(400, f"{param or 'message'}: {first['msg']}", param)
