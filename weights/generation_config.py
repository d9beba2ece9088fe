"""A checkpoint's own defaults for generation, from its ``generation_config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm.errors import CheckpointError

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """What a caller who gives no value gets. Without a file these are Sesame's own defaults.

    ``temperature`` 0 is greedy, ``top_k`` counts ids, ``max_audio_length_ms`` is the longest speech.
    """

    temperature: float = 0.9
    top_k: int = 50
    max_audio_length_ms: float = 90_000


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """The defaults of the checkpoint in ``folder``.

    Read are HF's ``do_sample`` (false is greedy), ``temperature`` and ``top_k``, and ``max_audio_length_ms``, which is
    a key of this project. HF's ``max_new_tokens`` is not read: CSM-1B's file limits speech to ten seconds by it.
    Raises CheckpointError for a file that cannot be read or a value out of range.
    """
    path = folder / FILE
    if not path.is_file():
        return GenerationDefaults()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a JSON object, not {type(values).__name__}")
    default = GenerationDefaults()
    temperature = _number(path, values, "temperature", default.temperature, 0)
    return GenerationDefaults(
        0.0 if values.get("do_sample") is False else temperature,
        int(_number(path, values, "top_k", default.top_k, 1)),
        _number(path, values, "max_audio_length_ms", default.max_audio_length_ms, 80),
    )


def _number(path: Path, values: dict[str, Any], key: str, default: float, least: float) -> float:
    """``values[key]``, or ``default`` where it is missing or null."""
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise CheckpointError(f"{path}: {key} must be a number of at least {least:g}, not {value!r}")
    return value
