"""Sampling a code from logits: temperature, top-k, and noise from a counter-based generator.

Call ``draw_noise`` once per frame, then ``sample`` for each codebook. The PyTorch reference computes the noise of all
codebooks at once, because ten rounds of Philox are a hundred launches. The kernel computes its own noise, before it
waits for the logits.

Shapes: B slots, K codebooks, V ids (the size of a codebook), D depth decoder dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm.kernels.launch import jit, launch, power_of_two, tl, use_kernels
from csm.kernels.native import ops as native
from csm.kernels.qkv_table import QKVGather, gather_qkv, gather_qkv_reference
from csm.kernels.quantized import Weight
from csm.kernels.row_file import RowFile, Table, gather
from csm.kernels.tiles import load_row, release_next_kernel, wait_for_inputs

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


class Noise(NamedTuple):
    """Inputs of a frame's draws. ``noise_BKV``, Gumbel noise times temperature, is None if the kernel draws."""

    seed_B: Tensor
    frame_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    noise_BKV: Tensor | None


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words to four random words.

    Every word is an int64 tensor with an unsigned 32-bit value; all broadcast together. 64-bit products wrap around in
    two's complement, so shifting and masking give their upper and lower halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return c0, c1, c2, c3


def gumbel_noise(seed_B: Tensor, frame_B: Tensor, num_codebooks: int, codebook_size: int) -> Tensor:
    """Standard Gumbel noise of all codebooks of a frame: (B, K, V) float32.

    Philox is keyed by the seed; the counter is (id // 4, codebook, frame, 0), and word ``id % 4`` of the output belongs
    to ``id``. The upper 23 bits of a word plus one half, times 2**-23, give a uniform number strictly between 0 and 1
    that float32 represents exactly.
    """
    device = seed_B.device
    quad_V = torch.arange(-(-codebook_size // 4), device=device)
    codebook_K1 = torch.arange(num_codebooks, device=device).unsqueeze(1)
    seed_B11, frame_B11 = seed_B.view(-1, 1, 1), frame_B.view(-1, 1, 1)
    counter = (quad_V, codebook_K1, frame_B11, torch.zeros_like(frame_B11))
    words = philox(counter, (seed_B11 & WORD, (seed_B11 >> 32) & WORD))
    word_BKV = torch.stack(words, dim=-1).flatten(-2)[..., :codebook_size]
    uniform_BKV = ((word_BKV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_BKV))


def draw_ids(logits_BV: Tensor, noise_BV: Tensor, top_k_B: Tensor) -> Tensor:
    """Draw one id per slot: (B, V) -> (B,) int64. ``noise_BV`` is Gumbel noise times temperature; 1 <= top-k <= V.

    The argmax of ``logits / temperature + gumbel`` over the top k logits is a draw from their softmax (Gumbel-max).
    Both terms are multiplied by the temperature here, so that none is divided; a temperature of 0 is greedy.
    """
    logits_BV = logits_BV.float()
    rank_B1 = (top_k_B - 1).unsqueeze(1)
    kth_B1 = logits_BV.sort(dim=1, descending=True).values.gather(1, rank_B1)
    return (logits_BV + noise_BV).masked_fill(logits_BV < kth_B1, -torch.inf).argmax(dim=1)


def draw_noise(
    seed_B: Tensor,
    frame_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    num_codebooks: int,
    codebook_size: int,
    head_VD: Weight,
) -> Noise:
    """Inputs of ``sample`` for every codebook of a frame. ``head_VD`` gives the dtype and device of the logits."""
    if use_kernels(head_VD, seed_B.shape[0]) or native.use_native_sampling(head_VD):
        return Noise(seed_B, frame_B, temperature_B, top_k_B, None)
    gumbel_BKV = gumbel_noise(seed_B, frame_B, num_codebooks, codebook_size)
    return Noise(seed_B, frame_B, temperature_B, top_k_B, gumbel_BKV * temperature_B.view(-1, 1, 1))


@jit
def slot_noise(seed_ptr, frame_ptr, temperature_ptr, codebook, BLOCK_V: tl.constexpr):
    """``gumbel_noise`` of one slot and codebook, times its temperature: (BLOCK_V,) float32."""
    seed, frame, temperature = tl.load(seed_ptr), tl.load(frame_ptr), tl.load(temperature_ptr)
    noise_V = tl.zeros((BLOCK_V,), dtype=tl.float32)
    # The branch also keeps the noise before the wait, and its product out of a fused multiply-add with the logits.
    if temperature != 0:
        w0_Q, w1_Q, w2_Q, w3_Q = tl.philox(seed, tl.arange(0, BLOCK_V // 4), codebook, frame.to(tl.int32), 0)
        word_V = tl.interleave(tl.interleave(w0_Q, w2_Q), tl.interleave(w1_Q, w3_Q))
        uniform_V = ((word_V >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
        noise_V = temperature * -tl.log(-tl.log(uniform_V))
    return noise_V


@jit
def argmax_id(key_V, logit_V, V: tl.constexpr):
    """The id with the largest key, its logit, and the number of larger logits."""
    code = tl.minimum(tl.argmax(key_V, axis=0), V - 1)  # with NaN keys argmax may return a padded id
    logit = tl.max(tl.where(tl.arange(0, key_V.shape[0]) == code, logit_V, -float("inf")), axis=0)
    return code, logit, tl.sum((logit_V > logit).to(tl.int32), axis=0)


@jit
def draw_id(logits_ptr, noise_V, top_k, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """``draw_ids`` of one slot, without a sort.

    The id with the largest key is in the top k if fewer than k logits exceed its own. Otherwise neither it nor any id
    with an equal or smaller logit is: these are rejected, and the largest remaining key is tried.
    """
    v_V = tl.arange(0, BLOCK_V)
    logit_V = tl.load(logits_ptr + v_V, mask=v_V < V, other=-float("inf")).to(tl.float32)
    key_V = tl.where(v_V < V, logit_V + noise_V, -float("inf"))
    code, logit, num_larger = argmax_id(key_V, logit_V, V)
    rejections = 0
    while (num_larger >= top_k) & (rejections < V):
        key_V = tl.where(logit_V > logit, key_V, -float("inf"))
        code, logit, num_larger = argmax_id(key_V, logit_V, V)
        rejections += 1
    return code


@jit
def copy_row(source_ptr, target_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy D elements."""
    d_D = tl.arange(0, BLOCK_D)
    tl.store(target_ptr + d_D, load_row(source_ptr, D, BLOCK_D), mask=d_D < D)


@jit(do_not_specialize=["codebook"])
def sample_slot(
    logits_ptr,
    seed_ptr,
    frame_ptr,
    temperature_ptr,
    top_k_ptr,
    codes_ptr,
    table_ptr,
    out_ptr,
    qkv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    codebook,
    logits_stride,
    codes_stride,
    slot_stride,
    head_stride,
    V: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draw one slot's code. BLOCK_D is 0 without a table of embeddings, BLOCK_E without one of q, k and v."""
    release_next_kernel(PDL)
    slot = tl.program_id(0)
    noise_V = slot_noise(seed_ptr + slot, frame_ptr + slot, temperature_ptr + slot, codebook, BLOCK_V)
    top_k = tl.load(top_k_ptr + slot)
    wait_for_inputs(PDL)
    code = draw_id(logits_ptr + slot * logits_stride, noise_V, top_k, V, BLOCK_V)
    tl.store(codes_ptr + slot * codes_stride + codebook, code.to(tl.int64))
    if BLOCK_D > 0:
        copy_row(table_ptr + code * D, out_ptr + slot * D, D, BLOCK_D)
    if BLOCK_E > 0:
        q_row_ptr, cache_offset = q_ptr + slot * H * d, slot * slot_stride
        gather_qkv(qkv_ptr, code, q_row_ptr, k_ptr, v_ptr, cache_offset, head_stride, H, G, d, BLOCK_E)


def sample(
    logits_BV: Tensor,
    codebook: int,
    noise: Noise,
    codes_BK: Tensor,
    table_VD: Table | None,
    qkv: QKVGather | None = None,
) -> Tensor | None:
    """Draw the code of ``codebook`` for every slot into ``codes_BK[:, codebook]``.

    Returns the drawn rows of ``table_VD``, (B, D): the input of the next depth position. None without a table. With
    ``qkv`` it also copies the first layer's q, k and v of the codes to where the gather says.
    """
    if noise.noise_BKV is not None:
        code_B = draw_ids(logits_BV, noise.noise_BKV[:, codebook], noise.top_k_B)
        codes_BK[:, codebook] = code_B
        if qkv is not None:
            gather_qkv_reference(code_B, qkv)
        return None if table_VD is None else gather(code_B, table_VD)
    if native.use_native_sampling(logits_BV):
        assert qkv is None, "the native op gathers no q, k and v"
        native.sample(logits_BV, codebook, noise[:4], codes_BK)
        return None if table_VD is None else gather(codes_BK[:, codebook], table_VD)
    if isinstance(table_VD, RowFile):  # on a CPU, in Triton's interpreter
        _launch_sample(logits_BV, codebook, noise, codes_BK, None, qkv)
        return gather(codes_BK[:, codebook], table_VD)
    return _launch_sample(logits_BV, codebook, noise, codes_BK, table_VD, qkv)


def _launch_sample(
    logits_BV: Tensor, codebook: int, noise: Noise, codes_BK: Tensor, table_VD: Tensor | None, qkv: QKVGather | None
) -> Tensor | None:
    """``sample`` by the kernel."""
    (B, V), D = logits_BV.shape, 0 if table_VD is None else table_VD.shape[1]
    assert logits_BV.stride(1) == 1 and codes_BK.stride(1) == 1
    out_BD = logits_BV.new_empty(B, max(1, D))
    launch(
        sample_slot,
        [B],
        logits_ptr=logits_BV,
        seed_ptr=noise.seed_B,
        frame_ptr=noise.frame_B,
        temperature_ptr=noise.temperature_B,
        top_k_ptr=noise.top_k_B,
        codes_ptr=codes_BK,
        table_ptr=out_BD if table_VD is None else table_VD,
        out_ptr=out_BD,
        codebook=codebook,
        logits_stride=logits_BV.stride(0),
        codes_stride=codes_BK.stride(0),
        V=V,
        D=D,
        BLOCK_V=power_of_two(max(4, V)),
        BLOCK_D=power_of_two(D) if D else 0,
        **_gather_arguments(qkv, out_BD),
        num_warps=16,  # one Philox quad per thread
    )
    return None if table_VD is None else out_BD


def _gather_arguments(qkv: QKVGather | None, unused: Tensor) -> dict[str, Any]:
    """The kernel's arguments that ``qkv`` decides. Asserts the layouts that it assumes."""
    if qkv is None:
        pointers = dict.fromkeys(("qkv_ptr", "q_ptr", "k_ptr", "v_ptr"), unused)
        return dict(slot_stride=0, head_stride=0, H=0, G=0, d=1, BLOCK_E=0, **pointers)
    table_VE, q_B1Hd, k_BGd, v_BGd = qkv
    assert table_VE.is_contiguous() and q_B1Hd.is_contiguous()
    assert k_BGd.stride() == v_BGd.stride() and k_BGd.stride(2) == 1
    return dict(
        qkv_ptr=table_VE,
        q_ptr=q_B1Hd,
        k_ptr=k_BGd,
        v_ptr=v_BGd,
        slot_stride=k_BGd.stride(0),
        head_stride=k_BGd.stride(1),
        H=q_B1Hd.shape[2],
        G=k_BGd.shape[1],
        d=k_BGd.shape[2],
        BLOCK_E=power_of_two(table_VE.shape[1]),
    )
