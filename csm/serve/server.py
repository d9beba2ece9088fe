"""The process: a socket, signals, and what an idle connection may cost.

The first SIGTERM or SIGINT closes the listening socket and lets running requests finish. A second one ends at once.
"""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from csm.serve.service import Service
from csm.serve.settings import MAX_MESSAGE, MAX_SOCKETS, Settings

MAX_HEADERS = 16 << 10  # bytes of a request line and its headers
SEND_BUFFER = 256 << 10  # bytes that the kernel may hold for a reader that lags: 5 s of PCM, not minutes
SPARE_CONNECTIONS = 256  # beyond those of requests that run and wait, and WebSockets
CLOSE_SECONDS = 5.0  # that a client has to read what it was sent, and the closing frame
PING_SECONDS = 20.0  # a client that does not answer a ping for so long has gone


def protocol(idle_timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that has not sent a request's headers after ``idle_timeout``."""

    class Protocol(H11Protocol):
        _idle: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connection = transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            self._watch_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def _watch_headers(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop_watching()
            elif self._idle is None:
                self._idle = self.loop.call_later(idle_timeout, self._close_idle)

        def _stop_watching(self) -> None:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None

        def _close_idle(self) -> None:
            self._idle = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Protocol


class SocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, which leaves no socket behind: closing alone would wait for a client that does not read."""

    _abort: asyncio.TimerHandle | None = None

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """The app has ended: give the client a while, then cut the connection."""
        super().on_task_complete(task)
        if not self.disconnected:
            self._abort = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        if self._abort is not None:
            self._abort.cancel()
        super().connection_lost(exc)

    def keepalive_timeout(self) -> None:
        """No answer to a ping."""
        super().keepalive_timeout()
        self.transport.abort()

    def shutdown(self) -> None:
        """An accepted socket ends by itself: ``Server.shutdown`` asks it to."""
        if not self.handshake_complete:
            super().shutdown()


class Server(uvicorn.Server):
    """uvicorn, with SIGTERM twice to end at once, and ``/ready`` false while it drains."""

    def __init__(self, app: FastAPI, settings: Settings):
        service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol(settings.idle_timeout),
                ws=SocketProtocol,
                ws_max_size=MAX_MESSAGE,
                ws_ping_interval=PING_SECONDS,
                ws_ping_timeout=PING_SECONDS,
                ws_per_message_deflate=False,
                timeout_keep_alive=int(min(settings.idle_timeout, 15)) or 1,
                timeout_graceful_shutdown=int(settings.request_timeout) + 1,
                limit_concurrency=settings.max_streams + settings.max_queue + MAX_SOCKETS + SPARE_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADERS,
                log_level="warning",
                access_log=False,
                server_header=False,
            )
        )
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; at the second signal, cut all connections and end."""
        self.force_exit = self._service.draining
        self.should_exit = self._service.draining = True
        if self.force_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        """Requests end as those of clients that have gone. From Python 3.12 on, closing waits for all connections."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let WebSockets end after their current turn, then shut down."""
        for connection in list(self._service.sockets):
            connection.drain()
        await super().shutdown(sockets)
