"""Find a checkpoint in the cache of the Hugging Face hub, or download it.

A checkpoint in the cache is used without a network request. Otherwise one request lists the repository's files, the
layout with the fewest bytes to download is chosen, free disk space is checked, and broken downloads are resumed.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from csm.errors import CheckpointError, UnavailableError

HF_INDEX = "transformers.safetensors.index.json"  # in sesame/csm-1b: the HF layout beside Sesame's
SINGLE_FILE = "model.safetensors"
# The files that weights begin with, in the order in which a folder is searched for them.
WEIGHTS = ("model.safetensors.index.json", HF_INDEX, SINGLE_FILE, "ckpt.pt")
OPTIONAL = ("generation_config.json", "pronunciation.json.gz")  # downloaded where a repository has them
MIMI_REPO = "kyutai/moshiko-pytorch-bf16"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
MIMI_BYTES = 384_644_900
ATTEMPTS = 5  # of a download that breaks off
LIST_SECONDS = 10
OTHERWISE = "Without network, use --model tiny."
MISSING = {
    "config.json": "the repository has no config.json; is it a CSM model?",
    "tokenizer.json": "the repository has no tokenizer.json, as in early revisions of sesame/csm-1b; use the newest "
    "revision, or copy the tokenizer.json of unsloth/csm-1b and the other files into a folder, and pass that folder",
}


class _NotFoundError(UnavailableError):
    """The repository lists a file, but answers that it does not exist."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and its SHA-256 where the hub stores it as a large file."""

    num_bytes: int
    sha256: str | None = None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local folder. Raises CheckpointError if there are none, or the index is invalid."""
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return _with_shards(path)
    raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")


def _with_shards(path: Path) -> list[Path]:
    """The shards of an index, or the file itself."""
    return [path.parent / shard for shard in shard_names(path)] if path.suffix == ".json" else [path]


def shard_names(index: Path) -> list[str]:
    """File names of the shards in an index. Raises CheckpointError if the index is invalid."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid shard index; download it again: {error!r}") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: shard names must be plain file names, got {names}")
    return names


