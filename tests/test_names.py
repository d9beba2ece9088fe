"""One name for one concept: names that were retired appear nowhere in the tree."""

import re

import pytest
from test_structure import ROOT

# Retired name -> pattern. Plain English words (span, pass, dots) are matched only where they name the old concept.
RETIRED = {
    "turn_BTp2": r"\bturn_\w*p2\b",
    "Places": r"\bPlaces\b(?! to)",
    "places (kernel arguments)": r"\*places\b|^\s*places = \(",
    "span (context bucket)": r"\bspan_of\b|\.spans?\b|\bspans? =|_span\b|_span_|MIN_SPAN|[Aa] span that|# spans\b",
    "Lane": r"\bLane\b(?!\")|\b_lanes?\b|\.lanes?\b|[Cc]aptured lane|\blanes? of (slots|that size)",
    "PASS_LENGTHS": r"\bPASS_LENGTHS\b",
    "pass (prefill chunk)": r"captured pass|passes of a few|computed in passes|prompts' passes|into passes|_passes_",
    "fold (precompute_depth_embedding)": r"\.fold\(|\bdef fold\b|folded table|nothing folded|was folded|merged, folded",
    "LaunchShape": r"\bLaunchShape\b|\b[Ll]aunch[ _]shapes?\b",
    "family (GPU architecture)": r"GPU famil|famil(y|ies) of GPU|\bgpu_famil|_family\b",
    "dots (matmul tile)": r"\*Dots\*|_dots\b|\bdots\b *[=(]",
    "LOOPED_ROWS": r"\bLOOPED_ROWS\b",
    "Speaker (class)": r"\bclass Speaker\b|\bSpeaker\(",
    "Processes' methods": r"\bprocesses\.(count|first|wait|total)\b",
    "Batch.counts": r"\bbatch\.counts\b|^\s*counts: bool\b",
    "clip, accumulate, checkpointing": r"\boptions\.(clip|accumulate|checkpointing)\b",
    "final_rate": r"\b(options|self)\.final_rate\b|\bfinal_rate=",
}


def files():
    for folder in (".", ".ci"):
        yield from (path for path in sorted((ROOT / folder).glob("*")) if path.suffix in (".py", ".md", ".toml"))
    yield ROOT / "Makefile"
    for folder in ("csm", "kernels", "weights", "tests", "docs"):
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".md"))


TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files()}
del TEXTS["tests/test_names.py"]


@pytest.mark.parametrize("name", RETIRED)
def test_retired_names_appear_nowhere(name):
    pattern = re.compile(RETIRED[name])
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Places", "def at(self) -> Places:"),
        ("span (context bucket)", "span = cache.span_of(length)"),
        ("Lane", "self.lanes[batch].launch()"),
        ("dots (matmul tile)", "acc_MN = dots(x_ptr, weight_ptr)"),
        ("final_rate", "options.final_rate"),
    ],
)
def test_the_patterns_match_what_they_are_for(name, line):
    assert re.search(RETIRED[name], line)
