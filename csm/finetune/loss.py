"""The training loss: teacher-forced cross-entropy of every codebook.

The backbone predicts codebook 0 of every trained frame at the position before it, including the end frame of zeros of
each turn. The depth decoder predicts the other codebooks for a random subset of those frames. Text is input only. Each
part is a mean over its own targets. With all frames sampled, this is the loss of HF Transformers'
CsmForConditionalGeneration.

Shapes as in ``csm.finetune.batches``; D backbone dim, V audio vocabulary, J = K - 1 codebooks of the depth decoder.
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

# Sizes are rounded up to multiples of these. On a CPU, every new shape of a matrix product compiles a kernel, which for
# a small model takes a third of a step (docs/log.md).
ROUND_POSITIONS = 8
ROUND_FRAMES = 32
EVAL_FRAMES = 128  # frames per depth-decoder chunk in evaluation: about 0.4 GB of activations for CSM-1B in bfloat16


class Sums(NamedTuple):
    """Summed cross-entropy of a batch in nats: of codebook 0, and of the other codebooks (J,), weighted by frame."""

    codebook0: Tensor
    depth_J: Tensor


class Counts(NamedTuple):
    """The divisors of ``Sums``: the number of trained frames, and of their codes in codebooks 1 to K - 1."""

    frames: float
    depth_codes: float


def count(batch: Batch) -> Counts:
    """The target counts of a batch; zero where it has no loss."""
    frames = float(batch.target_N.shape[0]) * batch.has_loss
    return Counts(frames, frames * (batch.code_AK.shape[1] - 1))


def combine(sums: Sums, counts: Counts, depth_weight: float) -> Tensor:
    """The loss: the mean of codebook 0 plus ``depth_weight`` times the mean of the other codebooks."""
    return sums.codebook0 / counts.frames + depth_weight * (sums.depth_J.sum() / counts.depth_codes)


class Trainee(nn.Module):
    """The model and its adapters, if any, in one module whose forward computes the loss. DDP wraps this module."""

    def __init__(self, model: CSM, lora: Lora | None = None, activation_checkpointing: bool = False):
        super().__init__()
        self.model = model
        self.lora = lora
        self.activation_checkpointing = activation_checkpointing

    def forward(self, batch: Batch) -> Sums:
        """The loss sums of a batch. Without loss they are zeros that are still connected to the graph."""
        h_ND = self.predicting_states(batch)
        code_NK = batch.code_AK[batch.target_N]
        codebook0_N = _cross_entropy(F.linear(h_ND, self.model.codebook0_head), code_NK[:, 0])
        # Evaluation covers every frame; chunks keep its memory below that of a training step.
        chunk_size = batch.frame_S.shape[0] if torch.is_grad_enabled() else EVAL_FRAMES
        depth_J = h_ND.new_zeros(code_NK.shape[1] - 1)
        for frame_S, weight_S in zip(batch.frame_S.split(chunk_size), batch.weight_S.split(chunk_size), strict=True):
            padding = -frame_S.shape[0] % ROUND_FRAMES  # repeats frame 0 with weight zero
            frame_S, weight_S = F.pad(frame_S, (0, padding)), F.pad(weight_S, (0, padding))
            logits_JSV = self.depth_logits(h_ND[frame_S], code_NK[frame_S])
            depth_J = depth_J + (_cross_entropy(logits_JSV, code_NK[frame_S, 1:].T) * weight_S).sum(dim=1)
        sums = Sums(codebook0_N.sum(), depth_J)
        return sums if batch.has_loss else Sums(*(0 * x for x in sums))

    def predicting_states(self, batch: Batch) -> Tensor:
        """The backbone's normed hidden states at the position before each trained frame: (N, D)."""
        x_BTD = embed(self.model, batch).unflatten(0, (batch.num_sequences, batch.num_positions))
        available = self.model.config.backbone.max_positions - batch.num_positions
        x_BTD = F.pad(x_BTD, (0, 0, 0, min(-batch.num_positions % ROUND_POSITIONS, available)))
        hidden_BTD = hidden_states(self.model.backbone, x_BTD, "backbone", self.lora, self.activation_checkpointing)
        hidden_BTD = hidden_BTD[:, : batch.num_positions]
        position_N = batch.code_position_A[batch.target_N] - 1
        return final_norm(self.model.backbone, hidden_BTD.flatten(0, 1)[position_N])

    def depth_logits(self, h_SD: Tensor, code_SK: Tensor) -> Tensor:
        """Logits of codebooks 1 to K - 1 given the hidden states (S, D) and the codes (S, K): (J, S, V)."""
        model = self.model
        embedded_SJD = F.embedding(code_SK[:, :-1] + model.offset_K[:-1], model.audio_embedding)
        x_SKD = F.linear(torch.cat((h_SD.unsqueeze(1).to(embedded_SJD.dtype), embedded_SJD), dim=1), model.projection)
        hidden = hidden_states(model.depth_decoder, x_SKD, "depth_decoder", self.lora, self.activation_checkpointing)
        hidden_JSD = final_norm(model.depth_decoder, hidden[:, 1:]).transpose(0, 1)
        return hidden_JSD @ model.depth_heads.transpose(1, 2)


def embed(model: CSM, batch: Batch) -> Tensor:
    """The backbone's input (B * T, D): text token embeddings, summed frame embeddings, and zeros for padding."""
    text_MD = F.embedding(batch.token_M, model.text_embedding)
    audio_AD = F.embedding_bag(batch.input_code_AK + model.offset_K, model.audio_embedding, mode="sum")
    x_PD = text_MD.new_zeros(batch.num_sequences * batch.num_positions, text_MD.shape[1])
    return x_PD.index_copy(0, batch.token_position_M, text_MD).index_copy(0, batch.code_position_A, audio_AD)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in float32 or wider, in the shape of ``target``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
