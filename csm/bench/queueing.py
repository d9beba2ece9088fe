"""A simulation of one server's queue, and the formula that it is tested against.

Requests arrive at random (Poisson). The engine is simulated round by round, as ``csm.engine`` runs it: a request waits
for a slot, its prompt is prefilled one chunk a round, and each round generates one frame of every running request.
Clients read as fast as audio is generated, and each plays it from ``PLAYER_BUFFER`` after the first frame on.

Times are in seconds. A load is in erlangs: requests a second times the seconds that each takes.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from csm.metrics import PLAYER_BUFFER

FRAME_SECONDS = 0.08
IN_TIME = 0.999  # of all frames
SEEDS = (0, 1, 2)
WAIT_LIMIT = 1.0  # seconds that 95 % of the requests may wait for a slot


@dataclass(frozen=True)
class Server:
    """``step_seconds`` gives the time of a frame for so many running requests; a prompt is ``chunks`` chunks."""

    slots: int
    step_seconds: Callable[[int], float]
    chunk_seconds: float = 0.0
    chunks: int = 1

    def capacity(self, mean_frames: float) -> float:
        """Requests a second with all slots in use: no queue drains faster."""
        request_seconds = mean_frames * self.step_seconds(self.slots) / self.slots + self.chunks * self.chunk_seconds
        return 1 / request_seconds


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a simulation saw: each request's wait for a slot and its time to the first frame, and frames in time."""

    wait_N: np.ndarray
    first_frame_N: np.ndarray
    in_time: float

    @property
    def acceptable(self) -> bool:
        """Whether ``IN_TIME`` of the frames are in time and 95 % of the requests wait at most ``WAIT_LIMIT``."""
        return self.in_time >= IN_TIME and float(np.quantile(self.wait_N, 0.95)) <= WAIT_LIMIT


@dataclass(eq=False)
class _Simulation:
    """The state between two rounds. ``ends`` is a heap of the rounds in which running requests end."""

    server: Server
    arrival_N: np.ndarray
    frames_N: np.ndarray
    now: float = 0.0
    next_request: int = 0
    chunks_left: int = 0
    prefilling: int = -1
    waiting: deque[int] = field(default_factory=deque)
    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # at which each round ended

    def __post_init__(self) -> None:
        self.slot_time_N = np.zeros(len(self.arrival_N))
        self.first_round_N = np.zeros(len(self.arrival_N), dtype=np.int64)

    @property
    def done(self) -> bool:
        return self.next_request == len(self.arrival_N) and not (self.waiting or self.ends or self.prefilling >= 0)

    def receive(self) -> None:
        """Queue the requests that have arrived; if there is nothing to do, go on to the next arrival."""
        if not (self.waiting or self.ends or self.prefilling >= 0):
            self.now = max(self.now, self.arrival_N[self.next_request])
        while self.next_request < len(self.arrival_N) and self.arrival_N[self.next_request] <= self.now:
            self.waiting.append(self.next_request)
            self.next_request += 1

    def admit(self) -> None:
        """Prefill: one chunk while others run, else everything that waits and finds a slot."""
        busy = bool(self.ends)
        while True:
            if self.prefilling < 0:
                if not self.waiting or len(self.ends) == self.server.slots:
                    return
                self.prefilling, self.chunks_left = self.waiting.popleft(), self.server.chunks
                self.slot_time_N[self.prefilling] = self.now
            self.now += self.server.chunk_seconds
            self.chunks_left -= 1
            if self.chunks_left <= 0:
                self.first_round_N[self.prefilling] = len(self.times)
                heapq.heappush(self.ends, len(self.times) + int(self.frames_N[self.prefilling]))
                self.prefilling = -1
            if busy and self.server.chunk_seconds:
                return

    def step(self) -> None:
        """One frame of every running request."""
        if self.ends:
            self.now += self.server.step_seconds(len(self.ends))
            self.times.append(self.now)
        while self.ends and self.ends[0] <= len(self.times):
            heapq.heappop(self.ends)


def simulate(server: Server, rate: float, mean_frames: float, num_requests: int, seed: int = 0) -> Outcome:
    """Run ``num_requests`` that arrive at ``rate`` a second, with exponentially distributed lengths."""
    random = np.random.default_rng(seed)
    arrival_N = np.cumsum(random.exponential(1 / rate, num_requests))
    frames_N = np.ceil(random.exponential(mean_frames, num_requests)).astype(np.int64)
    simulation = _Simulation(server, arrival_N, frames_N)
    while not simulation.done:
        simulation.receive()
        simulation.admit()
        simulation.step()
    time_F = np.array(simulation.times)
    late = sum(
        late_frames(time_F[first : first + frames])
        for first, frames in zip(simulation.first_round_N, frames_N, strict=True)
    )
    first_frame_N = time_F[simulation.first_round_N] - arrival_N
    return Outcome(simulation.slot_time_N - arrival_N, first_frame_N, 1 - late / int(frames_N.sum()))


def late_frames(time_T: np.ndarray) -> int:
    """How many frames come too late for a player that starts ``PLAYER_BUFFER`` after the first and waits for each.

    A player that has waited for a frame plays on from there. So a frame is late if it lags the pace of playing by more
    than the buffer and by more than every earlier frame did.
    """
    lag_T = time_T - time_T[0] - FRAME_SECONDS * np.arange(len(time_T))
    worst_T = np.maximum.accumulate(np.concatenate(([PLAYER_BUFFER], lag_T)))[:-1]
    return int((lag_T > worst_T + 1e-9).sum())


def highest_rate(server: Server, mean_frames: float, num_requests: int) -> float:
    """The most requests a second with an acceptable outcome, to 1 % of the server's capacity; 0 if none has.

    Near its capacity a queue varies much from run to run: each of ``SEEDS`` must be acceptable.
    """
    capacity = server.capacity(mean_frames)
    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        rate = capacity * middle / 100
        if all(simulate(server, rate, mean_frames, num_requests, seed).acceptable for seed in SEEDS):
            low = middle
        else:
            high = middle
    return capacity * low / 100


def erlang_c(servers: int, load: float) -> float:
    """The probability that a request waits in M/M/c with ``load`` erlangs (Erlang's second formula)."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def mean_wait(servers: int, load: float, service_seconds: float) -> float:
    """The mean wait in M/M/c."""
    return erlang_c(servers, load) * service_seconds / (servers - load) if load < servers else math.inf


def highest_load(servers: int, may_wait: float) -> float:
    """The highest load in erlangs at which at most a share ``may_wait`` of the requests waits, to 0.1 %."""
    low, high = 0.0, float(servers)
    while high - low > servers / 1000:
        middle = (low + high) / 2
        low, high = (middle, high) if erlang_c(servers, middle) <= may_wait else (low, middle)
    return low
