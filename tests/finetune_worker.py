"""Measures training steps of a model of CSM-1B's size with random weights, in its own process; prints JSON.

``python finetune_worker.py lora|full float32|bfloat16 BATCH STEPS [activation-checkpointing]``
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from fullsize_worker import memory

from csm.config import CSM_1B
from csm.finetune.loss import Trainee
from csm.finetune.options import TrainOptions
from csm.finetune.train import Trainer
from csm.lora import Lora, LoraConfig
from csm.model import CSM
from micro import random_examples

TEXT, FRAMES = 24, 100  # 8 s of audio; 125 positions with the end frame


def model_in(dtype: torch.dtype, device: torch.device) -> CSM:
    """Random weights, filled in place, so that no copy adds to the peak memory."""
    with torch.device("meta"):
        empty = CSM(CSM_1B, device)
    state = {}
    for name, parameter in empty.named_parameters():
        filled = torch.empty(parameter.shape, dtype=dtype, device=device)
        state[name] = filled.fill_(1.0) if parameter.ndim == 1 else filled.normal_(std=0.02)
    return CSM.from_state_dict(CSM_1B, state, device)


def main(mode: str, precision: str, batch: str, steps: str, *more: str) -> None:
    """Train and print the memory and time. On a GPU the peak is the CUDA allocator's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora = Lora(CSM_1B, LoraConfig(), device) if mode == "lora" else None
    dtype = torch.bfloat16 if lora is not None and precision == "bfloat16" else torch.float32
    model = model_in(dtype, device).requires_grad_(lora is None)
    trainee = Trainee(model, lora, activation_checkpointing="activation-checkpointing" in more).train()
    shape = dict(turns=(1, 1), text=(TEXT, TEXT + 1), frames=(FRAMES, FRAMES + 1))
    examples = random_examples(int(batch) * (1 + int(steps)), CSM_1B, **shape)
    options = TrainOptions(
        steps=1 + int(steps), batch_size=int(batch), precision=precision, save_every=0, eval_every=0, warmup=0
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(trainee, examples, [], options, Path(folder), progress=False)
        trainer.save = lambda: None  # writing gigabytes would measure the disk
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident memory
        size = memory("VmRSS")
        trainer._step()
        began = time.perf_counter()
        losses = [trainer._step()["loss"] for _ in range(int(steps))]
        seconds = (time.perf_counter() - began) / int(steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else memory("VmHWM")
    trained = sum(p.numel() for p in trainer.trained.values())
    report = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "trained": trained}
    report |= {"start_gb": size, "peak_gb": peak, "seconds_per_step": seconds, "losses": losses}
    report |= {"positions": int(batch) * examples[0].num_positions}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
