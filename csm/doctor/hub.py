"""The Hugging Face hub: what is cached, and whether the rest can be downloaded."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import requests
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from csm.doctor.finding import ERROR, OK, WARNING, Finding
from csm.generator import DEFAULT_MODEL
from csm.weights.hub import (
    MIMI_BYTES,
    MIMI_FILE,
    MIMI_REPO,
    SINGLE_FILE,
    cached,
    cached_weights,
    root_cause,
    size_in_words,
)

MIRROR = "unsloth/csm-1b"  # ungated
REQUEST_SECONDS = 4
ALL_SECONDS = 10  # for all requests: name resolution has no timeout of its own


@dataclass(frozen=True)
class HubProbe:
    """What the hub answers. ``failure`` is empty if it can be reached; None means that the question was not asked."""

    cached: tuple[str, ...] = ()  # of DEFAULT_MODEL and MIRROR
    codec_missing: bool = False  # the cached weights contain no codec, and Kyutai's is not in the cache
    offline: bool = False  # HF_HUB_OFFLINE
    failure: str = ""
    has_token: bool = False
    user: str | None = None
    licence: bool | None = None


def probe_hub() -> HubProbe:
    """Look into the cache, else ask the hub for at most ``ALL_SECONDS``. ``HF_HUB_OFFLINE`` forbids to ask."""
    found = tuple(repo for repo in (DEFAULT_MODEL, MIRROR) if is_cached(repo))
    if found or constants.HF_HUB_OFFLINE:
        codec_missing = bool(found) and needs_codec(found[0]) and cached(MIMI_REPO, MIMI_FILE) is None
        return HubProbe(found, codec_missing, offline=constants.HF_HUB_OFFLINE)
    answers: list[tuple[str, str | None, bool | None]] = []
    token = get_token()
    thread = threading.Thread(target=lambda: answers.append(ask(token)), daemon=True)
    thread.start()
    thread.join(ALL_SECONDS)
    failure, user, licence = answers[0] if answers else (f"no answer in {ALL_SECONDS} s", None, None)
    return HubProbe((), False, False, failure, token is not None, user, licence)


def is_cached(repo: str) -> bool:
    """Whether a checkpoint is completely in the cache."""
    return bool(cached_weights(repo) and cached(repo, "config.json") and cached(repo, "tokenizer.json"))


def needs_codec(repo: str) -> bool:
    """Whether the cached weights are in Sesame's layout, which has no codec. Only DEFAULT_MODEL has both layouts."""
    name = cached_weights(repo)[0].name
    return name == "ckpt.pt" or (name == SINGLE_FILE and repo == DEFAULT_MODEL)


def ask(token: str | None) -> tuple[str, str | None, bool | None]:
    """Why the hub cannot be reached, or ""; the user of the token; whether they accepted the model's licence."""
    try:
        requests.head(constants.ENDPOINT, timeout=REQUEST_SECONDS)
        if token is None:
            return "", None, None
        user = _user(token)
        return "", user, None if user is None else _licence(token)
    except (OSError, HfHubHTTPError) as error:  # requests' errors are OSErrors
        return f"{type(error).__name__}: {root_cause(error)}"[:160], None, None


def _user(token: str) -> str | None:
    try:
        return str(HfApi().whoami(token)["name"])
    except HfHubHTTPError:  # an expired or revoked token
        return None


def _licence(token: str) -> bool:
    try:
        HfApi().auth_check(DEFAULT_MODEL, token=token)
    except GatedRepoError:
        return False
    return True


def check_hub(probe: HubProbe) -> list[Finding]:
    """The cached checkpoint, or what is in the way of its download."""
    if probe.cached:
        return [_cached(probe)]
    missing = "CSM-1B is not in the cache"
    folder = "pass a folder with the files to --model; until then use --model tiny"
    if probe.offline:
        message = f"{missing}, and HF_HUB_OFFLINE forbids to download it"
        return [Finding("checkpoint", ERROR, message, f"unset HF_HUB_OFFLINE, or {folder}")]
    if probe.failure:
        message = f"{missing}, and {constants.ENDPOINT} cannot be reached: {probe.failure}"
        return [Finding("checkpoint", ERROR, message, f"check network, proxy and HF_ENDPOINT, or {folder}")]
    return [Finding("checkpoint", OK, f"{missing}; it is downloaded on first use"), _access(probe)]


def _cached(probe: HubProbe) -> Finding:
    """The cached checkpoint, and whether its codec is there too."""
    text = f"{probe.cached[0]} is in the cache"
    advice = "" if probe.cached[0] == DEFAULT_MODEL else f"pass --model {probe.cached[0]}"
    if not probe.codec_missing:
        return Finding("checkpoint", OK, f"{text} with its codec", advice)
    text = f"{text}, but not the codec ({MIMI_REPO}, {size_in_words(MIMI_BYTES)})"
    file = "pass the file to --codec"
    if probe.offline:
        return Finding("checkpoint", ERROR, f"{text}; HF_HUB_OFFLINE forbids to download it", f"unset it, or {file}")
    return Finding("checkpoint", WARNING, text, f"run csm generate once with a network, or {file}")


def _access(probe: HubProbe) -> Finding:
    """Whether the gated model may be downloaded."""
    mirror = f"or use the ungated mirror: --model {MIRROR}"
    if not probe.has_token:
        return Finding("licence", WARNING, f"not logged in, and {DEFAULT_MODEL} is gated", f"hf auth login, {mirror}")
    if probe.user is None:
        return Finding("licence", WARNING, "the hub refuses the saved token", f"hf auth login, {mirror}")
    if not probe.licence:
        advice = f"accept it on {constants.ENDPOINT}/{DEFAULT_MODEL}, {mirror}"
        return Finding("licence", WARNING, f"{probe.user} has not accepted the licence of {DEFAULT_MODEL}", advice)
    return Finding("licence", OK, f"logged in as {probe.user}, who has accepted the licence of {DEFAULT_MODEL}")
