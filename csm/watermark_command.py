"""Search audio files for a watermark. Exit code: 0 where every file has it, 1 where one has not, 2 for an error."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from csm import WATERMARKS, load_watermark, read_audio
from csm.audio import to_mono
from csm.command_line import Output
from csm.errors import AudioError
from csm.watermark import RATE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="an audio file: wav, flac, mp3, ogg; with PyAV m4a, m4b and opus",
    )
    parser.add_argument("--watermark", choices=WATERMARKS, default="perth", help="which one (default: perth)")


def run(args: argparse.Namespace) -> Output:
    """Search the files; a line for each."""
    recordings = [(path, read_mono(path)) for path in args.files]  # a bad file is an error before anything is loaded
    watermark = load_watermark(args.watermark)
    lines, all_found = [], True
    for path, audio_N in recordings:
        found, confidence, num_marked, num_blocks = watermark.detect(audio_N, RATE)
        all_found &= found
        share = f" in {num_marked} of {num_blocks} blocks" if num_blocks > 1 else ""
        verdict = f"the watermark {args.watermark} was {'found' if found else 'not found'}{share}"
        lines.append(f"{path}: {verdict} (confidence {confidence:.2f})")
    return Output("\n".join(lines), 0 if all_found else 1)


def read_mono(path: Path) -> Tensor:
    """A file's samples at ``RATE``. Raises AudioError, which names the file."""
    audio_CN, sample_rate = read_audio(path)
    try:
        return to_mono(audio_CN, sample_rate, RATE)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error
