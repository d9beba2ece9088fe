"""The model that a benchmark measures, its prompt, and the ops that it runs with."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csm.config import CSM_1B, MIMI, CodecConfig, CSMConfig
from csm.errors import CSMError
from csm.kernels.launch import triton
from csm.prompt import text_rows
from csm.weights import Checkpoint, open_checkpoint, read_model
from csm.weights.layouts import sesame_table, target_shapes

PROMPT_ROWS = 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """A model to measure: its shape, and the state dict under this package's names on the device to measure."""

    config: CSMConfig
    codec_config: CodecConfig
    weights: dict[str, Tensor]
    label: str
    checkpoint: Checkpoint | None = None

    @property
    def device(self) -> torch.device:
        return self.weights["codebook0_head"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["codebook0_head"].dtype


def load(
    model: str | None, device_name: str | None, dtype_name: str | None, tokenizer: str | Path | None = None
) -> Setup:
    """The checkpoint ``model``, or CSM-1B's shape with random weights. None for device or dtype is its default."""
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[dtype_name or ("bfloat16" if device.type == "cuda" else "float32")]
    if model is None:
        weights = random_weights(CSM_1B, device, dtype)
        return Setup(CSM_1B, MIMI, weights, "CSM-1B's shape, random weights (speed does not depend on their values)")
    checkpoint = open_checkpoint(model, tokenizer=tokenizer)
    weights = read_model(checkpoint, device, dtype)
    return Setup(checkpoint.config, checkpoint.codec_config, weights, model, checkpoint)


def random_weights(config: CSMConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the right shapes, drawn on the device."""
    torch.manual_seed(0)
    weights = {}
    for name, shape in target_shapes(sesame_table(config)).items():
        tensor = torch.empty(shape, device=device, dtype=dtype)
        weights[name] = tensor.fill_(1) if len(shape) == 1 else tensor.normal_(0, 1 / math.sqrt(shape[-1]))
    return weights


def small_setup(setup: Setup) -> Setup:
    """The embedded checkpoint's shape on the same device, in float32, with random weights: for equality checks.

    Random weights never draw a frame of zeros, so generation never ends. The ids that no codec knows get zero rows in
    the heads, because HF Transformers does not mask them.
    """
    checkpoint = open_checkpoint("tiny")
    weights = random_weights(checkpoint.config, setup.device, torch.float32)
    weights["codebook0_head"][checkpoint.config.codebook_size :] = 0
    weights["depth_heads"][:, checkpoint.config.codebook_size :] = 0
    return Setup(checkpoint.config, checkpoint.codec_config, weights, "tiny's shape")


def prompt_rows(config: CSMConfig) -> tuple[Tensor, Tensor]:
    """The prompt of every row: PROMPT_ROWS text rows of arbitrary ids, (T, K + 1), and their mask."""
    ids = [(7 * i + 3) % min(config.text_vocab_size, 200) for i in range(PROMPT_ROWS)]
    return text_rows(ids, config.num_codebooks)[:2]


@contextmanager
def forced_ops(name: str) -> Iterator[None]:
    """Set ``CSM_OPS`` to ``name`` inside the block. Raises CSMError for kernels without Triton."""
    if name == "triton" and triton is None:
        raise CSMError("kernels need Triton: install it, and without a GPU set CSM_TRITON=1 before csm is imported")
    before = os.environ.get("CSM_OPS")
    os.environ["CSM_OPS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["CSM_OPS"]
        else:
            os.environ["CSM_OPS"] = before


def synchronize(device: torch.device) -> None:
    """Wait for all work on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return (time.perf_counter() - started) * 1000
