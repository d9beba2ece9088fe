"""Books: the chapters of a plain text, a Markdown file or an EPUB."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from csm.book.epub import read_epub
from csm.book.types import Book, BookError, Chapter

MAX_TEXT_BYTES = 64 * 1024**2
ATX = re.compile(r"\s{0,3}(#{1,6})\s+(.+?)[\s#]*$")
FENCE = re.compile(r"\s{0,3}(```|~~~)")
NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMERAL = rf"(?:\d{{1,4}}|[IVXLC]{{1,8}}|(?:the\s+)?(?:{'|'.join(NUMBER_WORDS.split())})\b[\w-]*|first|last)"
# A line by itself, such as "Chapter 7", "CHAPTER VII. The Fox" or "Epilogue: Home".
PLAIN_HEADING = re.compile(
    rf"\s*((?:chapter|part|book|act|section|letter)\s+{NUMERAL}(?:\s*[.:–—-].*|\s*)"
    r"|(?:prologue|epilogue|foreword|preface|introduction|afterword)\b(?:\s*[.:–—-].*|\s*))",
    re.IGNORECASE,
)
MAX_HEADING = 100  # characters
READERS = (".txt", ".md", ".markdown", ".epub")


def read_book(path: Path) -> Book:
    """The chapters of a file, by its suffix. Raises BookError, which names the file and the fault."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise BookError(f"{path}: a book must end in {', '.join(READERS)}")
    if not path.is_file():
        raise BookError(f"{path}: no such file")
    if suffix == ".epub":
        return read_epub(path)
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise BookError(f"{path}: larger than {MAX_TEXT_BYTES // 1024**2} MiB: split it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BookError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return parse_text(text, path.stem, str(path), markdown=suffix != ".txt")


def parse_text(text: str, name: str, source: str, markdown: bool = False) -> Book:
    """The chapters of a text: Markdown headings, or lines like "Chapter 1". ``name`` is the title if it has none.

    A title that is the only heading of its level is the book's, and the next level's headings are chapters.
    Raises BookError, which begins with ``source``, if there is no text.
    """
    found = list(_markdown_headings(text) if markdown else _plain_headings(text))
    title = name
    top = min((level for _, level, _ in found), default=1)
    if markdown and sum(level == top for _, level, _ in found) == 1 and len(found) > 1:
        index = next(i for i, (_, level, _) in enumerate(found) if level == top)
        if index == 0:
            title = found[0][2]
            top = min(level for _, level, _ in found[1:])
            found = found[1:]
    starts = [(offset, heading) for offset, level, heading in found if level == top]
    bounds = [0, *(offset for offset, _ in starts), len(text)]
    titles = [title, *(heading for _, heading in starts)]
    parts = [(name, text[start:end]) for name, start, end in zip(titles, bounds, bounds[1:], strict=False)]
    chapters = _merged([Chapter(heading, part) for heading, part in parts if part.strip()])
    if not chapters:
        raise BookError(f"{source}: there is no text to speak")
    return Book(title, "", tuple(chapters))


def _merged(chapters: list[Chapter]) -> list[Chapter]:
    """Without chapters that are a heading only (a list of contents, a part's title): they begin the next one."""
    result: list[Chapter] = []
    waiting = ""
    for index, chapter in enumerate(chapters):
        is_last = index == len(chapters) - 1
        if len(chapter.text.strip().splitlines()) == 1 and not is_last and chapter.text.strip("# \n") == chapter.title:
            waiting += chapter.text
            continue
        result.append(Chapter(chapter.title, waiting + chapter.text))
        waiting = ""
    return result


def _markdown_headings(text: str) -> Iterator[tuple[int, int, str]]:
    """(offset, level, title) of the headings outside of code."""
    offset, fence, previous = 0, "", (0, "")
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if mark:
            fence = "" if fence == mark[1] else fence or mark[1]
        heading = ATX.match(line)
        underline = re.fullmatch(r"\s{0,3}(=+|-+)\s*", line)
        if heading and not fence:
            yield offset, len(heading[1]), _plain(heading[2])
        elif underline and not fence and previous[1].strip() and not ATX.match(previous[1]):
            yield previous[0], 1 if underline[1][0] == "=" else 2, _plain(previous[1])
        previous = offset, line
        offset += len(line)


def _plain(title: str) -> str:
    return re.sub(r"[*_`]+", "", re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", title)).strip()


def _plain_headings(text: str) -> Iterator[tuple[int, int, str]]:
    """(offset, 1, title) of lines like "Chapter 1" with a blank line before and after."""
    offset, before = 0, True
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        following = "".join(lines[index + 1 : index + 2])
        if before and not following.strip() and len(line) <= MAX_HEADING and PLAIN_HEADING.fullmatch(line.strip()):
            yield offset, 1, line.strip()
        before = not line.strip()
        offset += len(line)
