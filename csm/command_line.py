"""What all commands share: a parser, exit codes, and a suggestion that is shown once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from csm.errors import CSMError
from csm.kernels.native import cache_folder


class UsageError(CSMError):
    """Options that do not exist, are missing or exclude each other."""

    def __init__(self, message: str, program: str):
        super().__init__(message)
        self.program = program


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, so that all errors are reported in the same way."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)


@dataclass(frozen=True)
class Output:
    """What a command prints, and its exit code. A command whose exit code is always 0 returns the text alone."""

    text: str
    exit_code: int = 0


def execute(program: str, parse: Callable[[], argparse.Namespace]) -> int:
    """Run the command that ``parse`` finds and return its exit code: 2 with a message for what the user can fix.

    ``run`` of the parsed arguments is the command's function. ``program`` begins the message; a command's name follows.
    """
    try:
        args = parse()
        program = getattr(args, "program", program)
        output = args.run(args)
    except UsageError as error:
        print(f"{error.program}: error: {error}", file=sys.stderr)
        return 2
    except (CSMError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if isinstance(output, str):
        output = Output(output)
    if output.text:
        print(output.text)
    return output.exit_code


def add_tokenizer_option(parser: argparse._ActionsContainer) -> None:
    """``--tokenizer``, of every command that loads a model."""
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of a GGUF file that has none, or its folder")


def add_guard_options(parser: argparse._ActionsContainer) -> None:
    """``--no-guards`` and ``--no-guard``, of every command that generates; ``Guards.without(*args.no_guards)``."""
    parser.add_argument(
        "--no-guards",
        action="append_const",
        const="all",
        default=[],
        help="neither stop speech that runs on nor generate again what is too short (docs/guards.md)",
    )
    parser.add_argument(
        "--no-guard",
        action="append",
        dest="no_guards",
        metavar="NAME",
        help="turn off one guard: budget, silence, repeats or retry; may be repeated",
    )


def suggest_once(name: str, text: str) -> str:
    """``text`` on a terminal, the first time only, else an empty string. A file in ``$CSM_HOME`` records the first."""
    shown = cache_folder() / f"suggested-{name}"
    if not sys.stdout.isatty() or shown.exists():
        return ""
    try:
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.touch()
    except OSError as error:
        return f"{text} ({shown}: cannot be written, so this is shown again: {error.strerror})"
    return text
