"""When each word of a sentence is heard, told by the model's own attention.

While the backbone generates a frame, some of its heads attend to the text that is spoken in it. One more pass over the
text and the codes of a finished sentence gives these weights. For every head, the best monotone path through its
weights assigns a token to every frame. Heads with a sharp path attend to what is spoken or to what comes next, so the
latest of the sharp paths is taken. (Whisper's word times come from its cross-attention in a similar way: Radford et
al., 2022, https://arxiv.org/abs/2212.04356.)

Shapes: T rows, S positions, F frames, C text tokens, H heads (of all layers where they are counted), K codebooks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csm.cache import KVCache
from csm.kernels import norm_rope_cache
from csm.model import CSM
from csm.prompt import Prompt, SpokenWord, audio_rows, text_rows

MAX_ADVANCE = 6  # tokens that a path may go on by from one frame to the next
FLOOR = 1e-3  # added to weights: far below it all are the same
MARGIN = 0.5  # of the mean log weight: heads this close to the sharpest one are sharp


def word_frames(model: CSM, text_ids: list[int], words: list[SpokenWord], codes_TK: Tensor) -> list[tuple[int, int]]:
    """First frame, and the frame after the last, of every word of a sentence with codes (F, K).

    Empty if there are no words, or too few frames for so many tokens.
    """
    if not words or not codes_TK.shape[0]:
        return []
    first, last = words[0].first, words[-1].last
    weight_HFC = text_attention(model, text_ids, codes_TK)[:, :, first:last]
    path_HF, score_H = monotone_paths((weight_HFC + FLOOR).log())
    if not torch.isfinite(score_H).any():
        return []
    sharp_H = score_H >= score_H.max() - MARGIN
    lateness_H = -path_HF.float().mean(dim=1)  # a path that is late is at an earlier token in the same frame
    path_F = path_HF[int(lateness_H.masked_fill(~sharp_H, -math.inf).argmax())]
    starts = [int((path_F < word.first - first).sum()) for word in words]
    return list(zip(starts, [*starts[1:], codes_TK.shape[0]], strict=True))


@torch.inference_mode()
def text_attention(model: CSM, text_ids: list[int], codes_TK: Tensor) -> Tensor:
    """Attention weights (H, F, C) of the rows that generate the frames, to all rows of the text."""
    num_codebooks, num_tokens, num_frames = model.config.num_codebooks, len(text_ids), codes_TK.shape[0]
    parts = [text_rows(text_ids, num_codebooks), audio_rows(codes_TK)]
    prompt = Prompt(torch.cat([part.row_TC for part in parts]), torch.cat([part.mask_TC for part in parts]))
    num_rows = num_tokens + num_frames - 1  # the row before a frame generates it
    row_BTC, mask_BTC = (part[None, :num_rows].to(model.device) for part in prompt[:2])
    config = model.config.backbone
    cache = KVCache.allocate(config, 1, num_rows, model.device, model.dtype)
    position_BT = torch.arange(num_rows, device=model.device)[None]
    meta = model.backbone.attention_metadata(position_BT, num_rows)
    causal_FC = position_BT[0, :num_rows][None] <= position_BT[0, num_tokens - 1 :, None]
    x_BTD = model.embed_rows(row_BTC, mask_BTC)
    weights = []
    for index, layer in enumerate(model.backbone.layers):
        keys = cache.k_LBGSd[index], cache.v_LBGSd[index]
        attention = layer.attention
        q_BTHd = norm_rope_cache(
            x_BTD, attention.norm, attention.qkv, attention.eps, meta.rope_BTp2, *keys, cache.slot_B1, position_BT
        )
        k_HSd = keys[0][0, :, :num_rows].repeat_interleave(config.num_heads // config.num_kv_heads, dim=0)
        logits_HFS = torch.einsum("fhd,hsd->hfs", q_BTHd[0, num_tokens - 1 :].float(), k_HSd.float())
        masked_HFS = (logits_HFS / math.sqrt(config.head_dim)).masked_fill(~causal_FC, -math.inf)
        weights.append(masked_HFS.softmax(-1)[:, :, :num_tokens].cpu())
        x_BTD = layer(x_BTD, *keys, cache.slot_B1, meta)
    return torch.cat(weights)


def monotone_paths(score_HFC: Tensor) -> tuple[Tensor, Tensor]:
    """The best path of every head, (H, F) tokens, and its mean score (H,).

    A path begins at one of the first tokens, ends at one of the last, and goes on by at most ``MAX_ADVANCE`` a frame.
    """
    _, num_frames, num_tokens = score_HFC.shape
    best_HC = score_HFC[:, 0].clone()
    best_HC[:, MAX_ADVANCE:] = -math.inf
    steps = []
    for frame in range(1, num_frames):
        padded_HC = torch.nn.functional.pad(best_HC, (MAX_ADVANCE, 0), value=-math.inf)
        best_HC, step_HC = padded_HC.unfold(1, MAX_ADVANCE + 1, 1).max(dim=-1)
        steps.append(MAX_ADVANCE - step_HC)
        best_HC = best_HC + score_HFC[:, frame]
    best_HC[:, : max(0, num_tokens - MAX_ADVANCE)] = -math.inf
    total_H, token_H = best_HC.max(dim=1)
    path = [token_H]
    for step_HC in reversed(steps):
        path.append(path[-1] - step_HC.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], dim=1), total_H / num_frames
