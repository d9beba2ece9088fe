"""Numbers from what was heard: a summary of each kind of speech, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from csm.evaluate.measure import Heard

COLUMNS = {
    "utterances": "utterances",
    "wer": "word error rate",
    "wer_spread": "its spread over seeds",
    "length_ratio": "length ratio",
    "length_kept": "length within 0.8 to 1.25",
    "ended": "ended by itself",
    "similar": "same voice",
    "right_voice": "right speaker",
    "seconds": "seconds",
}


def summary(heard: Sequence[Heard]) -> dict[str, float | int | None]:
    """Word error rate over all words, its standard deviation over seeds, and what else there is a number of.

    Length ratio is the median, the shares and the likeness of the voice are means.
    """
    by_seed: dict[int | None, list[Heard]] = {}
    for one in heard:
        by_seed.setdefault(one.seed, []).append(one)
    ratios = [one.length_ratio for one in heard]
    rates = [_rate(group) for group in by_seed.values()]
    return {
        "utterances": len(heard),
        "seeds": len(by_seed),
        "wer": _rate(heard),
        "wer_spread": stdev(rates) if len(rates) > 1 else None,
        "length_ratio": _of(median, ratios),
        "length_kept": _of(mean, [None if r is None else 0.8 <= r <= 1.25 for r in ratios]),
        "ended": _of(mean, [one.ended for one in heard]),
        "similar": _of(mean, [one.similar for one in heard]),
        "right_voice": _of(mean, [one.right_voice for one in heard]),
        "seconds": sum(one.seconds for one in heard),
    }


def _rate(heard: Sequence[Heard]) -> float:
    return sum(one.errors for one in heard) / sum(one.words for one in heard)


def _of(function: Any, values: Sequence[float | None]) -> float | None:
    there = [float(value) for value in values if value is not None]
    return function(there) if there else None


def table(summaries: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """A Markdown table, one line for each kind of speech."""
    columns = [key for key in COLUMNS if any(values[key] is not None for values in summaries.values())]
    lines = ["| | " + " | ".join(COLUMNS[key] for key in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, values in summaries.items():
        lines.append(f"| {name} | " + " | ".join(_cell(key, values[key]) for key in columns) + " |")
    return "\n".join(lines)


def _cell(key: str, value: float | int | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if key in ("wer", "wer_spread", "length_kept", "ended", "right_voice"):
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if key != "seconds" else f"{value:.1f}"


def write(folder: Path, told: Mapping[str, object], kinds: Mapping[str, Sequence[Heard]]) -> str:
    """Write ``eval.json``, with every utterance in it, and ``eval.md``; return the table.

    Several speakers have a line each below the line of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {}
    for name, heard in kinds.items():
        summaries[name] = summary(heard)
        speakers = sorted({one.speaker for one in heard})
        for speaker in speakers if len(speakers) > 1 else ():
            summaries[f"{name}, speaker {speaker}"] = summary([one for one in heard if one.speaker == speaker])
    utterances = {name: [asdict(one) for one in heard] for name, heard in kinds.items()}
    values = {"options": dict(told), "summary": summaries, "utterances": utterances}
    (folder / "eval.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    text = table(summaries)
    (folder / "eval.md").write_text(text + "\n", encoding="utf-8")
    return text
