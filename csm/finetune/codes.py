"""A store of Mimi codes, so that recordings are encoded once: safetensors shards in a folder.

A shard holds the codes (T, K) of up to SHARD_CLIPS recordings. A tensor's name is a hash of its clip's key (path, size
and time of change), so a changed recording is encoded again. Shards are written atomically, so an interrupted run keeps
the finished ones. The folder's name includes a hash of the codec's weights.
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
    """What a worker process needs to load the codec."""

    checkpoint: Checkpoint
    file: Path | None
    num_codebooks: int
    device: str = "cpu"

    def load(self) -> Codec:
        """The codec, on ``device``."""
        return Codec(self.checkpoint.codec_config, self.num_codebooks, self._state(), torch.device(self.device))

    def fingerprint(self) -> str:
        """A hash of the codec's weights and shape; codes are valid only for the codec that produced them."""
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
            raise CheckpointError(
                f"{path}: cannot read this shard of codes ({error}); delete it to encode its recordings again"
            ) from error

    def num_frames(self, clip: Clip) -> int | None:
        """The number of frames stored for a clip; None if it has no codes or its recording is missing."""
        return self._frames_of.get(tensor_name(clip)) if clip.audio.is_file() else None

    def missing(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips without codes, one for each recording."""
        by_name = {tensor_name(clip): clip for clip in clips}
        return [clip for name, clip in by_name.items() if name not in self._file_of]

    def add_shard(self, codes: dict[str, Tensor]) -> None:
        """Write a shard, named by a hash of its clips."""
        name = hashlib.sha256("".join(sorted(codes)).encode()).hexdigest()[:12]
        path = self.folder / f"codes-{name}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".part-{os.getpid()}")
        save_file(codes, temporary)
        os.replace(temporary, path)
        self._add(path)

    def read(self, clips: Sequence[Clip]) -> list[Tensor]:
        """The codes (T, K) of each clip, in order, int16 or (codebooks above 2**15) int32. Opens each shard once."""
        names = [tensor_name(clip) for clip in clips]
        wanted: dict[Path, list[str]] = {}
        for name in dict.fromkeys(names):
            wanted.setdefault(self._file_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in wanted.items():
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in inside}
        return [found[name] for name in names]


def tensor_name(clip: Clip) -> str:
    """The name of a clip's tensor in its shard: a hash of its key."""
    return hashlib.sha256(clip.key.encode()).hexdigest()[:24]


def encode_missing(store: CodeStore, clips: Sequence[Clip], jobs: int, progress: bool) -> None:
    """Encode the clips that have no codes yet, in ``jobs`` processes; each finished shard is stored at once."""
    # Sorted by size, because on a CPU every new length compiles its kernels.
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
    context = multiprocessing.get_context("spawn")  # forked workers would share this process's threads and GPU context
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=_init_worker, initargs=(source, threads)) as pool:
        for done in as_completed([pool.submit(_encode_in_worker, shard) for shard in shards]):
            yield done.result()


_codec: Codec | None = None  # set in worker processes only


def _init_worker(source: CodecSource, threads: int) -> None:
    global _codec
    torch.set_num_threads(threads)
    _codec = source.load()


def _encode_in_worker(shard: list[Clip]) -> dict[str, Tensor]:
    assert _codec is not None
    return _encode(_codec, shard)


def _encode(codec: Codec, shard: Sequence[Clip]) -> dict[str, Tensor]:
    codes = {}
    for clip in shard:
        codes_TK = codec.encode(*read_audio(clip.audio))
        narrow = torch.int16 if codec.config.codebook_size <= 2**15 else torch.int32
        codes[tensor_name(clip)] = codes_TK.to(narrow).contiguous()
    return codes
