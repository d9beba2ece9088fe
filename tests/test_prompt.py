"""Prompt rows of turns, and the Llama-3 vocabulary against tiktoken."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

from csm import AudioError, CheckpointError, PromptError, PromptTooLongError, RoomWarning, Segment, SpeechRequest
from csm.config import CSM_1B
from csm.prompt import TextTokenizer, build_prompt
from csm.weights.recipe.shape import byte_tokenizer
from llama3 import llama3_tokenizers


def test_rows_of_a_conversation(noisy):
    """The row layout of the reference implementation."""
    codes = torch.arange(24).view(3, 8)
    prompt = noisy._request(SpeechRequest("Hi", 1, [Segment(0, "Yo", codes=codes)])).prompt
    ids = byte_tokenizer().encode
    first = [256, *ids("[0]Yo", add_special_tokens=False).ids, 257]
    last = [256, *ids("[1]Hi", add_special_tokens=False).ids, 257]
    rows = [[0] * 8 + [i] for i in first]
    rows += [[*frame, 0] for frame in codes.tolist()] + [[0] * 9]
    rows += [[0] * 8 + [i] for i in last]
    text, audio = [False] * 8 + [True], [True] * 8 + [False]
    assert prompt.row_TC.tolist() == rows
    assert prompt.mask_TC.tolist() == [text] * len(first) + [audio] * 4 + [text] * len(last)


def test_a_prompt_that_just_fits_generates_one_frame(noisy):
    limit = noisy.config.backbone.max_positions
    room = limit - len("[0]") - 2
    with pytest.warns(RoomWarning, match=r"room for 0\.08 s of audio, of the 90 s"):
        assert noisy._request(SpeechRequest("x" * room, 0)).max_frames == 1
    with pytest.raises(PromptTooLongError, match=f"takes {limit + 1} positions.*has {limit}"):
        noisy._request(SpeechRequest("x" * (room + 1), 0))


def test_context_counts_towards_the_limit(noisy):
    codes = torch.zeros(2030, 8, dtype=torch.int64)
    with pytest.raises(PromptTooLongError, match="takes 2049 positions.*has 2048"):
        noisy._request(SpeechRequest("Hello", 0, [Segment(0, "abc", codes=codes)]))


def test_context_audio_that_does_not_fit_is_rejected_before_encoding(noisy, monkeypatch):
    monkeypatch.setattr(type(noisy.codec), "encode", lambda *_: pytest.fail("encoded the audio"))
    with pytest.raises(PromptTooLongError, match="takes 2250 positions.*has 2048"):
        noisy._request(SpeechRequest("Hello", 0, [Segment(0, "abc", torch.zeros(2250 * 1920))]))


BAD_CODES = {
    "one dimension": (torch.zeros(8, dtype=torch.int64), "frames"),
    "no frames": (torch.zeros(0, 8, dtype=torch.int64), "empty"),
    "a list of words": (["a", "b"], "integers"),
    "complex": (torch.zeros(3, 8, dtype=torch.complex64), "integers"),
    "codebooks first": (torch.zeros(8, 30, dtype=torch.int64), "frames"),
    "floats": (torch.zeros(3, 8), "integers"),
    "bool": (torch.zeros(3, 8, dtype=torch.bool), "integers"),
    "an id that is no code": (torch.full((3, 8), 256), "256"),
    "negative": (torch.full((3, 8), -1), "-1"),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_invalid_codes_are_rejected(noisy, name):
    codes, message = BAD_CODES[name]
    with pytest.raises(AudioError, match=message):
        noisy.generate("Hello", 0, [Segment(0, "abc", codes=codes)])


@pytest.mark.parametrize(
    ("speaker", "text", "message"),
    [
        ("0", "Hi", "speaker"),
        (None, "Hi", "speaker"),
        (0, 5, "must be a string"),
        (0, "caf\udce9", "Unicode"),
        (-1, "Hi", "speaker"),
        (1.5, "Hi", "speaker"),
        (True, "Hi", "speaker"),
        (0, "", "empty"),
        (0, " \n\t", "empty"),
    ],
)
def test_invalid_turns_are_rejected(noisy, speaker, text, message):
    with pytest.raises(PromptError, match=message):
        noisy.generate(text, speaker)
    with pytest.raises(PromptError, match=message):
        noisy.generate("Hi", 0, [Segment(speaker, text, codes=torch.zeros(1, 8, dtype=torch.int64))])


def test_a_context_turn_needs_audio(noisy):
    with pytest.raises(PromptError, match="neither audio nor codes"):
        noisy.generate("Hi", 0, [Segment(0, "Hello")])


def test_a_text_is_tokenised_once(noisy, monkeypatch):
    """A conversation's turn has the texts of all earlier ones; the ids that a caller gets are its own."""
    counted = []
    inner = noisy._tokenizer._tokenizer
    counting = SimpleNamespace(encode=lambda text, **options: counted.append(text) or inner.encode(text, **options))
    monkeypatch.setattr(noisy._tokenizer, "_tokenizer", counting)
    ids = noisy._tokenizer.encode(0, "Tokenised once.")
    expected = [*ids]
    ids.append(7)
    assert noisy._tokenizer.encode(0, "Tokenised once.") == expected
    assert noisy._tokenizer.encode(1, "Tokenised once.") != expected
    assert counted == ["[0]Tokenised once.", "[1]Tokenised once."]


