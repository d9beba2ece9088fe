"""What is minimised: the cross-entropy of every codebook, teacher-forced.

Codebook 0 is predicted by the backbone at the position before a frame, for every trained frame, the frame of zeros that
ends a turn included. The other codebooks are predicted by the depth decoder, for a random subset of those frames. Text
is read and never predicted. Each of the two is a mean over its own count. With all frames drawn this is the loss of HF
Transformers' CsmForConditionalGeneration.

Shapes as in ``csm.finetune.batches``; D backbone dim, V audio vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm.finetune.batches import Batch
from csm.finetune.forward import final_norm, hidden_states
from csm.lora import Lora
from csm.model import CSM

# Sizes are rounded up to multiples of these: on a CPU every new shape of a matrix product costs the making of its
# kernel, which for a small model is a third of a step (docs/log.md).
ROUND_POSITIONS = 8
ROUND_FRAMES = 32
EVALUATED_AT_ONCE = 128  # frames of the depth decoder: about 0.4 GB of activations for CSM-1B in bfloat16


class Sums(NamedTuple):
    """Cross-entropies of a batch in nats, summed: of codebook 0, and of the others, (K - 1,), weighted by frame."""

    codebook0: Tensor
    depth_J: Tensor


class Counts(NamedTuple):
    """What ``Sums`` are divided by: trained frames, and codes that the depth decoder's frames stand for."""

    frames: float
    depth_codes: float


def count(batch: Batch) -> Counts:
    """The counts of a batch."""
    frames = float(batch.target_N.shape[0]) * batch.counts
    return Counts(frames, frames * (batch.code_AK.shape[1] - 1))


def combine(sums: Sums, counts: Counts, depth_weight: float) -> Tensor:
    """The loss: the mean of codebook 0 plus ``depth_weight`` times the mean of the others."""
    return sums.codebook0 / counts.frames + depth_weight * (sums.depth_J.sum() / counts.depth_codes)


class Trainee(nn.Module):
    """A model and its adapters, if any, as one module whose forward is the loss: what DDP wraps."""

    def __init__(self, model: CSM, lora: Lora | None = None, checkpointing: bool = False):
        super().__init__()
        self.model = model
        self.lora = lora
        self.checkpointing = checkpointing

    def forward(self, batch: Batch) -> Sums:
        """The sums of a batch; zeros, with a graph, for one that does not count."""
        h_ND = self.predicting_states(batch)
        code_NK = batch.code_AK[batch.target_N]
        codebook0_N = _cross_entropy(F.linear(h_ND, self.model.codebook0_head), code_NK[:, 0])
        # Evaluation looks at every frame: a few at once, so that it takes no more memory than a step of training.
        at_once = batch.frame_S.shape[0] if torch.is_grad_enabled() else EVALUATED_AT_ONCE
        depth_J = h_ND.new_zeros(code_NK.shape[1] - 1)
        for frame_S, weight_S in zip(batch.frame_S.split(at_once), batch.weight_S.split(at_once), strict=True):
            extra = -frame_S.shape[0] % ROUND_FRAMES  # frame 0 again, which there weighs nothing
            frame_S, weight_S = F.pad(frame_S, (0, extra)), F.pad(weight_S, (0, extra))
            logits_JSV = self.depth_logits(h_ND[frame_S], code_NK[frame_S])
            depth_J = depth_J + (_cross_entropy(logits_JSV, code_NK[frame_S, 1:].T) * weight_S).sum(dim=1)
        sums = Sums(codebook0_N.sum(), depth_J)
        return sums if batch.counts else Sums(*(0 * x for x in sums))

    def predicting_states(self, batch: Batch) -> Tensor:
        """The backbone's normed hidden state at the position before each trained frame: (N, D)."""
        x_BTD = embed(self.model, batch).unflatten(0, (batch.num_sequences, batch.num_positions))
        room = self.model.config.backbone.max_positions - batch.num_positions
        x_BTD = F.pad(x_BTD, (0, 0, 0, min(-batch.num_positions % ROUND_POSITIONS, room)))
        hidden_BTD = hidden_states(self.model.backbone, x_BTD, "backbone", self.lora, self.checkpointing)
        hidden_BTD = hidden_BTD[:, : batch.num_positions]
        at_N = batch.code_at_A[batch.target_N] - 1
        return final_norm(self.model.backbone, hidden_BTD.flatten(0, 1)[at_N])

    def depth_logits(self, h_SD: Tensor, code_SK: Tensor) -> Tensor:
        """Logits of codebooks 1..K-1 of frames, given the codes before each: (K - 1, S, V)."""
        model = self.model
        embedded_SJD = F.embedding(code_SK[:, :-1] + model.offset_K[:-1], model.audio_embedding)
        x_SKD = F.linear(torch.cat((h_SD.unsqueeze(1).to(embedded_SJD.dtype), embedded_SJD), dim=1), model.projection)
        hidden = hidden_states(model.depth_decoder, x_SKD, "depth_decoder", self.lora, self.checkpointing)
        hidden_JSD = final_norm(model.depth_decoder, hidden[:, 1:]).transpose(0, 1)
        return hidden_JSD @ model.depth_heads.transpose(1, 2)


def embed(model: CSM, batch: Batch) -> Tensor:
    """Embedded rows, (B * T, D): a text token's embedding, or the sum of a frame's; zeros where there is padding."""
    text_MD = F.embedding(batch.token_M, model.text_embedding)
    audio_AD = F.embedding_bag(batch.read_AK + model.offset_K, model.audio_embedding, mode="sum")
    x_PD = text_MD.new_zeros(batch.num_sequences * batch.num_positions, text_MD.shape[1])
    return x_PD.index_copy(0, batch.token_at_M, text_MD).index_copy(0, batch.code_at_A, audio_AD)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """In float32 at least, of the target's shape."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
