"""The report: a summary for each source of speech, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from csm.evaluate.measure import Utterance
from csm.guards import GuardEvent

COLUMNS = {
    "utterances": "utterances",
    "wer": "word error rate",
    "wer_spread": "std. dev. over seeds",
    "length_ratio": "length ratio",
    "length_kept": "length within 0.8 to 1.25",
    "ended": "ended before the limit",
    "similar": "voice similarity",
    "right_voice": "correct speaker",
    "seconds": "seconds",
}


def summary(utterances: Sequence[Utterance]) -> dict[str, float | int | None]:
    """Summary of the utterances: word error rate over all words, its standard deviation over seeds, and averages.

    ``length_ratio`` is a median; ``length_kept``, ``ended``, ``similar`` and ``right_voice`` are means. A value is None
    where no utterance has it.
    """
    by_seed: dict[int | None, list[Utterance]] = {}
    for one in utterances:
        by_seed.setdefault(one.seed, []).append(one)
    ratios = [one.length_ratio for one in utterances]
    rates = [_error_rate(group) for group in by_seed.values()]
    return {
        "utterances": len(utterances),
        "seeds": len(by_seed),
        "wer": _error_rate(utterances),
        "wer_spread": stdev(rates) if len(rates) > 1 else None,
        "length_ratio": _average(median, ratios),
        "length_kept": _average(mean, [None if r is None else 0.8 <= r <= 1.25 for r in ratios]),
        "ended": _average(mean, [one.ended for one in utterances]),
        "similar": _average(mean, [one.similar for one in utterances]),
        "right_voice": _average(mean, [one.right_voice for one in utterances]),
        "seconds": sum(one.seconds for one in utterances),
    }


def _error_rate(utterances: Sequence[Utterance]) -> float:
    return sum(one.errors for one in utterances) / sum(one.words for one in utterances)


def _average(statistic: Any, values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistic(known) if known else None


def table(summaries: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """A Markdown table with one line for each summary."""
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


def write(
    folder: Path,
    options: Mapping[str, object],
    sources: Mapping[str, Sequence[Utterance]],
    guard_events: Sequence[GuardEvent] | None = None,
) -> str:
    """Write ``eval.json``, with every utterance, and ``eval.md``; return the table.

    Where a source has several speakers, each speaker has a line below the source's. ``guard_events``, if the guards
    were on, are counted in a line below the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {}
    for name, utterances in sources.items():
        summaries[name] = summary(utterances)
        speakers = sorted({one.speaker for one in utterances})
        for speaker in speakers if len(speakers) > 1 else ():
            summaries[f"{name}, speaker {speaker}"] = summary([one for one in utterances if one.speaker == speaker])
    details = {name: [asdict(one) for one in utterances] for name, utterances in sources.items()}
    values: dict[str, Any] = {"options": dict(options), "summary": summaries, "utterances": details}
    text = table(summaries)
    if guard_events is not None:
        counts = Counter(event.guard for event in guard_events)
        values["guards"] = {name: counts[name] for name in ("retry", "budget", "silence", "repeats")}
        text += "\n\nGuards: " + ", ".join(f"{name} {count}" for name, count in values["guards"].items())
    (folder / "eval.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "eval.md").write_text(text + "\n", encoding="utf-8")
    return text
