"""One process or many: what ``torchrun`` says, and sums over all processes."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = datetime.timedelta(hours=2)  # the first process encodes a data set while the others wait


@dataclass(frozen=True)
class Processes:
    """This process among ``count``, and where it computes."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls, device: torch.device) -> Processes:
        """Join the others if ``torchrun`` started this process; with GPUs, each takes its own."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(0, 1, device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def stop(self) -> None:
        """Leave the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the processes in the backward pass."""
        if self.count == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def last_of(self, module: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around a batch of a step: gradients are exchanged in its last one alone."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()
