"""Every op of the step at the shapes of a model, for comparing kernels with their references (``csm.selfcheck``).

Shapes: B slots, T rows, C columns of a row, K codebooks, V ids, N candidates, D model dim, F hidden dim, H query heads,
G key/value heads, S cache positions, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from csm.kernels import (
    QKVGather,
    advance_frame,
    attention_linear_add,
    can_gather_qkv,
    draw_noise,
    linear_add,
    norm_rope_cache,
    norm_swiglu,
    sample,
    tabulate_qkv,
)
from csm.kernels.launch_config import MAX_GEMV_ROWS, weight_arguments
from csm.model import CSM, Attention, AttentionMetadata, Block, Transformer

TEMPERATURES = (0.0, 0.9)  # greedy and sampled
TOP_K = 8


@dataclass(frozen=True)
class Check:
    """One op: ``run`` computes it at one shape, with kernels or by its reference, and returns what it wrote."""

    name: str
    run: Callable[[], Sequence[Tensor]]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value; infinite for NaN. Integers must be equal."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    return float(difference.nan_to_num(nan=float("inf")))


class RandomTensors:
    """Reproducible random tensors on the model's device."""

    def __init__(self, model: CSM):
        self._model = model
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=self._generator)
        return values.to(self._model.device, self._model.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self._model.device)


def op_checks(model: CSM, batch_sizes: Sequence[int]) -> Iterator[Check]:
    """Every op of a step, at every shape and kind of weight that it has. Layers differ in the kinds at most."""
    random, config = RandomTensors(model), model.config
    for batch in sorted(set(batch_sizes)):
        shapes = [
            ("backbone", model.backbone, 1, config.backbone.max_positions),
            ("depth decoder, 2 rows,", model.depth_decoder, 2, config.num_codebooks),
            ("depth decoder", model.depth_decoder, 1, config.num_codebooks),
        ]
        for part, transformer, num_rows, context in shapes:
            for block in _distinct_blocks(transformer):
                for check in _block_checks(random, transformer, block, batch, num_rows, context):
                    yield replace(check, name=f"{check.name} of the {part} at batch {batch}")
        for check in (*_embedding_and_head_checks(random, model, batch), *_sample_checks(random, model, batch)):
            yield replace(check, name=f"{check.name} at batch {batch}")
    if _gathers(model, 1):
        x_1VD = random.normal(1, MAX_GEMV_ROWS, config.depth_decoder.dim)
        yield Check("tabulate_qkv", partial(_tabulate, model, x_1VD))


def _gathers(model: CSM, batch: int) -> bool:
    """Whether a frame of this batch size gathers q, k and v (``csm.kernels.qkv_table``)."""
    return model.config.num_codebooks > 2 and can_gather_qkv(model.depth_decoder.first_attention.qkv, batch)


def _tabulate(model: CSM, x_1VD: Tensor) -> tuple[Tensor, ...]:
    """The table of as many rows as one launch computes."""
    decoder, attention = model.depth_decoder, model.depth_decoder.first_attention
    rope_1p2, num_kv_heads = decoder.rope.rope_Sp2[2:3], decoder.config.num_kv_heads
    return (tabulate_qkv(x_1VD, attention.norm, attention.qkv, attention.eps, rope_1p2, num_kv_heads),)


def _distinct_blocks(transformer: Transformer) -> list[Block]:
    """The first layer of each combination of kinds of weights: those of a GGUF file may differ."""
    found: dict[tuple[str, ...], Block] = {}
    for block in transformer.layers:
        assert isinstance(block, Block)
        weights = (block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down)
        found.setdefault(tuple(str(weight_arguments(weight)["KIND"]) for weight in weights), block)
    return list(found.values())


def _block_checks(
    random: RandomTensors, transformer: Transformer, block: Block, batch: int, num_rows: int, context: int
) -> Iterator[Check]:
    """The ops of a block, for ``num_rows`` rows a slot at positions spread over a cache of ``context`` random ones."""
    config, mlp = transformer.config, block.mlp
    x_BTD = random.normal(batch, num_rows, config.dim)
    residual_BTD = random.normal(batch, num_rows, config.dim, scale=0.01)  # so that it does not hide the product
    hidden_BTF = random.normal(batch, num_rows, config.hidden_dim)
    q_BTHd = random.normal(batch, num_rows, config.num_heads, config.head_dim)
    k_BGSd, v_BGSd = (random.normal(batch, config.num_kv_heads, context, config.head_dim) for _ in range(2))
    slot_B1 = torch.arange(batch, device=x_BTD.device).unsqueeze(1)
    first_B1 = (context - num_rows) * (slot_B1 + 1) // batch
    position_BT = first_B1 + torch.arange(num_rows, device=x_BTD.device)
    # The metadata is made in the check, because it may differ between kernels and references.
    metadata = partial(transformer.attention_metadata, position_BT, context)
    rope = partial(_rope, block, x_BTD, k_BGSd, v_BGSd, slot_B1)
    attend = partial(_attend, block.attention, q_BTHd, residual_BTD, k_BGSd, v_BGSd)
    yield Check("norm_rope_cache", lambda: rope(metadata()))
    yield Check("attention_linear_add", lambda: attend(metadata()))
    yield Check("norm_swiglu", lambda: (norm_swiglu(x_BTD, mlp.norm, mlp.gate_up, mlp.eps),))
    yield Check("linear_add", lambda: (linear_add(hidden_BTF, mlp.down, residual_BTD=residual_BTD),))


