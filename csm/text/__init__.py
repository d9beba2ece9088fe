"""English text for speech: normalisation, sentences and pauses. Libraries are imported on first use."""

from csm.text.normalize import normalize, strip_markup
from csm.text.pauses import Pause, parse_pauses
from csm.text.sentences import ClauseBuffer, split

__all__ = ["ClauseBuffer", "Pause", "normalize", "parse_pauses", "split", "strip_markup"]
