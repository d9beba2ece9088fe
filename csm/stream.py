"""Speech while it is generated: iterators over a request's frames or samples, and the metrics of the request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from csm.engine import Frame
from csm.guards import GuardedTicket, Opener, guarded_frames
from csm.metrics import GenerationMetrics

Item = TypeVar("Item")


@dataclass(frozen=True)
class Speech:
    """A generated request: ``audio`` (samples,), its metrics, the seed of the take, and why it ended.

    ``finish_reason`` is "end" (the model ended the speech), "length" (the limit of the audio), or the guard that
    stopped it.
    """

    audio: Tensor
    metrics: GenerationMetrics
    seed: int
    finish_reason: str


class TicketKeeper:
    """An opener that keeps the ticket it opened."""

    def __init__(self, opener: Opener):
        self._opener = opener
        self.ticket: GuardedTicket | None = None

    def __call__(self, notify: Callable[[], None] | None) -> GuardedTicket:
        self.ticket = self._opener(notify)
        return self.ticket


class SpeechStream(Iterator[Item], Generic[Item]):
    """What ``convert`` makes of a request's frames, as they arrive. Closing or dropping it cancels the request."""

    def __init__(self, opener: Opener, convert: Callable[[Frame], Item]):
        self._keeper = TicketKeeper(opener)
        self._frames = guarded_frames([self._keeper])
        self._convert = convert

    def __next__(self) -> Item:
        return self._convert(next(self._frames)[1])

    @property
    def metrics(self) -> GenerationMetrics | None:
        """What the request took so far; complete once the iterator has ended. None before the first item."""
        return None if self._keeper.ticket is None else self._keeper.ticket.metrics

    def close(self) -> None:
        """Cancel the request."""
        self._frames.close()
