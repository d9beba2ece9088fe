"""How a run is followed: metrics as CSV, their curves as PNG (with matplotlib), and audio samples."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from csm.audio import WavWriter
from csm.generator import Generator


class MetricsLog:
    """A CSV file with one row a step."""

    def __init__(self, path: Path, resume_step: int | None = None):
        """``resume_step`` keeps the rows up to that step; None starts an empty file."""
        self.path = path
        rows = read_metrics(path) if resume_step is not None and path.is_file() else []
        path.unlink(missing_ok=True)
        for row in rows:
            if int(row["step"]) <= (resume_step or 0):
                self.append(row)

    def append(self, row: Mapping[str, object]) -> None:
        """Append a row; floats are written with every digit."""
        new = not self.path.is_file()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row.keys())
            writer.writerow(row.values())


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. An incomplete last line, left by a killed process, is skipped."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    return [row for row in rows if None not in row.values()]


def draw_curves(train: Path, valid: Path, png: Path) -> bool:
    """Draw the losses of both CSV files. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss_axes, codebook_axes = figure.subplots(2, 1, sharex=True)
    for path, name, style in ((train, "training", "-"), (valid, "held out", "o-")):
        rows = read_metrics(path) if path.is_file() else []
        if rows:
            steps = [int(row["step"]) for row in rows]
            loss_axes.plot(steps, [float(row["loss"]) for row in rows], style, label=name, markersize=3)
            columns = [column for column in rows[0] if column.startswith("codebook")]
            for column in columns:
                label = f"{name}, {column}" if column in (columns[0], columns[-1]) else None
                values = [float(row[column]) for row in rows]
                codebook_axes.plot(steps, values, style, label=label, markersize=2, linewidth=0.8)
    loss_axes.set_ylabel("loss (nats)")
    codebook_axes.set_ylabel("cross-entropy of a code (nats)")
    codebook_axes.set_xlabel("step")
    for axes in (loss_axes, codebook_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(png, dpi=120)
    return True


class Samples:
    """Audio of fixed texts, with fixed seeds, so that samples of different steps can be compared.

    ``texts`` are (speaker, text) pairs, ``seconds`` is the maximum duration of one sample.
    """

    def __init__(self, generator: Generator, texts: Sequence[tuple[int, str]], folder: Path, seconds: float):
        for speaker, text in texts:
            # Validates the request before training; the stream is not consumed.
            generator.stream(text, speaker, (), seconds * 1000, seed=0)
        self.generator = generator
        self.texts = texts
        self.folder = folder
        self.seconds = seconds

    def write(self, step: int) -> list[Path]:
        """Write ``step-00000100-0.wav`` and so on. The depth embedding must be up to date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index, (speaker, text) in enumerate(self.texts):
            paths.append(self.folder / f"step-{step:08d}-{index}.wav")
            with WavWriter(paths[-1]) as wav:
                wav.begin(self.generator.sample_rate)
                for chunk in self.generator.stream(text, speaker, (), self.seconds * 1000, seed=index):
                    wav.write(chunk)
        return paths
