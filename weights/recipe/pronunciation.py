"""Make a checkpoint's ``pronunciation.json.gz``: ``python -m csm.weights.recipe.pronunciation FILE``.

The phones that the synthesiser says are the reference. ``flite -ps`` prints them (its lexicon and its letter-to-sound
rules come from CMUdict; BSD-like licence). It is run on every word of Debian's ``wamerican``, of WordNet's texts and of
the training sentences. Letter-to-sound rules are made from these words. The lexicon holds the words that the rules get
wrong.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import string
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from csm.pronounce import CONTEXT, Pronouncer, letter_context
from csm.weights.recipe.open_text import open_sentences, wordnet_texts

DICTIONARY = Path("/usr/share/dict/american-english")
TRAINING_SENTENCES = 60_000  # their words are included
SYMBOLS = dict(  # of flite's phones: one character each
    pair.split(":")
    for pair in """
    aa:ɑ ae:æ ah:ʌ ao:ɔ aw:W ax:ə ay:I b:b ch:ʧ d:d dh:ð eh:ɛ er:ɜ ey:A f:f g:g hh:h ih:ɪ iy:i jh:ʤ k:k l:l m:m n:n
    ng:ŋ ow:O oy:Y p:p r:r s:s sh:ʃ t:t th:θ uh:ʊ uw:u v:v w:w y:j z:z zh:ʒ
    """.split()
)
IN_SENTENCES = {"a": "ə", "haven't": "hævənt", "lives": "lɪvz"}  # unlike the word by itself
LONGEST = 3  # phones of one letter
ALIGNED_FIRST = 10_000  # words from which the alignment's costs are learnt
FEWEST = 1  # words behind a rule: of 2,000 words kept back, 68 % are right with 1, 62 % with 2


def flite_phones(words: Iterable[str]) -> dict[str, str]:
    """What flite says for each word, a character a phone."""
    words = list(words)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{word}.\n\n" for word in words))
        file.flush()
        command = ["flite", "-voice", "kal16", "-ps", "-f", file.name, "-o", "none"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in said.splitlines() if line.strip()]
    if len(lines) != len(words):
        raise ValueError(f"flite read {len(lines)} utterances of {len(words)} words")
    return {
        word: "".join(SYMBOLS[phone] for phone in line if phone != "pau")
        for word, line in zip(words, lines, strict=True)
    }


def align(phones_of: Mapping[str, str], rounds: int = 5) -> list[tuple[str, list[str]]]:
    """Words and the phones, 0 to LONGEST, that each of their letters stands for.

    Hard expectation maximisation (Viterbi training) on some of the words: the likeliest alignment of each, then how
    often a letter had which phones. A word that no alignment fits is left out.
    """
    cost: dict[tuple[str, str], float] = {}
    words = list(phones_of)
    some = words[:: max(1, len(words) // ALIGNED_FIRST)]
    for _ in range(rounds):
        counts: Counter[tuple[str, str]] = Counter()
        for word in some:
            counts.update(zip(word, _best_alignment(word, phones_of[word], cost) or "", strict=False))
        total: Counter[str] = Counter()
        for (letter, _piece), number in counts.items():
            total[letter] += number
        cost = {pair: -math.log(number / total[pair[0]]) for pair, number in counts.items() if number > 1}
    aligned = ((word, _best_alignment(word, phones, cost)) for word, phones in phones_of.items())
    return [(word, pieces) for word, pieces in aligned if pieces is not None]


def _best_alignment(word: str, phones: str, cost: Mapping[tuple[str, str], float]) -> list[str] | None:
    """The cheapest split of ``phones`` over the letters. At first, without costs, one phone a letter is cheapest."""
    best: dict[int, tuple[float, list[str]]] = {0: (0.0, [])}
    for letter in word:
        after: dict[int, tuple[float, list[str]]] = {}
        for end, (so_far, pieces) in best.items():
            for length in range(min(LONGEST, len(phones) - end) + 1):
                piece = phones[end : end + length]
                price = cost.get((letter, piece), 12.0 + 4 * length) if cost else abs(length - 1) + 0.1 * length
                known = after.get(end + length)
                if known is None or so_far + price < known[0]:
                    after[end + length] = (so_far + price, [*pieces, piece])
        best = after
    return best[len(phones)][1] if len(phones) in best else None


def make_rules(aligned: Iterable[tuple[str, list[str]]], fewest: int = FEWEST) -> dict[str, str]:
    """Letter-to-sound rules of contexts that at least ``fewest`` words have and that change what is said."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for word, pieces in aligned:
        for place, piece in enumerate(pieces):
            context = letter_context(word, place)
            for end in range(1, len(CONTEXT) + 1):
                seen[context[:end]][piece] += 1
    rules: dict[str, str] = {}
    for context in sorted(seen, key=len):
        piece, _ = min(seen[context].items(), key=lambda item: (-item[1], item[0]))
        shorter = (context[:end] for end in range(len(context) - 1, 0, -1))
        said = next((rules[prefix] for prefix in shorter if prefix in rules), None)
        if piece != said and (len(context) == 1 or sum(seen[context].values()) >= fewest):
            rules[context] = piece
    return rules


def make_pronouncer(phones_of: Mapping[str, str]) -> Pronouncer:
    """Rules made from the words of ``phones_of``, and a lexicon of those that the rules get wrong."""
    letters = {word: phones for word, phones in phones_of.items() if word.isalpha() and len(word) > 1}
    rules = make_rules(align(letters))
    by_rules = Pronouncer({}, rules)
    wrong = {w: phones for w, phones in phones_of.items() if len(w) > 1 and by_rules.word(w) != phones}
    names = {letter: phones_of[letter] for letter in string.ascii_lowercase}
    return Pronouncer(wrong | names | {"A": phones_of["a"]} | IN_SENTENCES, rules)


def vocabulary() -> list[str]:
    """The words of the dictionary, of WordNet's texts and of the training sentences, without possessives."""
    texts = [DICTIONARY.read_text(encoding="utf-8"), *itertools.chain(*wordnet_texts())]
    texts += open_sentences("train", TRAINING_SENTENCES)
    words = {word for text in texts for word in re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())}
    return sorted(word for word in words | set(string.ascii_lowercase) if not word.endswith("'s"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    pronouncer = make_pronouncer(flite_phones(vocabulary()))
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    pronouncer.write(arguments.file)
    print(f"{arguments.file}: {len(pronouncer.lexicon)} words, {len(pronouncer.rules)} rules")


if __name__ == "__main__":
    main()
