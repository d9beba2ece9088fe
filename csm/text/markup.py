"""Rules for what is written but not spoken: Markdown, HTML, brackets, emoji, typographic characters; and addresses."""

from __future__ import annotations

import html
import re

from csm.text.numbers import digits
from csm.text.rules import Rule

TYPOGRAPHY = str.maketrans(
    {
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "„": '"',
        "«": '"',
        "»": '"',
        "…": "...",
        "\xa0": " ",
        "\u202f": " ",
        "−": "-",
    }
    | dict.fromkeys(map(chr, (0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFE0E, 0xFE0F, 0xFEFF)))
)
EMOJI = re.compile(
    "[\U0001f000-\U0001faff\U00002600-\U000027bf\U00002b00-\U00002bff\U000023e9-\U000023fa\U0001f1e6-\U0001f1ff\u20e3]+"
)
SPELLED_DOMAINS = {"io", "uk", "eu", "ai", "tv", "fm", "us", "de", "fr", "ch", "nl", "ca", "jp", "cn", "au", "edu"}
TOP_LEVEL = "com|org|net|edu|gov|io|ai|co|uk|eu|de|fr|ch|nl|ca|us|info|dev|app|tv|fm|me"
FILE_TYPES = "pdf|txt|py|md|csv|json|wav|mp3|mp4|jpg|png|html|docx?|xlsx?|zip|exe|toml|ya?ml"


def spell_address(text: str) -> str:
    """ "docs.example.com/a-b" is "docs dot example dot com slash a dash b"."""
    words = []
    for part in re.findall(r"[A-Za-z]+|\d+|[./_-]", text):
        if part in "./_-":
            words.append({".": "dot", "/": "slash", "_": "underscore", "-": "dash"}[part])
        elif part.isdigit():
            words.append(digits(part))
        else:
            words.append(" ".join(part.upper()) if part.lower() in SPELLED_DOMAINS and words else part)
    return " ".join(words)


def _url(match: re.Match[str]) -> str:
    address = match[0].strip("<>")
    rest = re.search(r"[.,;:!?)]*$", address)
    tail = rest[0] if rest else ""
    address = address[: len(address) - len(tail)]
    address = re.sub(r"^(?:https?|ftp)://|^www\.|^mailto:", "", address)
    address = re.split(r"[?#]", re.sub(r"^www\.", "", address))[0].rstrip("/")
    return spell_address(address) + tail.replace(")", "")


def _email(match: re.Match[str]) -> str:
    user = match[1].replace("+", " plus ")
    return f"{' plus '.join(spell_address(part) for part in user.split(' plus '))} at {spell_address(match[2])}"


def _code(match: re.Match[str]) -> str:
    return re.sub(r"<(/?[a-zA-Z!?][^<>]*)>", r" \1 ", match[0])  # a tag that the text shows


def _heading(match: re.Match[str]) -> str:
    title = match[1].rstrip(" #")
    return title if title[-1:] in ".!?:" else f"{title}."


def _table_row(match: re.Match[str]) -> str:
    cells = [cell.strip() for cell in match[0].strip().strip("|").split("|")]
    return "\n" + ", ".join(cell for cell in cells if cell) + "."


def _without_comments(match: re.Match[str]) -> str:
    """The text without comments, in one pass: many that begin and do not end would take quadratic time."""
    text, kept, at = match[0], [], 0
    while (begin := text.find("<!--", at)) >= 0 and (end := text.find("-->", begin)) >= 0:
        kept.append(text[at:begin])
        at = end + len("-->")
    return "".join(kept) + text[at:]


def _aside(match: re.Match[str]) -> str:
    return f", {match[1].strip()}, "


