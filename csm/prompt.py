"""Converts the turns of a conversation to prompt rows.

A row has K + 1 columns: one code for each of the K codebooks, then one text token. A mask says which columns are set.
A turn's text is the begin token, the tokens of ``[speaker]text`` and the end token, one text-only row each. A turn's
audio is one audio-only row for each frame, then the EOS row of K zeros. (Sesame's reference implementation,
``generator.py``.)

Shapes: T rows or frames, C columns of a row, K codebooks.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor

from csm.config import CSMConfig
from csm.errors import CheckpointError, PromptError, PromptTooLongError
from csm.pronounce import PRONUNCIATION_FILE, Pronouncer

CACHED_TEXTS = 1024
WORD = re.compile(r"\S*\w\S*")
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


@dataclass
class Segment:
    """One turn of a conversation: speaker, text, and its audio either as samples or as codec codes.

    ``audio`` is (samples,) or (channels, samples) floats at ``sample_rate`` Hz; None means the generator's sample rate
    (24,000). ``codes`` is (T, K) integers and needs no encoding.
    """

    speaker: int
    text: str
    audio: Tensor | None = None
    codes: Tensor | None = None
    sample_rate: int | None = None


class Prompt(NamedTuple):
    """Rows (T, K + 1) int64, their mask (T, K + 1) bool, and the number of rows up to the end of each context turn."""

    row_TC: Tensor
    mask_TC: Tensor
    turn_ends: tuple[int, ...] = ()


class SpokenWord(NamedTuple):
    """A word of a turn's text, and its tokens: the first, and the one after the last."""

    text: str
    first: int
    last: int


class TextTokenizer:
    """A checkpoint's ``tokenizer.json``. Begin and end tokens are added here, not by its post-processor.

    A ``pronunciation.json.gz`` beside it turns the text into phones first.
    """

    def __init__(self, path: Path, vocab_size: int):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error
        stage = path.with_name(PRONUNCIATION_FILE)
        self._pronounce = Pronouncer.read(stage) if stage.is_file() else None
        # Text that spells a special token is encoded as ordinary text: users cannot inject special tokens.
        self._tokenizer.encode_special_tokens = True
        self._begin, self._end = (self._special(path, token, vocab_size) for token in (BEGIN, END))
        self._path, self._vocab_size = path, vocab_size
        self._cached = lru_cache(CACHED_TEXTS)(self._encode)  # each turn of a conversation has all earlier texts

    def fingerprint(self) -> str:
        """A hash of its files."""
        digest = hashlib.sha256()
        for path in (self._path, self._path.with_name(PRONUNCIATION_FILE)):
            if path.is_file():
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _special(self, path: Path, token: str, vocab_size: int) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None or index >= vocab_size:
            raise CheckpointError(f"{path}: no token {token} with an id below {vocab_size}")
        return index

    def encode(self, speaker: int, text: str) -> list[int]:
        """Token ids of a turn's text, with begin and end tokens.

        Raises PromptError for invalid text or speaker, and for a token that the model has no embedding of.
        """
        if isinstance(speaker, bool) or not hasattr(speaker, "__index__") or operator.index(speaker) < 0:
            raise PromptError(f"speaker must be a whole number of at least 0, not {speaker!r}")
        if not isinstance(text, str):
            raise PromptError(f"text must be a string, not {text!r}")
        if not text.strip():
            raise PromptError(f"text is empty: {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"text is not valid Unicode: {text!r}") from error
        return list(self._cached(operator.index(speaker), text))

    def _encode(self, speaker: int, text: str) -> tuple[int, ...]:
        if self._pronounce is not None:
            spoken = self._pronounce(text)
            if not spoken:
                raise PromptError(f"no word of English in the text: {text!r}")
            text = spoken
        ids = self._tokenizer.encode(f"[{speaker}]{text}", add_special_tokens=False).ids
        largest = max(ids, default=0)
        if largest >= self._vocab_size:  # a tokenizer may have more tokens than the model, such as a pad token
            token = self._tokenizer.id_to_token(largest)
            raise PromptError(
                f"{self._path}: the text contains the token {token!r} with id {largest}, but the model has only "
                f"{self._vocab_size} text embeddings; remove it from the text"
            )
        return self._begin, *ids, self._end

    def words(self, speaker: int, text: str) -> list[SpokenWord]:
        """The words of a text with their tokens among the ids of ``encode``.

        Empty where words cannot be told apart: phones that are not as many words as the text has.
        """
        spoken = text if self._pronounce is None else self._pronounce(text)
        prefix = f"[{speaker}]"
        found = list(WORD.finditer(spoken))
        written = [match[0] for match in WORD.finditer(text)]
        if len(found) != len(written):
            return []
        offsets = self._tokenizer.encode(prefix + spoken, add_special_tokens=False).offsets
        words = []
        for name, match in zip(written, found, strict=True):
            start, end = match.start() + len(prefix), match.end() + len(prefix)
            inside = [index for index, (first, last) in enumerate(offsets, 1) if first < end and last > start]
            words.append(SpokenWord(name, inside[0], inside[-1] + 1))  # the begin token is token 0
        return words


def text_rows(ids: Sequence[int], num_codebooks: int) -> Prompt:
    """One text-only row for each token id."""
    row_TC = torch.zeros(len(ids), num_codebooks + 1, dtype=torch.int64)
    row_TC[:, -1] = torch.tensor(ids)
    mask_TC = torch.zeros_like(row_TC, dtype=torch.bool)
    mask_TC[:, -1] = True
    return Prompt(row_TC, mask_TC)


def audio_rows(codes_TK: Tensor) -> Prompt:
    """One audio-only row for each frame of (T, K) codes, then the EOS row of zeros."""
    num_frames, num_codebooks = codes_TK.shape
    row_TC = torch.zeros(num_frames + 1, num_codebooks + 1, dtype=torch.int64)
    row_TC[:-1, :-1] = codes_TK
    mask_TC = torch.zeros_like(row_TC, dtype=torch.bool)
    mask_TC[:, :-1] = True
    return Prompt(row_TC, mask_TC)


def build_prompt(turns: Sequence[tuple[list[int], Tensor]], text_ids: list[int], config: CSMConfig) -> Prompt:
    """Rows of the context turns, given as (text ids, codes (T, K)), followed by rows of the text to generate.

    Raises PromptTooLongError if the rows do not fit the backbone's positions.
    """
    parts, turn_ends = [], []
    for ids, codes_TK in turns:
        parts += [text_rows(ids, config.num_codebooks), audio_rows(codes_TK)]
        turn_ends.append(sum(part.row_TC.shape[0] for part in parts))
    parts.append(text_rows(text_ids, config.num_codebooks))
    check_length(sum(part.row_TC.shape[0] for part in parts), config)
    rows, masks = [part.row_TC for part in parts], [part.mask_TC for part in parts]
    return Prompt(torch.cat(rows), torch.cat(masks), tuple(turn_ends))


def check_length(num_rows: int, config: CSMConfig) -> None:
    """Raise PromptTooLongError if ``num_rows`` exceeds the number of positions of the backbone."""
    limit = config.backbone.max_positions
    if num_rows > limit:
        raise PromptTooLongError(
            f"the prompt takes {num_rows} positions (one for each text token and each 80 ms frame of context audio), "
            f"but the model has {limit}: shorten the text or the context"
        )
