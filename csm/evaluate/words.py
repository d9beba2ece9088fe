"""Word errors: substitutions, deletions and insertions, after both texts are normalised."""

from __future__ import annotations

import re
import unicodedata

from csm.errors import CSMError

SPELLINGS = {
    "mr": "mister",
    "mrs": "missus",
    "dr": "doctor",
    "st": "saint",
    "vs": "versus",
    "etc": "et cetera",
    "ok": "okay",
    "colour": "color",
    "everyday": "every day",
    "favourite": "favorite",
    "grey": "gray",
    "neighbour": "neighbor",
    "theatre": "theater",
    "travelled": "traveled",
}
SIGNS = {"&": " and ", "%": " percent ", "+": " plus ", "@": " at "}
COINS = {"$": "dollars", "£": "pounds", "€": "euros"}
MONEY = re.compile(r"([$£€])\s*(\d[\d,]*(?:\.\d+)?)")
# Words that a recogniser may write as two; SPELLINGS has the reverse case.
SPLIT = re.compile(r"\b(to[ -](day|night|morrow)|(every|some|any|no)[ -]body|(every|some|any)[ -](thing|where))\b")
READINGS = ("cardinal", "pairs", "digits")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:st|nd|rd|th)?")


def normalise(text: str, reading: str = "cardinal") -> str:
    """Normalise English text: lower case, no punctuation or accents, numbers and some abbreviations spelled out.

    Variant spellings become one: "to day" is "today", "hundred and five" is "hundred five". ``reading`` says how
    numbers are read: 745 is "seven hundred forty five" as "cardinal", "seven forty five" in "pairs" (as in times and
    years), and "seven four five" in "digits".
    """
    text = unicodedata.normalize("NFKD", text).lower()
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = SPLIT.sub(lambda match: re.sub("[ -]", "", match[0]), text)
    text = MONEY.sub(lambda match: f"{match[2]} {COINS[match[1]]}", text)
    text = NUMBER.sub(lambda match: f" {_spell_number(match[0].replace(',', ''), reading)} ", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"[’'`]", "", text)
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    text = " ".join(SPELLINGS.get(word, word) for word in words)
    return re.sub(r"\b(hundred|thousand) and\b", r"\1", text)


def _spell_number(number: str, reading: str) -> str:
    from num2words import num2words

    if number[-1].isalpha():
        whole = "." not in number
        return num2words(int(number[:-2]) if whole else float(number[:-2]), to="ordinal" if whole else "cardinal")
    if reading == "digits":
        return " ".join(num2words(int(digit)) for digit in number if digit.isdigit())
    if reading == "pairs" and re.fullmatch(r"\d\d?\.?\d\d", number):
        first, last = int(number[:-2].rstrip(".")), int(number[-2:])
        rest = num2words(last) if last > 9 else f"oh {num2words(last)}" if last else "hundred"
        return f"{num2words(first)} {rest}"
    return num2words(float(number) if "." in number else int(number))


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """The number of word errors in ``hypothesis`` and of words in ``reference``; both are normalised first.

    A recogniser may write 745 for several spoken forms. Each reading of numbers is applied to both texts, and the one
    with the fewest errors counts. Raises CSMError where the reference has no words.
    """
    import jiwer

    counts = []
    for reading in READINGS:
        expected, found = normalise(reference, reading), normalise(hypothesis, reading)
        if not expected:
            raise CSMError(f"no word to recognise in {reference!r}; remove this text")
        aligned = jiwer.process_words(expected, found)
        counts.append((aligned.substitutions + aligned.deletions + aligned.insertions, len(expected.split())))
    return min(counts, key=lambda count: count[0])
