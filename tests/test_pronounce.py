"""The text stage of a checkpoint: text to phones, its file, and how letter-to-sound rules are made."""

import gzip
import json
import shutil

import pytest

from csm.errors import CheckpointError, PromptError
from csm.prompt import TextTokenizer
from csm.pronounce import PRONUNCIATION_FILE, Pronouncer, letter_context
from csm.weights.recipe.pronunciation import align, flite_phones, make_pronouncer, make_rules
from csm.weights.recipe.shape import CHARACTERS, PHONES, phone_tokenizer

LETTERS = dict(zip("abcdefghijklmnopqrstuvwxyz", "æbkdɛfghɪʤklmnɑpkrstʌvwkjz", strict=True))
WORDS = {
    "cat": "kæt",
    "the": "ðə",
    "a": "ə",
    "A": "A",
    "t": "ti",
    "v": "vi",
    "dog": "dɔg",
    "box": "bɑks",
    "apple": "æpəl",
}
WORDS |= {"five": "fIv", "dollars": "dɑlɜz", "mister": "mɪstɜ", "point": "pYnt", "two": "tu", "haven't": "hævənt"}
WORDS |= {"seven": "sɛvən", "thirty": "θɜdi", "cafe": "kəfA", "o'clock": "əklɑk", "well": "wɛl"}


@pytest.fixture
def pronounce():
    return Pronouncer(WORDS, LETTERS)


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("The cat.", "ðə kæt."),
        ("THE CAT!", "ðə kæt!"),
        ("A well-fed cat?", "ə wɛl fɛd kæt?"),
        ("Cat… dog -- \"cat\" (dog), the 'cat'", "kæt. dɔg, kæt, dɔg, ðə kæt"),
        ("the dog's box, the cats' box, the box's", "ðə dɔgz bɑks, ðə kæts bɑks, ðə bɑksəz"),
        ("haven’t", "hævənt"),
        ("café", "kəfA"),
        ("TV", "ti vi"),
        ("the apple", "ði æpəl"),
        ("the box", "ðə bɑks"),
        ("Mr. Cat", "mɪstɜ kæt"),
        ("$5 at 7:30, 7:00", "fIv dɑlɜz æt sɛvən θɜdi, sɛvən əklɑk"),
        ("2.5", "tu pYnt fIv"),
        ("!!!", ""),
        ("你好", ""),
    ],
)
def test_text_to_phones(pronounce, text, spoken):
    assert pronounce(text) == spoken


def test_unknown_words_follow_the_rule_with_the_longest_context():
    assert letter_context("face", 2) == "cea_f____"
    rules = LETTERS | {"ce": "s", "cek": "k", "ea": "i", "e_": ""}
    pronounce = Pronouncer({}, rules)
    assert pronounce.word("face") == "fæs"
    assert pronounce.word("cab") == "kæb"
    assert pronounce.word("ceb") == "sɛb"
    assert Pronouncer({}, rules | {"cea": "ʃ"}).word("face") == "fæʃ"


def test_the_file_is_read_as_written(pronounce, tmp_path):
    path = tmp_path / PRONUNCIATION_FILE
    pronounce.write(path)
    again = Pronouncer.read(path)
    assert (again.lexicon, again.rules) == (pronounce.lexicon, pronounce.rules)
    first = path.read_bytes()
    pronounce.write(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "not a pronunciation file"),
        (gzip.compress(b"[]"), "not a pronunciation file"),
        (gzip.compress(json.dumps({"lexicon": {}, "rules": {"a": "A"}}).encode()), "no rule for the letters b, c"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / PRONUNCIATION_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{PRONUNCIATION_FILE}: {message}"):
        Pronouncer.read(tmp_path / PRONUNCIATION_FILE)


def test_a_tokenizer_with_a_pronunciation_beside_it_reads_phones(pronounce, tmp_path):
    phone_tokenizer().save(str(tmp_path / "tokenizer.json"))
    without = TextTokenizer(tmp_path / "tokenizer.json", 61)
    pronounce.write(tmp_path / PRONUNCIATION_FILE)
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json", 61)
    assert tokenizer.encode(3, "The cat.") == without.encode(3, "ðə kæt.")
    ids = tokenizer.encode(3, "The cat.")
    assert [CHARACTERS[index] for index in ids[1:-1]] == list("[3]ðə kæt.")
    assert ids[0] == len(CHARACTERS)
    with pytest.raises(PromptError, match=r"no word of English in the text: '\.\.\.'"):
        tokenizer.encode(0, "...")


def test_letters_are_aligned_with_what_they_stand_for():
    words = {"cat": "kæt", "mat": "mæt", "sat": "sæt", "cab": "kæb", "mate": "mAt", "sate": "sAt", "wax": "wæks"}
    words |= {"tax": "tæks", "ham": "hæm", "shame": "ʃAm", "sham": "ʃæm", "bash": "bæʃ", "bass": "bæs"}
    aligned = dict(align(words))
    assert aligned["tax"] == ["t", "æ", "ks"]
    assert all("".join(pieces) == words[word] for word, pieces in aligned.items())
    rules = make_rules(aligned.items())
    pronounce = Pronouncer({}, LETTERS | rules)
    assert all(pronounce.word(word) == phones for word, phones in words.items())
    assert pronounce.word("max") == "mæks"  # a word that was not there
    assert "max" not in words


def test_the_lexicon_holds_what_the_rules_get_wrong():
    words = LETTERS | {2 * letter: 2 * phone for letter, phone in LETTERS.items()}
    words |= {"read": "rid", "lead": "lid", "bread": "brɛd", "don't": "dOnt"}
    pronounce = make_pronouncer(words)
    assert all(pronounce.word(word) == phones for word, phones in words.items() if word != "a")
    assert pronounce.word("a") == "ə"
    assert not {"read", "lead"} <= pronounce.lexicon.keys()


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_the_synthesiser_s_phones_have_characters():
    said = flite_phones(["thermometer", "hello", "butter", "measure"])
    assert said == {"thermometer": "θɜmɑmətɜ", "hello": "həlO", "butter": "bʌtɜ", "measure": "mɛʒɜ"}
    assert set("".join(said.values())) <= set(PHONES)
