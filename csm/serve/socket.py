"""``WS /v1/audio/stream``: one WebSocket, its turns and its limits. docs/websocket.md describes the protocol.

The task of the route reads messages. A turn that is being generated has a task of its own, so a client can cancel it
at any time. Reading and sending are both bounded: text that waits by ``MAX_PENDING``, audio by what a client reads.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from csm import Segment
from csm.serve.errors import ApiError, api_error, response_of
from csm.serve.limits import SUBPROTOCOL, Rate
from csm.serve.messages import Cancel, ClientMessage, Flush, Piece, ProtocolError, Start, parse
from csm.serve.service import Service, within
from csm.serve.settings import MAX_INPUT, MAX_PENDING, MAX_SOCKETS
from csm.serve.turns import SlowReader, Turn

MESSAGES_PER_SECOND, MESSAGE_BURST = 200, 1000
CHARACTERS_PER_SECOND, CHARACTER_BURST = 1 << 20, 8 << 20
GOING_AWAY, RESTART = 1001, 1012  # closing codes (RFC 6455, section 7.4, and IANA's registry)


class Closed(Exception):
    """The socket ends with this code and reason."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


class Socket:
    """One connection. The turns that were heard are kept as context, so their keys and values stay in the cache."""

    def __init__(self, service: Service, websocket: WebSocket, owner: str):
        self._service = service
        self._websocket = websocket
        self._owner = owner
        self._history: list[Segment] = []
        self._turn: Turn | None = None
        self._num_turns = 0
        self._failed = False
        self._task: asyncio.Task[None] | None = None  # of the turn
        self._messages = Rate(MESSAGES_PER_SECOND, MESSAGE_BURST)
        self._characters = Rate(CHARACTERS_PER_SECOND, CHARACTER_BURST)
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """End once the current turn is complete."""
        self._draining.set()

    async def run(self) -> None:
        """Serve the connection to its end. Whatever ends it, its slot is free when this returns."""
        offered = self._websocket.scope.get("subprotocols", ())
        self._service.sockets.add(self)  # before the first wait: handshakes at the same time are all counted
        try:
            await self._websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            await self._announce()
            await self._serve()
        except Closed as error:
            await self._close(error.code, str(error))
        except ProtocolError as error:
            await self._close(error.code, str(error), ApiError(400, str(error), code="protocol_error"))
        except WebSocketDisconnect:
            pass  # the client has gone, as it may at any time
        finally:
            await self._stop()
            self._service.sockets.discard(self)

    async def _announce(self) -> None:
        limits = {"text": MAX_INPUT, "waiting": MAX_PENDING, "messages_per_second": MESSAGES_PER_SECOND}
        rate = (await self._service.generator()).sample_rate
        await self._send({"type": "ready", "format": "pcm_s16le", "sample_rate": rate, "channels": 1, "limits": limits})

    async def _serve(self) -> None:
        receiving = asyncio.ensure_future(self._websocket.receive())
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            while True:
                await self._wait(receiving, draining)
                if self._task is not None and self._task.done():
                    task, self._task = self._task, None
                    task.result()  # raises where the client could not be reached
                if self._draining.is_set() and self._task is None:
                    raise Closed(RESTART, "the server is shutting down")
                if receiving.done():
                    message = receiving.result()
                    receiving = asyncio.ensure_future(self._websocket.receive())
                    await self._receive(message)
        finally:
            receiving.cancel()
            draining.cancel()
            await asyncio.gather(receiving, draining, return_exceptions=True)

    async def _wait(self, receiving: asyncio.Future[Any], draining: asyncio.Future[Any]) -> None:
        """For a message, the end of the turn, or the server's. Raises Closed for a client that stays silent."""
        waiting = {receiving} | ({self._task} if self._task else set()) | (set() if draining.done() else {draining})
        limit = self._service.settings.socket_idle_timeout
        done, _ = await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        generating = self._task is not None and self._turn is not None and not self._turn.waiting
        if not done and not generating:
            raise Closed(GOING_AWAY, f"nothing was sent for {limit:g} s")

    # Messages

    async def _receive(self, message: Any) -> None:
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        if text is None:
            raise ProtocolError(1003, "binary frames are not accepted: send JSON as text")
        if not self._messages.take() or not self._characters.take(len(text)):
            raise ProtocolError(1008, f"too many messages: at most {MESSAGES_PER_SECOND} a second")
        try:
            await self._handle(parse(text))
        except ApiError as error:
            await self._send({"type": "error", **error.body})

    async def _handle(self, message: ClientMessage) -> None:
        if isinstance(message, Start):
            await self._start(message)
        elif isinstance(message, Cancel):
            await self._cancel(message)
        elif self._failed:
            pass  # of a turn that has failed; the client did not know yet
        elif self._turn is None or self._turn.ended:
            raise ApiError(400, "there is no turn: send start first", code="no_turn")
        elif isinstance(message, Piece):
            self._turn.push(message.text)
        elif isinstance(message, Flush):
            self._turn.flush()
        else:
            self._turn.end()

    async def _start(self, message: Start) -> None:
        if self._task is not None:
            raise ApiError(409, "a turn is in progress: wait for done, or send cancel", code="turn_in_progress")
        self._service.check_model(message.model or self._service.settings.model)
        self._turn = Turn(self._service, message, self._owner, self._history, self._write)
        self._num_turns += 1
        self._failed = False
        await self._send({"type": "started", "turn": self._num_turns, "seed": self._turn.seed})
        self._task = asyncio.ensure_future(self._generate(self._turn, self._num_turns))

    async def _generate(self, turn: Turn, number: int) -> None:
        """A turn to its end, and the event that says how it ended."""
        try:
            await turn.run()
            event = {"type": "done", "turn": number, "seconds": turn.heard().seconds, "clauses": turn.times()}
        except SlowReader as error:
            raise Closed(1008, str(error)) from error
        except WebSocketDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 - every failure of a turn is reported, and the socket stays
            self._failed = True
            event = {"type": "error", "turn": number, **_turn_error(error).body}
        self._history = turn.followed_by(turn.heard().segments)
        await self._send(event)

    async def _cancel(self, message: Cancel) -> None:
        """Stop the turn, or cut one that is complete to what was heard of it."""
        turn = self._turn
        if turn is None:
            raise ApiError(400, "there is no turn to cancel", code="no_turn")
        await self._stop()
        turn.ended = True
        heard = turn.heard(message.played)
        self._history = turn.followed_by(heard.segments)
        event = {"type": "cancelled", "turn": self._num_turns, "seconds": heard.seconds, "text": heard.text}
        await self._send(event)

    async def _stop(self) -> None:
        """End the turn's task. Its slot is free when this returns."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # retrieved: a client that cannot be reached is noticed by the next message

    # Sending

    async def _write(self, message: dict[str, Any] | bytes) -> None:
        """Send an event, or audio, once there is room for it."""
        if isinstance(message, bytes):
            await self._websocket.send_bytes(message)
        else:
            await self._websocket.send_text(json.dumps(message))

    async def _send(self, event: dict[str, Any]) -> None:
        """Send an event. Raises Closed if the client does not read."""
        try:
            await within(self._service.settings.send_timeout, self._write(event))
        except TimeoutError as error:
            raise Closed(1008, "the client does not read") from error

    async def _close(self, code: int, reason: str, error: ApiError | None = None) -> None:
        await self._stop()
        if self._websocket.client_state is not WebSocketState.CONNECTED:
            return
        try:
            if error is not None:
                await within(1.0, self._write({"type": "error", **error.body}))
            await within(1.0, self._websocket.close(code, reason[:120]))
        except (TimeoutError, WebSocketDisconnect):
            pass  # it does not read, or has gone: the connection is cut


def _turn_error(error: Exception) -> ApiError:
    if isinstance(error, TimeoutError):
        return ApiError(504, "the speech was not generated in time", code="timeout")
    return api_error(error)


async def serve_socket(service: Service, websocket: WebSocket, owner: str) -> None:
    """The route's handler. Refuses a socket, with an ordinary response, while there are too many."""
    error = None
    if service.draining:
        error = ApiError(503, "the server is shutting down", code="not_ready")
    elif len(service.sockets) >= MAX_SOCKETS:
        error = ApiError(429, f"{MAX_SOCKETS} sockets are open, which is the limit", code="too_many_sockets")
    if error is not None:
        await response_of(error)(websocket.scope, websocket.receive, websocket.send)
        return
    await Socket(service, websocket, owner).run()
