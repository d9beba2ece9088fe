"""What a recogniser hears, as words that can be compared: moonshine's English one, and error rates of words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jiwer
import torch
from torch import Tensor

from csm.weights.recipe.sentences import number_in_words, year_in_words

# Seconds of silence before and after: without, the recogniser drops first words, and takes the end of what it heard
# before for the beginning of what comes next.
SILENCE = 0.5


class Recogniser:
    """moonshine-voice's tiny English model, which the package carries (MIT licence)."""

    def __init__(self) -> None:
        from moonshine_voice import ModelArch, Transcriber, get_model_path  # a large library, needed only to judge

        self._transcriber = Transcriber(str(get_model_path("tiny-en")), ModelArch.TINY)

    def hear(self, audio: Tensor, sample_rate: int) -> str:
        """(samples,) to text."""
        silence = torch.zeros(int(SILENCE * sample_rate))
        audio = torch.cat([silence, audio, silence])
        transcript = self._transcriber.transcribe_without_streaming(audio.tolist(), sample_rate)
        return " ".join(line.text for line in transcript.lines)


def plain_words(text: str) -> str:
    """A text as lower-case words, numbers in words as the recordings say them, without punctuation."""
    text = re.sub(r"\$(\d[\d,]*)", r"\1 dollars", text.lower().replace("’", "'"))
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"\d+", lambda match: f" {_spoken(match[0])} ", text)
    text = text.replace("o'clock", "oclock").replace("-", " ")
    words = " ".join(re.sub(r"[^a-z ]", "", re.sub(r"[.,:;!?]", " ", text)).split())
    return re.sub(r"\b(to|every|no|some) (day|night|morrow|body)\b", r"\1\2", words)  # one word, heard as two


def _spoken(digits: str) -> str:
    """Four digits are a year, more are read one by one: the sentences have no other numbers beyond 999."""
    if len(digits) == 4 and 1100 <= int(digits) < 2100:
        return year_in_words(int(digits))
    if len(digits) > 3:
        return " ".join(number_in_words(int(digit)) for digit in digits)
    return number_in_words(int(digits))


def word_error_rate(references: Sequence[str], heard: Sequence[str]) -> float:
    """Errors of all sentences together per word of the references."""
    return jiwer.wer([plain_words(text) for text in references], [plain_words(text) for text in heard])
