"""Opens checkpoints in processes that start quickly: forked from one that has imported what does not read settings.

Reads a case per line of standard input, as JSON, and answers each with a line of JSON: what was printed.
"""

import json
import os
import sys
import tempfile
import traceback
from importlib import import_module

for heavy in ("numpy", "requests", "safetensors.torch", "sphn", "tokenizers", "torch", "torchaudio.functional", "tqdm"):
    import_module(heavy)


def open_checkpoint(name: str, before: str, progress: bool) -> None:
    """Print the folder and the weight files of a checkpoint, or its error."""
    exec(before, {})
    from csm.weights import open_checkpoint

    try:
        checkpoint = open_checkpoint(name, progress=progress)
        print(checkpoint.folder, *sorted({path.name for path in checkpoint.file_of.values()}), sep="\n")
    except ValueError as error:
        print(type(error).__name__, error)


def main() -> None:
    assert "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        case = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.environ.update(case.pop("environment"))
                try:
                    open_checkpoint(**case)
                except Exception:  # noqa: BLE001 - the test sees it
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            os.waitpid(child, 0)
            out.seek(0)
            err.seek(0)
            print(json.dumps([out.read(), err.read()]), flush=True)


if __name__ == "__main__":
    main()