# An HTML attribute has a value, but for a few. So "a <b and c> d" has no tag.
ATTRIBUTE = (
    r"(?:[\w:@.-]+\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+)"
    r"|async|checked|controls|defer|disabled|hidden|loop|muted|open|readonly|required|reversed|selected)"
)
# Elements of HTML and of SSML. Other words in angle brackets, as in "Dear <name>", are text.
ELEMENTS = (
    "a|abbr|address|article|aside|b|bdi|bdo|big|blockquote|body|button|caption|center|cite|code|col|dd|del|details|dfn|"
    "div|dl|dt|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|img|input|ins|kbd|label|legend|li|"
    "main|mark|nav|nobr|ol|option|p|pre|q|rp|rt|ruby|s|samp|script|section|select|small|span|strike|strong|style|sub|"
    "summary|sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr|break|emphasis|prosody|"
    "say-as|speak|voice"
)
TARGET = r"(?:[^()]|\([^()]*\))*"  # of a link, which may hold parentheses
M, IGNORE_CASE = re.MULTILINE, re.IGNORECASE
MARKUP_RULES: list[Rule] = [
    # Rules below begin with any amount of white space: for each of its characters they look at all that follow.
    (re.compile(r"[^\S\n]{9,}"), " " * 8),
    (re.compile(r"\n(?:[^\S\n]*\n){2,}"), "\n\n"),
    (re.compile(r"&lt;(/?[a-zA-Z!?][^&<>\n]*)&gt;"), r" \1 "),  # a tag that the text shows
    (re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|[a-zA-Z]\w+);"), lambda match: html.unescape(match[0])),
    (re.compile(r"(?s).+"), lambda match: match[0].translate(TYPOGRAPHY)),
    (re.compile(r"(?<!`)`+[^`\n]+`+"), _code),
    (re.compile(r"^\s*(?:```|~~~).*$", M), ""),
    (re.compile(r"(?s)<!--.*"), _without_comments),
    (re.compile(r"<br\s*/?>", IGNORE_CASE), " "),
    (re.compile(rf"</[a-zA-Z][\w:-]*\s*>|<(?:{ELEMENTS})\s*/?>", IGNORE_CASE), ""),
    (re.compile(rf"<[a-zA-Z][\w:-]*(?:(?:\s+{ATTRIBUTE})+\s*/?|\s*/)>"), ""),
    (re.compile(r"^\s*(?:[-*_]\s*){3,}$", M), ""),
    (re.compile(r"^\s*\|?\s*:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)+\|?\s*$\n?", M), ""),
    (re.compile(r"^\s*\|.*\|\s*$", M), _table_row),
    (re.compile(rf"!\[([^\[\]]*)\]\({TARGET}\)"), r"\1"),
    (re.compile(rf"\[([^\[\]]+)\]\({TARGET}\)"), r"\1"),
    (re.compile(r"\[\^[^\[\]]+\](?::\s*)?"), ""),
    (re.compile(r"^\s{0,3}#{1,6}\s+(.+?)\s*$", M), _heading),
    (re.compile(r"^\s*(?:>\s?)+", M), ""),
    (re.compile(r"^\s*[-*+•‣◦–]\s+(?:\[[ xX]\]\s+)?", M), "\n"),  # an item is a paragraph
    (re.compile(r"^\s*(\d{1,3})[.)]\s+(?=\D)", M), r"\n\1, "),
    (re.compile(r"(\*\*\*|\*\*|__|~~)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<!\w)_(?=\S)([^_\n]+?)(?<=\S)_(?!\w)"), r"\1"),
    (re.compile(r"`+([^`\n]+)`+"), r"\1"),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!-])"), r"\1"),
    (re.compile(r"(?<!\w)[:;]-?[)(DPp](?!\w)"), ""),
    (re.compile(r"[✓✔]"), " check "),
    (EMOJI, " "),
    (re.compile(r"<?\b(?:mailto:)?([\w.+-]{1,64})@((?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,})\b>?"), _email),
    (re.compile(r"<?\b(?:https?://|ftp://|www\.)[^\s<>\"]+>?", IGNORE_CASE), _url),
    (re.compile(rf"\b(?:[a-z0-9-]{{1,63}}\.){{1,8}}(?:{TOP_LEVEL})\b(?:/[^\s<>\"]*)?", IGNORE_CASE), _url),
    (re.compile(rf"\b([\w-]+)\.({FILE_TYPES})\b"), lambda match: f"{spell_address(match[1])} dot {match[2]}"),
    (re.compile(r"\s*\[(?:\d+(?:[,–-]\s*\d+)*|citation needed|sic)\]", IGNORE_CASE), ""),
    (re.compile(r"(?<=\w)\(s\)"), "s"),
    (re.compile(r"\((\d{3})\)\s*(?=\d{3}-\d{4})"), r"\1-"),
    (re.compile(r"\s*[(\[{]\s*([^()\[\]{}]*?)\s*[)\]}]\s*"), _aside),
    (re.compile(r"\s*[()\[\]{}]\s*"), " "),
]
