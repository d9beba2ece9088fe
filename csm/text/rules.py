"""Rules for abbreviations and for everything with digits: dates, times, money, units, numbers."""

from __future__ import annotations

import re
from collections.abc import Callable

from csm.text.numbers import cardinal, decade, digits, fraction, is_one, mixed, number, ordinal, roman, year

Match = re.Match[str]
Rule = tuple[re.Pattern[str], str | Callable[[Match], str]]

NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MONTH_OF = {name[:length].lower(): name for name in MONTHS for length in (3, 4, len(name))}
MONTH = "|".join(sorted({name.capitalize() for name in MONTH_OF}, key=len, reverse=True))
DAYS = {
    "Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday",
    "Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday", "Sun": "Sunday",
}  # fmt: skip
TITLES = {
    "Dr": "Doctor", "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Prof": "Professor", "Rev": "Reverend",
    "Gen": "General", "Capt": "Captain", "Lt": "Lieutenant", "Sgt": "Sergeant", "Col": "Colonel", "Gov": "Governor",
    "Sen": "Senator", "Rep": "Representative", "Hon": "Honorable", "Mt": "Mount", "Ft": "Fort",
}  # fmt: skip
STREETS = {"St": "Street", "Ave": "Avenue", "Rd": "Road", "Blvd": "Boulevard", "Ln": "Lane", "Hwy": "Highway"}
ABBREVIATIONS = {
    "e.g.": "for example", "i.e.": "that is", "etc.": "et cetera", "vs.": "versus", "vs": "versus", "cf.": "compare",
    "approx.": "approximately", "dept.": "department", "Dept.": "Department", "est.": "established", "al.": "others",
    "Jr.": "Junior", "Sr.": "Senior", "Inc.": "Incorporated", "Ltd.": "Limited", "Corp.": "Corporation",
    "Co.": "Company", "Bros.": "Brothers", "govt.": "government", "min.": "minutes", "hrs.": "hours", "hr.": "hour",
    "tel.": "telephone", "Tel.": "Telephone", "ext.": "extension", "Ext.": "Extension", "appt.": "appointment",
    "misc.": "miscellaneous", "incl.": "including", "max.": "maximum", "avg.": "average", "a.k.a.": "also known as",
    "P.S.": "P S", "Ph.D.": "P H D",
}  # fmt: skip
BEFORE_NUMBER = {
    "no": "number", "nos": "numbers", "vol": "volume", "p": "page", "pp": "pages", "fig": "figure", "figs": "figures",
    "ch": "chapter", "sec": "section", "ca": "around", "c": "around", "eq": "equation",
}  # fmt: skip
COINS = {
    "$": ("dollar", "dollars", "cent", "cents"), "US$": ("U S dollar", "U S dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"), "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"), "₹": ("rupee", "rupees", "paisa", "paise"),
    "USD": ("dollar", "dollars", "cent", "cents"), "EUR": ("euro", "euros", "cent", "cents"),
    "GBP": ("pound", "pounds", "penny", "pence"), "CHF": ("Swiss franc", "Swiss francs", "centime", "centimes"),
    "JPY": ("yen", "yen", "sen", "sen"),
}  # fmt: skip
SCALES = {
    "k": "thousand", "K": "thousand", "M": "million", "m": "million", "mn": "million", "bn": "billion", "B": "billion",
    "b": "billion", "T": "trillion", "tn": "trillion", "thousand": "thousand", "million": "million",
    "billion": "billion", "trillion": "trillion",
}  # fmt: skip
SCALE = "|".join(sorted(SCALES, key=len, reverse=True))
UNITS = {
    "km/h": ("kilometer per hour", "kilometers per hour"), "kmh": ("kilometer per hour", "kilometers per hour"),
    "m/s": ("meter per second", "meters per second"), "mph": ("mile per hour", "miles per hour"),
    "km²": ("square kilometer", "square kilometers"), "m²": ("square meter", "square meters"),
    "m³": ("cubic meter", "cubic meters"), "cm³": ("cubic centimeter", "cubic centimeters"),
    "sq ft": ("square foot", "square feet"), "sq. ft.": ("square foot", "square feet"),
    "km": ("kilometer", "kilometers"), "cm": ("centimeter", "centimeters"), "mm": ("millimeter", "millimeters"),
    "m": ("meter", "meters"), "mi": ("mile", "miles"), "ft": ("foot", "feet"), "yd": ("yard", "yards"),
    "kg": ("kilogram", "kilograms"), "mg": ("milligram", "milligrams"), "g": ("gram", "grams"),
    "lbs": ("pound", "pounds"), "lb": ("pound", "pounds"), "oz": ("ounce", "ounces"),
    "ml": ("milliliter", "milliliters"), "mL": ("milliliter", "milliliters"), "L": ("liter", "liters"),
    "l": ("liter", "liters"), "gal": ("gallon", "gallons"), "tbsp": ("tablespoon", "tablespoons"),
    "tsp": ("teaspoon", "teaspoons"), "kWh": ("kilowatt hour", "kilowatt hours"), "kW": ("kilowatt", "kilowatts"),
    "MW": ("megawatt", "megawatts"), "W": ("watt", "watts"), "V": ("volt", "volts"), "A": ("amp", "amps"),
    "mAh": ("milliamp hour", "milliamp hours"), "GHz": ("gigahertz", "gigahertz"), "MHz": ("megahertz", "megahertz"),
    "kHz": ("kilohertz", "kilohertz"), "Hz": ("hertz", "hertz"), "dB": ("decibel", "decibels"),
    "TB": ("terabyte", "terabytes"), "GB": ("gigabyte", "gigabytes"), "MB": ("megabyte", "megabytes"),
    "KB": ("kilobyte", "kilobytes"), "kB": ("kilobyte", "kilobytes"),
    "Mbps": ("megabit per second", "megabits per second"),
    "Gbps": ("gigabit per second", "gigabits per second"), "kbps": ("kilobit per second", "kilobits per second"),
    "ms": ("millisecond", "milliseconds"), "s": ("second", "seconds"), "sec": ("second", "seconds"),
    "secs": ("second", "seconds"), "min": ("minute", "minutes"), "mins": ("minute", "minutes"), "h": ("hour", "hours"),
    "hr": ("hour", "hours"), "hrs": ("hour", "hours"), "fps": ("frame per second", "frames per second"),
    "px": ("pixel", "pixels"), "rpm": ("revolution per minute", "revolutions per minute"),
    "°C": ("degree Celsius", "degrees Celsius"), "°F": ("degree Fahrenheit", "degrees Fahrenheit"),
    "°": ("degree", "degrees"), "%": ("percent", "percent"), "‰": ("per mille", "per mille"),
}  # fmt: skip
UNIT = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅛": (1, 8), "⅜": (3, 8),
    "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip
