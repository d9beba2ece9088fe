"""One row of ``bench.py --cpu``, in a process of its own: ``python -m csm.bench.cpu_worker KIND FOLDER THREADS``.

KIND is ``ours``, ``transformers`` or ``llama.cpp``. A process per row keeps their memory apart. It answers each line
of standard input, ``codes 8``, ``audio 60`` or ``check 4``, with one line of JSON.

Shapes: B slots, N rows, C columns, T frames, K codebooks, V ids.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from csm.bench import llama_cpp_row
from csm.bench.end_to_end import FRAME_MS, TEXT
from csm.bench.model_setup import forced_ops, milliseconds, prompt_rows
from csm.bench.peers import Clock, load_transformers
from csm.bench.stepping import bench_bucket
from csm.compare import teacher_forced_logits, with_codes
from csm.frame import FrameState, decode_frame
from csm.generator import Generator
from csm.model import CSM
from csm.prefill import Prefill
from csm.quantize import quantized_weights
from csm.quantized_model import FILE
from csm.sampling import SamplingParams
from csm.weights.config_json import read_config

Command = Callable[[int], dict[str, Any]]


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def frame_bytes(generator: Generator) -> dict[str, int]:
    """Bytes of the weights that a frame multiplies: those of the depth decoder in each of its passes, and all once."""
    weights = list(quantized_weights(generator.model))
    passes = {"depth": generator.config.num_codebooks - 1}
    multiplied = sum(weight.value.nbytes * passes.get(weight.part, 1) for weight in weights)
    return {"frame_bytes": multiplied, "weight_bytes": sum(weight.value.nbytes for weight in weights)}


@torch.inference_mode()
def logit_error(model: CSM, num_rows: int) -> float:
    """The relative error of a model's logits against PyTorch's ops on the same weights, over rows of random codes."""
    seed = torch.Generator().manual_seed(0)
    shape = (num_rows, model.config.num_codebooks + 1)
    row_NC = torch.randint(model.config.codebook_size, shape, generator=seed)
    row_NC[:, -1] = 0
    mask_NC = torch.ones_like(row_NC, dtype=torch.bool)
    mask_NC[:, -1] = False
    logits_TKV = teacher_forced_logits(model, row_NC, mask_NC, num_rows - 1)
    with forced_ops("reference"):
        reference_TKV = teacher_forced_logits(model, row_NC, mask_NC, num_rows - 1)
    return float((logits_TKV - reference_TKV).norm() / reference_TKV.norm())


@torch.inference_mode()
def worst_choice(model: CSM, frames: int) -> float:
    """How far the codes of the step that is timed are from the best ones, in standard deviations of the logits.

    The step generates ``frames`` frames greedily after the prompt. PyTorch's ops then compute the logits of the same
    codes, all rows at once. The result is the largest distance of a code's logit from the largest logit. It is 0 for
    equal arithmetic, and about 3.5 for a code that has nothing to do with its logits.
    """
    state = FrameState.allocate(model.config, 1, model.device, model.dtype)
    row_NC, mask_NC = prompt_rows(model.config)
    Prefill(model).start(state, 0, row_NC, mask_NC, SamplingParams(temperature=0))
    frames_TK = []
    for _ in range(frames):
        decode_frame(model, state, bench_bucket(state))
        frames_TK.append(state.codes_BK[0].clone())
    code_TK = torch.stack(frames_TK)
    row_NC, mask_NC = with_codes(row_NC, mask_NC, code_TK)
    with forced_ops("reference"):
        logits_TKV = teacher_forced_logits(model, row_NC, mask_NC, frames)
    chosen_TK = logits_TKV.gather(2, code_TK.unsqueeze(2)).squeeze(2)
    return float(((logits_TKV.amax(2) - chosen_TK) / logits_TKV.std(2)).max())


def ours(folder: str, threads: int) -> dict[str, Command]:
    """This package's model from a folder of either kind. Weights that are not quantised are bfloat16."""
    dtype = None if (Path(folder) / FILE).is_file() else torch.bfloat16
    generator = Generator.from_pretrained(folder, "cpu", dtype, progress=False, max_streams=1, threads=threads)
    torch.set_num_threads(threads)
    model = generator.model
    state = FrameState.allocate(model.config, 1, model.device, model.dtype)
    prefill = Prefill(model)

    def step() -> None:
        decode_frame(model, state, bench_bucket(state))

    def codes(frames: int) -> dict[str, Any]:
        started = time.perf_counter()
        prefill.start(state, 0, *prompt_rows(model.config), SamplingParams(temperature=0))
        step()
        first_ms = 1000 * (time.perf_counter() - started)
        ms = [milliseconds(step, model.device) for _ in range(frames)]
        return {"first_ms": first_ms, "ms": ms} | frame_bytes(generator)

    def audio(frames: int) -> dict[str, Any]:
        stream = generator.stream(TEXT, max_audio_length_ms=FRAME_MS * (frames + 1), temperature=0)
        arrived = [time.perf_counter() for _ in stream]
        if len(arrived) < 2:
            raise SystemExit("the model ends at once: its weights do not generate speech")
        return {"ms": [1000 * (arrived[-1] - arrived[0]) / (len(arrived) - 1)]}

    def check(rows: int) -> dict[str, Any]:
        return {"error": logit_error(model, rows), "worst_choice": worst_choice(model, rows)}

    return {"codes": codes, "audio": audio, "check": check}


def transformers(folder: str, threads: int) -> dict[str, Command]:
    """HF Transformers' model in bfloat16. Its codec cannot stream: it decodes all frames at the end."""
    torch.set_num_threads(threads)
    model = load_transformers(folder)
    ids = prompt_rows(read_config(Path(folder) / "config.json")[0])[0][:, -1][None]

    @torch.no_grad()
    def generate(frames: int) -> list[tuple[float, torch.Tensor]]:
        clock = Clock(model.config.num_codebooks)
        options = dict(do_sample=False, depth_decoder_do_sample=False, max_new_tokens=frames)
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        return clock.frames

    def codes(frames: int) -> dict[str, Any]:
        (first_ms, _), *others = generate(frames + 1)
        return {"first_ms": first_ms, "ms": [ms for ms, _ in others]}

    @torch.no_grad()
    def audio(frames: int) -> dict[str, Any]:
        _, *others = generate(frames + 1)
        last_code = model.codec_model.config.codebook_size - 1
        code_1KT = torch.stack([code_1K for _, code_1K in others], dim=2).clamp(max=last_code)
        started = time.perf_counter()
        model.codec_model.decode(code_1KT)
        decode_ms = 1000 * (time.perf_counter() - started)
        return {"ms": [(sum(ms for ms, _ in others) + decode_ms) / frames]}

    return {"codes": codes, "audio": audio}


def main(kind: str, folder: str, threads: str) -> None:
    """Load the model and answer commands until standard input ends."""
    commands = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp_row.commands}[kind](
        folder, int(threads)
    )
    for line in sys.stdin:
        name, number = line.split()
        result = commands[name](int(number))
        print(json.dumps(result | {"peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
