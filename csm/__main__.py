"""``python -m csm COMMAND``: voices, a server, training, evaluation. ``python -m csm --help`` lists the commands."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from csm import compare, quantized_model
from csm import voice_command as voice
from csm.errors import CSMError
from csm.evaluate import command as evaluate
from csm.finetune import command as finetune
from csm.serve import command as serve


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises CSMError, so that all errors are reported in the same way."""

    def error(self, message: str) -> NoReturn:
        raise CSMError(message)


# Name, help text, and the module that defines add_arguments() and run().
COMMANDS = (
    ("finetune", "train all weights or LoRA adapters on recordings", finetune),
    ("voice", "add, list, show, say, remove and export voices", voice),
    ("compare", "compare the weights and the logits of two models", compare),
    ("quantize", "write a model with int8 or int4 weights to a folder", quantized_model),
    ("eval", "measure generated speech: word error rate, length, voice similarity", evaluate),
    ("serve", "an HTTP server with OpenAI's audio API", serve),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command's options; ``run`` is the function that executes it."""
    parser = Parser(prog="python -m csm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_text, module in COMMANDS:
        command = commands.add_parser(name, help=help_text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with a message on stderr for an error that the user can fix."""
    try:
        args = parse_arguments(argv)
        output = args.run(args)
        if output:
            print(output)
    except (CSMError, OSError) as error:
        print(f"python -m csm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
