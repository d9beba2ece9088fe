"""Split text into sentences, and sentences that are too long into clauses.

sentencex finds the sentences of a paragraph. It joins lines and returns blank segments, so paragraphs, list lines and
headings are separated here first.
"""

from __future__ import annotations

import re

from csm.errors import PromptError

MAX_CHARS = 300  # about 20 s of speech
LIST_LINE = re.compile(r"\s*(?:[-*+•‣◦–]|\d{1,3}[.)]|[a-zA-Z]\)|#{1,6})\s+\S")
LIST_NUMBER = re.compile(r"\d{1,3}[.)]")
# The best place to split first; each pattern ends where the next part begins.
SPLITS = (
    re.compile(r"[.!?…][\"')\]]*\s+"),
    re.compile(r"[;:][\"')\]]*\s+|\s*[—–]\s*|\s--?\s"),
    re.compile(r",[\"')\]]*\s+"),
    re.compile(r"\s+(?=(?:and|or|but|so|because|which|that|who|when|while|where|if|then|than|as)\s)"),
    re.compile(r"\s+"),
)
# Where text that still arrives may be spoken: the end of a sentence, or also of a clause.
SENTENCE_END = re.compile(r"[.!?…][\"')\]]*\s+|\n")
CLAUSE_END = re.compile(r"[.!?…;:][\"')\]]*\s+|,\s+|\n")
MIN_CLAUSE = 20  # characters; shorter clauses wait for more


def split(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """The sentences of a text, stripped; longer ones as clauses or groups of words of at most ``max_chars``.

    A word longer than ``max_chars`` is cut. Parts without a letter or a digit are left out. Raises PromptError for text
    that is not valid Unicode.
    """
    assert max_chars >= 1
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"text is not valid Unicode: {text!r}") from error
    parts = [
        part
        for paragraph in _paragraphs(text)
        for sentence in _sentences(paragraph)
        for part in _fit(sentence, max_chars)
    ]
    return [part for part in parts if any(char.isalnum() for char in part)]


def _paragraphs(text: str) -> list[str]:
    """Text between blank lines, and each list line by itself; the lines of a paragraph are joined."""
    paragraphs: list[str] = []
    fresh = True
    for line in text.splitlines():
        if not line.strip():
            fresh = True
            continue
        item = LIST_LINE.match(line) is not None
        if fresh or item:
            paragraphs.append(line.strip())
        else:
            paragraphs[-1] += " " + line.strip()
        fresh = item and line.lstrip().startswith("#")  # a heading ends with its line
    return paragraphs


def _sentences(paragraph: str) -> list[str]:
    from sentencex import segment

    sentences: list[str] = []
    for sentence in filter(None, map(str.strip, segment("en", paragraph))):
        if sentences and LIST_NUMBER.fullmatch(sentences[-1]):
            sentences[-1] += f" {sentence}"
        else:
            sentences.append(sentence)
    return sentences


def _fit(sentence: str, max_chars: int) -> list[str]:
    """The sentence in parts of at most ``max_chars``, split at the strongest boundary that makes them short enough."""
    if len(sentence) <= max_chars:
        return [sentence]
    for pattern in SPLITS:
        ends = [match.end() for match in pattern.finditer(sentence)]
        near = [end for end in ends if max_chars // 4 <= len(sentence[:end].rstrip()) <= max_chars]
        if near:
            balanced = -(-len(sentence) // -(-len(sentence) // max_chars))  # parts of about equal length
            end = min(near, key=lambda end: abs(end - balanced))
            return [sentence[:end].rstrip(), *_fit(sentence[end:].lstrip(), max_chars)]
    return [sentence[:max_chars], *_fit(sentence[max_chars:].lstrip(), max_chars)]


class ClauseBuffer:
    """Collects text that arrives in pieces, and hands out whole clauses as soon as they are complete.

    How the text is divided into pieces does not change the clauses. ``sentences`` hands out whole sentences instead.
    Text without an end is divided between words before it exceeds ``max_chars``.
    """

    def __init__(self, min_chars: int = MIN_CLAUSE, max_chars: int = MAX_CHARS, sentences: bool = False):
        self._text = ""
        self._min_chars, self._max_chars = min_chars, max_chars
        self._ends = SENTENCE_END if sentences else CLAUSE_END

    @property
    def num_chars(self) -> int:
        """Characters that belong to no complete clause yet."""
        return len(self._text)

    def push(self, piece: str) -> list[str]:
        """Add a piece; the clauses that are now complete."""
        text = (self._text + piece).lstrip()
        clauses = []
        while (end := self._first_end(text[: self._max_chars + 1])) is not None:
            clauses.append(text[:end].strip())
            text = text[end:].lstrip()
        self._text = text
        return clauses

    def flush(self) -> list[str]:
        """What is left when no more text will come."""
        rest, self._text = self._text.strip(), ""
        return [rest] if rest else []

    def _first_end(self, window: str) -> int | None:
        """Where the first clause ends: a boundary with enough characters before it, and outside ``[...]``.

        ``window`` has one character more than a clause may have, so a boundary behind the longest clause is in it.
        """
        for match in self._ends.finditer(window):
            head = window[: match.end()]
            inside = head.rfind("[") > head.rfind("]")
            abbreviation = re.search(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|Prof|e\.g|i\.e|vs|No))\.\s+$", head)
            if len(head.strip()) >= self._min_chars and not inside and not abbreviation:
                return match.end()
        if len(window) <= self._max_chars:
            return None
        space = max(window.rfind(character) for character in " \t\n")
        return space if space > 0 else self._max_chars
