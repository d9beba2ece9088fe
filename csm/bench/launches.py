"""What a frame launches, counted without a GPU, and where the time of an eager frame goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csm.bench.model_setup import Setup, forced_ops
from csm.bench.report import table
from csm.bench.stepping import eager_step, stepping
from csm.config import CSMConfig
from csm.frame import FrameState, decode_frame
from csm.kernels.launch import Launch, launches
from csm.kernels.quantized_rows import empty_rows
from csm.model import CSM
from csm.quantize import keep_in_cache, parse_scheme, quantized_weights, set_weight
from csm.weights.layouts import sesame_table, target_shapes

ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")


class Counting(TorchDispatchMode):
    """Counts the ops that launch something: all but views and allocations. ``on_op`` gets the name of each."""

    def __init__(self, on_op: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self._on_op = on_op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, Tensor)]
        same = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        # A cast or a reshape is a view only where nothing has to change.
        is_view = func.is_view and all(x.untyped_storage()._cdata in same for x in results)
        if results and not is_view and func._schema.name not in ALLOCATIONS:
            name = func._schema.name.removeprefix("aten::")
            self.ops[name] += 1
            if self._on_op is not None:
                self._on_op(name)
        return result


def shadow_step(
    config: CSMConfig, batch: int, dtype: torch.dtype, ops: str, scheme: str | None = None, l2_bytes: int = 0
) -> Callable[[], None]:
    """A step on the meta device: every op is called, and none computes. ``ops`` is "reference" or "triton".

    ``scheme`` quantises the weights, of which as many stay in the GPU's cache as fit into ``l2_bytes``.
    """
    meta = torch.device("meta")
    shapes = target_shapes(sesame_table(config))
    weights = {name: torch.empty(shape, dtype=dtype, device=meta) for name, shape in shapes.items()}
    model = CSM.from_state_dict(config, weights, meta)
    types = parse_scheme(scheme) if scheme else {}
    for weight in list(quantized_weights(model)):
        if weight.part in types:
            set_weight(model, weight.name, empty_rows(weight.value.shape, types[weight.part], dtype, meta))
    keep_in_cache(model, l2_bytes)
    with forced_ops(ops):
        model.precompute_depth_qkv()
    state = FrameState.allocate(config, batch, meta, dtype)
    return lambda: decode_frame(model, state, state.backbone_cache.buckets[0])


def frame_launches(config: CSMConfig, batch: int, dtype: torch.dtype, scheme: str | None = None) -> list[Launch]:
    """Every kernel launch of one frame, in order."""
    step = shadow_step(config, batch, dtype, "triton", scheme)
    with forced_ops("triton"), launches() as seen:
        step()
    return seen


def frame_sequence(
    config: CSMConfig, batch: int, dtype: torch.dtype, scheme: str | None = None, l2_bytes: int = 0
) -> list[Launch | str]:
    """Everything that one frame launches, in order: kernels, and the names of PyTorch's ops between them."""
    step = shadow_step(config, batch, dtype, "triton", scheme, l2_bytes)
    sequence: list[Launch | str] = []
    with forced_ops("triton"), launches() as seen:

        def on_op(name: str) -> None:
            sequence.extend(seen)
            seen.clear()
            sequence.append(name)

        with Counting(on_op):
            step()
        sequence.extend(seen)
    return sequence


def count_launches(config: CSMConfig, ops: str, batch: int = 1) -> Counter[str]:
    """What one frame launches, by name: ``ops`` is "reference" or "triton"."""
    step = shadow_step(config, batch, torch.bfloat16, ops)
    with forced_ops(ops), launches() as seen, Counting() as counting:
        step()
    return counting.ops + Counter(launch.name for launch in seen)


def count_report(config: CSMConfig) -> tuple[str, dict[str, Any]]:
    """What a frame launches with PyTorch's ops, and with the kernels: Markdown, and the same for JSON."""
    counts = {ops: count_launches(config, ops) for ops in ("reference", "triton")}
    names = sorted(counts["reference"] | counts["triton"], key=lambda name: -max(c[name] for c in counts.values()))
    rows = [{"op": name, **{ops: count[name] for ops, count in counts.items()}} for name in names]
    totals = {ops: count.total() for ops, count in counts.items()}
    return table([*rows, {"op": "all", **totals}]), {"launches": totals, "ops": rows}


def profile(setup: Setup, ops: str) -> list[dict[str, Any]]:
    """Time of the ops of the prompt and one eager frame, the largest first; ``ops`` is "reference" or "triton"."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    generate = stepping(setup, 1, eager_step, ops)
    generate(1)
    on_gpu = setup.device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        generate(1)
    rows = []
    for event in recorded.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"op": event.key, "calls": event.count, "ms": micros / 1000})
    return sorted(rows, key=lambda row: -row["ms"])[:20]