def test_special_tokens_in_text_are_ordinary_text(noisy):
    ids = noisy._tokenizer.encode(0, "a<|end_of_text|>b")
    assert ids.count(257) == 1
    assert ids[-1] == 257
    assert len(ids) == 2 + len("[0]a<|end_of_text|>b")


def varied_strings():
    """More than 200 strings of many scripts, spacings and punctuations."""
    pieces = [
        "Hello, world!", "don't you'll we've I'M they'RE", "3.14159 and 1,234,567", "2026-11-21 10:45", "   spaces   ",
        "tabs\tand\nnew\r\nlines\n\n\n", "émigré naïve façade", "你好,世界", "こんにちは、元気?", "안녕하세요",
        "Привет, мир", "مرحبا بالعالم", "שלום", "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈", "e\u0301 combining", "C++ && x->y != z;", "https://example.org/a?b=c#d",
        "ALL CAPS AND lower", "snake_case camelCase", "…—–“quotes”", "100% $5 €7 £9", "a" * 50, "ab " * 20,
    ]  # fmt: skip
    strings = list(pieces)
    for i, first in enumerate(pieces):
        for second in (pieces[(i * 7 + 3) % len(pieces)], pieces[(i * 5 + 11) % len(pieces)]):
            strings += [first + " " + second, first + second, second + "\n" + first, f"  {first}...{second}!"]
    return sorted({string for string in strings if string.strip()})


def test_real_vocabulary_equals_tiktoken():
    ours, oracle = llama3_tokenizers()
    strings = varied_strings()
    assert len(strings) >= 200
    for speaker, text in enumerate(strings):
        expected = [128_000, *oracle.encode(f"[{speaker}]{text}", disallowed_special=()), 128_001]
        assert ours.encode(speaker, text) == expected, text


def test_a_tokenizer_without_special_tokens_is_rejected(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="begin_of_text"):
        TextTokenizer(tmp_path / "tokenizer.json", 258)


def test_a_tokenizer_larger_than_the_embedding_is_rejected(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"no token <\|end_of_text\|> with an id below 257"):
        TextTokenizer(tmp_path / "tokenizer.json", 257)


def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path):
    """Only an id that the model has no embedding of is an error."""
    larger = byte_tokenizer()
    larger.add_special_tokens(["<|pad|>"])
    larger.add_tokens(["hmm"])
    larger.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json", 258)
    plain = [256, *byte_tokenizer().encode("[0]Hi <|pad|>", add_special_tokens=False).ids, 257]
    assert tokenizer.encode(0, "Hi <|pad|>") == plain
    with pytest.raises(PromptError, match=r"tokenizer\.json.*token 'hmm' with id 259.*only 258 text embeddings"):
        tokenizer.encode(0, "Well, hmm.")


def test_an_invalid_tokenizer_file_is_rejected(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path / "tokenizer.json", 258)


def test_build_prompt_checks_the_length():
    with pytest.raises(PromptTooLongError, match=r"takes 2049 positions.*has 2048"):
        build_prompt([], [1] * 2049, CSM_1B)
