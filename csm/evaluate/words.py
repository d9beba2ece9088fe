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
    "favourite": "favorite",
    "grey": "gray",
    "neighbour": "neighbor",
    "theatre": "theater",
    "travelled": "traveled",
}
SIGNS = {"&": " and ", "%": " percent ", "+": " plus ", "@": " at "}
COINS = {"$": "dollars", "£": "pounds", "€": "euros"}
MONEY = re.compile(r"([$£€])\s*(\d[\d,]*(?:\.\d+)?)")
SPLIT = re.compile(r"\b(to|every|no|some|any) (day|night|morrow|body|one|thing|where)\b")  # one word, heard as two
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:st|nd|rd|th)?")


def normalise(text: str) -> str:
    """English as it is said: lower case, no punctuation or accents, numbers and a few abbreviations in words.

    One text for what may be written in two ways: "to day" is "today", "hundred and five" is "hundred five".
    """
    text = unicodedata.normalize("NFKD", text).lower()
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = MONEY.sub(lambda match: f"{match[2]} {COINS[match[1]]}", text)
    text = NUMBER.sub(_said, text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"[’'`]", "", text)
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    text = " ".join(SPELT.get(word, word) for word in words)
    return re.sub(r"\b(hundred|thousand) and\b", r"\1", SPLIT.sub(r"\1\2", text))


def _said(match: re.Match[str]) -> str:
    """Four digits of a possible year are one; five and more without commas, as of a telephone, are said one by one."""
    from num2words import num2words

    digits = match[0].replace(",", "")
    ordinal = digits[-1].isalpha()
    value = digits[:-2] if ordinal else digits
    number = float(value) if "." in value else int(value)
    kind = "ordinal" if ordinal and "." not in value else "cardinal"
    if match[0].isdigit() and len(value) == 4 and 1100 <= number < 2100:
        kind = "year"
    elif match[0].isdigit() and len(value) > 4:
        return "".join(f" {num2words(int(digit))} " for digit in value)
    return f" {num2words(number, to=kind)} "


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Words of ``heard`` that are wrong, missing or too many, and the words of ``said``, both normalised here."""
    import jiwer

    reference, hypothesis = normalise(said), normalise(heard)
    if not reference:
        raise CSMError(f"no word to recognise in {said!r}")
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, len(reference.split())
