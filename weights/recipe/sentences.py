"""Write English sentences to be read aloud: ``python -m csm.weights.recipe.sentences --split train --count 10``.

Templates are filled from word lists at random. A hash of a sentence's words decides its split, so a held-out sentence
stays held out, however many are made and whatever is added to the lists.
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

# Slots in braces are replaced by words of SLOTS.
TEMPLATES = (
    """
The {char} {job} {did} the {adj} {object} {past}.|{name} {did} a {color} {object} {past}.
I {did} your {object} {past}.|{name} and {name} {moved} {in_outdoors} {past}.
My {relative} {did} the {object} at the {spot}.|We {moved} {adv}.|She {did} her {color} {object} {past}.
He {did} his {object} because he was {feeling}.|My {relative} is very {feeling}.
The {char} {animal} {moved} {in_outdoors}.|A {color} {animal} {moved} {in_outdoors} {past}.
The {animal} {moved} {adv}.|{count_cap} {animals} {moved} {in_outdoors}.|The {object} is {prep} the {furniture}.
The {color} {object} is {in_room}.|There is a {adj} {furniture} {in_room}.|There are {count} {objects} {in_room}.
We found some {food} in the kitchen.|It will be {weather} {future}.|Is it {weather} in {place} today?
The weather in {place} was {weather} and {weather}.|Where is the {color} {object}?|Where did you {do} the {object}?
Why did {name} {do} the {adj} {object}?|When will the {job} {do} the {object}?|Did your {relative} {do} my {object}?
Can you {do} the {adj} {object} for me?|Could you please {do} the {object} {future}?
Would you like some {drink} with your {food}?|Who {did} the {object} {past}?|How many {objects} did {name} {do}?
How far is it from {place} to {place}?|What did your {relative} {do} {past}?
Please {do} the {object} and the {object}.|Do not {do} the {color} {object}!|Please do not {do} my {object}.
{name} is {number} years old.|The train to {place} leaves at {clock}.|The {object} costs {number} dollars.
We need {number} {objects} and {count} {objects}.|The {spot} opens at {clock}.|Please call me at {clock}.
My number is {digit} {digit} {digit} {digit} {digit}.|It is {number} miles from {place} to {place}.
In {year}, my {relative} lived in {place}.|My {relative} came to {place} in {year}.
I will {do} the {object} {future}.|When the {job} {moved}, the {animal} {moved}, too.
The {job} who {did} the {object} is {feeling}.|{name} said that the {object} was {adj}.
I think that {name} is {feeling}.|I know that you {did} the {object}.|{name} wants to {do} a {object} in {place}.
We are going to {do} the {object} {future}.|I am not {feeling}.|I would like to {do} {count} {objects}.
You should {do} your {object} {future}.|Nobody {did} the {adj} {object}.|{name} has never been to {place}.
Have you ever been to {place} or {place}?|We are going to {place} {future}.
{name} studies {subject} and {subject} in {place}.|I like {subject} more than {subject}.|I want to learn {subject}.
My {relative} studied {subject} in {place}.|The {job} {often} {moved_now} {in_outdoors} {habit}.
I {often} eat {food}.|We {often} have {food} and {drink} for {meal}.|{name} made {food} for {meal} {past}.
The {food} in {place} is {taste}.|My {relative} does not like {food}.
I would like {food} and a cup of {hot_drink}, please.|Do you like {food}?
The {food} and the {drink} are on the table.|Please buy some {food} at the {spot}.|Is there any {drink} left?
The {char} {animal} found all the {food}.|We had {food} for {meal}, and it was {taste}.|Who wants {food} for {meal}?
The {char} {job} drove the {color} {vehicle} to {place}.|My {relative} bought a {adj} {vehicle} {past}.
We went to {place} by {vehicle} {past}.|The {vehicle} stopped in front of the {spot}.
The {vehicle} is {adj} and {adj}.|{name} was waiting at the {spot} {past}.|I will meet you at the {spot} at {clock}.
The {spot} is {prep} the {spot}.|Turn left at the {spot} and right at the {spot}.|Is there a {spot} near the {spot}?
Let us meet at the {spot} {future}.|The {job} from {place} was {char} and {char}.
My {relative} is a {job}, and my {relative} is a {job}.|A {job} and a {job} {moved} together.
The {animal} and the {animal} are {feeling}.|I saw a {animal} at the {spot} {past}.
The {animal} was sleeping {prep} the {furniture}.|{name} has {count} {animals} and a {animal}.
I am afraid of {animals}.|"{phrase_open}," said the {char} {job}.|{phrase}|{phrase} {phrase}|{phrase} {phrase}
{phrase} {phrase}|No, {name} {did} it {past}.|Yes, I {did} the {object}.|Hello, {name}. {phrase}
{phrase} I am {feeling}.|{name}, {name} and {name} {moved} together.|One day, a {char} {job} {moved} {in_outdoors}.
Once there was a {job} who had {count} {objects}.|Yes, I like {food}.
The first {object} is {color}, and the second one is {color}.|{number_cap} {jobs} {moved} {past}.
No, I do not like {food}.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_PLURALS = {"mouse": "mice", "knife": "knives", "wolf": "wolves", "sheep": "sheep", "fireman": "firemen"}
_PLURALS |= {"policeman": "policemen"}


