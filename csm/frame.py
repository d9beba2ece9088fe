"""The step that generates one frame, and all buffers that it reads and writes.

Every slot has one *pending row*, the row that the backbone has not read yet. ``csm.prefill`` writes the keys and values
of all prompt rows but the last, which becomes the pending row. ``decode_frame`` reads the pending row of every slot,
generates a frame of codes, and makes it the next pending row. The first frame of a request is therefore computed by the
same step as all others.

Shapes: B slots, C columns of a row (K codebooks, then text), K codebooks, V ids, D dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from csm.cache import KVCache
from csm.config import CSMConfig, TransformerConfig
from csm.kernels import (
    DepthWeights,
    QKVGather,
    advance_frame,
    can_draw_depth_codes,
    depth_codes,
    draw_noise,
    sample,
)
from csm.kernels.sample import Noise
from csm.model import CSM, AttentionMetadata

STEP_OUTPUTS = ("pending_row_BC", "pending_mask_BC", "position_B", "frame_B", "codes_BK")  # what the step changes


@dataclass(frozen=True, eq=False)
class FrameState:
    """All buffers of the step, at fixed addresses. The step reads and writes them on the device only.

    ``pending_row_BC`` and ``pending_mask_BC`` are the pending rows and ``position_B`` their backbone positions.
    ``frame_B`` counts the frames generated so far, and ``codes_BK`` is the last frame.
    """

    pending_row_BC: Tensor
    pending_mask_BC: Tensor
    position_B: Tensor
    frame_B: Tensor
    codes_BK: Tensor
    seed_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    depth_position_BK: Tensor
    backbone_cache: KVCache
    depth_cache: KVCache

    @classmethod
    def allocate(
        cls,
        config: CSMConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int | None = None,
    ) -> FrameState:
        """Allocate ``batch`` slots of at most ``max_positions`` (None: all positions of the backbone)."""
        num_codebooks = config.num_codebooks

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=torch.int64)

        def cache(transformer: TransformerConfig, max_positions: int) -> KVCache:
            return KVCache.allocate(transformer, batch, max_positions, device, dtype)

        return cls(
            pending_row_BC=integers(batch, num_codebooks + 1),
            pending_mask_BC=torch.zeros(batch, num_codebooks + 1, device=device, dtype=torch.bool),
            position_B=integers(batch),
            frame_B=integers(batch),
            codes_BK=integers(batch, num_codebooks),
            seed_B=integers(batch),
            temperature_B=torch.zeros(batch, device=device),
            top_k_B=torch.ones(batch, device=device, dtype=torch.int64),
            depth_position_BK=torch.arange(num_codebooks, device=device).repeat(batch, 1),
            backbone_cache=cache(config.backbone, max_positions or config.backbone.max_positions),
            depth_cache=cache(config.depth_decoder, num_codebooks),
        )

    @property
    def batch(self) -> int:
        return self.pending_row_BC.shape[0]

    def narrow(self, batch: int) -> FrameState:
        """The first ``batch`` slots, as views of the same memory."""
        parts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            parts[field.name] = value.slots(0, batch) if isinstance(value, KVCache) else value[:batch]
        return FrameState(**parts)

    @torch.inference_mode()
    def move(self, source: int, target: int, num_positions: int | None = None) -> None:
        """Copy slot ``source`` to slot ``target``, with its first ``num_positions`` (None: all) keys and values.

        The request continues exactly in ``target``. ``source`` keeps its state.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, KVCache):
                value[target] = value[source]
        for cache_LBGSd in (self.backbone_cache.k_LBGSd, self.backbone_cache.v_LBGSd):
            cache_LBGSd[:, target, :, :num_positions] = cache_LBGSd[:, source, :, :num_positions]

    def save(self, slots: slice) -> dict[str, Tensor]:
        """Copies of what the step changes in these slots, for ``restore``.

        Keys and values are left out. A step writes them at a slot's own position and later, and those positions are
        computed again once the slot's position is restored.
        """
        return {name: getattr(self, name)[slots].clone() for name in STEP_OUTPUTS}

    def restore(self, saved: dict[str, Tensor], slots: slice) -> None:
        """Write what ``save`` returned to the same slots, or to as many others."""
        for name, value in saved.items():
            getattr(self, name)[slots] = value

    def buffers(self) -> dict[str, Tensor]:
        """All tensors of the state by name, including those of the caches."""
        named: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, KVCache):
                named |= {f"{field.name}.{name}": tensor for name, tensor in vars(value).items()}
            else:
                named[field.name] = value
        return named


