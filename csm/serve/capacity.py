"""What a stream costs a server's CPU, and a voice its folder: ``python -m csm.serve.capacity`` (docs/scale.md).

One thread encodes the audio of all streams, and each request looks its voice up in the folder of voices.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csm.bench.report import cpu_name, table
from csm.formats import ENCODERS, Encoder
from csm.serve.voices import VoiceStore
from csm.voices import SUFFIX, Voice, save_voice

SAMPLE_RATE, FRAME_SIZE = 24_000, 1920
VOICE_FRAMES = 125  # 10 s
LOOKUPS = 3


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of this thread while ``function`` runs: other processes do not count."""
    started = time.thread_time()
    function()
    return time.thread_time() - started


def encoder_rows(seconds: float) -> list[dict[str, Any]]:
    """CPU time that a format's encoder takes for a second of audio, written a frame at a time."""
    time_N = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise_N = np.random.default_rng(0).normal(size=len(time_N))
    audio_N = (0.2 * np.sin(2 * np.pi * 180 * time_N) + 0.05 * noise_N).astype(np.float32)
    rows = []
    for name, new in ENCODERS.items():
        used = cpu_seconds(partial(encode, new(SAMPLE_RATE), audio_N)) / seconds
        rows.append({"format": name, "CPU ms per s of audio": 1e3 * used, "streams a core": int(1 / used)})
    return rows


def encode(encoder: Encoder, audio_N: np.ndarray) -> None:
    """Encode audio as a request does."""
    for start in range(0, len(audio_N), FRAME_SIZE):
        encoder.write(audio_N[start : start + FRAME_SIZE])
    encoder.close()


def voice_rows(counts: Sequence[int]) -> list[dict[str, Any]]:
    """CPU time that it takes to find one voice among so many files of a folder, and to list them all twice.

    The first list reads every file; the second one, those that have changed. All but one are links to the first.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), 0
        first = folder / f"voice_0{SUFFIX}"
        codes_TK = torch.zeros(VOICE_FRAMES, 32, dtype=torch.int64)
        save_voice(Voice("voice_0", ("What is said in the recording.",), (codes_TK,), 0, "a test"), first)
        for count in counts:
            for number in range(made + 1, count):
                (folder / f"voice_{number}{SUFFIX}").symlink_to(first)
            made = count - 1
            store = VoiceStore(folder)
            used = min(cpu_seconds(partial(store.choose, "voice_0", None)) for _ in range(LOOKUPS))
            lists = [cpu_seconds(store.files) for _ in range(2)]
            size = first.stat().st_size * count / 1e9
            times = {"CPU ms a request": 1e3 * used, "first list, s": lists[0], "next list, s": lists[1]}
            rows.append({"voices": f"{count:,}", **times, "files GB": size})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m csm.serve.capacity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="audio for each format (default: 60)")
    parser.add_argument("--voices", type=int, nargs="+", default=[10, 1000, 100_000], help="numbers of voices")
    args = parser.parse_args(argv)
    print(f"{cpu_name()}\n\n{table(encoder_rows(args.seconds))}\n\n{table(voice_rows(sorted(args.voices)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
