"""The row of llama.cpp in ``bench.py --cpu``: the matrix shapes of a frame, read by its ops (llama-cpp-python).

llama.cpp knows nothing of CSM, so a frame is imitated by two Llama models of random q4_0 weights with the shapes of the
backbone and the depth decoder, one token of the first and K of the second. Each has one head in q8_0; llama.cpp reads
the same head in all passes of the depth decoder, a frame of CSM reads another in each. Nothing is sampled, and no code
depends on another. So the row tells what these shapes cost in another well-kept library, not what it would generate.

Shapes: N rows, K codebooks, V ids, D dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from csm.bench.model_setup import PROMPT_ROWS
from csm.config import CSMConfig, TransformerConfig
from csm.gguf_model import package

NAMES = ("backbone.gguf", "depth_decoder.gguf")
CONTEXT = 512  # positions; the bench's frames stay below
BLOCK = 32  # weights that share a float16 scale, in q4_0 and q8_0


def write_models(config: CSMConfig, folder: Path) -> None:
    """Two GGUF files of random weights with the shapes of the two transformers."""
    for name, transformer in zip(NAMES, (config.backbone, config.depth_decoder), strict=True):
        _write(folder / name, transformer, config)


def tensors(config: TransformerConfig, vocab: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """The name, shape and type of every tensor, as llama.cpp expects them of a Llama model."""
    dim, hidden = config.dim, config.hidden_dim
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "token_embd.weight", (vocab, dim), "Q4_0"
    for index in range(config.num_layers):
        matrices = {
            "attn_q": (query, dim),
            "attn_k": (key, dim),
            "attn_v": (key, dim),
            "attn_output": (dim, query),
            "ffn_gate": (hidden, dim),
            "ffn_up": (hidden, dim),
            "ffn_down": (dim, hidden),
        }
        yield from ((f"blk.{index}.{name}.weight", shape, "Q4_0") for name, shape in matrices.items())
        yield from ((f"blk.{index}.{name}.weight", (dim,), "F32") for name in ("attn_norm", "ffn_norm"))
    yield "output_norm.weight", (dim,), "F32"
    yield "output.weight", (vocab, dim), "Q8_0"


def random_tensor(shape: tuple[int, ...], kind: str, random: np.random.Generator) -> np.ndarray:
    """Ones for F32, else blocks of a scale and random values: (N, bytes) uint8."""
    if kind == "F32":
        return np.ones(shape, dtype=np.float32)
    num_bytes = {"Q4_0": 16, "Q8_0": 32}[kind]
    blocks = random.integers(0, 256, (shape[0], shape[1] // BLOCK, 2 + num_bytes), dtype=np.uint8)
    scale = np.float16(shape[1] ** -0.5 / (4 if kind == "Q4_0" else 64))
    blocks[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return blocks.reshape(shape[0], -1)


def _write(path: Path, config: TransformerConfig, model: CSMConfig) -> None:
    gguf, vocab = package(), model.audio_vocab_size
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(max(config.max_positions, CONTEXT))
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    random, num_bytes = np.random.default_rng(0), 0
    for name, shape, kind in tensors(config, vocab):
        data = random_tensor(shape, kind, random)
        num_bytes += data.nbytes if name != "token_embd.weight" else 0  # which is gathered, not multiplied
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_uint64("csm.weight_bytes", num_bytes)
    writer.add_uint32("csm.passes", model.num_codebooks - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def commands(folder: str, threads: int) -> dict[str, Callable[[int], dict[str, Any]]]:
    """What ``csm.bench.cpu_worker`` answers for this row: ``codes`` alone."""
    from llama_cpp import Llama

    options = {"n_ctx": CONTEXT, "n_batch": 128, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    backbone, depth = (Llama(str(Path(folder) / name), **options) for name in NAMES)
    passes = int(depth.metadata["csm.passes"])

    def frame() -> None:
        backbone.eval([1])
        depth.reset()
        depth.eval([1, 2])
        for _ in range(passes - 1):
            depth.eval([1])

    def milliseconds(function: Callable[[], None]) -> float:
        started = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - started)

    def first_frame() -> None:
        backbone.reset()
        backbone.eval([2] * (PROMPT_ROWS - 1))
        frame()

    def codes(frames: int) -> dict[str, Any]:
        first_ms = milliseconds(first_frame)
        sizes = [int(model.metadata["csm.weight_bytes"]) for model in (backbone, depth)]
        return {
            "first_ms": first_ms,
            "ms": [milliseconds(frame) for _ in range(frames)],
            "frame_bytes": sizes[0] + passes * sizes[1],
            "weight_bytes": sum(sizes),
        }

    return {"codes": codes}
