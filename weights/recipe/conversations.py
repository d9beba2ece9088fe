"""Group recordings into conversations: ``python -m csm.weights.recipe.conversations train.jsonl talks.jsonl``.

A conversation has one to three turns by one or two voices. In half of those with several turns, each voice has its own
speaker id, and the model learns to continue. In the others each has a random one of OPEN_IDS, so only the earlier turns
tell which voice the id has, and the model learns to take a voice from reference audio.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from csm.weights.recipe.recordings import VOICES, Utterance, read_manifest

TURNS = (1, 2, 2, 3)  # numbers of turns, equally likely
OPEN_IDS = range(len(VOICES), 2 * len(VOICES))
OPEN_SHARE = 0.5


def conversations(utterances: Sequence[Utterance], seed: int = 0) -> Iterator[Utterance]:
    """Every utterance once, in random conversations. The speakers of ``utterances`` are indices into VOICES."""
    rng = random.Random(f"conversations/{seed}")
    left = [[line for line in utterances if line.speaker == voice] for voice in range(len(VOICES))]
    for lines in left:
        rng.shuffle(lines)
    number = 0
    while any(left):
        at_hand = [voice for voice, lines in enumerate(left) if lines]
        pair = rng.sample(at_hand, min(2, len(at_hand)))
        turns = rng.choice(TURNS)
        opened = turns > 1 and rng.random() < OPEN_SHARE
        ids = dict(zip(pair, rng.sample(OPEN_IDS, len(pair)) if opened else pair, strict=True))
        for order in range(turns):
            voice = rng.choice(pair)
            if left[voice]:
                yield replace(left[voice].pop(), speaker=ids[voice], conversation=f"talk-{number}", order=order)
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a manifest of recordings")
    parser.add_argument("target", type=Path, help="the manifest to write, in the folder of the source")
    arguments = parser.parse_args()
    folder = arguments.target.parent
    lines = [
        json.dumps(asdict(line) | {"audio": str(Path(line.audio).relative_to(folder))})
        for line in conversations(read_manifest(arguments.source))
    ]
    part = arguments.target.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(arguments.target)


if __name__ == "__main__":
    main()
