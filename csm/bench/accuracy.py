"""How far the kernels' numbers are from PyTorch's ops: logits under teacher forcing, and free-running greedy codes.

Greedy codes alone are a poor test: one rounding can change one code, and every code after it depends on it. So every
run is also forced to the same codes, and the logits are compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import csm.frame
from csm.bench.model_setup import Setup, forced_ops, prompt_rows
from csm.bench.stepping import bench_bucket
from csm.errors import CSMError
from csm.frame import FrameState, decode_frame
from csm.kernels import QKVGather, sample
from csm.kernels.launch import triton
from csm.model import CSM
from csm.prefill import Prefill
from csm.sampling import SamplingParams

Sample = Callable[..., Tensor | None]


@dataclass(frozen=True)
class Run:
    """Codes (F, K) that were drawn, and the logits (F * K, V) in float32 that they were drawn from."""

    codes_FK: Tensor
    logits_NV: Tensor


@contextmanager
def sampling_with(replacement: Sample) -> Iterator[None]:
    """Make ``decode_frame`` draw codes with ``replacement`` inside the block."""
    csm.frame.sample = replacement
    try:
        yield
    finally:
        csm.frame.sample = sample


def run(setup: Setup, ops: str, frames: int, forced_FK: Tensor | None = None) -> Run:
    """Greedy frames of one slot with PyTorch's ops ("reference") or the kernels ("triton").

    With ``forced_FK`` every draw takes that code instead of its own; the codes returned are still the run's own draws.
    """
    model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
    state = FrameState.allocate(model.config, 1, model.device, model.dtype)
    logits: list[Tensor] = []
    codes: list[Tensor] = []

    def recording(
        logits_BV: Tensor, codebook: int, noise: Any, codes_BK: Tensor, table_VD: Tensor | None, qkv: QKVGather | None
    ) -> Tensor | None:
        assert qkv is None, "this model has no table of q, k and v"
        logits.append(logits_BV[0].float().clone())
        embedding_BD = sample(logits_BV, codebook, noise, codes_BK, table_VD)
        codes.append(codes_BK[0, codebook].clone())
        if forced_FK is None:
            return embedding_BD
        codes_BK[:, codebook] = forced_FK[(len(codes) - 1) // model.config.num_codebooks, codebook]
        return None if table_VD is None else F.embedding(codes_BK[:, codebook], table_VD)

    with torch.inference_mode(), forced_ops("reference"):
        Prefill(model).start(state, 0, *prompt_rows(model.config), SamplingParams(temperature=0))
    with torch.inference_mode(), forced_ops(ops), sampling_with(recording):
        for _ in range(frames):
            decode_frame(model, state, bench_bucket(state))
    return Run(torch.stack(codes).view(frames, -1).cpu(), torch.stack(logits).cpu())


def compare(setup: Setup, frames: int) -> list[dict[str, Any]]:
    """One row for each dtype and ops: the distance from PyTorch's ops in float32, with the same weight values.

    ``first_differing_frame`` compares free-running greedy codes with PyTorch's ops in the same dtype; None: all equal.
    Logit errors are in units of the logits' standard deviation. ``codes_changed`` counts the draws, of all, whose
    largest logit is another one. The kernels in bfloat16 are right if they are about as far away as PyTorch's ops.
    Raises CSMError where the kernels cannot run.
    """
    if setup.device.type != "cuda" and not (triton and triton.knobs.runtime.interpret):
        raise CSMError(f"the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1), and the model is on {setup.device}")
    wide = {name: tensor.float() for name, tensor in setup.weights.items()}
    reference = run(replace(setup, weights=wide), "reference", frames)
    scale = reference.logits_NV.std()
    rows = []
    for dtype in dict.fromkeys((torch.float32, setup.dtype)):
        own = replace(setup, weights={name: tensor.to(dtype) for name, tensor in wide.items()})
        plain = reference if dtype == torch.float32 else run(own, "reference", frames)
        for ops in ("reference", "triton"):
            if ops == "reference" and dtype == torch.float32:
                continue
            free = plain if ops == "reference" else run(own, ops, frames)
            forced = run(own, ops, frames, reference.codes_FK.to(setup.device))
            error_NV = (forced.logits_NV - reference.logits_NV) / scale
            rows.append(
                {
                    "ops": ops,
                    "dtype": str(dtype).removeprefix("torch."),
                    "frames": frames,
                    "first_differing_frame": first_difference(free.codes_FK, plain.codes_FK),
                    "largest_logit_error": error_NV.abs().max().item(),
                    "rms_logit_error": error_NV.square().mean().sqrt().item(),
                    "codes_changed": int((forced.codes_FK != reference.codes_FK).sum()),
                    "codes": reference.codes_FK.numel(),
                }
            )
    return rows


def first_difference(one_FK: Tensor, other_FK: Tensor) -> int | None:
    """The first frame in which two runs drew different codes, or None."""
    different = (one_FK != other_FK).any(dim=1).nonzero()
    return int(different[0]) if different.numel() else None
