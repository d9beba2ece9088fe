"""Data-parallel training: the process group that ``torchrun`` sets up, or a single process."""

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

TIMEOUT = datetime.timedelta(hours=2)  # the main process encodes the data set while the others wait


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``world_size`` processes, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: torch.device) -> Processes:
        """Join the process group if ``torchrun`` started this process. With CUDA, each process takes its own GPU."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(0, 1, device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only process that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        if self.world_size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, wrapped so that the backward pass averages gradients over the processes."""
        if self.world_size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def gradient_sync(self, module: nn.Module, last_batch: bool) -> AbstractContextManager[object]:
        """The context for one batch of a step: gradients are exchanged in the step's last batch only."""
        if isinstance(module, DistributedDataParallel) and not last_batch:
            return module.no_sync()
        return nullcontext()
