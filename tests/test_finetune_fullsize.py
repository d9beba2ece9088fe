"""Memory and time of training steps at CSM-1B's size with random weights: ``make fullsize``. Prints a table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.fullsize
CPU = (
    ("lora", "bfloat16", 1, 1, "activation-checkpointing"),
    ("lora", "bfloat16", 1, 1),
    ("lora", "bfloat16", 8, 1, "activation-checkpointing"),
)
GPU = tuple((mode, "bfloat16", batch, 10) for mode in ("lora", "full") for batch in (1, 8))


def run(*arguments):
    worker = Path(__file__).parent / "finetune_worker.py"
    command = [sys.executable, worker, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_a_training_step_at_full_size():
    print(f"\ntorch {torch.__version__}\n| mode | batch | positions | trained M | weights GB | peak GB | s per step |")
    print("|---|---|---|---|---|---|---|")
    for arguments in GPU if torch.cuda.is_available() else CPU:
        mode, precision, batch, _, *more = arguments
        found = run(*arguments)
        name = " ".join([mode, precision, *more, found["device"]])
        figures = [f"{found[key]:.2f}" for key in ("start_gb", "peak_gb", "seconds_per_step")]
        print(
            f"| {name} | {batch} | {found['positions']} | {found['trained'] / 1e6:.1f} | {' | '.join(figures)} |",
            flush=True,
        )
        assert all(math.isfinite(loss) and loss > 7 for loss in found["losses"])
        if mode == "lora":
            assert found["trained"] < 40e6
