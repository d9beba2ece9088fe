"""``python bench.py``: measure frames a second on this machine, or look at the kernels without a GPU.

Prints Markdown tables and, last, one line of JSON. A configuration is timed only after it has generated the eager
step's greedy codes on a small float32 model. With random weights (the default) only time is measured: it does not
depend on their values.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from csm.bench import accuracy, end_to_end, machine_code, predict, report, tune
from csm.bench.cpu import ROWS as CPU_ROWS
from csm.bench.cpu import cpu_report
from csm.bench.launches import count_report, profile
from csm.bench.load import load_report
from csm.bench.model_setup import DTYPES, Setup, load
from csm.bench.rows import SKIPPED_FRAMES, NotTimed, Row, check_rows, copy_bandwidth, measured_rows
from csm.bench.stepping import MAX_FRAMES
from csm.command_line import Output, Parser, add_tokenizer_option, execute
from csm.config import CSM_1B
from csm.errors import CSMError
from csm.generator import DEFAULT_MODEL, Generator, find_device
from csm.quantize import PRESETS, parse_scheme
from csm.weights import open_checkpoint


def rows_section(setup: Setup, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The table of timed configurations."""
    bandwidth = copy_bandwidth(setup.device)
    here = report.machine(setup.device) | {"copy_gb_s": round(bandwidth / 1e9, 1), "dtype": str(setup.dtype)}

    def keep(rows: Sequence[Row | NotTimed]) -> None:
        if args.out:
            report.write(args.out, "rows.json", json.dumps([asdict(row) for row in rows]))

    rows = measured_rows(setup, args.rows, args.batch, args.frames, bandwidth, keep, args.quiet)
    lines = [f"{setup.label}; " + ", ".join(f"{k} {v}" for k, v in here.items()), ""]
    lines += [report.table([asdict(row) for row in rows]), ""]
    timed = [asdict(row) for row in rows if isinstance(row, Row)]
    if args.out and timed:
        report.plot(timed, args.out / "bench.png")
    not_timed = [asdict(row) for row in rows if isinstance(row, NotTimed)]
    return lines, {"machine": here, "model": setup.label, "rows": timed, "not_timed": not_timed}


def first_audio_section(setup: Setup) -> tuple[list[str], dict[str, Any]]:
    """The table of the time to first audio, or why there is none."""
    try:
        result = end_to_end.first_audio(setup)
    except CSMError as error:
        return [f"First audio: not measured, because {error}", ""], {}
    title = f"First audio, after {end_to_end.CONTEXT_ROWS} rows of context:"
    return [title, "", report.table([result]), ""], {"first_audio": result}


def benchmark(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Everything that is timed: Markdown, and the same for JSON."""
    setup = load(args.model, args.device, args.dtype, args.tokenizer)
    lines, result = rows_section(setup, args)
    more, first_audio = first_audio_section(setup)
    lines, result = lines + more, result | first_audio
    if args.profile:
        for ops in ("reference", "triton") if setup.device.type == "cuda" else ("reference",):
            result[f"profile_{ops}"] = profile(setup, ops)
            lines += [f"One frame, {ops} ops:", "", report.table(result[f"profile_{ops}"]), ""]
    if args.model:
        generator = Generator.from_pretrained(
            args.model, setup.device, setup.dtype, progress=not args.quiet, tokenizer=args.tokenizer
        )
        result["sentences"] = end_to_end.sentences(generator, args.max_seconds)
        lines += [report.table(result["sentences"]), ""]
    return "\n".join(lines), result


SERVE_SECONDS, TUNE_SECONDS = 30.0, 120.0
MODES = ("count", "kernels", "predict", "accuracy", "tune", "cpu", "serve")


def _add_cpu_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--cpu",
        action="store_true",
        help=f"compare weights on a CPU, taking turns, and stop; --rows are {', '.join(CPU_ROWS)}, or other presets",
    )
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads of --cpu (default: PyTorch's)")
    parser.add_argument("--busy", type=int, nargs="+", help="busy loops beside the rows of --cpu (default: 0)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of ``bench.py``."""
    parser = Parser(prog="bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", help=f"tiny, a folder, a GGUF file or a hub name ({DEFAULT_MODEL}); default: random weights"
    )
    add_tokenizer_option(parser)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--frames", type=int, default=20, help="frames to time in each row (default: 20)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these configurations")
    parser.add_argument("--max-seconds", type=float, default=4.0, help="most audio of each of the ten sentences")
    parser.add_argument("--count", action="store_true", help="count what a frame launches, and stop")
    parser.add_argument("--kernels", action="store_true", help="compile a frame's kernels for several GPUs, and stop")
    parser.add_argument(
        "--predict",
        choices=predict.GPUS,
        metavar="GPU",
        help=f"predict a frame's time, and stop: {', '.join(predict.GPUS)}",
    )
    presets = ", ".join(PRESETS)
    parser.add_argument("--quantize", help=f"with --kernels or --predict: {presets}, or types by part")
    parser.add_argument("--accuracy", action="store_true", help="compare the kernels with PyTorch's ops, and stop")
    parser.add_argument("--tune", action="store_true", help="measure launch configurations for this GPU, and stop")
    _add_cpu_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="add a table of the ops of a frame")
    parser.add_argument("--serve", metavar="URL", help="load a running server with --clients, and stop")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="clients at once (default: 1 8)")
    parser.add_argument(
        "--seconds", type=float, help="time for --tune (default: 120), or for each row of --serve (default: 30)"
    )
    parser.add_argument("--api-key", help="the server's API key")
    parser.add_argument("--out", type=Path, help="a folder for bench.md, bench.json and bench.png")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=report_results)
    args = parser.parse_args(argv)
    _check(parser, args)
    _check_values(parser, args)
    return args


