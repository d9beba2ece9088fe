"""A request to speak, as the user states it: every argument of ``Generator.generate`` in one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from csm.errors import CSMError
from csm.prompt import Segment
from csm.voices import Voice


@dataclass(frozen=True)
class SpeechRequest:
    """What to say and how. The fields are the arguments of ``Generator.generate``, which documents them.

    ``repeatable`` keeps nothing of the generated frames in the prefix cache. A later request that continues them then
    gets the same codes to the bit, whether or not they were generated in this process.
    """

    text: str
    speaker: int = 0
    context: Sequence[Segment] = ()
    max_audio_length_ms: float | None = None
    temperature: float | None = None
    topk: int | None = None
    seed: int | None = None
    voice: str | Voice | None = None
    repeatable: bool = False

    @classmethod
    def of(cls, request: SpeechRequest | Mapping[str, Any]) -> SpeechRequest:
        """The request itself, or one made of a mapping of its fields. Raises CSMError for an unknown field."""
        if isinstance(request, SpeechRequest):
            return request
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(request) - set(known))
        if unknown or "text" not in request:
            problem = f"unknown field {unknown[0]!r}" if unknown else "no field 'text'"
            raise CSMError(f"request: {problem}; the fields are {', '.join(known)}")
        return cls(**request)
