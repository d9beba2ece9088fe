"""The server on a Ray cluster: ``serve run csm.serve.ray:app model=sesame/csm-1b max_replicas=4`` (docs/scale.md).

Each replica is the same FastAPI app with a model of its own, on one GPU. Needs the extra ``ray``.

A session's requests go to one replica, which has its keys and values, if the client names the session in the header
``x-session-id``. Its turns are kept in an actor, so that any other replica can continue it when that one has gone.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import pickle
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from csm import CSMError, Segment
from csm.serve import command
from csm.serve.app import create_app
from csm.serve.errors import ApiError
from csm.serve.service import MAX_SESSIONS, SESSION_SECONDS, Sessions

NAMESPACE = "serve"  # of the store; Ray keeps its replicas there too
SESSION_HEADER = b"x-session-id"
STORE = "csm-sessions"
STORE_SECONDS = 5.0  # that the store may take to answer
SPARE_REQUESTS = 64  # of a replica, beyond those that run and wait: /health, /metrics, voices
AUTOSCALE_AT = 0.75  # running requests of a replica, as a share of its streams, that another replica is started at
_UNAVAILABLE = "sessions are not available now: try again"
CLUSTER_OPTIONS = ("min_replicas", "max_replicas", "num_gpus", "num_cpus")

Result = TypeVar("Result")


class SessionStore:
    """The turns of all replicas' sessions, as bytes. Runs as an actor of which there is one.

    A session is in use from ``begin`` until ``end`` of the same replica, until ``lease`` seconds have passed, or until
    that replica has gone.
    """

    def __init__(self, max_sessions: int = MAX_SESSIONS):
        self._max_sessions = max_sessions
        self._turns: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._leases: dict[str, tuple[str, float]] = {}

    def begin(self, key: str, replica: str, lease: float) -> bytes | None:
        """The session's turns, ``b""`` for a new one; None if it is in use."""
        now = time.monotonic()
        holder, ends = self._leases.get(key, ("", 0.0))
        if now < ends and self.is_alive(holder):
            return None
        for stale in [name for name, (used, _) in self._turns.items() if used < now - SESSION_SECONDS]:
            del self._turns[stale]
        self._leases[key] = replica, now + lease
        return self._turns.get(key, (0.0, b""))[1]

    def end(self, key: str, replica: str, turns: bytes | None) -> None:
        """The session is no longer in use; None leaves its turns as they are."""
        if self._leases.get(key, ("", 0.0))[0] != replica:
            return  # its lease ran out, and another replica has it
        del self._leases[key]
        if turns is None:
            return
        self._turns[key] = time.monotonic(), turns
        self._turns.move_to_end(key)
        while len(self._turns) > self._max_sessions:
            self._turns.popitem(last=False)

    def is_alive(self, replica: str) -> bool:
        """Whether a replica still runs."""
        try:
            ray.get_actor(replica, namespace=NAMESPACE)
        except ValueError:
            return False
        return True


class SharedSessions(Sessions):
    """Sessions whose turns are kept in the store. ``lease`` is how long a request may take."""

    def __init__(self, store: Any, replica: str, lease: float):
        super().__init__()
        self._store = store
        self._replica = replica
        self._lease = lease

    async def begin(self, key: str) -> list[Segment]:
        """The session's turns so far. Raises ApiError 409 if it is in use, 503 if the store does not answer."""
        turns = await self._ask(key)
        if turns is None:
            raise ApiError(409, "a request of this session is still running", "session", "session_busy")
        self._turns[key] = time.monotonic(), pickle.loads(turns) if turns else []
        return await super().begin(key)

    async def _ask(self, key: str) -> bytes | None:
        """The store's answer to ``begin``. If nobody waits for it any more, the session is not left in use."""
        answer = asyncio.ensure_future(_result(self._store.begin.remote(key, self._replica, self._lease)))
        try:
            done, _ = await asyncio.wait({answer}, timeout=STORE_SECONDS)
        except asyncio.CancelledError:  # the client has gone
            answer.add_done_callback(partial(self._give_back, key))
            raise
        if not done:
            answer.add_done_callback(partial(self._give_back, key))
            raise ApiError(503, _UNAVAILABLE, code="sessions_unavailable")
        try:
            return answer.result()
        except RayActorError as error:
            raise ApiError(503, _UNAVAILABLE, code="sessions_unavailable") from error

    def _give_back(self, key: str, answer: asyncio.Future[bytes | None]) -> None:
        if not answer.cancelled() and answer.exception() is None and answer.result() is not None:
            self._store.end.remote(key, self._replica, None)

    def end(self, key: str, turn: Segment | None, max_positions: int) -> int:
        """Add a turn, if it was generated to its end, and hand the turns to the store; how many turns were left out."""
        num_evicted = super().end(key, turn, max_positions)
        turns = self._turns.pop(key, (0.0, []))[1]
        self._store.end.remote(key, self._replica, None if turn is None else pickle.dumps(turns))
        return num_evicted


