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
}
SIGNS = {"&": " and ", "%": " percent ", "+": " plus ", "@": " at "}
COINS = {"$": "dollars", "£": "pounds", "€": "euros"}
MONEY = re.compile(r"([$£€])\s*(\d[\d,]*(?:\.\d+)?)")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:st|nd|rd|th)?")


def normalise(text: str) -> str:
    """English as it is said: lower case, no punctuation or accents, numbers and a few abbreviations in words."""
    text = unicodedata.normalize("NFKD", text).lower()
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = MONEY.sub(lambda match: f"{match[2]} {COINS[match[1]]}", text)
    text = NUMBER.sub(_said, text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"[’'`]", "", text)
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    return " ".join(SPELT.get(word, word) for word in words)


def _said(match: re.Match[str]) -> str:
    from num2words import num2words

    digits = match[0].replace(",", "")
    ordinal = digits[-1].isalpha()
    value = digits[:-2] if ordinal else digits
    number = float(value) if "." in value else int(value)
    return f" {num2words(number, to='ordinal' if ordinal and '.' not in value else 'cardinal')} "


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Words of ``heard`` that are wrong, missing or too many, and the words of ``said``, both normalised here."""
    import jiwer

    reference, hypothesis = normalise(said), normalise(heard)
    if not reference:
        raise CSMError(f"no word to recognise in {said!r}")
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, len(reference.split())
