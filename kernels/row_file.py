"""An embedding table whose rows stay in their file: a gather reads the rows that it needs, and no others.

A memory map would do the same with less code. But Linux maps whole folios of the page cache, up to 2 MB for a row of
4 KB, and a process that has gathered a few hundred rows seems to hold the table.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

IS_SUPPORTED = hasattr(os, "preadv")


class _OpenFile:
    """A file descriptor, closed with the last table that reads it."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def __deepcopy__(self, memo: object) -> _OpenFile:
        return self


class RowFile:
    """(V, D) of ``dtype``, row by row in a file from byte ``offset`` on, for a gather on the CPU. Thread-safe."""

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.offset = offset
        self._path = path
        self._opened = _OpenFile(path)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def file(self) -> int:
        """The descriptor of the open file."""
        return self._opened.descriptor

    def read_ahead(self) -> None:
        """Ask the system to read the table into its cache: a row from a disk takes 0.1 ms."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):  # a file system without it
            os.posix_fadvise(self.file, self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)

    def __getitem__(self, rows: slice) -> RowFile:
        """A range of the rows, in the same file."""
        first, stop, step = rows.indices(self.shape[0])
        assert step == 1 and first <= stop
        part = copy.copy(self)
        part.shape = torch.Size((stop - first, self.shape[1]))
        part.offset = self.offset + first * self.shape[1] * self.dtype.itemsize
        return part

    def ends_early(self, row: int) -> OSError:
        """The error to raise where this row, or one after it, cannot be read."""
        return OSError(f"{self._path}: the file ends before row {row}")

    def gather(self, ids: Tensor) -> Tensor:
        """The rows of these ids, of any shape: (*ids.shape, D). Raises IndexError, and OSError if the file shrank."""
        unique_U, index = ids.unique(return_inverse=True)
        if len(unique_U) and not 0 <= int(unique_U[0]) <= int(unique_U[-1]) < self.shape[0]:
            raise IndexError(f"{self._path}: ids {unique_U[0]} to {unique_U[-1]} of a table of {self.shape[0]} rows")
        row_UD = torch.empty(len(unique_U), self.shape[1], dtype=self.dtype, device="cpu")
        bytes_UN = row_UD.view(torch.uint8).numpy()
        num_bytes = bytes_UN.shape[1]
        for row_N, row_id in zip(bytes_UN, unique_U.tolist(), strict=True):
            if os.preadv(self.file, [row_N], self.offset + row_id * num_bytes) != num_bytes:
                raise self.ends_early(row_id)
        return row_UD[index]


Table = Tensor | RowFile


def gather(ids: Tensor, table_VD: Table) -> Tensor:
    """The rows of a table of any kind."""
    return table_VD.gather(ids) if isinstance(table_VD, RowFile) else F.embedding(ids, table_VD)