ROMAN_AFTER = "Chapter|Part|Act|Scene|Volume|Book|Section|Phase|Type|World War|Appendix|Article|Episode|Season|Level"
ROYAL = "Louis|Henry|Charles|George|James|Edward|William|Richard|Elizabeth|Philip|Pope [A-Z][a-z]+|Pius|Leo|Benedict"
ROMAN_NUMERAL = r"(?=[IVXLC])(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})"


def _initials(match: Match) -> str:
    letters = match[0].replace(".", " ").strip()
    last = match.end() == len(match.string.rstrip())
    return letters + ("." if last else "")


def _keep_stop(words: str, match: Match) -> str:
    """The words, with a full stop if the abbreviation's own was also that of the text."""
    return words + ("." if match[0].endswith(".") and match.end() == len(match.string.rstrip()) else "")


def _era(match: Match) -> str:
    return _keep_stop(f"{cardinal(int(match[1]))} {' '.join(match[2].replace('.', ''))}", match)


def _day(text: str) -> str:
    return ordinal(int(text))


def _iso_date(match: Match) -> str:
    if not (1 <= int(match[2]) <= 12 and 1 <= int(match[3]) <= 31):
        return match[0]
    time = f" at {_clock(int(match[4]), match[5])}" if match[4] else ""
    return f"{MONTHS[int(match[2]) - 1]} {_day(match[3])}, {year(int(match[1]))}{time}"


def _slash_date(match: Match) -> str:
    """Month first, as in American English, unless only the other order is a date."""
    first, second, written = int(match[1]), int(match[2]), match[3]
    month, day = (second, first) if first > 12 else (first, second)
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return match[0]
    value = int(written) if len(written) == 4 else (2000 if int(written) < 50 else 1900) + int(written)
    return f"{MONTHS[month - 1]} {ordinal(day)}, {year(value)}"


def _month_day(match: Match) -> str:
    words = f"{MONTH_OF[match[1].lower()]} {_day(match[2])}"
    return words + (f", {year(int(match[3]))}" if match[3] else "")


