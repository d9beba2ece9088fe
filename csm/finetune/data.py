"""From a data set's path to training examples: manifest, checks, codes, turns.

Shapes: T frames, K codebooks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csm.config import CSMConfig
from csm.finetune.batches import Example, Turn, conversation_examples
from csm.finetune.codes import CodecSource, CodeStore, encode_missing
from csm.finetune.manifest import Clip, DataError, Manifest, check_clips, check_recording, read_manifest
from csm.prompt import TextTokenizer


@dataclass(frozen=True)
class Corpus:
    """Training examples, held-out examples, and (speaker, text) pairs for samples."""

    train: list[Example]
    valid: list[Example]
    texts: list[tuple[int, str]]


@dataclass(frozen=True)
class DataOptions:
    """Where the data is and how it is split.

    Held-out data is the manifest ``valid``, or else a share ``valid_share`` of the conversations in ``data``.
    """

    data: Path
    codes: Path
    valid: Path | None = None
    valid_share: float = 0.02
    context: int = 0
    mask_context: bool = False
    jobs: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.valid_share < 1:
            raise DataError(f"--valid-share must be at least 0 and below 1, not {self.valid_share}")
        if self.context < 0:
            raise DataError(f"--context must be at least 0, not {self.context}")
        if self.jobs < 1:
            raise DataError(f"--jobs must be at least 1, not {self.jobs}")


def load_corpus(
    options: DataOptions, source: CodecSource, tokenizer: TextTokenizer, config: CSMConfig, progress: bool = True
) -> Corpus:
    """Check and encode the data, and split it into examples. Raises DataError, which names every bad line."""
    manifests = [read_manifest(path) for path in (options.data, options.valid) if path is not None]
    store = CodeStore(options.codes, source)
    for manifest in manifests:
        check(manifest, store, tokenizer, config, progress)
    for manifest in manifests:
        encode_missing(store, manifest.clips, options.jobs, progress)
    train = conversations(manifests[0].clips)
    valid = conversations(manifests[1].clips) if options.valid else hold_out(train, options.valid_share)
    texts = [(clip.speaker, clip.text) for clip in (valid or train)[0][:1] + (valid or train)[-1][:1]]
    sets = [_examples(part, store, tokenizer, config, options) for part in (train, valid)]
    return Corpus(sets[0], sets[1], list(dict.fromkeys(texts)))


def check(manifest: Manifest, store: CodeStore, tokenizer: TextTokenizer, config: CSMConfig, progress: bool) -> None:
    """Check every line's length against the model, and every recording that has no codes yet. Raises DataError."""
    limit, frame_rate = config.backbone.max_positions, store.frame_rate

    def examine(clip: Clip) -> None:
        known = store.num_frames(clip)
        num_frames = math.ceil(check_recording(clip.audio) * frame_rate) if known is None else known
        needed = len(tokenizer.encode(clip.speaker, clip.text)) + num_frames + 1
        if needed > limit:
            raise DataError(f"text and audio take {needed} positions, the model has {limit}; split the recording")

    check_clips(manifest, examine, progress)


def conversations(clips: Sequence[Clip]) -> list[list[Clip]]:
    """The clips of each conversation, in order. A clip without a conversation is a conversation by itself."""
    grouped: dict[str, list[Clip]] = {}
    for clip in clips:
        grouped.setdefault(clip.conversation, []).append(clip)
    return [sorted(group, key=lambda clip: clip.order) for group in grouped.values()]


def hold_out(train: list[list[Clip]], share: float) -> list[list[Clip]]:
    """Remove a share of the conversations from ``train`` and return them; nothing is removed from a single one.

    The choice depends only on the number of conversations.
    """
    count = min(len(train) - 1, max(1, round(share * len(train)))) if share > 0 else 0
    chosen = sorted(random.Random(f"valid/{len(train)}").sample(range(len(train)), count), reverse=True)
    return [train.pop(index) for index in chosen]


def _examples(
    groups: Sequence[Sequence[Clip]],
    store: CodeStore,
    tokenizer: TextTokenizer,
    config: CSMConfig,
    options: DataOptions,
) -> list[Example]:
    codes = iter(store.read([clip for group in groups for clip in group]))
    limit = config.backbone.max_positions
    examples: list[Example] = []
    for group in groups:
        turns = [Turn(tokenizer.encode(clip.speaker, clip.text), next(codes)) for clip in group]
        examples += conversation_examples(turns, options.context, options.mask_context, limit)
    return examples
