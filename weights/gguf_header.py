"""Read the header of a GGUF file: its metadata, and the name, shape, type and place of every tensor.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length and count of the file is checked
against a limit and against the bytes that are left before anything is allocated or read. ``gguf.GGUFReader`` is not
used, because it trusts them.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from csm.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRING = 64 << 20  # bytes; the largest string of a CSM file is its tokenizer, 17 MB
MAX_HEADER = 256 << 20  # bytes of metadata and tensor infos
MAX_COUNT = 1 << 14  # metadata keys; tensors
MAX_ARRAY = 1 << 20  # strings of an array
MAX_NAME = 1 << 10  # bytes of a key or a tensor's name
MAX_DIMS = 4
SHORT = 1 << 12  # bytes that are skipped by reading them, which keeps the file's buffer
STRING, ARRAY = 8, 9
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # value type: format of struct
DOWNLOAD = "download the file again"


@dataclass(frozen=True)
class GGMLType:
    """A type of tensor: ``block`` values along the last dimension take ``num_bytes`` bytes."""

    name: str
    block: int
    num_bytes: int


TYPES = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    30: GGMLType("BF16", 1, 2),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file. ``shape`` is PyTorch's, slowest dimension first. ``offset`` is from the file's start."""

    shape: tuple[int, ...]
    type: GGMLType
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.num_bytes


