"""``bench.py --serve URL``: load from N clients on a running server.

Each client asks for PCM again and again. In pace, it reads as a player does, and asks anew when the audio has been
played; flat out, it reads as fast as it can. Underruns are those of ``csm.metrics.Listener``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from csm.bench import report
from csm.errors import CSMError
from csm.metrics import Listener

BYTES_PER_SECOND = 48_000  # 16 bits at 24 kHz
REQUEST_TIMEOUT = 600.0  # seconds: longer than the server's own
MAX_CLIENTS, MAX_SECONDS = 1024, 3600.0
SENTENCES = (
    "The weather was warm in the morning.",
    "She opened the window and looked at the garden.",
    "We will meet again at the station in an hour.",
    "He asked for a cup of coffee and a piece of bread.",
)
TURNS = len(SENTENCES)  # requests of a client, each with another sentence and seed


@dataclass
class Tally:
    """What all clients of one run saw. Times are in seconds. ``verify`` judges a whole response, given its request."""

    verify: Callable[[dict[str, Any], bytes], bool] | None = None
    first_audio: list[float] = field(default_factory=list)
    audio: float = 0.0
    rtf: list[float] = field(default_factory=list)
    chunks: int = 0
    underruns: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """Count an error."""
        self.errors[reason] = self.errors.get(reason, 0) + 1


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value below which so many percent lie (nearest rank); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


async def one_request(http: Any, body: dict[str, Any], pace: bool, tally: Tally) -> None:
    """One request to its end."""
    started, first, size, player = time.perf_counter(), None, 0, Listener()
    parts: list[bytes] = []
    async with http.stream("POST", "/v1/audio/speech", json=body) as response:
        if response.status_code != 200:
            tally.fail(str(response.status_code))
            await asyncio.sleep(float(response.headers.get("retry-after", 0.2)))
            return
        async for data in response.aiter_raw():
            now = time.perf_counter()
            first = first or now - started
            size += len(data)
            if tally.verify is not None:
                parts.append(data)
            tally.chunks += 1
            player.arrive(now, len(data) / BYTES_PER_SECOND)
    finished, seconds = time.perf_counter(), size / BYTES_PER_SECOND
    if first is None or not seconds:
        tally.fail("no audio")
        return
    if tally.verify is not None and not tally.verify(body, b"".join(parts)):
        tally.fail("wrong audio")
    tally.first_audio.append(first)
    tally.rtf.append((finished - started) / seconds)
    tally.audio += seconds
    tally.underruns += player.num_underruns
    if pace:
        await asyncio.sleep(player.remaining(finished))


def body_of(index: int, number: int) -> dict[str, Any]:
    """A client's request: the sentences in turn, with seeds of its own. Both recur after ``TURNS`` requests."""
    text, seed = SENTENCES[(index + number) % len(SENTENCES)], index * TURNS + number % TURNS
    return {"model": "tts-1", "voice": "alloy", "response_format": "pcm", "input": text, "seed": seed}


async def client(http: Any, index: int, ends: float, pace: bool, fields: dict[str, Any], tally: Tally) -> None:
    """Requests of one client until the time is over."""
    import httpx

    number = 0
    while time.perf_counter() < ends:
        try:
            await one_request(http, {**body_of(index, number), **fields}, pace, tally)
        except httpx.HTTPError as error:
            tally.fail(type(error).__name__)
            await asyncio.sleep(0.2)
        number += 1


async def run_clients(
    url: str,
    clients: int,
    seconds: float,
    pace: bool,
    key: str | None = None,
    fields: dict[str, Any] | None = None,
    verify: Callable[[dict[str, Any], bytes], bool] | None = None,
) -> dict[str, Any]:
    """Load a server with so many clients for so long; the figures of the table."""
    import httpx

    tally, limits = Tally(verify), httpx.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=REQUEST_TIMEOUT) as http:
        ends = started + seconds
        await asyncio.gather(*(client(http, i, ends, pace, fields or {}, tally) for i in range(clients)))
    return figures(tally, clients, pace, time.perf_counter() - started)


def figures(tally: Tally, clients: int, pace: bool, wall: float) -> dict[str, Any]:
    """A row of the table."""
    p50, p95, rtf = percentile(tally.first_audio, 50), percentile(tally.first_audio, 95), percentile(tally.rtf, 50)
    return {
        "clients": clients,
        "pace": "real time" if pace else "flat out",
        "requests": len(tally.rtf),
        "first audio p50 ms": None if p50 is None else round(p50 * 1000),
        "first audio p95 ms": None if p95 is None else round(p95 * 1000),
        "underruns %": round(100 * tally.underruns / max(1, tally.chunks), 2),
        "RTF p50": None if rtf is None else round(rtf, 3),
        "x real time": round(tally.audio / wall, 2),
        "errors": ", ".join(f"{count} x {name}" for name, count in sorted(tally.errors.items())) or "none",
    }


def check_url(url: str) -> None:
    """Raise CSMError for an address that no server can have."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CSMError(f"--serve takes the address of a server, such as http://localhost:8000, not {url!r}")


def load_report(url: str, clients: Sequence[int], seconds: float, key: str | None = None) -> tuple[str, dict[str, Any]]:
    """The table for every number of clients, in pace and flat out: Markdown, and the same for JSON."""
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise CSMError("bench.py --serve needs the package httpx: pip install 'csm[serve]'") from error
    if not 1 <= min(clients) <= max(clients) <= MAX_CLIENTS or not 0 < seconds <= MAX_SECONDS:
        raise CSMError(f"load takes 1 to {MAX_CLIENTS} clients and up to {MAX_SECONDS:g} s")
    check_url(url)
    rows = [asyncio.run(run_clients(url, count, seconds, pace, key)) for count in clients for pace in (True, False)]
    title = f"{url}, {seconds:g} s for each row:"
    return "\n".join([title, "", report.table(rows), ""]), {"url": url, "seconds": seconds, "load": rows}