def _day_month(match: Match) -> str:
    words = f"{match[1] or 'the'} {_day(match[2])} of {MONTH_OF[match[3].lower()]}"
    return words + (f" {year(int(match[4]))}" if match[4] else "")


def _clock(hour: int, minutes: str, half: str = "") -> str:
    minute = int(minutes)
    if minute == 0:
        words = f"{cardinal(hour)}" + ("" if half else " o'clock" if 1 <= hour <= 12 else " hundred hours")
        return words if hour or half else "midnight"
    tail = f"oh {cardinal(minute)}" if minute < 10 else cardinal(minute)
    return f"{cardinal(hour)} {tail}"


def _time(match: Match) -> str:
    hour, minutes, seconds, half = int(match[1]), match[2] or "00", match[3], match[4]
    if hour > 23 or int(minutes) > 59:
        return match[0]
    words = _clock(hour, minutes, half or "")
    if seconds:
        words += f" and {cardinal(int(seconds))} second{'' if int(seconds) == 1 else 's'}"
    if not half:
        return words
    return f"{words} {half[0].upper()} M" + ("." if match[0].endswith(".") and match.end() == len(match.string) else "")


def _money(match: Match) -> str:
    sign, coin, amount, scale = match[1], match[2], match[3], match[4]
    return sign.replace("-", "minus ") + _amount(coin, amount, scale)


def _money_after(match: Match) -> str:
    return _amount(match[3], match[1], match[2])


def _amount(coin: str, amount: str, scale: str | None) -> str:
    one, many, small_one, small_many = COINS[coin]
    whole, _, part = amount.replace(",", "").partition(".")
    if scale:
        return f"{number(amount)} {SCALES[scale]} {many}"
    if len(part) != 2:
        return f"{number(amount)} {one if is_one(amount) else many}"
    cents = int(part)
    small = f"{cardinal(cents)} {small_one if cents == 1 else small_many}"
    big = f"{cardinal(int(whole or 0))} {one if whole == '1' else many}"
    if not cents:
        return big
    return small if not int(whole or 0) else f"{big} and {small}"


def _unit(match: Match) -> str:
    value, unit = match[1], UNITS[match[2]]
    return f"{number(value)} {unit[0] if is_one(value) else unit[1]}"


def _unit_range(match: Match) -> str:
    return f"{number(match[1])} to {number(match[2])} {UNITS[match[3]][1]}"


def _phone(match: Match) -> str:
    groups = re.findall(r"\d+", match[0])
    words = ", ".join(digits(group) for group in groups)
    return ("plus " if match[0].startswith("+") else "") + words


def _version(match: Match) -> str:
    prefix = "version " if match[1] else ""
    return prefix + " point ".join(cardinal(int(part)) for part in match[2].split("."))


def _dotted_digits(match: Match) -> str:
    return " dot ".join(digits(part) for part in match[0].split("."))


def _power(match: Match) -> str:
    exponent = match[2]
    known = {"2": "squared", "3": "cubed"}.get(exponent)
    return f"{match[1]} {known}" if known else f"{match[1]} to the power of {number(exponent)}"


def _scientific(match: Match) -> str:
    return f"{number(match[1])} times ten to the power of {number(match[2])}"


def _feet_inches(match: Match) -> str:
    return f"{cardinal(int(match[1]))} foot {cardinal(int(match[2]))}"


def _plain_year(match: Match) -> str:
    return year(int(match[0]))


def _number(match: Match) -> str:
    return number(match[0])


def _words(table: dict[str, str], tail: str = "") -> str:
    return "|".join(re.escape(word) for word in sorted(table, key=len, reverse=True)) + tail


