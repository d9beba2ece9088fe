"""Reads EPUB 2 and 3 files: a ZIP archive with XHTML documents, their order, and a table of contents.

An EPUB is untrusted. Nothing is written to disk: members are read by name, each up to a limit whatever its header
says. XML with entity declarations is refused, and names that leave the archive are too. XHTML is read by
``html.parser``, which knows no entities but characters.

Format: EPUB 3.3 (W3C), Open Packaging Format 2.0.1, NCX.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag
from xml.etree import ElementTree
from xml.parsers import expat

from csm.book.types import Book, BookError, Chapter

MAX_MEMBER_BYTES = 32 * 1024**2  # of a document, uncompressed
MAX_TOTAL_BYTES = 256 * 1024**2
MAX_MEMBERS = 20_000
MAX_RATIO = 200  # of a large member's uncompressed to compressed size; text has up to 10
LARGE_BYTES = 1024**2
MAX_DOCUMENTS = 5_000
CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
FONT_ALGORITHMS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
SKIPPED = {"script", "style", "head", "svg", "math", "audio", "video", "iframe", "object", "rt", "rp"}
SKIPPED_TYPES = {"noteref", "footnote", "footnotes", "endnote", "endnotes", "rearnote", "rearnotes", "pagebreak"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "dd", "div", "dl", "dt", "figcaption", "figure", "footer"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table"),
    *("tr", "ul"),
}
CELLS = {"td", "th"}
SHOWN_TAG = re.compile(r"<(/?[a-zA-Z!?][^<>\n]*)>")  # of the text, not markup: without brackets it is not removed
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}


class Archive:
    """Members of an EPUB by name, with limits. Raises BookError, which names the file."""

    def __init__(self, path: Path):
        self._path = path
        self._left = MAX_TOTAL_BYTES
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise BookError(f"{path}: not an EPUB: {error}") from error
        self.names = set(self._zip.namelist())
        if len(self.names) > MAX_MEMBERS:
            raise BookError(f"{path}: has {len(self.names)} members; the limit is {MAX_MEMBERS}")

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def read(self, name: str) -> bytes:
        """A member's bytes."""
        if name not in self.names:
            raise BookError(f"{self._path}: {name!r} is not in it")
        info = self._zip.getinfo(name)
        if info.flag_bits & 1:
            raise BookError(f"{self._path}: {name} is encrypted (DRM): only books without can be read")
        if info.file_size > LARGE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
            raise BookError(f"{self._path}: {name} is a ZIP bomb: {info.compress_size} bytes for {info.file_size}")
        limit = min(MAX_MEMBER_BYTES, self._left)
        try:
            with self._zip.open(info) as member:
                data = member.read(limit + 1)  # the header may lie
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise BookError(f"{self._path}: {name} cannot be unpacked: {error}") from error
        if len(data) > limit:
            raise BookError(f"{self._path}: {name} has more than {limit} bytes uncompressed: more than is read")
        self._left -= len(data)
        return data

    def xml(self, name: str) -> ElementTree.Element:
        """A member as XML. One that declares entities is refused before anything is expanded."""

        def refuse(entity: str, *_: object) -> None:
            raise BookError(f"{self._path}: {name} declares the entity {entity!r}, which is refused")

        data = self.read(name)
        scan = expat.ParserCreate()
        scan.EntityDeclHandler = refuse
        try:
            scan.Parse(data, True)
            return ElementTree.fromstring(data)
        except (expat.ExpatError, ElementTree.ParseError, ValueError) as error:
            if isinstance(error, BookError):
                raise
            raise BookError(f"{self._path}: {name} is not well-formed XML: {error}") from error

    def resolve(self, base: str, link: str) -> tuple[str, str]:
        """(member, fragment) that a link in the member ``base`` points to."""
        address, fragment = urldefrag(link)
        name = posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(address))) if address else base
        if name.startswith(("/", "..")) or "\\" in name or ":" in name.split("/")[0]:
            raise BookError(f"{self._path}: the link {link!r} in {base} leaves the archive")
        return name, fragment


@dataclass
class Block:
    """A paragraph: its text, whether it is a heading, and the ids of the elements that begin with it."""

    text: str
    heading: bool = False
    ids: list[str] = field(default_factory=list)


class _Paragraphs(HTMLParser):
    """The paragraphs of an XHTML document."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._ids: list[str] = []
        self._heading = False
        self._skipping: list[str] = []  # open elements, from the skipped one on

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a paragraph, or a part that is not read out."""
        values = {key: value or "" for key, value in attrs}
        if tag in VOID:
            if tag == "br":
                self._text.append("\n")
            elif tag == "hr":
                self._end()
            return
        if self._skipping or tag in SKIPPED or SKIPPED_TYPES & {*values.get("epub:type", "").split()}:
            self._skipping.append(tag)
            return
        if tag in BLOCKS:
            self._end()
            self._heading = tag in HEADINGS
        elif tag in CELLS:
            self._text.append(" ")
        if values.get("id"):
            self._ids.append(values["id"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """``<x/>`` has no content: only its id counts."""
        if tag in VOID:
            self.handle_starttag(tag, attrs)
        elif not self._skipping:
            self._ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        """End a paragraph."""
        if self._skipping:
            if tag in self._skipping:  # unclosed elements inside end with it
                while self._skipping.pop() != tag:
                    pass
        elif tag in BLOCKS:
            self._end()
            self._heading = False

    def handle_data(self, data: str) -> None:
        """Text."""
        if not self._skipping:
            self._text.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self._text).split())
        if text:
            self.blocks.append(Block(text, self._heading, self._ids))
            self._ids = []
        self._text = []

    def finish(self) -> list[Block]:
        """The paragraphs, once everything was fed."""
        self.close()
        self._end()
        return self.blocks