def number_in_words(number: int) -> str:
    """0 to 999,999 in words: 341 is "three hundred forty one"."""
    if number < 20:
        return _ONES[number]
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{number_in_words(number // size)} {name}" + (f" {number_in_words(rest)}" if rest else "")
    return _TENS[number // 10] + (f" {_ONES[number % 10]}" if number % 10 else "")


def year_in_words(year: int) -> str:
    """A year from 1100 to 2099 in words: 1984 is "nineteen eighty four"."""
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


def _third_person(verb: str) -> str:
    first, _, rest = verb.partition("_")
    return plural(first) + (f" {rest}" if rest else "")


def _clock(rng: random.Random) -> str:
    hour = _ONES[rng.randint(1, 12)]
    return hour + rng.choice((" o'clock", " thirty", " forty five", " twenty"))


def _verb(pairs: list[str], part: int) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(pairs).split(":")[part]


def _one(options: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(options)


def _many(options: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: plural(rng.choice(options))


SLOTS: dict[str, Callable[[random.Random], str]] = {
    "name": _one(words.NAMES),
    "place": _one(words.PLACES),
    "relative": _one(words.RELATIVES),
    "job": _one(words.JOBS),
    "jobs": _many(words.JOBS),
    "animal": _one(words.ANIMALS),
    "animals": _many(words.ANIMALS),
    "object": _one(words.OBJECTS),
    "objects": _many(words.OBJECTS),
    "furniture": _one(words.FURNITURE),
    "vehicle": _one(words.VEHICLES),
    "food": _one(words.FOODS),
    "drink": _one(words.DRINKS),
    "hot_drink": _one(["coffee", "tea"]),
    "meal": _one(words.MEALS),
    "spot": _one(words.SPOTS),
    "in_outdoors": lambda rng: f"{rng.choice(('in', 'near', 'behind', 'outside'))} the {rng.choice(words.OUTDOORS)}",
    "in_room": lambda rng: f"in the {rng.choice(words.ROOMS)}",
    "color": _one(words.COLORS),
    "adj": _one(words.ADJECTIVES),
    "char": _one(words.CHARACTERS),
    "feeling": _one(words.FEELINGS),
    "taste": _one(words.TASTES),
    "do": _verb(words.ACTIONS, 0),
    "did": _verb(words.ACTIONS, 1),
    "moved": _verb(words.MOVES, 1),
    "moved_now": lambda rng: _third_person(rng.choice(words.MOVES).split(":")[0]),
    "adv": _one(words.ADVERBS),
    "often": _one(words.OFTEN),
    "past": _one(words.PAST),
    "future": _one(words.FUTURE),
    "habit": _one(words.HABIT),
    "weather": _one(words.WEATHER),
    "subject": _one(words.SUBJECTS),
    "prep": _one(words.PREPOSITIONS),
    "count": lambda rng: number_in_words(rng.randint(2, 12)),
    "number": lambda rng: number_in_words(
        rng.choice((rng.randint(2, 99), rng.randint(2, 9) * 100, rng.randint(2, 999)))
    ),
    "digit": lambda rng: rng.choice(_ONES[:10]),
    "year": lambda rng: year_in_words(rng.randint(1900, 2029)),
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
    """``count`` different sentences of a split, the same for a seed; a larger count only adds to the end."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    found: dict[str, None] = {}
    for sentence in endless_sentences(random.Random(seed)):
        if len(found) >= count:
            break
        if split_of(sentence) == split:
            found[sentence] = None
    return list(found)


def endless_sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of the templates without end, of every split."""
    while True:
        sentence = re.sub(r"{(\w+)}", lambda match: _fill(match[1], rng), rng.choice(TEMPLATES))
        sentence = re.sub(r"\b([Aa]) (?=[aeiou]|hon)(?!use|uni|one)", r"\1n ", sentence)
        if len(sentence.split()) <= 18:
            yield sentence[0].upper() + sentence[1:]


def _fill(slot: str, rng: random.Random) -> str:
    if slot.endswith("_cap"):
        text = _fill(slot.removesuffix("_cap"), rng)
        return text[0].upper() + text[1:]
    return SLOTS[slot](rng).replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=20)
    arguments = parser.parse_args()
    print("\n".join(sentences(arguments.split, arguments.count)))


if __name__ == "__main__":
    main()
