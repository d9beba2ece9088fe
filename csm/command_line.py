"""What all commands share: a parser, exit codes, and a suggestion that is shown once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from csm.errors import CSMError, ListError
from csm.kernels.native import cache_folder

# A model's files of text, also beside a GGUF file or a tokenizer.json.
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer.json", "pronunciation.json.gz")
# Files of a model's or an adapter's folder, with the voices beside a checkpoint.
MODEL_FILES = (
    *CONFIG_FILES,
    "adapter_config.json",
    *("*.safetensors", "*.index.json", "*.pt", "prompts/*.wav", "voices/*.safetensors"),
)


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
    except (CSMError, OSError) as error:
        program = error.program if isinstance(error, UsageError) else program
        print(f"{program}: error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if isinstance(output, str):
        output = Output(output)
    if output.text:
        print(output.text)
    return output.exit_code


def printable(error: Exception) -> str:
    """An error's message on one line, or one a line if it lists several. It may repeat any argument or file name.

    Control characters are escaped: a terminal would obey them.
    """
    lines = str(error).splitlines() if isinstance(error, ListError) else [str(error)]
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(x.split())) for x in lines)


def check_overwrites(
    inputs: Iterable[tuple[str, str | Path | None]], outputs: Iterable[tuple[str, str | Path | None]]
) -> None:
    """Raise CSMError where an output is a file that is read, or is another output. ``inputs``: with what reads them."""
    taken = {os.path.realpath(path): f"is read ({name})" for name, path in inputs if path is not None}
    for name, path in outputs:
        if path is None or (Path(path).exists() and not Path(path).is_file()):  # a pipe or a device
            continue
        place = os.path.realpath(path)
        if place in taken:
            raise CSMError(f"{name} {path}: would overwrite a file that {taken[place]}; give another name")
        taken[place] = f"is written ({name})"


def model_inputs(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The files that --model, --tokenizer, --codec and --lora read, those of a folder included, each with its option.

    A checkpoint of the hub has none here: its files are in the hub's cache.
    """
    for option, patterns in (("model", MODEL_FILES), ("lora", MODEL_FILES), ("tokenizer", CONFIG_FILES)):
        value = getattr(args, option)
        path = None if value is None else Path(value)
        if path is not None and path.is_dir():
            yield from ((f"--{option}", file) for pattern in patterns for file in path.glob(pattern))
        elif path is not None and path.is_file():
            names = (path.name, *CONFIG_FILES, f"{path.stem}.codec.safetensors")  # of a GGUF file, or a tokenizer.json
            yield from ((f"--{option}", path.with_name(name)) for name in names)
    if args.codec is not None:
        yield "--codec", args.codec


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