def _check(parser: Parser, args: argparse.Namespace) -> None:
    if not 1 <= args.frames <= MAX_FRAMES - SKIPPED_FRAMES or min(args.batch) < 1:
        parser.error(f"--frames must be within 1 and {MAX_FRAMES - SKIPPED_FRAMES}, --batch at least 1")
    if args.quantize and not (args.kernels or args.predict):
        parser.error("--quantize goes with --kernels or --predict")
    if (args.threads or args.busy) and (not args.cpu or min(args.threads or [1]) < 1 or min(args.busy or [0]) < 0):
        parser.error("--threads and --busy go with --cpu; threads are at least 1, busy loops at least 0")


def _check_values(parser: Parser, args: argparse.Namespace) -> None:
    """Raise what can be known before a model is loaded or anything is measured."""
    if not 0.08 <= args.max_seconds < math.inf:
        parser.error(f"--max-seconds must be at least 0.08, not {args.max_seconds:g}")
    if args.seconds is not None and not (args.tune or args.serve):
        parser.error("--seconds goes with --tune or --serve")
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        parser.error(f"--seconds must be positive, not {args.seconds:g}")
    if args.api_key is not None and not args.serve:
        parser.error("--api-key goes with --serve")
    modes = [name for name in MODES if getattr(args, name)]
    if len(modes) > 1:
        parser.error(f"--{modes[1]} is not allowed with --{modes[0]}: each is all that is done")
    if args.rows and not args.cpu:
        check_rows(args.rows)
    find_device(args.device)
    if args.quantize is not None:
        parse_scheme(args.quantize)
    if args.out is not None and any(part.exists() and not part.is_dir() for part in (args.out, *args.out.parents)):
        raise CSMError(f"{args.out}: --out is a folder, and there is a file in its place")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    """What the options ask for: Markdown, the same for JSON, and the exit code."""
    if args.serve:
        return *load_report(args.serve, args.clients, args.seconds or SERVE_SECONDS, args.api_key), 0
    if args.cpu:
        threads = args.threads or [torch.get_num_threads()]
        return *cpu_report(args.model, args.rows, threads, args.frames, args.busy or [0], args.quiet), 0
    if args.accuracy:
        setup = load(args.model, args.device, args.dtype, args.tokenizer)
        rows = accuracy.compare(setup, args.frames)
        return report.table(rows), {"model": setup.label, "accuracy": rows}, 0
    if not (args.count or args.kernels or args.predict or args.tune):
        return *benchmark(args), 0
    config = open_checkpoint(args.model, tokenizer=args.tokenizer).config if args.model else CSM_1B
    dtype = DTYPES[args.dtype or "bfloat16"]
    if args.count:
        return *count_report(config), 0
    if args.predict:
        return *predict.predict_report(config, args.batch[0], dtype, args.predict, args.quiet, args.quantize), 0
    if args.tune:
        return *tune.tune_report(config, args.batch, dtype, args.seconds or TUNE_SECONDS, args.quiet), 0
    text, result = machine_code.kernels_report(config, args.batch, dtype, args.quiet, args.quantize)
    return text, result, 1 if result["spilled"] else 0


def report_results(args: argparse.Namespace) -> Output:
    """Run, and write ``--out``. The exit code is 1 if a kernel spills registers."""
    text, result, code = run(args)
    line = json.dumps(result)
    if args.out:
        report.write(args.out, "bench.md", text)
        report.write(args.out, "bench.json", line)
    return Output(f"{text}\n{line}", code)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if a kernel spills registers; 2 with a message on stderr for what the user can mend."""
    return execute("bench.py", lambda: parse_arguments(argv))
