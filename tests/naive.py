"""CSM written down as its mathematics reads: no cache, everything computed again for every code.

Independent of the package: it takes a state dict in Sesame's names and a dictionary of sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def frequencies(head_dim: int) -> list[float]:
    """Llama-3 scaling as its reference code branches: factor 32, low 1, high 4, original context 8192."""
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
    """(heads, positions, head_dim): interleaved pairs as complex numbers, turned by position * frequency."""
    angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), torch.tensor(frequencies(x.shape[2]), dtype=x.dtype))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def transformer(x: Tensor, w: dict[str, Tensor], name: str, layers: int, heads: int, kv_heads: int) -> Tensor:
    """(positions, dim) -> (positions, dim)."""
    length = x.shape[0]
    mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
    for layer in range(layers):
        p = f"{name}.layers.{layer}"
        y = rms_norm(x, w[f"{p}.sa_norm.scale"])
        q, k, v = (y @ w[f"{p}.attn.{part}_proj.weight"].T for part in "qkv")
        head_dim = q.shape[1] // heads
        q, k, v = (t.view(length, -1, head_dim).transpose(0, 1) for t in (q, k, v))
        q, k = rope(q), rope(k)
        mixed = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            weights = (q[head] @ k[kv].T / math.sqrt(head_dim) + mask).softmax(-1)
            mixed.append(weights @ v[kv])
        x = x + torch.cat(mixed, dim=1) @ w[f"{p}.attn.output_proj.weight"].T
        y = rms_norm(x, w[f"{p}.mlp_norm.scale"])
        gate, up = y @ w[f"{p}.mlp.w1.weight"].T, y @ w[f"{p}.mlp.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}.mlp.w2.weight"].T
    return rms_norm(x, w[f"{name}.norm.scale"])


def next_frame(rows: list[dict], w: dict[str, Tensor], sizes: dict) -> list[int]:
    """The greedy frame after a prompt of rows, each {"text": id} or {"codes": [ids]}."""
    vocab = sizes["vocab"]
    audio = w["audio_embeddings.weight"]
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
        logits = decoded[-1] @ w["audio_head"][len(codes) - 1]
        codes.append(int(logits[: sizes["codebook_size"]].argmax()))
    return codes
