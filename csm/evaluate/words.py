"""Word error rate: words that are wrong, missing or too many, over the words there are, however they are spelt."""

from __future__ import annotations

import re
import unicodedata

from csm.errors import CSMError

SPELT = {
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
# One word that is heard as two; and the other way round, in SPELT.
SPLIT = re.compile(r"\b(to[ -](day|night|morrow)|(every|some|any|no)[ -]body|(every|some|any)[ -](thing|where))\b")
READINGS = ("cardinal", "pairs", "digits")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:st|nd|rd|th)?")


def normalise(text: str, reading: str = "cardinal") -> str:
    """English as it is said: lower case, no punctuation or accents, numbers and a few abbreviations in words.

    One text for what may be written in two ways: "to day" is "today", "hundred and five" is "hundred five". ``reading``
    is of numbers: 745 is seven hundred forty five, in "pairs", as of a clock or a year, seven forty five, and in
    "digits" seven four five.
    """
    text = unicodedata.normalize("NFKD", text).lower()
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = SPLIT.sub(lambda match: re.sub("[ -]", "", match[0]), text)
    text = MONEY.sub(lambda match: f"{match[2]} {COINS[match[1]]}", text)
    text = NUMBER.sub(lambda match: f" {_said(match[0].replace(',', ''), reading)} ", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"[’'`]", "", text)
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    text = " ".join(SPELT.get(word, word) for word in words)
    return re.sub(r"\b(hundred|thousand) and\b", r"\1", text)


def _said(number: str, reading: str) -> str:
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


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Words of ``heard`` that are wrong, missing or too many, and the words of ``said``, both normalised here.

    A recogniser writes 745 for what may be said in several ways: of the readings, the same for both texts, the one with
    the fewest errors counts.
    """
    import jiwer

    counts = []
    for reading in READINGS:
        reference, hypothesis = normalise(said, reading), normalise(heard, reading)
        if not reference:
            raise CSMError(f"no word to recognise in {said!r}")
        found = jiwer.process_words(reference, hypothesis)
        counts.append((found.substitutions + found.deletions + found.insertions, len(reference.split())))
    return min(counts, key=lambda count: count[0])
