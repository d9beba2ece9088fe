"""``csm batch --ray``: a file of lines on the GPUs of a Ray cluster (docs/scale.md). Needs the extra ``ray``.

Ray Data hands blocks of lines to workers, each of which has a model, and starts a worker anew that has gone. A worker
writes WAV files into the folder, which all nodes share; the process that was started writes the manifest alone. A
line's audio depends on the line and the options alone, so a block that is generated twice has the same files.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from tqdm import tqdm

from csm.batch import (
    BatchLine,
    BatchOptions,
    Output,
    Problem,
    generate_jobs,
    identified,
    is_finished,
    make_jobs,
    problem_of,
    write_audio,
)
from csm.errors import CSMError
from csm.generator import Generator
from csm.metrics import GenerationMetrics
from csm.watermark import load_watermark

BLOCKS_PER_SLOT = (
    4  # lines of a block for each slot: fewer leave slots empty at its end, more are lost if a worker goes
)


@dataclass(frozen=True)
class Task:
    """A line for a worker, with the entry that the manifest has of it."""

    number: int
    line: BatchLine
    entry: dict[str, Any] | None


@dataclass(frozen=True)
class Result:
    """What became of a line: an entry for the manifest, a problem, or neither, because it was there."""

    entry: dict[str, Any] | None = None
    metrics: GenerationMetrics | None = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each has of a node. None: one for each GPU of the cluster, else one."""

    count: int | None = None
    num_gpus: float | None = None
    num_cpus: float = 1.0

    def resolved(self, on_cpu: bool) -> Workers:
        """The same without None, for the cluster that Ray is connected to."""
        gpus = 0.0 if on_cpu else float(ray.cluster_resources().get("GPU", 0))
        num_gpus = self.num_gpus if self.num_gpus is not None else float(gpus > 0)
        return Workers(self.count or max(1, int(gpus)), num_gpus, self.num_cpus)


@dataclass(frozen=True)
class Plan:
    """What every worker is told. ``load`` makes the generator."""

    load: Callable[[], Generator]
    folder: Path
    options: BatchOptions
    slots: int
    watermark: str | None


class Worker:
    """A model, and blocks of lines for it."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._generator = plan.load()
        self._options = identified(plan.options, self._generator)
        self._watermark = None if plan.watermark is None else load_watermark(plan.watermark)

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Results of all lines of a block, at once: a block that is done again has none of them twice."""
        tasks: list[Task] = [pickle.loads(each) for each in block["item"]]
        return {"item": [pickle.dumps(result) for result in self.results(tasks)]}

    def results(self, tasks: list[Task]) -> Iterator[Result]:
        """What became of each line."""
        plan = self._plan
        entries = {task.number: task.entry for task in tasks}
        jobs, problems = make_jobs(self._generator, [(task.number, task.line) for task in tasks], self._options)
        yield from (Result(problem=problem) for problem in problems)
        open_jobs = [job for job in jobs if not is_finished(plan.folder, job, entries[job.line])]
        yield from (Result() for _ in range(len(jobs) - len(open_jobs)))
        for job, speech in generate_jobs(self._generator, open_jobs, plan.slots, self._watermark, plan.options.guards):
            if isinstance(speech, Exception):
                yield Result(problem=problem_of(job, speech))
            else:
                entry = write_audio(plan.folder, job, speech, self._generator.sample_rate)
                yield Result(entry, speech.metrics)


def generate_on_ray(
    lines: Mapping[int, BatchLine], output: Output, plan: Plan, workers: Workers, on_cpu: bool, quiet: bool
) -> tuple[list[GenerationMetrics], list[Problem]]:
    """Generate what is not there yet. Returns the metrics of each line, and the lines that failed.

    Connects to the cluster of ``RAY_ADDRESS``, or of this machine, or starts one on it. Raises CSMError.
    """
    tasks = [Task(number, line, output.entries.get(line.id)) for number, line in lines.items()]
    parts: list[GenerationMetrics] = []
    problems: list[Problem] = []
    with tqdm(total=len(tasks), unit="line", disable=True if quiet else None, leave=False) as bar:
        try:
            for result in _results(tasks, plan, workers, on_cpu):
                bar.update()
                if result.problem is not None:
                    problems.append(result.problem)
                elif result.entry is not None and result.metrics is not None:
                    _check_shared(plan.folder, result.entry)
                    output.add(result.entry)
                    parts.append(result.metrics)
        except RayError as error:
            raise CSMError(f"a worker failed: {error}") from error
    return parts, problems


def _results(tasks: list[Task], plan: Plan, workers: Workers, on_cpu: bool) -> Iterator[Result]:
    """The results of all lines, as blocks end."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    workers = workers.resolved(on_cpu)
    size = BLOCKS_PER_SLOT * plan.slots
    size = max(1, min(size, -(-len(tasks) // (workers.count or 1))))
    items = [{"item": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(items, override_num_blocks=-(-len(items) // size))
    done = dataset.map_batches(
        Worker,
        fn_constructor_args=(plan,),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers.count),
        num_gpus=workers.num_gpus,
        num_cpus=workers.num_cpus,
    )
    for row in done.iter_rows():
        yield pickle.loads(row["item"])


def _check_shared(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["file"]
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        raise CSMError(f"{path} was written by a worker and is not here: give a folder that all nodes share")
