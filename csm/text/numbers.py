"""Numbers in English words, on num2words: cardinals, ordinals, years, digits, decimals and fractions."""

from __future__ import annotations

import re
from typing import Any

MAX_DIGITS = 15  # longer numbers are read digit by digit
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DENOMINATORS = {2: ("half", "halves"), 4: ("quarter", "quarters")}
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


def cardinal(value: int) -> str:
    """105 is "one hundred and five"."""
    return _num2words(value).replace(",", "")


def ordinal(value: int) -> str:
    """21 is "twenty-first"."""
    return _num2words(value, to="ordinal").replace(",", "")


def year(value: int) -> str:
    """1984 is "nineteen eighty-four", 1905 "nineteen oh five", 2005 "two thousand and five"."""
    if not 1000 <= value <= 2999:
        return cardinal(value)
    return _num2words(value, to="year").replace("oh-", "oh ").replace(",", "")


def decade(value: int) -> str:
    """1990 is "nineteen nineties", 90 "nineties", 2000 "two thousands"."""
    words = year(value) if value > 99 else cardinal(value)
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


def digits(text: str) -> str:
    """Each digit by itself; every other character is ignored."""
    return " ".join(DIGITS[int(char)] for char in text if char in "0123456789")


def number(text: str) -> str:
    """A number as it is written: sign, thousands separators, a decimal part. "-1,234.50" or "007" or ".5"."""
    sign = "minus " if text[0] in "-−" else ""
    whole, point, part = text.lstrip("+-−").replace(",", "").partition(".")
    if point and not whole:
        return f"{sign}point {digits(part)}"
    words = digits(whole) if len(whole) > MAX_DIGITS or re.match(r"0\d", whole) else cardinal(int(whole))
    return sign + words + (f" point {digits(part)}" if point else "")


def is_one(text: str) -> bool:
    """Whether the unit after this number is singular."""
    return text.lstrip("+-−") == "1"


def fraction(numerator: int, denominator: int) -> str:
    """3/4 is "three quarters", 1/2 "one half", 2/3 "two thirds", 5/128 "five over one hundred and twenty-eight"."""
    if not 2 <= denominator <= 20:
        return f"{cardinal(numerator)} over {cardinal(denominator)}"
    one, many = DENOMINATORS.get(denominator) or (ordinal(denominator), ordinal(denominator) + "s")
    return f"{cardinal(numerator)} {one if numerator == 1 else many}"


def mixed(whole: str, numerator: int, denominator: int) -> str:
    """2 1/2 is "two and a half", 1 3/4 "one and three quarters"."""
    words = fraction(numerator, denominator)
    return f"{number(whole)} and {re.sub('^one ', 'a ', words)}"


def roman(text: str) -> int:
    """The value of a Roman numeral."""
    values = [ROMAN[char] for char in text]
    following = [*values[1:], 0]
    return sum(-value if value < after else value for value, after in zip(values, following, strict=True))


def _num2words(value: int, **options: Any) -> str:
    from num2words import num2words

    return str(num2words(value, lang="en", **options))
