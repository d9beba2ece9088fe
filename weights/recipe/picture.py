"""Plot a sentence of a model: ``python -m csm.weights.recipe.picture test.jsonl tiny OUT.png``. Writes OUT.wav too.

The plot shows waveform and mel spectrogram, the recording above and the model below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from csm import Generator, WavWriter, read_audio
from csm.audio import to_mono
from csm.weights.recipe.codec import MelLoss
from csm.weights.recipe.recordings import SPEAKERS, read_manifest


def draw(sounds: dict[str, Tensor], sample_rate: int, path: Path) -> None:
    """Plot each sound, (samples,), as a row of waveform and spectrogram on common scales."""
    from matplotlib.figure import Figure

    mel = MelLoss(sample_rate)
    seconds = max(len(sound) for sound in sounds.values()) / sample_rate
    figure = Figure(figsize=(12, 2.6 * len(sounds)), layout="constrained")
    axes = figure.subplots(len(sounds), 2, squeeze=False)
    for (name, sound), (wave, spectrogram) in zip(sounds.items(), axes, strict=True):
        wave.plot(torch.arange(len(sound)) / sample_rate, sound, linewidth=0.3)
        wave.set(title=name, xlim=(0, seconds), ylim=(-1, 1), ylabel="amplitude")
        bands_TM = mel.mel(sound[None], 1024)[0].add(1e-3).log10().mul(20)
        length = len(sound) / sample_rate
        spectrogram.imshow(bands_TM.T, origin="lower", aspect="auto", extent=(0, length, 0, 80), vmin=-60, vmax=20)
        spectrogram.set(title=f"{name}: mel bands up to {sample_rate // 2000} kHz", xlim=(0, seconds))
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--line", type=int, default=0, help="index of the manifest's line (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    line = read_manifest(arguments.manifest)[arguments.line]
    generator = Generator.from_pretrained(arguments.model, "cpu")
    spoken = generator.generate(line.text, line.speaker, seed=arguments.seed)
    recorded = to_mono(*read_audio(line.audio), generator.sample_rate)
    sounds = {f"{SPEAKERS[line.speaker]}, recorded": recorded, f"{SPEAKERS[line.speaker]}, spoken by the model": spoken}
    draw(sounds, generator.sample_rate, arguments.out)
    with WavWriter(arguments.out.with_suffix(".wav")) as wav:
        wav.begin(generator.sample_rate)
        wav.write(spoken)
    print(f"{line.text!r}: {arguments.out}")


if __name__ == "__main__":
    main()
