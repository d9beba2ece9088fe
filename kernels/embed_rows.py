"""The embedding of a row: the sum of the embeddings of its unmasked codes and its unmasked text token."""

from __future__ import annotations

import torch
from torch import Tensor

from csm.kernels.launch import jit, launch, power_of_two, tl, use_kernels
from csm.kernels.native import ops as native
from csm.kernels.row_file import RowFile, Table, gather
from csm.kernels.tiles import release_next_kernel, wait_for_inputs

BLOCK_D = 64


def embed_rows_reference(
    row_BTC: Tensor, mask_BTC: Tensor, offset_K: Tensor, audio_WD: Table, text_VD: Table
) -> Tensor:
    """``embed_rows`` in PyTorch."""
    audio_BTKD = gather(row_BTC[..., :-1] + offset_K, audio_WD)
    text_BT1D = gather(row_BTC[..., -1:], text_VD)
    return (torch.cat((audio_BTKD, text_BT1D), dim=-2) * mask_BTC.unsqueeze(-1)).sum(dim=-2)


@jit
def embed_row(
    row_ptr,
    mask_ptr,
    offset_ptr,
    audio_ptr,
    text_ptr,
    out_ptr,
    CODEBOOKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_D dimensions of one row. Masked-out ids are not looked up."""
    release_next_kernel(PDL)
    row = tl.program_id(0)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c_C = tl.arange(0, BLOCK_C)
    wait_for_inputs(PDL)
    first = row * (CODEBOOKS + 1)
    unmasked_C = tl.load(mask_ptr + first + c_C, mask=c_C < CODEBOOKS, other=0) != 0
    id_C = tl.load(row_ptr + first + c_C, mask=c_C < CODEBOOKS, other=0)
    id_C += tl.load(offset_ptr + c_C, mask=c_C < CODEBOOKS, other=0)
    mask_CD = unmasked_C[:, None] & (d_D < D)[None, :]
    audio_CD = tl.load(audio_ptr + id_C[:, None] * D + d_D[None, :], mask=mask_CD, other=0.0).to(tl.float32)
    has_text = tl.load(mask_ptr + first + CODEBOOKS) != 0
    text_ptr_D = text_ptr + tl.load(row_ptr + first + CODEBOOKS) * D + d_D
    text_D = tl.load(text_ptr_D, mask=(d_D < D) & has_text, other=0.0).to(tl.float32)
    out_D = tl.sum(audio_CD, axis=0) + text_D
    tl.store(out_ptr + row * D + d_D, out_D.to(out_ptr.dtype.element_ty), mask=d_D < D)


def embed_rows(row_BTC: Tensor, mask_BTC: Tensor, offset_K: Tensor, audio_WD: Table, text_VD: Table) -> Tensor:
    """(B, T, K + 1) ids and mask -> (B, T, D). Codebook k starts at row ``offset_K[k]`` of the audio table."""
    (B, T, C), D = row_BTC.shape, audio_WD.shape[1]
    if native.use_native_embedding(audio_WD, text_VD):
        embedded_BTD = native.embed_rows(row_BTC, mask_BTC, offset_K, audio_WD, text_VD)
        if embedded_BTD is not None:  # else the reference raises the error that names the row
            return embedded_BTD
    if isinstance(audio_WD, RowFile) or isinstance(text_VD, RowFile) or not use_kernels(audio_WD, B * T):
        return embed_rows_reference(row_BTC, mask_BTC, offset_K, audio_WD, text_VD)
    assert row_BTC.is_contiguous() and mask_BTC.is_contiguous()
    out_BTD = audio_WD.new_empty(B, T, D)
    launch(
        embed_row,
        (B * T, -(-D // BLOCK_D)),
        row_ptr=row_BTC,
        mask_ptr=mask_BTC,
        offset_ptr=offset_K,
        audio_ptr=audio_WD,
        text_ptr=text_VD,
        out_ptr=out_BTD,
        CODEBOOKS=C - 1,
        D=D,
        BLOCK_C=power_of_two(C - 1),
        BLOCK_D=BLOCK_D,
    )
    return out_BTD
