"""The end of a frame: its codes become the pending row, and the slot's counters go up by one."""

from __future__ import annotations

from torch import Tensor

from csm.kernels.launch import jit, launch, power_of_two, tl, use_kernels
from csm.kernels.quantized import Weight


def advance_frame_reference(
    codes_BK: Tensor,
    pending_row_BC: Tensor,
    pending_mask_BC: Tensor,
    position_B: Tensor,
    frame_B: Tensor,
    max_position: int,
) -> None:
    """``advance_frame`` in PyTorch."""
    pending_row_BC[:, :-1] = codes_BK
    pending_row_BC[:, -1] = 0
    pending_mask_BC[:, :-1] = True
    pending_mask_BC[:, -1] = False
    frame_B.add_(1)
    position_B.add_(1).clamp_(max=max_position)


@jit
def advance_slot(
    codes_ptr,
    row_ptr,
    mask_ptr,
    position_ptr,
    frame_ptr,
    max_position,
    CODEBOOKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """One slot. Launched without dependent launch, so that it starts when all earlier kernels have ended."""
    slot, c_C = tl.program_id(0), tl.arange(0, BLOCK_C)
    code_C = tl.load(codes_ptr + slot * CODEBOOKS + c_C, mask=c_C < CODEBOOKS, other=0)
    tl.store(row_ptr + slot * (CODEBOOKS + 1) + c_C, code_C, mask=c_C <= CODEBOOKS)
    tl.store(mask_ptr + slot * (CODEBOOKS + 1) + c_C, c_C < CODEBOOKS, mask=c_C <= CODEBOOKS)
    tl.store(position_ptr + slot, tl.minimum(tl.load(position_ptr + slot) + 1, max_position))
    tl.store(frame_ptr + slot, tl.load(frame_ptr + slot) + 1)


def advance_frame(
    codes_BK: Tensor,
    pending_row_BC: Tensor,
    pending_mask_BC: Tensor,
    position_B: Tensor,
    frame_B: Tensor,
    max_position: int,
    head_VD: Weight,
) -> None:
    """Write the codes into the pending row (no text), and advance position and frame counter, all in place.

    Positions stop at ``max_position``, since a finished slot keeps stepping with its batch. The tensors are integers;
    ``head_VD`` gives the dtype that decides whether kernels run.
    """
    B, K = codes_BK.shape
    state = (codes_BK, pending_row_BC, pending_mask_BC, position_B, frame_B)
    if not use_kernels(head_VD, B):
        advance_frame_reference(*state, max_position)
        return
    assert all(tensor.is_contiguous() for tensor in state)
    launch(
        advance_slot,
        [B],
        codes_ptr=codes_BK,
        row_ptr=pending_row_BC,
        mask_ptr=pending_mask_BC,
        position_ptr=position_B,
        frame_ptr=frame_B,
        max_position=max_position,
        CODEBOOKS=K,
        BLOCK_C=power_of_two(K + 1),
        num_warps=1,
        dependent=False,
    )