@torch.inference_mode()
def decode_frame(model: CSM, state: FrameState, context_bucket: int | None = None) -> None:
    """Read the pending row of every slot and generate one frame into ``state.codes_BK``.

    Attention covers the first ``context_bucket`` cache positions (None: all of them), one of ``KVCache.buckets``. Every
    slot's position must be below it.

    The step never synchronises with the host, so that it can be captured: positions, frame counters and sampling
    parameters are read, and positions and frame counters advanced, on the device.
    """
    noise = _draw_noise(model, state)
    x_B1D = model.embed_rows(state.pending_row_BC.unsqueeze(1), state.pending_mask_BC.unsqueeze(1))
    meta = model.backbone.attention_metadata(
        state.position_B.unsqueeze(1), context_bucket or state.backbone_cache.max_positions
    )
    hidden_B1D = model.backbone(x_B1D, state.backbone_cache, meta)
    projected_BD = model.enter_depth(hidden_B1D).squeeze(1)
    # Depth positions: 0 reads the backbone's hidden state, i >= 1 reads code i - 1 and predicts code i.
    depth_meta = model.depth_decoder.attention_metadata(
        state.depth_position_BK, context_bucket=model.config.num_codebooks, max_rows=2
    )
    code_BD = _sample_code(model, state, noise, 0, hidden_B1D)
    assert code_BD is not None
    _draw_depth_codes(model, state, noise, depth_meta, torch.stack((projected_BD, code_BD), dim=1))
    _advance(model, state)


def _draw_depth_codes(model: CSM, state: FrameState, noise: Noise, meta: AttentionMetadata, x_B2D: Tensor) -> None:
    """Draw the codes of all codebooks but the first: a pass of the depth decoder for each."""
    num_codebooks, cache = model.config.num_codebooks, state.depth_cache
    weights = _depth_weights(model)
    if can_draw_depth_codes(x_B2D, weights, noise):
        where = (cache.k_LBGSd, cache.v_LBGSd, cache.slot_B1, state.depth_position_BK)
        depth_codes(x_B2D, weights, meta.rope_BTp2, *where, noise, state.codes_BK)
        return
    x_BTD, q_BTHd = x_B2D, None
    for codebook in range(1, num_codebooks):
        first = codebook + 1 - x_BTD.shape[1]
        hidden_BTD = model.depth_decoder(x_BTD, cache, meta.rows(first, codebook + 1), q_BTHd)
        qkv = _qkv_gather(model, state, codebook)
        code_BD = _sample_code(model, state, noise, codebook, hidden_BTD, qkv)
        x_BTD = x_BTD if code_BD is None else code_BD.unsqueeze(1)
        q_BTHd = None if qkv is None else qkv.q_B1Hd


def _depth_weights(model: CSM) -> DepthWeights:
    """What ``csm.kernels.depth_codes`` reads."""
    decoder, config = model.depth_decoder, model.config
    return DepthWeights(
        layers=decoder.block_weights(),
        norm_D=decoder.norm,
        eps=decoder.config.norm_eps,
        heads=[model.head(codebook) for codebook in range(1, config.num_codebooks)],
        table_WD=model.depth_embedding,
        table_step=config.audio_vocab_size,
    )


def _sample_code(
    model: CSM, state: FrameState, noise: Noise, codebook: int, hidden_BTD: Tensor, qkv: QKVGather | None = None
) -> Tensor | None:
    """Sample a code from the last row; return its embedding, (B, depth dim), or None for the last codebook."""
    logits_BV = model.logits(codebook, hidden_BTD[:, -1:]).squeeze(1)
    table_VD = model.code_embedding(codebook) if codebook + 1 < model.config.num_codebooks else None
    return sample(logits_BV, codebook, noise, state.codes_BK, table_VD, qkv=qkv)


def _draw_noise(model: CSM, state: FrameState) -> Noise:
    """Inputs of every draw of the frame."""
    return draw_noise(
        seed_B=state.seed_B,
        frame_B=state.frame_B,
        temperature_B=state.temperature_B,
        top_k_B=state.top_k_B,
        num_codebooks=model.config.num_codebooks,
        codebook_size=model.config.codebook_size,
        head_VD=model.codebook0_head,
    )


def _qkv_gather(model: CSM, state: FrameState, codebook: int) -> QKVGather | None:
    """The gather of layer 0's q, k and v for the next depth position; None if the next pass computes them."""
    table_VE = model.code_qkv(codebook, state.batch)
    if table_VE is None:
        return None
    cache, position = state.depth_cache, codebook + 1
    return QKVGather.allocate(table_VE, cache.k_LBGSd[0, :, :, position], cache.v_LBGSd[0, :, :, position])


def _advance(model: CSM, state: FrameState) -> None:
    """Make the generated frame the pending row of the next position."""
    advance_frame(
        codes_BK=state.codes_BK,
        pending_row_BC=state.pending_row_BC,
        pending_mask_BC=state.pending_mask_BC,
        position_B=state.position_B,
        frame_B=state.frame_B,
        max_position=state.backbone_cache.max_positions - 1,
        head_VD=model.codebook0_head,
    )
