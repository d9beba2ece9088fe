"""Books: ``chapters`` and ``epub`` read them, ``parts`` plans and keeps sentences, ``recording`` speaks and joins."""

from csm.book.chapters import parse_text, read_book
from csm.book.parts import Parts, Section, Sentence, Settings, Take, plan
from csm.book.recording import Binder, Reader, Recording, Sound
from csm.book.types import Book, BookError, Chapter

__all__ = [
    "Binder",
    "Book",
    "BookError",
    "Chapter",
    "Parts",
    "Reader",
    "Recording",
    "Section",
    "Sentence",
    "Settings",
    "Sound",
    "Take",
    "parse_text",
    "plan",
    "read_book",
]
