"""English text to phones: a checkpoint's own text stage, in front of its tokenizer.

A checkpoint that was trained on phones has ``pronunciation.json.gz`` beside its ``tokenizer.json``. Words are looked
up in its lexicon; others follow its letter-to-sound rules. One character stands for one phone (IPA, with a capital
letter for a diphthong). Punctuation is kept, because it decides pauses and intonation.

Letter-to-sound rules: a letter's phones depend on the letters around it. The neighbours are read in the order of
``CONTEXT``, and the longest context with a rule decides (IGTree: Daelemans, van den Bosch and Weijters, 1997,
https://doi.org/10.1023/A:1006506017891).
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path

from csm.errors import CheckpointError
from csm.text import normalize

PRONUNCIATION_FILE = "pronunciation.json.gz"
CONTEXT = (0, 1, -1, 2, -2, 3, -3, 4, -4)  # offsets of the letters a rule may look at, the most telling first
EDGE = "_"  # the letter before the first and after the last
SUFFIXES = {"'ll": "əl", "'d": "d", "'ve": "v", "'re": "ɜ", "n't": "ənt"}
VOICELESS, SIBILANTS, VOWELS = "ptkfθ", "szʃʒʧʤ", "ɑæʌɔWəIɛɜAɪiOYʊu"

_TOKEN = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*'?|[.,;:?!]")
# Applied in order to normalised text.
_PUNCTUATION = [
    (re.compile(pattern), plain)
    for pattern, plain in ((r"[’‘]", "'"), (r"…", "."), (r"\s[-–]+\s|—|–|[()]", ", "), (r"[-/\"“”*_]", " "))
]


def letter_context(word: str, place: int) -> str:
    """The letters that a rule for ``word[place]`` may look at, in the order of ``CONTEXT``."""
    at = (place + offset for offset in CONTEXT)
    return "".join(word[index] if 0 <= index < len(word) else EDGE for index in at)


class Pronouncer:
    """A lexicon and letter-to-sound rules.

    Args:
        lexicon: phones of a word in lower case; the names of the letters stand under their capitals.
        rules: phones of a letter, by a prefix of its ``letter_context``. Every letter a to z has a rule by itself.
    """

    def __init__(self, lexicon: dict[str, str], rules: dict[str, str]):
        self.lexicon, self.rules = lexicon, rules

    @classmethod
    def read(cls, path: Path) -> Pronouncer:
        """Read ``pronunciation.json.gz``. Raises CheckpointError where it is not one."""
        try:
            values = json.loads(gzip.decompress(path.read_bytes()))
            lexicon, rules = values["lexicon"], values["rules"]
            missing = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in rules]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a pronunciation file: {error!r}") from error
        if missing:
            raise CheckpointError(f"{path}: no rule for the letters {', '.join(missing)}")
        return cls(lexicon, rules)

    def write(self, path: Path) -> None:
        """Write ``pronunciation.json.gz``, the same bytes for the same contents."""
        values = {"lexicon": dict(sorted(self.lexicon.items())), "rules": dict(sorted(self.rules.items()))}
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

    def __call__(self, text: str) -> str:
        """The phones of ``text``, words separated by spaces, with its punctuation."""
        text = normalize(text)  # numbers and abbreviations to words
        for pattern, plain in _PUNCTUATION:
            text = pattern.sub(plain, text)
        folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        spoken = ""
        for token in _TOKEN.findall(folded):
            if token[0].isalpha():
                phones = " ".join(self.word(word) for word in self._words_of(token))
                if phones and phones[0] in VOWELS and (spoken == "ðə" or spoken.endswith(" ðə")):
                    spoken = spoken[:-1] + "i"  # "the apple"
                spoken += (" " if spoken else "") + phones
            elif spoken and spoken[-1] not in ".,;:?!":
                spoken += token
        return spoken

    def _words_of(self, token: str) -> list[str]:
        """The letters of an abbreviation, or the word itself."""
        token = token.rstrip("'")  # a closing quotation mark, or the possessive of a plural
        is_abbreviation = token.isupper() and 1 < len(token) <= 5 and token.lower() not in self.lexicon
        return list(token) if is_abbreviation else [token.lower()]

    def word(self, word: str) -> str:
        """The phones of one word, in lower case; a letter's name, where it is one capital letter."""
        for known in (word, word.lower()):
            if known in self.lexicon:
                return self.lexicon[known]
        for suffix, phones in SUFFIXES.items():
            if word.endswith(suffix) and len(word) > len(suffix):
                return self.word(word.removesuffix(suffix)) + phones
        if word.endswith("'s") and len(word) > 2:
            stem = self.word(word[:-2])
            return stem + _possessive(stem[-1:])
        return "".join(self._phones_of(letter_context(word, place)) for place in range(len(word)) if word[place] != "'")

    def _phones_of(self, context: str) -> str:
        """The phones of a letter, by the longest context that has a rule."""
        return next(self.rules[context[:end]] for end in range(len(context), 0, -1) if context[:end] in self.rules)


def _possessive(last: str) -> str:
    """How an 's sounds after a word that ends with the phone ``last``."""
    if last and last in SIBILANTS:
        return "əz"
    return "s" if last and last in VOICELESS else "z"
