"""Results as Markdown tables, JSON files and a plot."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the rows' keys; floats to three digits. A cell without a value stays empty."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return "" if value is None else str(value)

    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(name)) for name in head) + " |" for row in rows])


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and PyTorch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def plot(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Milliseconds a frame and seconds of audio a second, both over the batch. False if matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        batches = [row["batch"] for row in own]
        left.plot(batches, [row["median_ms"] for row in own], "o-", label=name)
        right.plot(batches, [row["audio_per_second"] for row in own], "o-", label=name)
    floor = rows[0]["median_ms"] * rows[0]["percent_of_copy"] / 100
    left.axhline(floor, color="grey", linestyle=":", label="weights at copy bandwidth")
    left.set(xlabel="batch", ylabel="ms per frame", yscale="log")
    right.set(xlabel="batch", ylabel="seconds of audio per second")
    left.legend()
    figure.savefig(path, dpi=120)
    return True


def write(folder: Path, name: str, text: str) -> None:
    """Write a file of the folder of results, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text + "\n", encoding="utf-8")
