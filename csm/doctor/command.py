"""``csm doctor``: run all checks and show what they found."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from csm.command_line import Output
from csm.doctor import gpu, hub, machine, sound
from csm.doctor.finding import EXIT_CODES, Finding, as_json, as_text, worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> Output:
    """Run all checks. The exit code is that of the worst finding: 0, 1 or 2."""
    findings = examine()
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text = as_json(findings) if args.json else as_text(findings, colored)
    return Output(text, EXIT_CODES[worst(findings)])


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    cuda, online = gpu.probe_cuda(), hub.probe_hub()
    return [
        machine.check_python(*machine.running_python()),
        machine.check_torch(torch.__version__, machine.version_of("torchaudio")),
        *gpu.check_gpu(cuda),
        gpu.check_triton(cuda),
        machine.check_selfcheck(),
        machine.check_native(),
        *machine.check_cores(machine.probe_cores()),
        machine.check_memory(machine.probe_memory()),
        *machine.check_gpu_memory(cuda),
        machine.check_disk(machine.free_for_download(), bool(online.cached)),
        *hub.check_hub(online),
        sound.check_codec(),
        sound.check_formats(),
        sound.check_sound(),
    ]
