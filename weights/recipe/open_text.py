"""Open-vocabulary training sentences: ``python -m csm.weights.recipe.open_text --split train --count 10``.

Four sources, drawn in the proportions of ``MIX``:

- WordNet 3.0 (Debian's ``wordnet-base``): its example sentences and its shorter definitions, 1 to 20 words each.
- The templates of ``everyday.py``: questions, times, dates, prices, names, greetings, lists, small talk.
- The templates of ``sentences.py``, which the first edition was trained on.
- Short lists of the commonest words, so that every word is heard in many neighbourhoods.

A hash of the words decides the split, as in ``sentences.py``. ``everyday.txt`` is the evaluation list: no sentence
of it is ever produced here.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from csm.weights.recipe.everyday import everyday_sentences
from csm.weights.recipe.sentences import SPLITS, endless_sentences, split_of

WORDNET = Path("/usr/share/wordnet")
EVALUATION = Path(__file__).with_name("everyday.txt")
SEED = 20_261_125
MIX = {"examples": 8, "everyday": 5, "templates": 3, "definitions": 2, "words": 2}
COMMON_WORDS = 20_000
MOST_WORDS = 20
_PLAIN = re.compile(r"[A-Za-z][A-Za-z' ,.;:?!-]*")


def plain_words(sentence: str) -> str:
    """The words alone, in lower case: what two sentences are compared by."""
    return " ".join(re.findall(r"[a-z']+", sentence.lower()))


def as_sentence(text: str) -> str | None:
    """``text`` with a capital letter and a full stop, or None unless it is 1 to 20 words of letters."""
    text = re.sub(r"\.{2,}|--+", ", ", text.strip())
    text = re.sub(r"\s+", " ", re.sub(r"\s+([,.;:?!])", r"\1", text)).strip(" ,;:-")
    if not _PLAIN.fullmatch(text) or len(text.split()) > MOST_WORDS or re.search(r"\b[A-Z]{2,}|\b[A-Z]\.", text):
        return None
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


@cache
def wordnet_texts(folder: Path = WORDNET) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet's example sentences and its definitions, each once, in the order of its files.

    A gloss is ``definition; "example"; "example"`` behind the last bar of a line (wndb(5WN)).
    """
    examples: dict[str, None] = {}
    definitions: dict[str, None] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            gloss = line.split("|", 1)[1].strip()
            quoted = [as_sentence(text) for text in re.findall(r'"([^"]+)"', gloss)]
            examples |= dict.fromkeys(text for text in quoted if text)
            definition = as_sentence(re.sub(r"\([^)]*\)", "", gloss.split('; "')[0]))
            definitions |= {definition: None} if definition else {}
    return tuple(examples), tuple(definitions)


@cache
def common_words(folder: Path = WORDNET, count: int = COMMON_WORDS) -> tuple[str, ...]:
    """The ``count`` commonest words of WordNet's examples and definitions."""
    counts: Counter[str] = Counter()
    for text in itertools.chain(*wordnet_texts(folder)):
        counts.update(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))
    return tuple(word for word, _ in counts.most_common(count))


def evaluation_sentences() -> list[str]:
    """The lines of ``everyday.txt``."""
    return EVALUATION.read_text(encoding="utf-8").split("\n")[:-1]


def _shuffled(texts: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    """Every text once a round, the rounds in different orders."""
    while True:
        yield from rng.sample(texts, len(texts))


def _word_lists(common: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    words = _shuffled(common, rng)
    while True:
        separator = rng.choice((", ", " "))
        text = separator.join(itertools.islice(words, rng.randint(1, 6)))
        yield text[0].upper() + text[1:] + rng.choice("...?!")


def open_sentences(split: str, count: int, seed: int = SEED, wordnet: Path = WORDNET) -> list[str]:
    """``count`` different sentences of a split, the same for a seed; a larger count only adds to the end."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    examples, definitions = wordnet_texts(wordnet)
    sources = {
        "examples": _shuffled(examples, random.Random(f"examples/{seed}")),
        "definitions": _shuffled(definitions, random.Random(f"definitions/{seed}")),
        "everyday": everyday_sentences(random.Random(f"everyday/{seed}")),
        "templates": endless_sentences(random.Random(f"templates/{seed}")),
        "words": _word_lists(common_words(wordnet), random.Random(f"words/{seed}")),
    }
    rng = random.Random(seed)
    names, weights = list(MIX), list(MIX.values())
    seen = {plain_words(sentence) for sentence in evaluation_sentences()}
    found: list[str] = []
    while len(found) < count:
        sentence = next(sources[rng.choices(names, weights)[0]])
        plain = plain_words(sentence)
        if plain not in seen and split_of(sentence) == split:
            seen.add(plain)
            found.append(sentence)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=20)
    arguments = parser.parse_args()
    print("\n".join(open_sentences(arguments.split, arguments.count)))


if __name__ == "__main__":
    main()
