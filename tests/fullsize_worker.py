"""A full-size checkpoint in a process of its own, ours or Transformers': speaks on request, prints JSON lines.

``python fullsize_worker.py ours|transformers FOLDER DTYPE RECORDING``
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

TEXT = "The same sentence, for one and for the other."
REFERENCE_TEXT = "What the recording says does not matter to the clock."
REFERENCE_SECONDS = 5


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def recording(path: str) -> torch.Tensor:
    from csm.audio import read_audio, to_mono

    audio, sample_rate = read_audio(path)
    whole_frames = REFERENCE_SECONDS * 24_000 // 1920 * 1920
    return to_mono(audio, sample_rate, 24_000)[:whole_frames]


def ours(folder: str, dtype: torch.dtype, audio: torch.Tensor):
    from csm import Generator, Segment

    generator = Generator.from_pretrained(folder, device="cpu", dtype=dtype)
    context = [Segment(0, REFERENCE_TEXT, audio)]
    yield

    def speak(frames: int) -> torch.Tensor:
        return generator.generate_codes(TEXT, 0, context, max_audio_length_ms=frames * 80, temperature=0)

    yield speak


def transformers(folder: str, dtype: torch.dtype, audio: torch.Tensor):
    from transformers import CsmForConditionalGeneration

    model = CsmForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    model.codec_model.float()  # as ours: Mimi stays in float32
    yield
    from oracle import hf_inputs

    inputs = hf_inputs([(REFERENCE_TEXT, audio)], TEXT, speakers=[0, 0])

    @torch.no_grad()
    def speak(frames: int) -> torch.Tensor:
        greedy = dict(do_sample=False, depth_decoder_do_sample=False)
        return model.generate(**inputs, **greedy, max_new_tokens=frames)[0, -frames:]

    yield speak


def report(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main(who: str, folder: str, dtype: str, path: str) -> None:
    """Load and say so; then, for each number of frames on standard input, speak and say how long it took."""
    audio = recording(path)
    before, started = memory("VmRSS"), time.perf_counter()
    stages = {"ours": ours, "transformers": transformers}[who](folder, getattr(torch, dtype), audio)
    next(stages)
    report(load_s=time.perf_counter() - started, load_peak_gb=memory("VmHWM") - before)
    speak = next(stages)
    for line in sys.stdin:
        started = time.perf_counter()
        codes = speak(int(line))
        seconds = time.perf_counter() - started
        report(seconds=seconds, run_peak_gb=memory("VmHWM") - before, codes=codes.tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
