"""Numbers of a run as CSV, one row a step, and their curves as a PNG where matplotlib is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path


class Log:
    """A CSV file that grows by rows and can be cut back to where a resumed run goes on."""

    def __init__(self, path: Path, resume_at: int | None = None):
        """``resume_at`` keeps the rows up to that step; None begins anew."""
        self.path = path
        rows = read(path) if resume_at is not None and path.is_file() else []
        path.unlink(missing_ok=True)
        for row in rows:
            if int(row["step"]) <= (resume_at or 0):
                self.add(row)

    def add(self, row: Mapping[str, object]) -> None:
        """Append a row; floats are written with every digit."""
        new = not self.path.is_file()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row.keys())
            writer.writerow(row.values())


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; a last line that a killed process left unfinished is no row."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    return [row for row in rows if None not in row.values()]


def draw_curves(train: Path, valid: Path, png: Path) -> bool:
    """Draw the losses of both files, and say whether there was anything to draw with."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, parts = figure.subplots(2, 1, sharex=True)
    for path, name, style in ((train, "training", "-"), (valid, "held out", "o-")):
        rows = read(path) if path.is_file() else []
        if rows:
            steps = [int(row["step"]) for row in rows]
            losses.plot(steps, [float(row["loss"]) for row in rows], style, label=name, markersize=3)
            books = [column for column in rows[0] if column.startswith("codebook")]
            for column in books:
                label = f"{name}, {column}" if column in (books[0], books[-1]) else None
                parts.plot(steps, [float(row[column]) for row in rows], style, label=label, markersize=2, linewidth=0.8)
    losses.set_ylabel("loss (nats)")
    parts.set_ylabel("cross-entropy of a code (nats)")
    parts.set_xlabel("step")
    for axes in (losses, parts):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(png, dpi=120)
    return True
