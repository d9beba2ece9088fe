"""Write English sentences to be read aloud: ``python -m csm.weights.recipe.sentences --split train --count 10``.

Templates over word lists, from a seed. Which split a sentence belongs to is decided by a hash of its words, so that
what is held out stays held out, however many are made and whatever is added to the lists.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Callable, Iterator

from csm.weights.recipe import words

SPLITS = ("train", "valid", "test")
SEED = 20_251_121

# What a slot in braces may become; a slot's own text may hold slots again.
TEMPLATES = (
    """
The {adj} {person} {did} the {thing} {time}.|The {person} {did} a {adj} {thing} {spot_where}.
{name} {moved} {spot_where}.|{name} {did} {count} {adj} {things} {time}.
{name} and {name} {moved} {spot_where} {time}.|{time_cap}, {name} {did} my {thing}.|I {did} the {adj} {thing}.
I never {did} your {thing}.|We {moved} {adv} {spot_where}.|They {did} the {thing} {adv}.
She {did} her {adj} {thing} {time}.|He {did} his {thing} because he was {feeling}.
My {person} is very {feeling} today.|The {animal} {moved} {spot_where}.|A {adj} {animal} {moved} {prep} the {spot}.
{count_cap} {animals} {moved} {spot_where}.|The {thing} is {prep} the {thing}.
The {adj} {thing} is {prep} the {adj} {thing}.|There is a {adj} {thing} {spot_where}.
There are {count} {things} {prep} the {spot}.|There was some {stuff} {prep} the {thing}.|It will be {weather} {time}.
Is it {weather} in {place} {time}?|The weather in {place} was {weather} and {weather}.|Where is the {adj} {thing}?
Where did you {do} the {thing}?|Why did {name} {do} the {adj} {thing}?|When will the {person} {do} the {thing}?
Did the {person} {do} your {thing}?|Can you {do} the {adj} {thing} for me?|Could you please {do} the {thing} {time}?
Would you like some {stuff} with your {stuff}?|Who {did} the {thing} {time}?|How many {things} did {name} {do}?
How far is it from {place} to {place}?|What did the {adj} {person} {do} {time}?|Do you {do} {things} {time}?
Please {do} the {thing} and {do} the {thing}.|Do not {do} the {adj} {thing}!|{do_cap} the {thing} before you {go}.
{name} is {number} years old.|The train to {place} leaves at {clock}.|The {thing} costs {number} dollars.
We need {number} {things} and {count} {things}.|The {spot} opens at {clock} {time}.|Call me at {clock}.
My number is {digit} {digit} {digit} {digit} {digit}.|{place} is {number} miles from {place}.
In {year}, {name} {moved} in {place}.|If you {do} the {thing}, I will {do} the {thing}.
When the {person} {moved}, the {animal} {moved} too.|The {person} who {did} the {thing} is {feeling}.
{name} said that the {thing} was {adj}.|I think that {name} is {feeling}.|I know that you {did} the {thing}.
{name} wants to {do} a {thing} in {place}.|We are going to {do} the {thing} {time}.
I would like to {do} {count} {things}.|You should {do} your {thing} {adv}.|Nobody {did} the {adj} {thing}.
Everybody {did} the {thing} {time}.|{name} has never been to {place}.|Have you ever been to {place} or {place}?
{name} teaches {subject} and {subject} in {place}.|I like {subject} more than {subject}.
{subject_cap} is {adj}, but {subject} is {adj}.|Although it was {weather}, the {person} {moved} {spot_where}.
After {clock}, the {spot} was {adj} and {adj}.|The {adj} {animal} and the {adj} {animal} {moved} together.
Her {thing} was as {adj} as a {thing}.|Some {people} {do} {stuff} {time}.
All the {people} in {place} {moved} {spot_where}.|The {person} gave {name} a {thing}, a {thing} and a {thing}.
"{phrase_open}," said the {adj} {person}.|{phrase}|{phrase}|No, {name} {did} it {time}.|Yes, I {did} the {thing}.
One day, a {adj} {person} {moved} {prep} a {adj} {spot}.|Once there was a {person} who {did} {things}.
The first {thing} is {adj}, the second is {adj}.|Half of the {things} are {adj}.|{number_cap} {people} {moved} {time}.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_PLURALS = {"man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese", "knife": "knives"}
_PLURALS |= {
    "wolf": "wolves",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "fireman": "firemen",
    "bread": "loaves",
}


