"""``python -m csm COMMAND``: what is not speaking. ``python -m csm --help`` lists the commands."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from csm.errors import CSMError
from csm.evaluate import command as evaluate
from csm.finetune import command as finetune


class Parser(argparse.ArgumentParser):
    """Reports a bad option as everything else is reported."""

    def error(self, message: str) -> NoReturn:
        raise CSMError(message)


# Name, what it does, and the module with its add_arguments and run.
COMMANDS = (
    ("finetune", "train a model, whole or by adapters, on recordings", finetune),
    ("eval", "measure what a model says: word error rate, length, voice", evaluate),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command's options, and as ``run`` what runs it."""
    parser = Parser(prog="python -m csm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, does, module in COMMANDS:
        command = commands.add_parser(name, help=does, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with a message on stderr for what the user can mend."""
    try:
        args = parse_arguments(argv)
        said = args.run(args)
        if said:
            print(said)
    except (CSMError, OSError) as error:
        print(f"python -m csm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