@dataclass(frozen=True)
class Header:
    """``metadata`` has scalars and strings. Arrays are checked and skipped."""

    metadata: dict[str, str | int | float | bool]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic number, or is called .gguf and so was meant to."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Parse and check the header. Raises CheckpointError, which names the file and the key or tensor."""
    try:
        with path.open("rb") as file:
            return _Parser(path, file).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Parser:
    """Reads a header front to back. ``what`` names what is read, for messages."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._size = path.stat().st_size
        self._offset = 0

    def header(self) -> Header:
        self._check_start()
        num_tensors, num_keys = self._count("the tensors", 33), self._count("the metadata", 14)
        metadata: dict[str, str | int | float | bool] = {}
        seen: set[str] = set()
        for index in range(num_keys):
            key = self._string(f"metadata key {index + 1} of {num_keys}", MAX_NAME)
            if key in seen:
                self._fail(f"duplicate metadata key {key!r}")
            seen.add(key)
            value = self._value(f"metadata {key!r}")
            if value is not None:
                metadata[key] = value
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            self._fail(f"general.alignment must be a power of two, not {alignment!r}")
        infos = [self._tensor_info(index, num_tensors) for index in range(num_tensors)]
        return Header(metadata, self._placed(infos, -(-self._offset // alignment) * alignment, alignment))

    def _check_start(self) -> None:
        start = self._file.read(8)
        if start[:4] != MAGIC:
            kinds = {b"PK\x03\x04": "a zip or .pt file", b"vers": "a Git LFS pointer", b"<!DO": "a web page"}
            is_safetensors = start[2:8] == b"\0\0\0\0\0\0"
            kind = "a .safetensors file" if is_safetensors else kinds.get(start[:4], "another kind of file")
            self._fail(f"not a GGUF file, but {kind if start else 'empty'}; {DOWNLOAD}")
        if len(start) < 8:
            self._fail(f"truncated in the version; {DOWNLOAD}")
        self._offset = 8
        version = int.from_bytes(start[4:], "little")
        if version not in VERSIONS:
            if int.from_bytes(start[4:], "big") in VERSIONS:
                self._fail("a big-endian file, which is not supported; convert the original checkpoint")
            self._fail(f"GGUF version {version} is not supported; {' and '.join(map(str, VERSIONS))} are")

    def _value(self, what: str) -> str | int | float | bool | None:
        """A scalar or a string; None for an array, which is skipped."""
        kind = self._integer("I", what)
        if kind == STRING:
            return self._string(what, MAX_STRING)
        if kind == ARRAY:
            self._skip_array(what)
            return None
        if kind not in SCALARS:
            self._fail(f"{what}: unknown value type {kind}; {DOWNLOAD}")
        data = self._read(struct.calcsize(SCALARS[kind]), what)
        if SCALARS[kind] == "?" and data not in (b"\0", b"\1"):
            self._fail(f"{what}: a boolean must be 0 or 1, not {data[0]}")
        return struct.unpack(f"<{SCALARS[kind]}", data)[0]

    def _skip_array(self, what: str) -> None:
        kind, count = self._integer("I", what), self._integer("Q", what)
        if kind in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[kind]), what)
        elif kind == STRING:
            if count > MAX_ARRAY:
                self._fail(f"{what}: an array of {count} strings; at most {MAX_ARRAY} are supported")
            self._need(8 * count, what)
            for _ in range(count):
                self._skip(self._integer("Q", what), what)
        else:
            self._fail(f"{what}: arrays of value type {kind} are not supported")

    def _tensor_info(self, index: int, num_tensors: int) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset from the start of the data."""
        name = self._string(f"name of tensor {index + 1} of {num_tensors}", MAX_NAME)
        what = f"tensor {name}"
        num_dims = self._integer("I", what)
        if not 1 <= num_dims <= MAX_DIMS:
            self._fail(f"{what}: {num_dims} dimensions; from 1 to {MAX_DIMS} are supported")
        shape = tuple(self._integer("Q", what) for _ in range(num_dims))[::-1]
        if not all(shape):
            self._fail(f"{what}: shape {shape} has a dimension of 0")
        return name, shape, self._integer("I", what), self._integer("Q", what)

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """The tensors by name, of known types, inside the file and apart from each other."""
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                self._fail(f"duplicate tensor {name}")
            if kind not in TYPES:
                known = ", ".join(known.name.lower() for known in TYPES.values())
                self._fail(f"tensor {name}: type {kind} of ggml is not supported; {known} are")
            if shape[-1] % TYPES[kind].block:
                self._fail(f"tensor {name}: rows of {shape[-1]} are no multiple of {TYPES[kind].name}'s block")
            if offset % alignment:
                self._fail(f"tensor {name}: offset {offset} is no multiple of the alignment, {alignment}")
            tensors[name] = tensor = TensorInfo(shape, TYPES[kind], start + offset)
            if tensor.offset + tensor.num_bytes > self._size:
                end = tensor.offset + tensor.num_bytes
                self._fail(f"truncated: tensor {name} ends at byte {end} of {self._size}; {DOWNLOAD}")
        by_offset = sorted(tensors.items(), key=lambda item: item[1].offset)
        for (name, tensor), (following, after) in itertools.pairwise(by_offset):
            if tensor.offset + tensor.num_bytes > after.offset:
                self._fail(f"tensors {name} and {following} overlap; {DOWNLOAD}")
        return tensors

    def _count(self, what: str, least_bytes: int) -> int:
        """How many there are of something that takes at least ``least_bytes`` each."""
        count = self._integer("Q", f"the count of {what}")
        if count > MAX_COUNT:
            self._fail(f"{what}: {count} entries; at most {MAX_COUNT} are supported")
        self._need(count * least_bytes, what)
        return count

    def _string(self, what: str, limit: int) -> str:
        length = self._integer("Q", what)
        if length > limit:
            self._fail(f"{what}: a string of {length} bytes; at most {limit} are supported")
        try:
            return self._read(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what}: not valid UTF-8; {DOWNLOAD}")

    def _integer(self, kind: str, what: str) -> int:
        return struct.unpack(f"<{kind}", self._read(struct.calcsize(kind), what))[0]

    def _read(self, num_bytes: int, what: str) -> bytes:
        self._need(num_bytes, what)
        self._offset += num_bytes
        return self._file.read(num_bytes)

    def _skip(self, num_bytes: int, what: str) -> None:
        self._need(num_bytes, what)
        self._offset += num_bytes
        if num_bytes < SHORT:
            self._file.read(num_bytes)
        else:
            self._file.seek(self._offset)

    def _need(self, num_bytes: int, what: str) -> None:
        """Raise if the file, or the limit of the header, ends before ``num_bytes`` more bytes."""
        end = self._offset + num_bytes
        if end > self._size:
            self._fail(f"truncated in {what}: it ends at byte {end} of {self._size}; {DOWNLOAD}")
        if end > MAX_HEADER:
            self._fail(f"{what}: the header has more than {MAX_HEADER} bytes")

    def _fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {message}")
