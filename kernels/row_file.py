"""An embedding table whose rows stay in their file: a gather reads the rows that it needs, and no others.

A memory map would do the same with less code. But Linux maps whole folios of the page cache, up to 2 MB for a row of
4 KB, and a process that has gathered a few hundred rows seems to hold the table.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

IS_SUPPORTED = hasattr(os, "preadv")


class RowFile:
    """(V, D) of ``dtype``, row by row in a file from byte ``offset`` on, for a gather on the CPU. Thread-safe."""

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._path = path
        self._offset = offset
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize

    def gather(self, ids: Tensor) -> Tensor:
        """The rows of these ids, of any shape: (*ids.shape, D). Raises IndexError, and OSError if the file shrank."""
        unique_U, index = ids.unique(return_inverse=True)
        if len(unique_U) and not 0 <= int(unique_U[0]) <= int(unique_U[-1]) < self.shape[0]:
            raise IndexError(f"{self._path}: ids {unique_U[0]} to {unique_U[-1]} of a table of {self.shape[0]} rows")
        row_UD = torch.empty(len(unique_U), self.shape[1], dtype=self.dtype)
        bytes_UN = row_UD.view(torch.uint8).numpy()
        num_bytes = bytes_UN.shape[1]
        for row_N, row_id in zip(bytes_UN, unique_U.tolist(), strict=True):
            if os.preadv(self._file, [row_N], self._offset + row_id * num_bytes) != num_bytes:
                raise OSError(f"{self._path}: the file ends before row {row_id}")
        return row_UD[index]


Table = Tensor | RowFile


def gather(ids: Tensor, table_VD: Table) -> Tensor:
    """The rows of a table of any kind."""
    return table_VD.gather(ids) if isinstance(table_VD, RowFile) else F.embedding(ids, table_VD)
