"""What a book is: a title, an author, and chapters."""

from __future__ import annotations

from dataclasses import dataclass

from csm.errors import CSMError


class BookError(CSMError):
    """A book cannot be read. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Chapter:
    """A chapter's title, and its text with blank lines between paragraphs. The text includes the heading."""

    title: str
    text: str


@dataclass(frozen=True)
class Book:
    """A title, an author ("" where unknown) and at least one chapter."""

    title: str
    author: str
    chapters: tuple[Chapter, ...]