def paragraphs(data: bytes) -> list[Block]:
    """The paragraphs of an XHTML document."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    declared = re.match(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", data)
    try:
        text = data.decode(declared[1].decode() if declared and encoding != "utf-16" else encoding, errors="replace")
    except LookupError:
        text = data.decode("utf-8", errors="replace")
    parser = _Paragraphs()
    parser.feed(text.removeprefix("\ufeff"))
    return parser.finish()


def read_epub(path: Path) -> Book:
    """The chapters of an EPUB. Raises BookError, which names the file and the fault."""
    archive = Archive(path)
    try:
        _refuse_encrypted(archive, path)
        root = next(_elements(archive.xml(CONTAINER), "rootfile"), None)
        if root is None or not root.get("full-path"):
            raise BookError(f"{path}: {CONTAINER} names no package")
        package_name = archive.resolve("", root.get("full-path", ""))[0]
        package = archive.xml(package_name)
        documents = list(_spine(archive, package, package_name))
        marks = _contents(archive, package, package_name)
        chapters = _chapters([(name, paragraphs(archive.read(name))) for name in documents], marks)
    finally:
        archive.close()
    if not chapters:
        raise BookError(f"{path}: there is no text to speak")
    return Book(_text_of(package, "title") or path.stem, _text_of(package, "creator"), tuple(chapters))


def _refuse_encrypted(archive: Archive, path: Path) -> None:
    if ENCRYPTION not in archive.names:
        return
    for method in _elements(archive.xml(ENCRYPTION), "EncryptionMethod"):
        if method.get("Algorithm") not in FONT_ALGORITHMS:
            raise BookError(f"{path}: is encrypted (DRM): only books without can be read")


def _elements(parent: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """All elements of this name below, in any namespace."""
    return (element for element in parent.iter() if isinstance(element.tag, str) and _local(element.tag) == name)


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _text_of(package: ElementTree.Element, name: str) -> str:
    return next((" ".join("".join(element.itertext()).split()) for element in _elements(package, name)), "")


def _spine(archive: Archive, package: ElementTree.Element, base: str) -> Iterator[str]:
    """The documents in reading order, without those outside it (linear="no") and the table of contents."""
    items = {item.get("id"): item for item in _elements(package, "item")}
    seen = set()
    for reference in _elements(package, "itemref"):
        item = items.get(reference.get("idref"))
        if item is None or reference.get("linear") == "no" or "nav" in (item.get("properties") or "").split():
            continue
        if "html" not in (item.get("media-type") or ""):
            continue
        name = archive.resolve(base, item.get("href") or "")[0]
        if name not in seen:
            seen.add(name)
            yield name
        if len(seen) > MAX_DOCUMENTS:
            raise BookError(f"{base}: more than {MAX_DOCUMENTS} documents")


def _contents(archive: Archive, package: ElementTree.Element, base: str) -> dict[tuple[str, str], str]:
    """(member, fragment) -> title of the table of contents' upper level: EPUB 3's navigation, else the NCX."""
    items = sorted(_elements(package, "item"), key=lambda item: "nav" not in (item.get("properties") or "").split())
    for item in items:
        is_nav = "nav" in (item.get("properties") or "").split()
        if not is_nav and item.get("media-type") != "application/x-dtbncx+xml":
            continue  # other items may be anywhere: an EPUB 3 refers to videos by their web address
        name = archive.resolve(base, item.get("href") or "")[0]
        if name not in archive.names:
            continue
        entries = list((_nav_entries if is_nav else _ncx_entries)(archive.xml(name)))
        marks = {archive.resolve(name, link): title for link, title in entries if link and title}
        if marks:
            return marks
    return {}


def _nav_entries(nav: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for element in _elements(nav, "nav"):
        kind = next((value for key, value in element.attrib.items() if _local(key) == "type"), "toc")
        top = next(_elements(element, "ol"), None)
        if kind == "toc" and top is not None:
            for entry in top:
                link = next(_elements(entry, "a"), None)
                if link is not None:
                    yield link.get("href") or "", " ".join("".join(link.itertext()).split())


def _ncx_entries(ncx: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for points in _elements(ncx, "navMap"):
        for point in points:
            label, content = next(_elements(point, "text"), None), next(_elements(point, "content"), None)
            if label is not None and content is not None:
                yield content.get("src") or "", " ".join("".join(label.itertext()).split())


def _chapters(documents: list[tuple[str, list[Block]]], marks: dict[tuple[str, str], str]) -> list[Chapter]:
    """Paragraphs as chapters: they begin where the table of contents points, or at headings where there is none."""
    titles: list[str] = []
    texts: list[list[str]] = []
    for name, blocks in documents:
        title = marks.get((name, ""))
        for block in blocks:
            title = next((marks[name, each] for each in block.ids if (name, each) in marks), title)
            if title is None and not marks and block.heading and not _only_headings(texts):
                title = block.text
            if title is not None or not texts:
                titles.append(title or block.text[:60])
                texts.append([])
                title = None
            texts[-1].append(SHOWN_TAG.sub(r" \1 ", block.text))
    return [Chapter(title, "\n\n".join(parts)) for title, parts in zip(titles, texts, strict=True)]


def _only_headings(texts: list[list[str]]) -> bool:
    """Whether the chapter that is open has its first paragraph only: a heading that another one follows."""
    return bool(texts) and len(texts[-1]) == 1