def number_in_words(number: int) -> str:
    """0 to 999,999 as it is said: 341 is "three hundred forty one"."""
    if number < 20:
        return _ONES[number]
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{number_in_words(number // size)} {name}" + (f" {number_in_words(rest)}" if rest else "")
    return _TENS[number // 10] + (f" {_ONES[number % 10]}" if number % 10 else "")


def year_in_words(year: int) -> str:
    """1100 to 2099 as a year is said: 1984 is "nineteen eighty four"."""
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" {_ONES[rest]}" if rest else "")
    return f"{_ONES[century] if century < 20 else 'twenty'} " + _year_rest(rest)


def _year_rest(rest: int) -> str:
    if rest == 0:
        return "hundred"
    return f"oh {_ONES[rest]}" if rest < 10 else number_in_words(rest)


def plural(noun: str) -> str:
    """The plural of a noun of the word lists."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _clock(rng: random.Random) -> str:
    hour = _ONES[rng.randint(1, 12)]
    return hour + rng.choice((" o'clock", " thirty", " fifteen", " forty five", " twenty", " ten"))


def _verb(pairs: list[str], part: int) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(pairs).split(":")[part]


def _one(options: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(options)


def _many(options: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: plural(rng.choice(options))


SLOTS: dict[str, Callable[[random.Random], str]] = {
    "name": _one(words.NAMES),
    "place": _one(words.PLACES),
    "person": _one(words.PEOPLE),
    "people": _many(words.PEOPLE),
    "animal": _one(words.ANIMALS),
    "animals": _many(words.ANIMALS),
    "thing": _one(words.THINGS),
    "things": _many([thing for thing in words.THINGS if thing not in words.STUFF]),
    "stuff": _one(words.STUFF),
    "spot": _one(words.SPOTS),
    "spot_where": lambda rng: f"{rng.choice(words.PREPOSITIONS)} the {rng.choice(words.SPOTS)}",
    "adj": _one(words.ADJECTIVES),
    "feeling": _one(words.FEELINGS),
    "do": _verb(words.ACTIONS, 0),
    "did": _verb(words.ACTIONS, 1),
    "go": _verb(words.MOVES, 0),
    "moved": _verb(words.MOVES, 1),
    "adv": _one(words.ADVERBS),
    "time": _one(words.TIMES),
    "weather": _one(words.WEATHER),
    "subject": _one(words.SUBJECTS),
    "prep": _one(words.PREPOSITIONS),
    "count": lambda rng: number_in_words(rng.randint(2, 12)),
    "number": lambda rng: number_in_words(
        rng.choice((rng.randint(2, 99), rng.randint(2, 9) * 100, rng.randint(2, 999)))
    ),
    "digit": lambda rng: rng.choice(_ONES[:10]),
    "year": lambda rng: year_in_words(rng.randint(1700, 2029)),
    "clock": _clock,
    "phrase": _one(words.PHRASES),
    "phrase_open": lambda rng: rng.choice(words.PHRASES).rstrip(".?!"),
}


def split_of(sentence: str) -> str:
    """The split that a sentence belongs to, by its words alone: 2 % test, 2 % validation, the rest training."""
    plain = " ".join(re.findall(r"[a-z']+", sentence.lower()))
    share = int(hashlib.sha256(plain.encode()).hexdigest()[:8], 16) % 50
    return {0: "test", 1: "valid"}.get(share, "train")


def sentences(split: str, count: int, seed: int = SEED) -> list[str]:
    """``count`` different sentences of a split, always the same and in the same order; more only adds to the end."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    found: dict[str, None] = {}
    for sentence in _endless(random.Random(seed)):
        if len(found) >= count:
            break
        if split_of(sentence) == split:
            found[sentence] = None
    return list(found)


def _endless(rng: random.Random) -> Iterator[str]:
    while True:
        sentence = re.sub(r"{(\w+)}", lambda match: _fill(match[1], rng), rng.choice(TEMPLATES))
        sentence = re.sub(r"\b([Aa]) (?=[aeiou])(?!use|uni|one)", r"\1n ", sentence)
        if len(sentence.split()) <= 18:
            yield sentence[0].upper() + sentence[1:]


def _fill(slot: str, rng: random.Random) -> str:
    if slot.endswith("_cap"):
        text = _fill(slot.removesuffix("_cap"), rng)
        return text[0].upper() + text[1:]
    return SLOTS[slot](rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=20)
    arguments = parser.parse_args()
    print("\n".join(sentences(arguments.split, arguments.count)))


if __name__ == "__main__":
    main()