def cached(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a repository in the cache, or None. Never asks the network."""
    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def cached_weights(repo: str, revision: str | None = None) -> list[Path]:
    """The weight files of the first layout that is completely in the cache; empty if none is."""
    for name in WEIGHTS:
        path = cached(repo, name, revision)
        files = _with_shards(path) if path else []
        if files and all(file.is_file() for file in files):
            return files
    return []


def fetch_checkpoint(repo: str, revision: str | None, progress: bool = True) -> tuple[Path, list[Path]]:
    """The folder of a repository's config.json and tokenizer.json, and its weight files. Downloads what is missing.

    Raises UnavailableError, which says what to do.
    """
    with _explained(repo, "config.json", revision):  # an invalid name is found here
        config = cached(repo, "config.json", revision)
    weights = cached_weights(repo, revision)
    if weights and config and cached(repo, "tokenizer.json", revision):
        return config.parent, weights
    remote = _list_files(repo, revision, "the checkpoint")
    gguf = sorted(name for name in remote if name.endswith(".gguf"))
    if gguf and not remote.keys() & set(WEIGHTS):
        raise UnavailableError(
            f"{repo}: its weights are GGUF files ({', '.join(gguf[:3])}); download one with "
            f"`hf download {repo} {gguf[0]}`, and pass its path"
        )
    with _progress_bars(progress):
        for name in ("config.json", "tokenizer.json"):
            if name not in remote:
                raise UnavailableError(f"{repo}: {MISSING[name]}")
            _download(repo, name, revision)
        for name in OPTIONAL:
            if name in remote:
                _download(repo, name, revision)
        names = [file.name for file in weights]
        codec = 0
        if not names or not remote.keys() >= set(names):
            names, codec = _choose_layout(repo, revision, remote)
        _announce(repo, revision, {name: remote[name] for name in names}, codec, progress)
        files = [_download(repo, name, revision) for name in names]
    return files[0].parent, files


def _choose_layout(repo: str, revision: str | None, remote: dict[str, RemoteFile]) -> tuple[list[str], int]:
    """Names of the weight files of the layout with the fewest bytes to download, and the bytes of a separate codec."""
    choices = []
    missing = ""
    for order, name in enumerate(name for name in WEIGHTS if name in remote):
        try:
            names = shard_names(_download(repo, name, revision)) if name.endswith(".json") else [name]
        except _NotFoundError:
            missing = f"; it lists {name}, but does not have it"
            continue
        absent = [shard for shard in names if shard not in remote]
        if absent:
            missing = f"; {name} lists {absent[0]}, which the repository does not have"
            continue
        needed = sum(remote[file].num_bytes for file in names if not cached(repo, file, revision))
        codec = _separate_codec_bytes(name, remote)
        choices.append((needed + codec, order, names, codec))
    if not choices:
        raise UnavailableError(f"{repo}: no weights; expected one of {', '.join(WEIGHTS)}{missing}. {OTHERWISE}")
    *_, names, codec = min(choices)
    return names, codec


def _separate_codec_bytes(name: str, remote: dict[str, RemoteFile]) -> int:
    """Bytes of Kyutai's codec file, if this layout contains no codec and the file is not in the cache.

    A single model.safetensors is Sesame's layout, without a codec, where the repository has the HF layout too.
    """
    sesame = name == "ckpt.pt" or (name == SINGLE_FILE and HF_INDEX in remote)
    return MIMI_BYTES if sesame and not cached(MIMI_REPO, MIMI_FILE) else 0


def fetch(repo: str, name: str, revision: str | None = None, progress: bool = True) -> Path:
    """One file of a repository, from the cache or downloaded. Raises UnavailableError, which says what to do."""
    path = cached(repo, name, revision)
    if path is not None:
        return path
    remote = _list_files(repo, revision, name)
    if name not in remote:
        raise UnavailableError(f"{repo}: the repository has no {name}; try another revision")
    with _progress_bars(progress):
        _announce(repo, revision, {name: remote[name]}, 0, progress)
        return _download(repo, name, revision)


def _list_files(repo: str, revision: str | None, wanted: str) -> dict[str, RemoteFile]:
    """The files of a repository. The first request for what is ``wanted``, so an unreachable hub is found here."""
    with _explained(repo, wanted, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=LIST_SECONDS)
    return {
        file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
    }


def _announce(repo: str, revision: str | None, remote: dict[str, RemoteFile], codec_bytes: int, progress: bool) -> None:
    """Say what is downloaded. Raises UnavailableError if the disk has no room for it."""
    needed = sum(
        file.num_bytes - _partial_bytes(repo, file) for name, file in remote.items() if not cached(repo, name, revision)
    )
    if not needed:
        return
    cache = Path(constants.HF_HUB_CACHE)
    free = free_bytes(cache)
    if free < needed + codec_bytes:
        raise UnavailableError(
            f"{repo}: {size_in_words(needed + codec_bytes)} must be downloaded, but the disk of {cache} has "
            f"{size_in_words(free)} free; free some, or set HF_HOME to a folder on a larger disk. {OTHERWISE}"
        )
    codec = f"; the codec, {size_in_words(codec_bytes)}, follows when audio is first needed" if codec_bytes else ""
    if progress:
        tqdm.write(f"Downloading {repo}: {size_in_words(needed)} to {cache}{codec}", file=sys.stderr)


def _partial_bytes(repo: str, file: RemoteFile) -> int:
    """Bytes of a file that an interrupted download left in the cache."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    partial = folder / f"{file.sha256}.incomplete"
    return min(partial.stat().st_size, file.num_bytes) if partial.is_file() else 0


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_in_words(num_bytes: int) -> str:
    """6211186784 -> "6.21 GB", 17209980 -> "17.2 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 100e6 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the bars of huggingface_hub's downloads, which are on unless its user has disabled them."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _download(repo: str, name: str, revision: str | None) -> Path:
    """One file, resumed where the connection breaks. A listed file that cannot be found raises _NotFoundError."""
    for attempt in range(1, ATTEMPTS + 1):
        with _explained(repo, name, revision):
            try:
                return Path(hf_hub_download(repo, name, revision=revision))
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt == ATTEMPTS:
                    raise
    raise AssertionError("unreachable")


@contextmanager
def _explained(repo: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into UnavailableError."""
    try:
        yield
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError: the network failed
        raise UnavailableError(_unreachable(repo, name, error.__cause__ or error)) from error
    except EntryNotFoundError as error:
        raise _NotFoundError(f"{repo}: the repository lists {name}, but does not have it; try again later") from error
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


def _unreachable(repo: str, name: str, error: BaseException) -> str:
    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached: {root_cause(error)}"
    return (
        f"{repo}: {name} is not in the cache, and {why}; run it again with a network (what was downloaded is kept), or "
        f"pass a local folder. {OTHERWISE}"
    )


def root_cause(error: BaseException) -> str:
    """In one line, the error of the socket below the errors of urllib3 and requests."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return " ".join(str(error).split()) or type(error).__name__


def _reason(repo: str, name: str, error: OSError | RuntimeError) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"{repo}: no space left on the disk for {name}; free some, or set HF_HOME to a larger disk. {OTHERWISE}"
    if isinstance(error, HfHubHTTPError):
        return f"{repo}: the hub refused {name}: {error}. {OTHERWISE}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return (
            f"{repo}: the download of {name} broke off {ATTEMPTS} times; run it again to resume where it stopped. "
            f"{OTHERWISE}"
        )
    if isinstance(error, (ConnectionError, requests.RequestException, RuntimeError)):
        return _unreachable(repo, name, error)
    return f"{repo}: {name} could not be saved; check the cache folder: {error}. {OTHERWISE}"
