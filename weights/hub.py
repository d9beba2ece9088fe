"""Download a checkpoint from the Hugging Face hub with progress bars, or find it in the hub's cache.

The files of ``WEIGHTS`` are requested in order; the first one that the repository has decides the layout.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

import requests
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from csm.errors import CheckpointError, UnavailableError

# HF layout first: it includes the codec.
WEIGHTS = (
    "model.safetensors.index.json",
    "transformers.safetensors.index.json",
    "model.safetensors",
    "ckpt.pt",
)
OTHERWISE = "Without network, use --model tiny."


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local folder. Raises CheckpointError if there are none, or the index is invalid."""
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return [folder / shard for shard in shard_names(path)] if path.suffix == ".json" else [path]
    raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")


def shard_names(index: Path) -> list[str]:
    """File names of the shards in an index. Raises CheckpointError if the index is invalid."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid shard index; download it again: {error!r}") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: shard names must be plain file names, got {names}")
    return names


def fetch_checkpoint(repo: str, revision: str | None) -> Path:
    """Download config.json, tokenizer.json and the weights of a repository, and return their folder.

    Files in the cache are not downloaded again. Raises UnavailableError, which says what to do.
    """
    offline = not hub_answers()
    config = fetch(repo, "config.json", revision, offline)
    fetch(repo, "tokenizer.json", revision, offline)
    for name in WEIGHTS:
        try:
            path = _fetch(repo, name, revision, offline)
        except EntryNotFoundError:  # not in the repository or, offline, not in the cache: try the next
            continue
        if path.suffix == ".json":
            for shard in shard_names(path):
                fetch(repo, shard, revision, offline)
        return config.parent
    raise UnavailableError(
        f"{repo}: no weights in the repository or in the cache; expected one of {', '.join(WEIGHTS)}. {OTHERWISE}"
    )


def hub_answers() -> bool:
    """Whether the hub can be reached. Asked once, because its client retries for 20 seconds per file, cached or not."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException:
        return False
    return True


def fetch(repo: str, name: str, revision: str | None, offline: bool | None = None) -> Path:
    """One file of a repository; only from the cache if ``offline``. Raises UnavailableError, which says what to do."""
    try:
        return _fetch(repo, name, revision, not hub_answers() if offline is None else offline)
    except LocalEntryNotFoundError as error:
        raise UnavailableError(
            f"{repo}: {name} is not in the cache and the hub cannot be reached; connect once, or pass a local folder. "
            f"{OTHERWISE}"
        ) from error
    except EntryNotFoundError as error:
        raise UnavailableError(
            f"{repo}: the repository has no {name}; try another revision or unsloth/csm-1b"
        ) from error


def _fetch(repo: str, name: str, revision: str | None, offline: bool) -> Path:
    """``fetch``, but a file that does not exist raises EntryNotFoundError."""
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=offline))
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:
        raise UnavailableError(
            f"{repo} is gated: accept its licence on its page on the hub and run `hf auth login`, "
            f"or use the ungated mirror: --model unsloth/csm-1b. {OTHERWISE}"
        ) from error
    except RevisionNotFoundError as error:
        raise UnavailableError(
            f"{repo}: the repository has no revision {revision!r}; leave it out for the newest"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnavailableError(
            f"{repo!r} is neither a folder nor a repository on the hub (a private one needs `hf auth login`). "
            f"{OTHERWISE}"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: from hf_xet, which downloads large files
        raise UnavailableError(_reason(repo, name, error)) from error


def _reason(repo: str, name: str, error: OSError | RuntimeError) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"{repo}: no space left on the disk for {name}; free some, or set HF_HOME to a larger disk. {OTHERWISE}"
    if isinstance(error, HfHubHTTPError):
        return f"{repo}: the hub refused {name}: {error}. {OTHERWISE}"
    if isinstance(error, (requests.RequestException, RuntimeError)):
        return f"{repo}: the hub cannot be reached for {name}; try again later: {error}. {OTHERWISE}"
    return f"{repo}: {name} could not be saved; check the cache folder: {error}. {OTHERWISE}"
