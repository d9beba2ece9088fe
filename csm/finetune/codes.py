"""Recordings to Mimi codes, once: sharded safetensors that later runs read, and that a killed run resumes.

A shard holds some recordings' codes (T, K), each under a hash of its clip's key, so that a recording which changed is
encoded again. Shards appear whole or not at all. A codec of other weights has other shards.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from csm.audio import read_audio
from csm.codec import Codec
from csm.errors import CheckpointError
from csm.finetune.manifest import Clip
from csm.weights import Checkpoint, read_codec

SHARD_CLIPS = 128


@dataclass(frozen=True)
class CodecSource:
    """Whose codec: what a process of its own needs to load it."""

    checkpoint: Checkpoint
    file: Path | None
    num_codebooks: int
    device: str = "cpu"

    def load(self) -> Codec:
        """The codec."""
        return Codec(self.checkpoint.codec_config, self.num_codebooks, self._state(), torch.device(self.device))

    def fingerprint(self) -> str:
        """A hash of its weights and shape: codes of one codec mean nothing to another."""
        digest = hashlib.sha256(repr((self.num_codebooks, self.checkpoint.codec_config)).encode())
        for name, tensor in sorted(self._state().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def _state(self) -> dict[str, Tensor]:
        return read_codec(self.checkpoint, self.file, torch.device(self.device))


class CodeStore:
    """The shards of one codec in a folder."""

    def __init__(self, folder: Path, source: CodecSource):
        self.source = source
        self.frame_rate = source.checkpoint.codec_config.frame_rate
        self.folder = folder / f"mimi-{source.fingerprint()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file_of: dict[str, Path] = {}
        self._frames_of: dict[str, int] = {}
        for path in sorted(self.folder.glob("codes-*.safetensors")):
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self._file_of[name], self._frames_of[name] = path, file.get_slice(name).get_shape()[0]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a shard that can be read ({error}); remove it") from error

    def num_frames(self, clip: Clip) -> int | None:
        """How many frames of codes there are of a clip; None without any, or without its recording."""
        return self._frames_of.get(name_of(clip)) if clip.audio.is_file() else None

    def missing(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips without codes, one of each recording."""
        by_name = {name_of(clip): clip for clip in clips}
        return [clip for name, clip in by_name.items() if name not in self._file_of]

    def add_shard(self, codes: dict[str, Tensor]) -> None:
        """Write a shard under a name of its own."""
        name = hashlib.sha256("".join(sorted(codes)).encode()).hexdigest()[:12]
        path = self.folder / f"codes-{name}.safetensors"
        aside = path.with_suffix(f".part-{os.getpid()}")
        save_file(codes, aside)
        os.replace(aside, path)
        self._add(path)

    def read(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Codes (T, K) int16 of each clip, in order; each shard is opened once."""
        names = [name_of(clip) for clip in clips]
        wanted: dict[Path, list[str]] = {}
        for name in dict.fromkeys(names):
            wanted.setdefault(self._file_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in wanted.items():
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in inside}
        return [found[name] for name in names]


def name_of(clip: Clip) -> str:
    """The name of a clip's tensor: a hash of its key."""
    return hashlib.sha256(clip.key.encode()).hexdigest()[:24]


def encode_missing(store: CodeStore, clips: Sequence[Clip], jobs: int, progress: bool) -> None:
    """Encode what the store has not, ``jobs`` processes at a time; a shard is kept as soon as it is done."""
    # Of like length one after the other: on a CPU a new length costs the making of its kernels.
    missing = sorted(store.missing(clips), key=lambda clip: clip.audio.stat().st_size)
    size = min(SHARD_CLIPS, max(1, len(missing) // (4 * jobs)))
    shards = [missing[first : first + size] for first in range(0, len(missing), size)]
    bar = tqdm(desc="encoding recordings", total=len(missing), unit="clip", disable=None if progress else True)
    with bar:
        for codes in _encode_shards(store.source, shards, min(jobs, len(shards))):
            store.add_shard(codes)
            bar.update(len(codes))


def _encode_shards(source: CodecSource, shards: list[list[Clip]], jobs: int) -> Iterator[dict[str, Tensor]]:
    if jobs <= 1:
        if shards:
            codec = source.load()
            yield from (_encode(codec, shard) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the threads and the GPU of this process
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(source, threads)) as pool:
        for done in as_completed([pool.submit(_encode_here, shard) for shard in shards]):
            yield done.result()


_codec: Codec | None = None  # of a process that encodes


def _start(source: CodecSource, threads: int) -> None:
    global _codec
    torch.set_num_threads(threads)
    _codec = source.load()


def _encode_here(shard: list[Clip]) -> dict[str, Tensor]:
    assert _codec is not None
    return _encode(_codec, shard)


def _encode(codec: Codec, shard: Sequence[Clip]) -> dict[str, Tensor]:
    codes = {}
    for clip in shard:
        codes_TK = codec.encode(*read_audio(clip.audio))
        narrow = torch.int16 if codec.config.codebook_size <= 2**15 else torch.int32
        codes[name_of(clip)] = codes_TK.to(narrow).contiguous()
    return codes
