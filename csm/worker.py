"""The thread that steps an engine while it has work.

It starts with the first request and ends after some idle seconds, so that an unused generator can be freed.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable

import torch

from csm.engine import Engine, Request, Ticket

LINGER_SECONDS = 10.0  # a new thread costs a new pool of compute threads

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """Runs one engine; any number of threads may submit and read."""

    def __init__(self, engine: Engine, num_threads: Callable[[], int] = torch.get_num_threads):
        """``num_threads`` is asked at each request that finds the engine idle.

        What runs keeps its number, because PyTorch's ops may round differently with another one.
        """
        self.engine = engine
        self._work = threading.Condition()
        self._changed = False
        self._thread: threading.Thread | None = None
        self._choose_threads = num_threads
        self._num_threads = num_threads()
        self._closed = False
        _workers.add(self)

    def submit(
        self, request: Request, max_unread: int | None = None, notify: Callable[[], None] | None = None
    ) -> Ticket:
        """``Engine.submit``, and see to it that somebody steps the engine."""
        with self._work:
            if self._closed:
                raise RuntimeError("the engine is closed: the process is ending")
            if self.engine.idle:
                self._num_threads = self._choose_threads()
            ticket = self.engine.submit(request, max_unread, notify)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="csm-engine", daemon=True)
                self._thread.start()
        self.wake()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """``Engine.cancel``, at once."""
        self.engine.cancel(ticket)
        self.wake()

    def wake(self) -> None:
        """Tell the thread that there may be work: a request, a cancellation, or a reader that has caught up."""
        with self._work:
            self._changed = True
            self._work.notify()

    def _run(self) -> None:
        try:
            while self._step_or_wait():
                pass
        except BaseException as error:
            self.engine.abort(error)  # readers must not wait for a thread that is gone
            with self._work:
                self._thread = None
            raise

    def _step_or_wait(self) -> bool:
        """One step, or a wait for work if there was nothing to do. False after ``LINGER_SECONDS`` without work."""
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        if not self._closed and self.engine.step():
            return True
        with self._work:
            if self._closed:
                return False
            if not self._work.wait_for(lambda: self._changed, LINGER_SECONDS) and self.engine.idle:
                self._thread = None
                return False
            self._changed = False
        return True

    def close(self) -> None:
        """End the thread after its current step. Requests that have not finished get no more frames."""
        with self._work:
            thread, self._closed = self._thread, True
        self.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()


@atexit.register
def _close_all() -> None:
    """A thread that is inside PyTorch while the interpreter is finalised would abort the process."""
    for worker in list(_workers):
        worker.close()
