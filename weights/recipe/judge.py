"""Judge a codec by ear: ``python -m csm.weights.recipe.judge test.jsonl FOLDER --sentences 100``.

Word error rates of a recogniser on held-out recordings, as they are (the floor) and after the codec's round trip, for
each voice; whether the stream equals the whole; how long a frame takes to decode. ``--save`` puts the figures into
codec.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sphn
import torch
from torch import Tensor
from tqdm import tqdm

from csm.codec import Codec
from csm.evaluate.listen import Recogniser
from csm.evaluate.words import word_errors
from csm.weights.recipe.recordings import VOICES, Utterance, read_manifest
from csm.weights.recipe.shape import load_codec


def error_rates(codec: Codec | None, recordings: Sequence[Utterance], recogniser: Recogniser) -> dict[str, float]:
    """Word error rate of each voice and of "all"; without a codec, of the recordings as they are."""
    counts: list[tuple[str, int, int]] = []
    for line in tqdm(recordings, desc="floor" if codec is None else f"{codec.num_codebooks} codebooks", mininterval=5):
        audio, rate = read(line)
        heard = recogniser.hear(audio if codec is None else codec.decode(codec.encode(audio)), rate)
        counts.append((VOICES[line.speaker], *word_errors(line.text, heard)))
    rates: dict[str, float] = {}
    for name in (*VOICES, "all"):
        chosen = [(errors, words) for voice, errors, words in counts if name in (voice, "all")]
        if chosen:
            rates[name] = round(sum(errors for errors, _ in chosen) / sum(words for _, words in chosen), 4)
    return rates


def read(line: Utterance) -> tuple[Tensor, int]:
    """A recording as (samples,) and its rate."""
    audio, rate = sphn.read(line.audio)
    return torch.from_numpy(audio[0]), rate


def stream_difference(codec: Codec, codes_TK: Tensor) -> float:
    """The largest difference of a sample between decoding frame by frame and at once."""
    decoder = codec.stream_decoder()
    streamed = torch.cat([decoder.step(frame[None])[0] for frame in codes_TK])
    return float((streamed - codec.decode(codes_TK)).abs().max())


def frame_milliseconds(codec: Codec, codes_TK: Tensor) -> float:
    """Median time of decoding one frame of a stream."""
    decoder, times = codec.stream_decoder(), []
    for frame in codes_TK:
        begin = time.perf_counter()
        decoder.step(frame[None])
        times.append(1000 * (time.perf_counter() - begin))
    return round(float(torch.tensor(times).median()), 2)


def judge(folder: Path, recordings: Sequence[Utterance], codebooks: Sequence[int]) -> dict[str, Any]:
    """All figures of a codec that ``export`` wrote, with each of several numbers of codebooks."""
    config, state = load_codec(folder)
    recogniser = Recogniser()
    rates = {"floor": error_rates(None, recordings, recogniser)}
    for number in codebooks or [config.num_codebooks]:
        codec = Codec(config, number, state, torch.device("cpu"))
        rates[f"{number} codebooks"] = error_rates(codec, recordings, recogniser)
    codes_TK = torch.cat([codec.encode(read(line)[0]) for line in recordings[:5]])
    return {
        "sentences": len({line.text for line in recordings}),
        "word_error_rate": rates,
        "stream_minus_whole": stream_difference(codec, codes_TK),
        "frame_ms": frame_milliseconds(codec, codes_TK),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--codebooks", type=int, nargs="*", help="numbers of codebooks to try (default: all)")
    parser.add_argument("--save", action="store_true", help="put the figures into FOLDER/codec.json")
    arguments = parser.parse_args()
    recordings = read_manifest(arguments.manifest)
    chosen = set(list(dict.fromkeys(line.text for line in recordings))[: arguments.sentences])
    figures = judge(arguments.folder, [line for line in recordings if line.text in chosen], arguments.codebooks)
    print(json.dumps(figures, indent=2))
    if arguments.save:
        path = arguments.folder / "codec.json"
        values = json.loads(path.read_text(encoding="utf-8")) | {"judged": figures}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
