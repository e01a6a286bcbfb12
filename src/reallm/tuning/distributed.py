"""Several processes with a model each, started by torchrun: every one takes its share of each batch."""

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
    """This process among all."""

    rank: int = 0
    count: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return rows[self.rank :: self.count]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over all processes."""
        if self.count == 1:
            return
        tensors = list(tensors)
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message for hundreds of small tensors
        dist.all_reduce(together)
        for tensor, summed in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def barrier(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def check_batch(self, option: str, windows: int) -> None:
        """Errors: RecipeError for windows that cannot be shared evenly."""
        if windows % self.count:
            raise RecipeError(f"{option} {windows} cannot be shared by {self.count} processes; take a multiple")


@contextlib.contextmanager
def init_process_group(device: str) -> Iterator[tuple[ProcessGroup, str]]:
    """(this process, its device): what torchrun says, or one process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ProcessGroup(), device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
        torch.cuda.set_device(device)
    # With its device named, NCCL need not guess which one a barrier is on.
    dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device(device) if cuda else None)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
