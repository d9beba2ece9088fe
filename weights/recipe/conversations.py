"""Put recordings into conversations: ``python -m csm.weights.recipe.conversations train.jsonl talks.jsonl``.

One to three turns by one or two voices. In half of those with several turns every voice has the speaker id that the
model knows it by; in the others it has one of OPEN_IDS, another one each time, so that nothing but the turns before
tells whose voice an id stands for. From the first a model learns to go on, from the second to take a voice from
reference audio.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from csm.weights.recipe.recordings import VOICES, Utterance, read_manifest

TURNS = (1, 2, 2, 3)  # drawn from
OPEN_IDS = range(len(VOICES), 2 * len(VOICES))
OPEN_SHARE = 0.5


def conversations(utterances: Sequence[Utterance], seed: int = 0) -> Iterator[Utterance]:
    """Every utterance once, the first speaker ids being those of VOICES; which go together is drawn from ``seed``."""
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
    parser.add_argument("target", type=Path, help="the manifest to write, in the same folder")
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