IGNORE_CASE = re.IGNORECASE
ABBREVIATION_RULES: list[Rule] = [
    (re.compile(r"\bet al\."), lambda match: _keep_stop("and others", match)),
    (
        re.compile(rf"\b({_words(TITLES)})\b\.?\s+(?=[A-Z]|and (?:{_words(TITLES)})\b)"),
        lambda match: f"{TITLES[match[1]]} ",
    ),
    (re.compile(r"\bSt\.\s+(?=[A-Z])"), "Saint "),
    (re.compile(rf"(?<=\w )({_words(STREETS)})\b\.?(?=\s*(?:,|$|[a-z]|[.;]))"), lambda m: _keep_stop(STREETS[m[1]], m)),
    (re.compile(rf"(?<![\w.])({_words(ABBREVIATIONS)})(?![\w])"), lambda m: _keep_stop(ABBREVIATIONS[m[1]], m)),
    (
        re.compile(r"\b(no|nos|vol|pp?|figs?|ch|sec|ca?|eq)\.\s*(?=\d)", IGNORE_CASE),
        lambda m: f"{BEFORE_NUMBER[m[1].lower()]} ",
    ),
    (re.compile(r"\b(\d+)\s*(B\.C\.(?:E\.)?|BCE?|A\.D\.|CE|AD)(?!\w)"), _era),
    (re.compile(r"\b(?:A\.D\.|AD)\s+(?=\d)"), "A D "),
    (re.compile(rf"\b({_words(DAYS)})(?:\.|(?=,))(?=,?\s)"), lambda match: DAYS[match[1]]),
    (re.compile(r"\b(?:[A-Z]\.){2,}(?=\s|$|[,;:?!'\")])"), _initials),
]
DATE_RULES: list[Rule] = [
    (re.compile(r"\b(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::\d\d)?(?:\.\d+)?Z?)?\b"), _iso_date),
    (re.compile(r"\b(\d{1,2})[/.](\d{1,2})[/.](\d{4}|\d\d)\b(?!\.\d)"), _slash_date),
    (re.compile(rf"\b({MONTH})\.?\s+(\d{{1,2}})(?:st|nd|rd|th)?\b(?!:)(?:,?\s+(\d{{4}})\b)?"), _month_day),
    (
        re.compile(rf"\b(?:([Tt]he)\s+)?(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({MONTH})\b\.?(?:,?\s+(\d{{4}})\b)?"),
        _day_month,
    ),
    (re.compile(rf"\b({MONTH})\.?\s+(\d{{4}})\b"), lambda match: f"{MONTH_OF[match[1].lower()]} {year(int(match[2]))}"),
    (re.compile(r"(?<!\w)'(\d0)s\b"), lambda match: decade(int(match[1]))),
    (re.compile(r"\b(\d{3}0|[2-9]0)'?s\b"), lambda match: decade(int(match[1]))),
    (re.compile(r"(?<!\w)'(\d\d)\b"), lambda match: cardinal(int(match[1]))),
    (
        re.compile(r"\b(1[1-9]\d\d|20\d\d)\s*[-–]\s*(1[1-9]\d\d|20\d\d)\b"),
        lambda m: f"{year(int(m[1]))} to {year(int(m[2]))}",
    ),
    (
        re.compile(r"\b(1[1-9]\d\d|20\d\d)[-–](\d\d)\b(?![-\d])"),
        lambda m: f"{year(int(m[1]))} to {cardinal(int(m[2]))}",
    ),
]
TIME_RULES: list[Rule] = [
    (re.compile(r"\b(\d{1,2}):(\d\d)(?::(\d\d))?(?:\s*([ap]\.?m\b\.?))?", IGNORE_CASE), _time),
    (re.compile(r"\b(\d{1,2})()()\s*([ap]\.?m\b\.?)", IGNORE_CASE), _time),
    (re.compile(r"(?<=o'clock )([ap])\.?m\b\.?", IGNORE_CASE), lambda match: f"{match[1].upper()} M"),
    (re.compile(r"\b(\d+):(\d+)\b(?!:)"), lambda match: f"{number(match[1])} to {number(match[2])}"),
    (re.compile(r"\b24/7\b"), "twenty-four seven"),
    (re.compile(r"\b9/11\b"), "nine eleven"),
]
COIN_SIGN = r"US\$|[$€£¥₹]"
MONEY_RULES: list[Rule] = [
    (
        re.compile(rf"({COIN_SIGN})({NUMBER})\s?[-–]\s?(?:{COIN_SIGN})?({NUMBER})(?:\s?({SCALE})\b)?"),
        lambda m: f"{number(m[2])} to {_amount(m[1], m[3], m[4])}",
    ),
    (re.compile(rf"(-?)({COIN_SIGN})\s?({NUMBER})(?:\s?({SCALE})\b)?"), _money),
    (re.compile(rf"\b({NUMBER})(?:\s?({SCALE}))?\s?(€|£|USD\b|EUR\b|GBP\b|CHF\b|JPY\b)"), _money_after),
    (re.compile(r"\b(\d+)\s?¢"), lambda m: f"{number(m[1])} cent{'' if m[1] == '1' else 's'}"),
]
CODE_RULES: list[Rule] = [
    (re.compile(r"(?<![\w.])\+\d{1,3}(?:[ -]\(?\d{2,4}\)?){2,4}\b"), _phone),
    (re.compile(r"(?<![\w.-])(?:1-)?\d{3}-\d{3}-\d{4}\b|(?<![\w.-])\d{3}-\d{4}\b"), _phone),
    (re.compile(r"(?<![\w.-])\d+(?:-\d+){2,}(?![\w-])"), _phone),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"), _dotted_digits),
    (re.compile(r"\b([vV](?:ersion )?)(\d+(?:\.\d+)*)\b"), _version),
    (re.compile(r"\b()(\d+(?:\.\d+){2,})\b"), _version),
    (re.compile(r"(?<!\w)#\s?(?=\d)"), "number "),
    (re.compile(r"\bC\+\+"), "C plus plus"),
    (re.compile(r"\b([CF])#"), r"\1 sharp"),
    (re.compile(r"\b(\d)'\s?(\d{1,2})(?:\"|'')"), _feet_inches),
    (re.compile(r"\b(\d+(?:\.\d+)?)[eE]([+-]?\d+)\b"), _scientific),
    (re.compile(r"\b([a-zA-Z]|\d+)\^(-?\d+)"), _power),
]
POWER_RULES: list[Rule] = [
    (re.compile(r"(?<=\w)\s?([²³])"), lambda match: " squared" if match[1] == "²" else " cubed"),
]
UNIT_RULES: list[Rule] = [
    (re.compile(rf"(?<![\w.])({NUMBER})\s?[-–]\s?({NUMBER})\s?({UNIT})(?!\w)"), _unit_range),
    (re.compile(rf"(?<![\w.])([-−+]?(?:{NUMBER}))[\s-]?({UNIT})(?![\w'])"), _unit),
    (re.compile(rf"(?<![\w.])({NUMBER})\s?(k|K|M|bn|B)\b"), lambda m: f"{number(m[1])} {SCALES[m[2]]}"),
]
FRACTION_RULES: list[Rule] = [
    (re.compile(rf"(\d+)\s?([{''.join(VULGAR)}])"), lambda m: mixed(m[1], *VULGAR[m[2]])),
    (re.compile(rf"[{''.join(VULGAR)}]"), lambda m: fraction(*VULGAR[m[0]])),
    (re.compile(r"\b(\d+)\s+(\d)/(\d{1,2})\b"), lambda m: mixed(m[1], int(m[2]), int(m[3]))),
    (re.compile(r"(?<![\w/.])(\d{1,3})/(\d{1,3})(?![\w/])"), lambda m: fraction(int(m[1]), int(m[2]))),
]
ROMAN_RULES: list[Rule] = [
    (re.compile(rf"\b({ROMAN_AFTER})\s+({ROMAN_NUMERAL})\b(?!')"), lambda m: f"{m[1]} {cardinal(roman(m[2]))}"),
    (re.compile(rf"\b({ROYAL})\s+({ROMAN_NUMERAL})\b(?!')"), lambda m: f"{m[1]} the {ordinal(roman(m[2]))}"),
]
PLAIN_RULES: list[Rule] = [
    (re.compile(r"\b(\d+(?:,\d{3})*)(?:st|nd|rd|th)\b"), lambda m: ordinal(int(m[1].replace(",", "")))),
    (re.compile(r"\b(\d+)\s?[x×]\s?(\d+)\b"), lambda m: f"{number(m[1])} by {number(m[2])}"),
    (re.compile(r"\b(\d+)x\b"), lambda m: f"{number(m[1])} times"),
    (re.compile(rf"(?<![\w.,])({NUMBER})\s?[-–]\s?({NUMBER})(?![\w-])"), lambda m: f"{number(m[1])} to {number(m[2])}"),
    (re.compile(r"(?<![^\s(])-(?=\.?\d)"), "minus "),
    (re.compile(r"(?<![\w.,-])(?:1[1-9]\d\d|20\d\d)(?![\w,-]*\d|\.\d)"), _plain_year),
    (re.compile(r"(?<=[A-Za-z])-(?=\d)"), " "),
    (re.compile(r"(?<=[A-Za-z])(?=\d)"), " "),
    (re.compile(NUMBER), _number),
    (re.compile(r"(?<=[a-z])\s?°"), " degrees"),
]
NUMBER_RULES: list[Rule] = [
    *ABBREVIATION_RULES,
    *DATE_RULES,
    *MONEY_RULES,
    *TIME_RULES,
    *CODE_RULES,
    *UNIT_RULES,
    *POWER_RULES,
    *FRACTION_RULES,
    *ROMAN_RULES,
    *PLAIN_RULES,
]
