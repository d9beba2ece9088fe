"""Frame runners: a step over buffers of its own, eager or captured, that generates greedy frames from the prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from csm.bench.model_setup import PROMPT_ROWS, Setup, forced_ops, milliseconds, prompt_rows
from csm.errors import CSMError
from csm.frame import FrameState, decode_frame
from csm.graph import Graph, graphs_enabled
from csm.kernels.launch import launches
from csm.model import CSM
from csm.prefill import Prefill
from csm.sampling import SamplingParams

MAX_FRAMES = 150
CHECKED_FRAMES = 12  # of an equality check

# Generates so many greedy frames from the prompt: milliseconds and codes (B, K) of each.
FrameRunner = Callable[[int], list[tuple[float, Tensor]]]
Make = Callable[[Setup, int], FrameRunner]
MakeStep = Callable[[CSM, FrameState], Callable[[], None]]


def stepping(
    setup: Setup,
    batch: int,
    make_step: MakeStep,
    ops: str = "reference",
    prompt: tuple[Tensor, Tensor] | None = None,
) -> FrameRunner:
    """A frame runner around a step over buffers of its own; ``ops`` is "reference" or "triton".

    ``prompt`` is rows (T, K + 1) and their mask for every slot; None is the prompt of every row.
    """
    rows = prompt or prompt_rows(setup.config)
    model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
    state = FrameState.allocate(model.config, batch, model.device, model.dtype)
    with forced_ops(ops):
        model.precompute_depth_qkv()
        prefill, step = Prefill(model), make_step(model, state)

    def generate(frames: int) -> list[tuple[float, Tensor]]:
        with forced_ops(ops):
            for slot in range(batch):
                prefill.start(state, slot, *rows, SamplingParams(temperature=0))
            return [(milliseconds(step, setup.device), state.codes_BK.clone()) for _ in range(frames)]

    return generate


def bench_bucket(state: FrameState) -> int:
    """The context bucket that holds the prompt and every frame that is timed."""
    return state.backbone_cache.bucket_for(PROMPT_ROWS + MAX_FRAMES)


def eager_step(model: CSM, state: FrameState) -> Callable[[], None]:
    """The step, run eagerly."""
    return lambda: decode_frame(model, state, bench_bucket(state))


def eager(setup: Setup, batch: int) -> FrameRunner:
    """The step run eagerly with PyTorch's ops: what every other row is compared with."""
    return stepping(setup, batch, eager_step)


def eager_kernels(setup: Setup, batch: int) -> FrameRunner:
    """The step run eagerly with the Triton kernels."""
    if setup.device.type != "cuda":
        raise CSMError(f"the Triton kernels need an NVIDIA GPU, and this runs on {setup.device}")
    return stepping(setup, batch, eager_step, "triton")


def graph(ops: str) -> Make:
    """The step, captured whole as one CUDA graph."""

    def make(setup: Setup, batch: int) -> FrameRunner:
        if not graphs_enabled(setup.device):
            reason = "CSM_NO_GRAPH is set" if setup.device.type == "cuda" else f"this runs on {setup.device}"
            raise CSMError(f"a CUDA graph cannot be captured: {reason}")

        def make_step(model: CSM, state: FrameState) -> Callable[[], None]:
            with launches() as seen:
                captured = Graph(eager_step(model, state), state.buffers, setup.device)
            if bool(seen) != (ops == "triton"):
                raise RuntimeError(f"with CSM_OPS={ops} the step launched {len(seen)} kernels")
            return captured.replay

        return stepping(setup, batch, make_step, ops)

    return make
