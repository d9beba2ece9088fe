"""Generate a file of lines into a folder of WAV files, many lines at a time (docs/batch.md).

Each line of the file is a JSON object: id, text, and as you like voice, speaker, seed, temperature, top_k, max_seconds.
A run that was stopped goes on where it was. Exit code: 0, 1 where lines are listed in errors.jsonl, 2 for an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from csm import CSMError, GenerationMetrics, Generator, Guards, SamplingParams, Watermark
from csm.batch import (
    ERRORS,
    FIELDS,
    MANIFEST,
    BatchLine,
    BatchOptions,
    Job,
    Output,
    Problem,
    generate_jobs,
    identified,
    make_jobs,
    problem_of,
    read_lines,
)
from csm.command_line import Output as Printed
from csm.command_line import add_guard_options
from csm.generate_command import (
    add_model_options,
    add_report_options,
    add_watermark_option,
    load,
    open_watermark,
)
from csm.metrics import combined

MAX_SLOTS = 1024
SHOWN = 10  # problems that are printed; errors.jsonl has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("lines", type=Path, metavar="FILE", help=f"JSON lines with the fields {', '.join(FIELDS)}")
    parser.add_argument("out", type=Path, help="folder for ID.wav of each line, manifest.jsonl and errors.jsonl")
    group = parser.add_argument_group("defaults of all lines")
    group.add_argument("--seed", type=int, default=0, help="a line without a seed draws one from this and its id (0)")
    group.add_argument("--max-seconds", type=float, help="most audio of a line (default: the checkpoint's, else 90)")
    group.add_argument("--no-normalize", action="store_true", help="keep numbers, abbreviations and markup as written")
    add_watermark_option(group)
    add_guard_options(group)
    group = parser.add_argument_group("run")
    group.add_argument("--slots", type=int, default=8, help="lines that are generated at a time (default: 8)")
    add_report_options(group)
    group = parser.add_argument_group("on a Ray cluster (docs/scale.md)")
    group.add_argument("--ray", action="store_true", help="on the cluster of $RAY_ADDRESS, or one of this machine")
    group.add_argument("--ray-workers", type=int, metavar="N", help="models (default: one for each GPU, else one)")
    group.add_argument("--ray-cpus", type=float, default=1.0, metavar="N", help="processors of a worker (default: 1)")
    add_model_options(parser.add_argument_group("model and device"))


def run(args: argparse.Namespace) -> Printed:
    """Generate what is not there yet; return the closing line."""
    if args.lines.resolve() in [(args.out / name).resolve() for name in (MANIFEST, ERRORS)]:
        raise CSMError(f"{args.lines}: would be overwritten; choose another folder than {args.out}")
    lines, problems = read_lines(args.lines)
    check_options(args)
    if args.ray:
        return run_on_ray(args, lines, problems)
    watermark = open_watermark(args)
    generator = load(args, max_streams=args.slots)
    jobs, more = make_jobs(generator, lines.items(), identified(options_of(args), generator))
    if not jobs:
        raise CSMError(f"no line can be spoken: line {more[0].line}: {more[0].error}")
    problems += more
    with Output(args.out) as output:
        open_jobs = [job for job in jobs if not output.has(job)]
        started = time.perf_counter()
        parts, failed = generate_all(generator, open_jobs, output, args, watermark)
        metrics = combined(parts, time.perf_counter() - started)
        problems = sort([*problems, *failed])
        left_out = {problem.id for problem in failed}
        output.finish([job.id for job in jobs if job.id not in left_out], problems)
    return printed(args, metrics, len(parts), len(jobs) - len(open_jobs), problems)


def run_on_ray(args: argparse.Namespace, lines: dict[int, BatchLine], problems: list[Problem]) -> Printed:
    """The same on a Ray cluster. Workers say which lines are there already."""
    try:
        from csm.batch_ray import Plan, Workers, generate_on_ray
    except ImportError as error:
        raise CSMError(f"--ray needs the package {error.name}: pip install 'csm[ray]'") from error

    plan = Plan(
        partial(load, args, max_streams=args.slots), args.out.resolve(), options_of(args), args.slots, args.watermark
    )
    workers = Workers(args.ray_workers, num_cpus=args.ray_cpus)
    with Output(args.out) as output:
        started = time.perf_counter()
        parts, failed = generate_on_ray(lines, output, plan, workers, args.device == "cpu", args.quiet)
        metrics = combined(parts, time.perf_counter() - started)
        problems = sort([*problems, *failed])
        left_out = {problem.id for problem in failed}
        output.finish([line.id for line in lines.values() if line.id not in left_out], problems)
    return printed(args, metrics, len(parts), len(lines) - len(parts) - len(failed), problems)


def sort(problems: Sequence[Problem]) -> list[Problem]:
    """In the order of the lines."""
    return sorted(problems, key=lambda problem: problem.line)


def check_options(args: argparse.Namespace) -> None:
    """Raise CSMError for an option that is out of range, before anything is loaded."""
    SamplingParams(seed=args.seed)
    Guards.without(*args.no_guards)
    if not 1 <= args.slots <= MAX_SLOTS:
        raise CSMError(f"--slots must be 1 to {MAX_SLOTS}, not {args.slots}")
    if (args.ray_workers is not None and args.ray_workers < 1) or not args.ray_cpus >= 0:
        raise CSMError("--ray-workers must be at least 1, and --ray-cpus at least 0")
    BatchLine("x", "x", max_seconds=args.max_seconds)
    if args.out.exists() and not args.out.is_dir():
        raise CSMError(f"{args.out} is not a folder: give the name of one")


def options_of(args: argparse.Namespace) -> BatchOptions:
    """What holds for all lines."""
    off = (f"no-guard-{name}" for name in sorted(set(args.no_guards)))
    identity = " ".join([f"watermark {args.watermark}", *off])
    return BatchOptions(args.seed, not args.no_normalize, args.max_seconds, identity, Guards.without(*args.no_guards))


def generate_all(
    generator: Generator, jobs: Sequence[Job], output: Output, args: argparse.Namespace, watermark: Watermark | None
) -> tuple[list[GenerationMetrics], list[Problem]]:
    """Generate and keep every job. Returns the metrics of each, and the jobs that failed."""
    parts: list[GenerationMetrics] = []
    failed: list[Problem] = []
    with tqdm(total=len(jobs), unit="line", disable=True if args.quiet else None, leave=False) as bar:
        guards = Guards.without(*args.no_guards)
        for job, result in generate_jobs(generator, jobs, args.slots, watermark, guards):
            if isinstance(result, Exception):
                failed.append(problem_of(job, result))
            else:
                output.write(job, result, generator.sample_rate)
                parts.append(result.metrics)
            bar.update()
    return parts, failed


def printed(
    args: argparse.Namespace, metrics: GenerationMetrics, done: int, there: int, problems: Sequence[Problem]
) -> Printed:
    """Print the first lines that were left out; return the closing line and the exit code."""
    for problem in problems[:SHOWN]:
        print(f"line {problem.line}: {problem.error}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more", file=sys.stderr)
    return Printed(closing(args, metrics, done, there, len(problems)), 1 if problems else 0)


def closing(args: argparse.Namespace, metrics: GenerationMetrics, done: int, there: int, num_problems: int) -> str:
    """What was done, on one line, and the metrics if they are asked for."""
    text = f"{args.out}: {done} lines generated, {there} were there"
    if num_problems:
        text += f", {num_problems} left out ({args.out / ERRORS})"
    if metrics.rtf:
        seconds, elapsed = metrics.audio_seconds, metrics.elapsed_seconds
        text += f"; {seconds:.2f} s of audio in {elapsed:.2f} s ({1 / metrics.rtf:.1f}x real time)"
    return f"{text}\nmetrics: {metrics}" if args.metrics else text