async def _result(reference: Awaitable[Result]) -> Result:
    """A reference's value: Ray's references can be awaited, but are no coroutines."""
    return await reference


class SessionRouter(RequestRouter):
    """Requests of a session go to one replica; others to the one of two that has fewer requests.

    A session's replica is the one whose hash with the session is the largest (rendezvous hashing), so a replica that
    comes or goes moves no other replica's sessions.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas to try, one group after the other."""
        if not candidate_replicas:
            return []
        session = b"" if pending_request is None else session_of(pending_request)
        if session:
            return [[each] for each in sorted(candidate_replicas, key=lambda each: rank(session, each), reverse=True)]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def session_of(request: PendingRequest) -> bytes:
    """The value of the header ``x-session-id``, empty without one. Ray's proxy sends a pickled ASGI scope."""
    sent = pickle.loads(request.args[0]) if request.args and isinstance(request.args[0], bytes) else None
    headers = getattr(sent, "asgi_scope", {}).get("headers", ())
    return next((value for name, value in headers if name == SESSION_HEADER), b"")


def rank(session: bytes, replica: RunningReplica) -> bytes:
    """The hash of a session and a replica."""
    return hashlib.sha256(replica.replica_id.unique_id.encode() + b"\0" + session).digest()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CSMError(f"{message}; csm.serve.ray takes the options of csm serve, and {', '.join(CLUSTER_OPTIONS)}")


def parse(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """Options of ``csm serve`` by their names, ``max_streams=16``, and those of the cluster. Raises CSMError."""
    parser = _Parser(prog="csm.serve.ray", add_help=False, allow_abbrev=False)
    command.add_arguments(parser)
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int)
    parser.add_argument("--num-gpus", type=float)
    parser.add_argument("--num-cpus", type=float, default=1.0)
    words: list[str] = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        is_flag = str(value).lower() in ("true", "false")
        words += ([option] if str(value).lower() == "true" else []) if is_flag else [f"{option}={value}"]
    args = parser.parse_args(words)
    args.max_replicas = max(args.min_replicas, args.max_replicas or args.min_replicas)
    if args.num_gpus is None:
        args.num_gpus = 0.0 if args.device == "cpu" else 1.0
    return args


def app(arguments: dict[str, str]) -> serve.Application:
    """The application, for ``serve run`` or ``serve.run``. Raises CSMError for an option that does not exist."""
    args = parse(arguments)
    settings = command.read_settings(args)

    def build() -> FastAPI:
        """Runs in each replica. The keys are read there, from the replica's own files and environment."""
        service = command.open_service(args, command.read_settings(args))
        options = {"name": STORE, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
        store = ray.remote(SessionStore).options(get_if_exists=True, **options).remote()
        ray.get(store.__ray_ready__.remote())  # it loads as long as a replica does
        replica = serve.get_replica_context().replica_id.to_full_id_str()
        service.sessions = SharedSessions(store, replica, settings.request_timeout)
        return create_app(service)

    scale: dict[str, Any] = {"num_replicas": args.min_replicas}
    if args.max_replicas > args.min_replicas:
        target = max(1.0, AUTOSCALE_AT * settings.max_streams)
        limits = {"min_replicas": args.min_replicas, "max_replicas": args.max_replicas}
        scale = {"autoscaling_config": {**limits, "target_ongoing_requests": target}}
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="csm",
        ray_actor_options={"num_gpus": args.num_gpus, "num_cpus": args.num_cpus},
        max_ongoing_requests=settings.max_streams + settings.max_queue + SPARE_REQUESTS,
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),
        graceful_shutdown_timeout_s=settings.request_timeout,
        health_check_period_s=5,
        **scale,
    )
    return deployment.bind()
