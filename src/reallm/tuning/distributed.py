"""Data parallelism over processes started by torchrun: each has a copy of the model and a shard of each batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from reallm.errors import RecipeError


@dataclass(frozen=True)
class ProcessGroup:
    """This process (`rank`) among `count` processes."""

    rank: int = 0
    count: int = 1

    @property
    def is_main_process(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """Return this process's rows of a batch."""
        return rows[self.rank :: self.count]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.count == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message for hundreds of small tensors
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def barrier(self) -> None:
        """Wait until all processes reach this point."""
        if self.count > 1:
            dist.barrier()

    def check_batch(self, option: str, windows: int) -> None:
        """Raise RecipeError if the number of windows is not a multiple of the number of processes."""
        if windows % self.count:
            raise RecipeError(
                f"{option} {windows} cannot be split evenly over {self.count} processes; use a multiple of {self.count}"
            )


@contextlib.contextmanager
def init_process_group(device: str) -> Iterator[tuple[ProcessGroup, str]]:
    """Yield (process group, device of this process): torchrun's group, or a single process without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ProcessGroup(), device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
        torch.cuda.set_device(device)
    # With device_id, NCCL need not guess the device of a barrier.
    dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device(device) if cuda else None)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
