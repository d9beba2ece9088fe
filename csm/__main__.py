"""Generate speech, serve it, train and measure models, check this machine. ``csm COMMAND --help`` describes a command.

``csm`` is the console script of the installed package; ``python -m csm`` is the same.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from csm import (
    batch_command,
    compare,
    doctor,
    generate_command,
    quantized_model,
    read_command,
    watermark_command,
)
from csm import voice_command as voice
from csm.command_line import Parser, UsageError, execute
from csm.evaluate import command as evaluate
from csm.finetune import command as finetune
from csm.serve import command as serve

# Name, help text, and the module that defines add_arguments() and run().
COMMANDS = (
    ("generate", "generate speech from text into an audio file", generate_command),
    ("read", "read a book or a dialogue into audio files with chapters; resumable", read_command),
    ("batch", "generate a file of lines into a folder, many at a time", batch_command),
    ("finetune", "train all weights or LoRA adapters on recordings", finetune),
    ("voice", "add, list, show, say, remove and export voices", voice),
    ("compare", "compare the weights and the logits of two models", compare),
    ("quantize", "write a model with quantised weights to a folder, or to a GGUF file", quantized_model),
    ("watermark", "search audio files for a watermark", watermark_command),
    ("eval", "measure generated speech: word error rate, length, voice similarity", evaluate),
    ("serve", "an HTTP server with OpenAI's audio API", serve),
    ("doctor", "check what this machine has, and what CSM-1B needs", doctor),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command's options; ``run`` is the function that executes it."""
    parser = Parser(prog=_program(), description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_text, module in COMMANDS:
        command = commands.add_parser(name, help=help_text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, program=command.prog)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}", args.program)
    return args


def _program() -> str:
    """How the program was called."""
    return "csm" if Path(sys.argv[0]).stem == "csm" else "python -m csm"


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: its own, or 2 with a message on stderr for what the user can fix."""
    return execute(_program(), lambda: parse_arguments(argv))


def console() -> None:
    """The console script ``csm``. SIGTERM becomes an exception, so that half-written files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())


if __name__ == "__main__":
    console()
