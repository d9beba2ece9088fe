"""CSM in eighty lines: the model as its mathematics is written, with no cache, no batch and no sampling. Read it first.

A position holds either one text token or one frame of audio, which is one code for each of the K codebooks.

1. Every position is embedded: a text token by its own embedding, a frame by the sum of the embeddings of its K codes.
2. The *backbone*, a causal transformer, reads all positions. Its last hidden state predicts code 0 of the next frame.
3. The *depth decoder*, a smaller causal transformer, predicts codes 1 to K - 1, one after another. Its sequence is that
   hidden state, then the embeddings of the codes chosen so far. It starts anew for every frame.
4. The K codes form the next position, and the loop goes on. A codec, not shown here, turns codes into audio.

Here every new code recomputes all that went before. ``csm/frame.py`` does the same work with KV caches, in place, for a
batch, and ``tests/test_naive.py`` checks that both generate the same codes. This file imports nothing from the package.
It takes a state dict with Sesame's tensor names and a dictionary of sizes:

    {"backbone": (layers, heads, kv_heads), "depth": (layers, heads, kv_heads), "vocab": rows of a codebook's embedding,
     "codebook_size": ids that the codec knows, "num_codebooks": K}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Divide each row by its root mean square, then multiply by the learned scale."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def frequencies(head_dim: int) -> list[float]:
    """Radians per position of each rotary pair, with the scaling of Llama 3.1: factor 32, original context 8192.

    Short wavelengths are kept, long ones are divided by 32, and those between are interpolated.
    """
    result = []
    for i in range(0, head_dim, 2):
        frequency = 1 / 500_000 ** (i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1:
            frequency /= 32
        elif wavelength >= 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 32 + smooth * frequency
        result.append(frequency)
    return result


def rope(x: Tensor) -> Tensor:
    """(heads, positions, head_dim): rotate each pair of neighbours by position * frequency, as complex numbers."""
    angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), torch.tensor(frequencies(x.shape[2]), dtype=x.dtype))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def transformer(x: Tensor, w: dict[str, Tensor], name: str, layers: int, heads: int, kv_heads: int) -> Tensor:
    """The backbone or the depth decoder, both Llama's architecture: (positions, dim) -> (positions, dim).

    Each layer computes h = x + attention(norm(x)), then h + mlp(norm(h)).
    """
    length = x.shape[0]
    mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)  # no position sees a later one
    for layer in range(layers):
        p = f"{name}.layers.{layer}"
        y = rms_norm(x, w[f"{p}.sa_norm.scale"])
        q, k, v = (y @ w[f"{p}.attn.{part}_proj.weight"].T for part in "qkv")
        head_dim = q.shape[1] // heads
        q, k, v = (t.view(length, -1, head_dim).transpose(0, 1) for t in (q, k, v))
        q, k = rope(q), rope(k)
        mixed = []
        for head in range(heads):
            kv = head // (heads // kv_heads)  # several query heads share one key/value head
            weights = (q[head] @ k[kv].T / math.sqrt(head_dim) + mask).softmax(-1)
            mixed.append(weights @ v[kv])
        x = x + torch.cat(mixed, dim=1) @ w[f"{p}.attn.output_proj.weight"].T
        y = rms_norm(x, w[f"{p}.mlp_norm.scale"])
        gate, up = y @ w[f"{p}.mlp.w1.weight"].T, y @ w[f"{p}.mlp.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}.mlp.w2.weight"].T  # SwiGLU
    return rms_norm(x, w[f"{name}.norm.scale"])


def next_frame(rows: list[dict], w: dict[str, Tensor], sizes: dict) -> list[int]:
    """The frame that follows ``rows``, each {"text": id} or {"codes": [K ids]}: K codes, the most likely each time."""
    vocab = sizes["vocab"]
    audio = w["audio_embeddings.weight"]  # one table: codebook k owns rows k * vocab and up
    embedded = []
    for row in rows:
        if "text" in row:
            embedded.append(w["text_embeddings.weight"][row["text"]])
        else:
            embedded.append(sum(audio[k * vocab + code] for k, code in enumerate(row["codes"])))
    hidden = transformer(torch.stack(embedded), w, "backbone", *sizes["backbone"])[-1]
    codes = [int((w["codebook0_head.weight"] @ hidden)[: sizes["codebook_size"]].argmax())]
    while len(codes) < sizes["num_codebooks"]:
        inputs = [hidden] + [audio[k * vocab + code] for k, code in enumerate(codes)]
        decoded = transformer(torch.stack(inputs) @ w["projection.weight"].T, w, "decoder", *sizes["depth"])
        logits = decoded[-1] @ w["audio_head"][len(codes) - 1]  # each codebook has a head of its own
        codes.append(int(logits[: sizes["codebook_size"]].argmax()))
    return codes
