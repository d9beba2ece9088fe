"""What is checked before a route is reached: the API key, the host that was named, and the body's size and pace."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import HTTPException  # FastAPI passes on its own, while it reads a body, and no other exception
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm.serve.errors import ApiError, response_of
from csm.serve.settings import MAX_FORM, MAX_JSON, MAX_VALUES, Settings

PROBES = ("/health", "/ready")  # for load balancers, which have no key and may name the server by its address
OPEN_PATHS = (*PROBES, "/")  # the page asks for a key
OPEN_FOLDER = "/static/"
SUBPROTOCOL = "csm.v1"
KEY_SUBPROTOCOL = "csm.key."  # followed by the key in Base64 (URL alphabet, no padding)
MIN_BODY_RATE = 16 << 10  # bytes a second, once a body has taken the time that it may take in any case
DRAIN_BYTES, DRAIN_SECONDS = 64 << 20, 5.0  # of a body that is too large: a client that still sends reads no answer


class Gate:
    """An ASGI middleware. It puts the key's index into ``scope["state"]["owner"]``."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with the error."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(scope, headers)
            scope.setdefault("state", {})["owner"] = self._owner(scope, headers)
            if scope["type"] == "http":
                is_form = headers.get("content-type", "").startswith("multipart/")
                limit = MAX_FORM if is_form else MAX_JSON
                await self._check_length(headers, limit, receive)
                receive = self._limited(receive, limit, limit if is_form else MAX_VALUES)
        except ApiError as error:
            await response_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """A page of another site, opened in a browser on this machine, must not reach a server without keys.

        Probes may name any host; they say nothing but whether the server runs.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, site = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError as error:
            raise ApiError(400, "the headers Host or Origin cannot be read") from error
        is_probe = scope["type"] == "http" and scope["path"] in PROBES
        if not is_probe and not self._settings.allows_host(name):
            message = "this server answers to localhost only, and to the names given with --allowed-host"
            raise ApiError(403, message, code="host_not_allowed")
        if origin is not None and site != host:
            raise ApiError(403, "requests from pages of other sites are refused", code="origin_not_allowed")

    def _owner(self, scope: Scope, headers: Headers) -> str:
        if not self._settings.api_keys or _is_open(scope):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else _key_of(scope.get("subprotocols", ()))
        index = self._settings.key_index(key)
        if index is None:
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(
                401, "no or a wrong API key: send Authorization: Bearer KEY", None, "invalid_api_key", challenge
            )
        return str(index)

    async def _check_length(self, headers: Headers, limit: int, receive: Receive) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            await _drain(receive)
            raise ApiError(413, f"the body has {length} bytes, the limit is {limit}", code="body_too_large")

    def _limited(self, receive: Receive, limit: int, max_values: int) -> Receive:
        """``receive`` with limits for the body's bytes, for its commas (the values of JSON), and for the time it takes.

        That is ``body_timeout``, and more as bytes come.
        """
        read, values, complete = 0, 0, False
        started: float | None = None

        async def limited() -> Message:
            nonlocal read, values, complete, started
            if complete:
                return await receive()
            try:
                started = time.monotonic() if started is None else started
                until = started + self._settings.body_timeout + read / MIN_BODY_RATE
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "the body did not arrive in time") from error
            body = message.get("body", b"")
            read, values = read + len(body), values + body.count(b",")
            complete = not message.get("more_body", False)
            if read > limit or values > max_values:
                if not complete:
                    await _drain(receive)
                most = f"{limit} bytes" if read > limit else f"{max_values} commas, so it may have too many values"
                raise HTTPException(413, f"the body has more than {most}")
            return message

        return limited


def _is_open(scope: Scope) -> bool:
    return scope["type"] == "http" and (scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER))


def _key_of(subprotocols: Iterable[str]) -> str:
    """The API key that a browser sent as a subprotocol: it cannot set a WebSocket's headers. "" if there is none."""
    for name in subprotocols:
        if name.startswith(KEY_SUBPROTOCOL):
            try:
                encoded = name[len(KEY_SUBPROTOCOL) :]
                return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
            except (binascii.Error, UnicodeDecodeError):
                return ""
    return ""


class Rate:
    """A limit in units per second, with a burst (a token bucket)."""

    def __init__(self, per_second: float, burst: float):
        self._per_second, self._burst = per_second, burst
        self._left, self._at = burst, time.monotonic()

    def take(self, units: float = 1.0) -> bool:
        """Spend units; False if they exceed the limit."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second) - units
        self._at = now
        return self._left >= 0


async def _drain(receive: Receive) -> None:
    """Read on for a while, and throw it away."""

    async def discard() -> None:
        read = 0
        while read < DRAIN_BYTES:
            message = await receive()
            read += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    task = asyncio.ensure_future(discard())
    await asyncio.wait({task}, timeout=DRAIN_SECONDS)
    task.cancel()
