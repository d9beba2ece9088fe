"""Synthesise recordings: ``python -m csm.weights.recipe.recordings FOLDER --split train --count 20000``.

The voices are four of flite's (Carnegie Mellon University, BSD-like licence; ``apt install flite``), with one speaker
id each. They take turns with training sentences; each of them reads every held-out sentence. ``--voices espeak-ng``
(``apt install espeak-ng``) is a fifth voice with the next speaker id, for adapting to an untrained voice. ``--text
open`` reads open text (it needs ``wordnet-base``), ``--text everyday`` the evaluation list.

Writes ``SPLIT/VOICE/NUMBER-HASH.wav`` (24 kHz mono), for flite's voices ``NUMBER-HASH.phones`` beside it (each phone
and its end in seconds), and a manifest, ``SPLIT.jsonl`` or ``SPLIT-VOICES.jsonl``. Existing recordings are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sphn
import torch
import torchaudio.functional as audio_functional
from tqdm import tqdm

from csm.weights.recipe.open_text import evaluation_sentences, open_sentences
from csm.weights.recipe.sentences import SPLITS, sentences

VOICES = ("slt", "rms", "awb", "kal16")  # of flite
ESPEAK = "espeak-ng"
SPEAKERS = (*VOICES, ESPEAK)  # the index is the speaker id
SAMPLE_RATE = 24_000
# Where sentences come from. The evaluation list has one split.
TEXTS = {"open": open_sentences, "templates": sentences, "everyday": lambda _, count: evaluation_sentences()[:count]}


@dataclass(frozen=True)
class Utterance:
    """A line of the manifest, as ``python -m csm finetune`` reads it. ``audio`` is relative to the manifest's folder.

    Every recording is a conversation of its own here. ``csm.weights.recipe.conversations`` groups them.
    """

    audio: str
    text: str
    speaker: int
    conversation: str
    order: int


def plan(
    split: str, count: int, voices: Sequence[str] = VOICES, text: str = "templates"
) -> Iterator[tuple[int, str, int]]:
    """(number of the sentence, sentence, speaker id) of every recording of a split's first ``count`` sentences."""
    for number, sentence in enumerate(TEXTS[text](split, count)):
        for voice in [voices[number % len(voices)]] if split == "train" else voices:
            yield number, sentence, SPEAKERS.index(voice)


def speak(text: str, voice: str) -> tuple[np.ndarray, str]:
    """A sentence by one of SPEAKERS as float32 samples at 24 kHz, and its phones, "pau:0.197 dh:0.234 ..."

    The number after a phone is its end in seconds. espeak-ng gives no phones: the string is empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", str(path)]
        if voice == ESPEAK:
            command = [ESPEAK, "-v", "en-us", "-w", str(path), text]
        phones = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wav = path.read_bytes()
    rate = int.from_bytes(wav[24:28], "little")
    start = wav.index(b"data") + 8
    samples = torch.frombuffer(bytearray(wav[start:]), dtype=torch.int16).float() / 32768
    # The default filter is not sharp enough: it leaves an image of the highest kilohertz above the original band.
    return audio_functional.resample(samples, rate, SAMPLE_RATE, lowpass_filter_width=64).numpy(), phones.strip()


def record(folder: Path, split: str, number: int, text: str, speaker: int) -> Utterance:
    """Record one sentence, unless its file exists, and return its line of the manifest."""
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]  # a changed sentence gets a new file
    path = folder / split / SPEAKERS[speaker] / f"{number:06d}-{mark}.wav"
    beside = path.with_suffix(".phones")
    if not (path.exists() and (beside.exists() or SPEAKERS[speaker] == ESPEAK)):
        samples, phones = speak(text, SPEAKERS[speaker])
        if phones:
            beside.write_text(phones + "\n", encoding="utf-8")
        part = path.with_suffix(".part")
        sphn.write_wav(str(part), samples, SAMPLE_RATE)
        part.replace(path)
    return Utterance(str(path.relative_to(folder)), text, speaker, f"{split}-{number}-{speaker}", 0)


def record_all(
    folder: Path, split: str, count: int, workers: int, voices: Sequence[str] = VOICES, text: str = "templates"
) -> Path:
    """Record a split and write its manifest. Returns the manifest's path."""
    for voice in voices:
        (folder / split / voice).mkdir(parents=True, exist_ok=True)
    jobs = list(plan(split, count, voices, text))
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        lines = pool.map(lambda job: record(folder, split, *job), jobs)
        done = [
            json.dumps(asdict(line)) for line in tqdm(lines, total=len(jobs), desc=f"reading ({split})", mininterval=5)
        ]
    own = "" if tuple(voices) == VOICES else "-" + "-".join(voices)  # does not overwrite flite's manifest
    manifest = folder / f"{split}{own}.jsonl"
    part = manifest.with_suffix(".part")
    part.write_text("\n".join(done) + "\n", encoding="utf-8")
    part.replace(manifest)
    return manifest


def read_manifest(path: Path) -> list[Utterance]:
    """The utterances of a manifest, with ``audio`` as a full path."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Utterance(**(line | {"audio": str(path.parent / line["audio"])})) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=20_000, help="sentences (default 20000)")
    parser.add_argument("--voices", nargs="+", choices=SPEAKERS, default=VOICES, help="default: flite's")
    parser.add_argument("--text", choices=TEXTS, default="templates", help="what is read (default: templates)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(
        record_all(
            arguments.folder, arguments.split, arguments.count, arguments.workers, arguments.voices, arguments.text
        )
    )


if __name__ == "__main__":
    main()
