"""How the model sounds on the way: a few texts, spoken from the same seeds every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csm.audio import WavWriter
from csm.generator import Generator


class Samples:
    """Speaks ``texts``, (speaker, text) each, into ``folder``."""

    def __init__(self, generator: Generator, texts: Sequence[tuple[int, str]], folder: Path, seconds: float):
        for speaker, text in texts:
            generator.stream(text, speaker, (), seconds * 1000, seed=0)  # not read: what is wrong is said now
        self.generator = generator
        self.texts = texts
        self.folder = folder
        self.seconds = seconds

    def speak(self, step: int) -> list[Path]:
        """Write ``step-00000100-0.wav`` and so on. The generator's weights have been folded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index, (speaker, text) in enumerate(self.texts):
            paths.append(self.folder / f"step-{step:08d}-{index}.wav")
            with WavWriter(paths[-1]) as wav:
                wav.begin(self.generator.sample_rate)
                for chunk in self.generator.stream(text, speaker, (), self.seconds * 1000, seed=index):
                    wav.write(chunk)
        return paths
