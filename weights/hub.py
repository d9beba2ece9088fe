"""Files of a checkpoint on the Hugging Face hub: downloaded with progress bars, or found in its cache.

Which weights a repository offers is found by asking for them in the order of ``WEIGHTS``.
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

# The HF layout first: it brings its own codec.
WEIGHTS = (
    "model.safetensors.index.json",
    "transformers.safetensors.index.json",
    "model.safetensors",
    "ckpt.pt",
)
OTHERWISE = "Or run without it: --model tiny needs no network."


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local folder. Raises CheckpointError if there are none, or a shard is missing."""
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return [folder / shard for shard in shard_names(path)] if path.suffix == ".json" else [path]
    raise CheckpointError(f"{folder}: no weights; looked for {', '.join(WEIGHTS)}")


def shard_names(index: Path) -> list[str]:
    """File names of the shards that an index lists."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: a shard's name is not a plain file name: {names}")
    return names


def fetch_checkpoint(repo: str, revision: str | None) -> Path:
    """Have config.json, tokenizer.json and the weights of a repository here; return their folder.

    Raises UnavailableError, which says what to do.
    """
    offline = not hub_answers()
    config = fetch(repo, "config.json", revision, offline)
    fetch(repo, "tokenizer.json", revision, offline)
    for name in WEIGHTS:
        try:
            path = _fetch(repo, name, revision, offline)
        except EntryNotFoundError:  # not offered; or offline and not in the cache, where a later one may be
            continue
        if path.suffix == ".json":
            for shard in shard_names(path):
                fetch(repo, shard, revision, offline)
        return config.parent
    raise UnavailableError(f"{repo}: no weights there or in the cache; looked for {', '.join(WEIGHTS)}. {OTHERWISE}")


def hub_answers() -> bool:
    """Whether the hub can be reached. Its client would try for 20 seconds for each file, cached or not."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException:
        return False
    return True


def fetch(repo: str, name: str, revision: str | None, offline: bool | None = None) -> Path:
    """One file of a repository, from the cache alone if ``offline``. Raises UnavailableError, which says what to do."""
    try:
        return _fetch(repo, name, revision, not hub_answers() if offline is None else offline)
    except LocalEntryNotFoundError as error:
        raise UnavailableError(
            f"{repo}: {name} is not in the cache and the hub cannot be reached; connect once, or give a folder. "
            f"{OTHERWISE}"
        ) from error
    except EntryNotFoundError as error:
        raise UnavailableError(f"{repo}: the repository has no {name}") from error


def _fetch(repo: str, name: str, revision: str | None, offline: bool) -> Path:
    """``fetch``, with a file that is not to be had left as EntryNotFoundError."""
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
        raise UnavailableError(f"{repo}: no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnavailableError(
            f"neither a folder nor a repository on the hub is called {repo!r} (a private one needs `hf auth login`). "
            f"{OTHERWISE}"
        ) from error
    except (OSError, RuntimeError) as error:  # hf_xet, the hub's downloader of large files, raises RuntimeError
        raise UnavailableError(_reason(repo, name, error)) from error


def _reason(repo: str, name: str, error: OSError | RuntimeError) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"no space left on the disk for {name} of {repo}: free some, or set HF_HOME to a larger one. {OTHERWISE}"
    if isinstance(error, HfHubHTTPError):
        return f"{repo}: the hub refused {name}: {error}. {OTHERWISE}"
    if isinstance(error, (requests.RequestException, RuntimeError)):
        return f"{repo}: the hub cannot be reached for {name}: {error}. {OTHERWISE}"
    return f"{repo}: {name} could not be stored: {error}. {OTHERWISE}"
