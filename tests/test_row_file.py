"""Embedding tables that stay in their file: rows equal those of the table in memory, and take little memory."""

import copy
import gc
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from csm.kernels.embed_rows import embed_rows
from csm.kernels.row_file import IS_SUPPORTED, RowFile, gather

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="this system has no preadv")


def table_and_file(folder, rows, dim, dtype, offset):
    table_VD = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows)).to(dtype)
    path = folder / "table"
    path.write_bytes(b"x" * offset + table_VD.view(torch.uint8).numpy().tobytes())
    return table_VD, RowFile(path, offset, (rows, dim), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3, 4)])
def test_a_gather_equals_that_of_a_table_in_memory(tmp_path, dtype, shape):
    table_VD, rows = table_and_file(tmp_path, 50, 6, dtype, offset=13)
    ids = torch.randint(50, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gather(ids, rows), F.embedding(ids, table_VD))
    assert gather(ids, rows).dtype == dtype


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 40)])
@pytest.mark.parametrize("choice", ["", "reference"])
def test_embed_rows_is_the_sum_in_float64(tmp_path, where, dtype, shape, choice, monkeypatch):
    """Over tables in memory and in a file; an id that the mask leaves out may be anything within its table."""
    monkeypatch.setenv("CSM_OPS", choice)
    (tmp_path / "text").mkdir()
    tables = [
        table_and_file(tmp_path, 3 * 11, 72, dtype, offset=8),
        table_and_file(tmp_path / "text", 20, 72, dtype, offset=0),
    ]
    audio, text = (pair[where == "file"] for pair in tables)
    row_BTC = torch.randint(11, (*shape, 4), generator=torch.Generator().manual_seed(1))
    mask_BTC = torch.rand(*shape, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    offset_K = torch.tensor([0, 11, 22])
    actual = embed_rows(row_BTC, mask_BTC, offset_K, audio, text)
    audio_BTKD, text_BTD = tables[0][0].double()[row_BTC[..., :-1] + offset_K], tables[1][0].double()[row_BTC[..., -1]]
    expected = (torch.cat((audio_BTKD, text_BTD.unsqueeze(2)), 2) * mask_BTC.unsqueeze(-1)).sum(2)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype))


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize(("column", "wrong"), [(0, -1), (2, 11), (3, 20), (3, -5)])
def test_embed_rows_refuses_ids_outside_the_tables(tmp_path, where, column, wrong):
    (tmp_path / "text").mkdir()
    tables = [
        table_and_file(tmp_path, 3 * 11, 8, torch.float32, offset=8),
        table_and_file(tmp_path / "text", 20, 8, torch.float32, offset=0),
    ]
    audio, text = (pair[where == "file"] for pair in tables)
    row_11C = torch.tensor([[[3, 4, 5, 6]]])
    row_11C[..., column] = wrong
    with pytest.raises(IndexError):
        embed_rows(row_11C, torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([0, 11, 22]), audio, text)


def test_a_part_of_a_file_is_the_part_of_the_table(tmp_path):
    table_VD, rows = table_and_file(tmp_path, 50, 6, torch.bfloat16, offset=13)
    ids = torch.tensor([4, 0, 9])
    assert torch.equal(rows[20:30].gather(ids), table_VD[20:30][ids])
    with pytest.raises(IndexError, match="a table of 10 rows"):
        rows[20:30].gather(torch.tensor([10]))


@pytest.mark.parametrize("ids", [[-1], [3, 50], [1 << 40]])
def test_an_id_outside_the_table_is_an_error(tmp_path, ids):
    _, rows = table_and_file(tmp_path, 50, 4, torch.float32, offset=0)
    with pytest.raises(IndexError, match="a table of 50 rows"):
        rows.gather(torch.tensor(ids))


def test_a_file_that_shrank_is_an_error(tmp_path):
    _, rows = table_and_file(tmp_path, 50, 4, torch.float32, offset=0)
    with (tmp_path / "table").open("r+b") as file:
        file.truncate(49 * 16 + 3)
    with pytest.raises(OSError, match="ends before row 49"):
        rows.gather(torch.tensor([0, 49]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_gathered_rows_take_little_memory(tmp_path):
    """1,000 rows of 4 KB from a file of 128 MB; the kernel would map a large part of it."""
    path = tmp_path / "table"
    path.write_bytes(bytes(1 << 27))
    script = f"""
import re, torch
from pathlib import Path
from csm.kernels.row_file import RowFile
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
rows = RowFile(Path({str(path)!r}), 0, (1 << 15, 2048), torch.bfloat16)
rows.gather(torch.arange(64))
before = resident()
for first in range(0, 1 << 15, 33): rows.gather(torch.tensor([first]))
print(resident() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown < 16_000  # kB


def test_a_deep_copy_reads_the_same_file_after_the_original_is_gone(tmp_path):
    table_VD, rows = table_and_file(tmp_path, 50, 6, torch.float32, offset=0)
    copied = copy.deepcopy(rows)
    del rows
    gc.collect()
    assert torch.equal(copied.gather(torch.tensor([3])), table_VD[3:4])


def test_the_default_device_does_not_matter(tmp_path):
    (tmp_path / "text").mkdir()
    audio_WD, audio_file = table_and_file(tmp_path, 3 * 11, 8, torch.float32, offset=8)
    text_VD, text_file = table_and_file(tmp_path / "text", 20, 8, torch.float32, offset=0)
    ids = torch.ones(1, 2, 4, dtype=torch.int64), torch.ones(1, 2, 4, dtype=torch.bool), torch.tensor([0, 11, 22])
    expected, row = embed_rows(*ids, audio_WD, text_VD), torch.tensor([5])
    with torch.device("meta"):
        actual, gathered = embed_rows(*ids, audio_file, text_file), text_file.gather(row)
    assert torch.equal(actual, expected) and torch.equal(gathered, text_VD[5:6])
