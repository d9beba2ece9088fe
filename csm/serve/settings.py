"""The server's settings."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from csm.errors import CSMError
from csm.guards import DEFAULT_GUARDS, Guards
from csm.watermark import WATERMARKS

MAX_INPUT = 4096  # characters of ``input``, as in OpenAI's API
MAX_UPLOAD = 10 << 20  # bytes of a voice's recording
MAX_FORM = MAX_UPLOAD + (64 << 10)  # bytes of an upload with its other fields
MAX_JSON = 4 << 20  # bytes of any other body
# Commas of a JSON body, which bound its values: parsing holds up all streams, in a thread too. The model's window takes
# 2,048 x 32 codes.
MAX_VALUES = 100_000
MAX_FIELDS = 64  # of a JSON object
MAX_MESSAGE = MAX_JSON  # bytes of a WebSocket message
MAX_PENDING = 16 << 10  # characters of a WebSocket's turn that wait to be spoken
MAX_SOCKETS = 256  # WebSockets that are open
TIMES = ("max_seconds", "request_timeout", "body_timeout", "idle_timeout", "socket_idle_timeout", "send_timeout")
# All speech; speech in added voices or after a context, which can hold any voice; or only where a request asks for it.
WATERMARK_FOR = ("all", "added-voices", "requests")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Settings:
    """How to serve. Times are in seconds; ``unload_after`` None keeps the model loaded.

    ``allowed_hosts`` are the names that a proxy is reached by: values of the header ``Host``, besides the local ones.
    ``watermark`` names a watermark, and ``watermark_for`` the speech that has it (``WATERMARK_FOR``).
    """

    model: str = "csm"
    voices: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    max_streams: int = 8
    max_queue: int = 64
    max_seconds: float = 90.0
    request_timeout: float = 300.0
    body_timeout: float = 30.0
    idle_timeout: float = 15.0
    socket_idle_timeout: float = 300.0
    send_timeout: float = 15.0
    unload_after: float | None = None
    api_keys: tuple[str, ...] = ()
    watermark: str | None = None
    watermark_for: str = "all"
    guards: Guards = DEFAULT_GUARDS

    def __post_init__(self) -> None:
        if self.watermark is not None and self.watermark not in WATERMARKS:
            raise CSMError(f"no watermark is called {self.watermark!r}; there are {', '.join(WATERMARKS)}")
        if self.watermark_for not in WATERMARK_FOR:
            raise CSMError(f"watermark_for must be one of {', '.join(WATERMARK_FOR)}, not {self.watermark_for!r}")
        for name, least in (("max_streams", 1), ("max_queue", 0), ("port", 0)):
            if getattr(self, name) < least:
                raise CSMError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.port > 65_535:
            raise CSMError(f"port must be at most 65535, not {self.port}")
        if self.unload_after is not None and not 0 < self.unload_after < math.inf:
            raise CSMError(f"unload_after must be positive, not {self.unload_after}")
        for name in TIMES:
            if not 0 < getattr(self, name) < math.inf:
                raise CSMError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in self.allowed_hosts:
            if not HOST_NAME.fullmatch(name):
                raise CSMError(f"an allowed host is a name without scheme and port, as tts.example.com; not {name!r}")
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            raise CSMError("an API key must be printable ASCII without spaces around it, and not empty")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    def allows_host(self, name: str | None) -> bool:
        """Whether a request may name this host, in lower case and without a port. None: it names none."""
        if name is None or not (self.is_local or self.allowed_hosts):
            return True
        return name in LOOPBACK or name in {allowed.lower() for allowed in self.allowed_hosts}

    def key_index(self, key: str) -> int | None:
        """Which key this is; None for a wrong one. The time it takes does not depend on how much of it is right."""
        digest, found = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest(), None
        for index, known in enumerate(self.api_keys):
            if hmac.compare_digest(digest, hashlib.sha256(known.encode()).digest()):
                found = index
        return found


def read_keys(given: Iterable[str], file: Path | None, environment: str | None) -> tuple[str, ...]:
    """API keys from the command line, from a file with one on each line, and from a comma-separated variable."""
    keys = list(given)
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise CSMError(f"{file}: API keys cannot be read: {error}") from error
    keys += [key.strip() for key in (environment or "").split(",")]
    unique = tuple(dict.fromkeys(key for key in keys if key and not key.startswith("#")))
    if file is not None and not unique:
        raise CSMError(f"{file} has no API key: put one on each line")
    return unique
