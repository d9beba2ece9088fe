"""``make gpu``: everything that the first contact with a GPU can teach, in one run of less than ten minutes.

Each part is a process with a time limit of its own. A part that fails or is stopped costs the others nothing. Output
goes to a file of the results folder as it comes, and ``summary.json`` is written after every part. Exit code: 0 if
every part succeeded, else 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from csm.bench.report import table, write

TOTAL_SECONDS = 590.0
GRACE_SECONDS = 5.0  # between the request to stop and the kill


class Part(NamedTuple):
    """One process: a name for its files, its command, and its time limit."""

    name: str
    command: Sequence[str]
    seconds: float


class Outcome(NamedTuple):
    """What became of a part: ``result`` is "passed", "failed (code)", "stopped at its limit" or "no time left"."""

    part: str
    result: str
    seconds: float


def parts(out: Path) -> list[Part]:
    """The parts in the order of what they teach, so that a run that is cut short still has the most."""
    python = sys.executable
    bench = [python, "bench.py", "--quiet"]
    ours = ["eager", "eager, kernels", "graph, PyTorch ops", "graph, kernels", "text to audio"]
    captured = ["graph, PyTorch ops", "graph, kernels", "text to audio"]
    peers = ["transformers", "transformers, static cache", "compile", "compile, reduce-overhead"]
    batches = ["2", "4", "8", "16", "32", "64"]
    return [
        Part("rows", [*bench, "--rows", *ours, "--out", str(out / "rows")], 110),
        Part("accuracy", [*bench, "--accuracy", "--frames", "20", "--out", str(out / "accuracy")], 60),
        Part("tests", [python, "-m", "pytest", "-m", "cuda", "-rs"], 150),
        Part("batches", [*bench, "--rows", *captured, "--batch", *batches, "--out", str(out / "batches")], 90),
        Part("tune", [*bench, "--tune", "--seconds", "60", "--out", str(out / "tune")], 90),
        Part("tuned", [*bench, "--rows", "graph, kernels", "--out", str(out / "tuned")], 30),
        Part("profile", [*bench, "--rows", "graph, kernels", "--profile", "--out", str(out / "profile")], 40),
        Part("peers", [*bench, "--rows", *peers, "--out", str(out / "peers")], 180),
    ]


def run_part(part: Part, out: Path, seconds: float) -> Outcome:
    """Run one part for at most ``seconds``; its output goes to ``NAME.txt`` line by line."""
    started = time.perf_counter()
    with (out / f"{part.name}.txt").open("w", encoding="utf-8") as file:
        process = subprocess.Popen(part.command, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=seconds)
            result = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            stop(process)
            result = "stopped at its limit"
    return Outcome(part.name, result, time.perf_counter() - started)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process: ask first, then kill."""
    process.terminate()
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_all(wanted: Sequence[Part], out: Path, total_seconds: float = TOTAL_SECONDS) -> list[Outcome]:
    """Run every part that there is time for. Writes ``summary.json`` and ``summary.md`` after each."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + total_seconds
    outcomes: list[Outcome] = []
    for part in wanted:
        left = deadline - time.perf_counter() - GRACE_SECONDS
        limit = min(part.seconds, left)
        print(f"{part.name}: at most {max(0.0, limit):.0f} s", flush=True)
        outcomes.append(run_part(part, out, limit) if limit > 0 else Outcome(part.name, "no time left", 0.0))
        print(f"{part.name}: {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", flush=True)
        rows = [outcome._asdict() for outcome in outcomes]
        write(out, "summary.json", json.dumps(rows))
        write(out, "summary.md", table(rows))
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m csm.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results (default: results)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these parts only")
    args = parser.parse_args(argv)
    every = parts(args.out)
    unknown = set(args.only) - {part.name for part in every}
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}; choose from: {', '.join(part.name for part in every)}")
    outcomes = run_all([part for part in every if not args.only or part.name in args.only], args.out)
    print(table([outcome._asdict() for outcome in outcomes]))
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
