"""Written English to speakable English, by ordered rules: a rule sees the text that earlier rules have left.

Markup goes first, then what contains digits and dots but is no number (addresses, dates, times), then numbers with a
unit, and plain numbers last. Rules of markup are in ``csm.text.markup``, those of numbers in ``csm.text.rules``.
"""

from __future__ import annotations

import re

from csm.text.markup import MARKUP_RULES
from csm.text.rules import NUMBER_RULES, Rule

SYMBOL_RULES: list[Rule] = [
    (re.compile(r"(?<=\w)\s*&\s*(?=\w)"), " and "),
    (re.compile(r"\b(and)/(or)\b"), r"\1 \2"),
    (re.compile(r"\bw/o\b"), "without"),
    (re.compile(r"\bw/(?=\s|\w)\s*"), "with "),
    (re.compile(r"\bc/o\b"), "care of"),
    (re.compile(r"(?<=[a-zA-Z])/(?=[a-zA-Z])"), " or "),
    (re.compile(r"\s*[—―]\s*|\s+(?:--?-?|–)\s+|--+"), ", "),
    (re.compile(r"(?<=\w)\s*\+\s*(?=\w)"), " plus "),
    (re.compile(r"(?<=[\w)])\s*(?<![<>=!])={1,2}\s*(?=[\w(])"), " equals "),
    (re.compile(r"(?<=\w)\s+@\s+(?=\w)"), " at "),
    (re.compile(r"(?<=\w)\s+<\s+(?=\w)"), " is less than "),
    (re.compile(r"(?<=\w)\s+>\s+(?=\w)"), " is greater than "),
    (re.compile(r"~\s*(?=\w)"), "about "),
    (re.compile(r"#(?=[A-Za-z])"), "hashtag "),
    (re.compile(r"(?<!\w)@(?=\w)"), "at "),
    (re.compile(r"(?<=\w)_(?=\w)"), " "),
    (re.compile(r"\s*→\s*"), " to "),
    (re.compile(r"\s*±\s*"), " plus or minus "),
    (re.compile(r"\s*×\s*"), " times "),
    (re.compile(r"\s*÷\s*"), " divided by "),
    (re.compile(r"\s*≈\s*"), " is about "),
    (re.compile(r"\s*≤\s*"), " is at most "),
    (re.compile(r"\s*≥\s*"), " is at least "),
    (re.compile(r"\s*≠\s*"), " is not "),
    (re.compile(r"§\s*"), "section "),
    (re.compile(r"©\s*"), "copyright "),
    (re.compile(r"[™®]"), ""),
    (re.compile(r"\$"), " dollar "),
    (re.compile(r"[*_~^|\\<>{}#=`•‣◦+]"), " "),
]
TIDY_RULES: list[Rule] = [
    (re.compile(r"\s+"), " "),
    (re.compile(r"\s+([,.;:!?])"), r"\1"),
    (re.compile(r"(?:,\s*)+(?=[,.;:!?])"), ""),
    (re.compile(r"([.;:!?])(?:\s*,)+"), r"\1"),
    (re.compile(r"\.(?:\s*\.)+(?=\s|$)"), "..."),
    (re.compile(r"([!?])\1+"), r"\1"),
    (re.compile(r"(?<!\.)\.\.(?!\.)"), "."),
    (re.compile(r"^[\s,;:]+|[\s,;:]+$"), ""),
    (re.compile(r"(?:^|(?<!\.)[.!?][\"']?\s+)[a-z](?=[a-z\s-])"), lambda match: match[0].upper()),
]
NOTHING_TO_SAY = re.compile(r"[\W_]*")


def normalize(text: str) -> str:
    """English text as it is spoken: numbers, times, dates, currency, units, abbreviations and addresses in words.

    Markdown, brackets and emoji are removed. A list item or a row of a table becomes a paragraph. Lines without a word
    become empty. Surrogates and other scripts are left as they are.
    """
    return "\n".join(_normalize_line(line) for line in strip_markup(text).splitlines()).strip("\n")


def strip_markup(text: str) -> str:
    """Text without Markdown, HTML, brackets and emoji, with addresses in words; numbers stay as they are written."""
    for pattern, replacement in MARKUP_RULES:
        text = pattern.sub(replacement, text)
    return text


def _normalize_line(line: str) -> str:
    for pattern, replacement in (*NUMBER_RULES, *SYMBOL_RULES, *TIDY_RULES):
        line = pattern.sub(replacement, line)
    return "" if NOTHING_TO_SAY.fullmatch(line) else line
