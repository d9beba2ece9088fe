"""Bodies of requests. Unknown fields are refused: a misspelt ``sed`` must not go unnoticed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from csm.serve.settings import MAX_INPUT, MAX_JSON

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


class VoiceId(BaseModel):
    """A voice by its id."""

    model_config = ConfigDict(extra="forbid")
    id: str = Field(min_length=1)


class Turn(BaseModel):
    """An earlier turn of the conversation: its text, and its audio as a Base64 file or as codes (T, K)."""

    model_config = ConfigDict(extra="forbid")
    text: Text = Field(max_length=MAX_INPUT)
    speaker: Speaker = 0
    audio: str | None = Field(None, max_length=MAX_JSON)
    codes: list[list[int]] | None = Field(None, max_length=2048)


class SpeechBody(BaseModel):
    """``POST /v1/audio/speech``: OpenAI's fields, then this server's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
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