def _rope(
    block: Block, x_BTD: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, slot_B1: Tensor, meta: AttentionMetadata
) -> tuple[Tensor, ...]:
    """Queries, and copies of the caches with the new keys and values."""
    k_BGSd, v_BGSd = k_BGSd.clone(), v_BGSd.clone()
    q_BTHd = norm_rope_cache(
        x_BTD=x_BTD,
        norm_D=block.attention.norm,
        qkv_ED=block.attention.qkv,
        eps=block.attention.eps,
        rope_BTp2=meta.rope_BTp2,
        k_cache_BGSd=k_BGSd,
        v_cache_BGSd=v_BGSd,
        slot_B1=slot_B1,
        position_BT=meta.position_BT,
    )
    return q_BTHd, k_BGSd, v_BGSd


def _attend(
    attention: Attention,
    q_BTHd: Tensor,
    residual_BTD: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    meta: AttentionMetadata,
) -> tuple[Tensor, ...]:
    out_BTD = attention_linear_add(
        q_BTHd=q_BTHd,
        k_cache_BGSd=k_BGSd,
        v_cache_BGSd=v_BGSd,
        bias_BTS=meta.bias_BTS,
        position_BT=meta.position_BT,
        weight_DE=attention.output,
        residual_BTD=residual_BTD,
        context=meta.context,
    )
    return (out_BTD,)


def _embedding_and_head_checks(random: RandomTensors, model: CSM, batch: int) -> Iterator[Check]:
    config = model.config
    codes_BTK = random.integers(config.codebook_size, batch, 1, config.num_codebooks)
    text_BT1 = random.integers(config.text_vocab_size, batch, 1, 1)
    row_BTC = torch.cat((codes_BTK, text_BT1), dim=-1)
    mask_BTC = torch.ones_like(row_BTC, dtype=torch.bool)
    hidden_BTD = random.normal(batch, 1, config.backbone.dim)
    depth_BTD = random.normal(batch, 1, config.depth_decoder.dim)
    yield Check("embed_rows", lambda: (model.embed_rows(row_BTC, mask_BTC),))
    yield Check("norm_linear (projection)", lambda: (model.enter_depth(hidden_BTD),))
    yield Check("norm_linear (codebook 0)", lambda: (model.logits(0, hidden_BTD),))
    yield Check("norm_linear (codebook 1)", lambda: (model.logits(1, depth_BTD),))
    yield Check("advance_frame", partial(_advance, model, codes_BTK[:, 0], row_BTC[:, 0]))


def _advance(model: CSM, codes_BK: Tensor, row_BC: Tensor) -> tuple[Tensor, ...]:
    """Copies of a slot's pending row and counters, advanced; the last slot's position is the largest."""
    position_B = torch.arange(row_BC.shape[0], device=row_BC.device)
    row_BC, mask_BC, frame_B = row_BC.clone(), torch.zeros_like(row_BC, dtype=torch.bool), position_B + 7
    advance_frame(
        codes_BK=codes_BK,
        pending_row_BC=row_BC,
        pending_mask_BC=mask_BC,
        position_B=position_B,
        frame_B=frame_B,
        max_position=row_BC.shape[0] - 1,
        head_VD=model.codebook0_head,
    )
    return row_BC, mask_BC, position_B, frame_B


def _sample_checks(random: RandomTensors, model: CSM, batch: int) -> Iterator[Check]:
    """Sampling, greedy and not, from logits of which TOP_K differ by more than any rounding."""
    config, device = model.config, model.device
    num_candidates = min(TOP_K, config.codebook_size)
    logits_BV = torch.full((batch, config.codebook_size), -8.0, device=device, dtype=model.dtype)
    ids_BN = random.normal(batch, config.codebook_size).argsort(dim=1)[:, :num_candidates]
    values_N = 0.25 * torch.arange(num_candidates, device=device, dtype=model.dtype)
    logits_BV.scatter_(1, ids_BN, values_N.expand(batch, -1))
    seed_B = random.integers(2**62, batch)
    frame_B = random.integers(100, batch)
    top_k_B = torch.full_like(frame_B, num_candidates)
    qkv_VE = random.normal(config.codebook_size, config.depth_decoder.qkv_dim) if _gathers(model, batch) else None

    def run(codebook: int, temperature: float) -> Sequence[Tensor]:
        temperature_B = torch.full((batch,), temperature, device=device)
        noise = draw_noise(
            seed_B=seed_B,
            frame_B=frame_B,
            temperature_B=temperature_B,
            top_k_B=top_k_B,
            num_codebooks=config.num_codebooks,
            codebook_size=config.codebook_size,
            head_VD=model.codebook0_head,
        )
        codes_BK = torch.zeros(batch, config.num_codebooks, device=device, dtype=torch.int64)
        is_last = codebook + 1 == config.num_codebooks
        qkv = None if qkv_VE is None or codebook == 0 or is_last else _empty_gather(model, qkv_VE, batch)
        table_VD = None if is_last else model.code_embedding(codebook)
        row_BD = sample(logits_BV, codebook, noise, codes_BK, table_VD, qkv=qkv)
        return (codes_BK, *(() if row_BD is None else (row_BD,)), *(() if qkv is None else qkv[1:]))

    for codebook in sorted({0, 1, config.num_codebooks - 1}):
        for temperature in TEMPERATURES:
            yield Check(
                f"sample (codebook {codebook}, temperature {temperature:g})", partial(run, codebook, temperature)
            )


def _empty_gather(model: CSM, table_VE: Tensor, batch: int) -> QKVGather:
    """A gather into a cache of zeros."""
    config = model.config.depth_decoder
    k_BGd, v_BGd = table_VE.new_zeros(2, batch, config.num_kv_heads, config.head_dim)
    return QKVGather.allocate(table_VE, k_BGd, v_BGd)
