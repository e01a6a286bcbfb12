"""Calibration inputs on their way through a model, one decoder block after the other.

The hidden states of all windows stand before one block at a time. What its matrices are fed is summed up
there; then the block, compressed by now, carries the states on. So every block is calibrated on the inputs
that it will really see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.errors import SourceError
from reallm.model import calls
from reallm.model.calls import Calls
from reallm.model.decoder import decoder_blocks, decoder_of
from reallm.model.devices import device_of
from reallm.model.pieces import Pieces, hollow_model
from reallm.model.silence import quiet
from reallm.model.walk import Matrix, linear_shape

# Tokens a pass: 8,192 of 4,096 hidden numbers are 128 MB in float32, and keep a processor's products large.
TOKENS_PER_PASS = 8192


@dataclass
class Moments:
    """XᵀX / n_tokens of the inputs of modules; those that are fed the same tensor share one."""

    leader_of: dict[str, str] = field(default_factory=dict)  # module path -> the one whose sum serves
    sums: dict[str, Float[Tensor, "in in"]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> Float[Tensor, "in in"] | None:
        """XᵀX / n_tokens, float32; None for a module that calibration never reached."""
        leader = self.leader_of.get(name)
        if leader is None or not self.tokens[leader]:
            return None
        return self.sums[leader] / self.tokens[leader]

    def take(self, name: str) -> Float[Tensor, "in in"] | None:
        """The same, for the last time: sums that serve no other module are given away and not copied."""
        found = None
        if (leader := self.leader_of.pop(name, None)) is not None and self.tokens[leader]:
            last = leader not in self.leader_of.values()
            total = self.sums.pop(leader) if last else self.sums[leader]
            found = total.div_(self.tokens[leader]) if last else total / self.tokens[leader]
        return found

    def add(
        self,
        name: str,
        inputs: Float[Tensor, "*tokens in"],
        alike: dict[str, Tensor],
        weights: Float[Tensor, "windows context"] | None = None,
    ) -> None:
        """Count the inputs of one forward pass. `alike`: leaders of this pass with the very tensor they got.

        With `weights` of the tokens a module has a sum of its own.
        """
        twin = next((leader for leader, tensor in alike.items() if tensor is inputs), None)
        if self.leader_of.setdefault(name, twin or name) != name:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if weights is None:
            alike[name] = inputs
        else:
            rows = rows * weights.reshape(-1, 1).to(rows).sqrt()
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.tokens[name] = 0
        self.sums[name].addmm_(rows.T, rows)
        self.tokens[name] += len(rows)


def nbytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes that a stream through a model of a config holds per token, from a pass that reads no weight.

    Where only a run can tell it is one row of hidden numbers.
    """
    text = config.get_text_config(decoder=True)
    with quiet():
        model = hollow_model(config, dtype).eval()
    found = calls.nbytes_per_token(model, decoder_of(model), decoder_blocks(model))
    return text.hidden_size * dtype.itemsize if found is None else found


class Stream:
    """Windows of token ids inside a dense model, whose weights its owner replaces block by block."""

    def __init__(
        self,
        model: nn.Module,
        windows: Int[Tensor, "windows context"],
        device: str | torch.device,
        batch: int | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """Stands before the first block. The model may lie on the CPU: only one block at a time is on `device`.

        `batch` windows go through a block at once; without, as many as 8,192 tokens. A model that is in memory in
        `pieces` is filled here a block at a time; later the owner has to fill the present block.
        Errors: SourceError for a model whose blocks cannot be told apart.
        """
        self.model, self.device, self._pieces = model, torch.device(device), pieces
        self.batches = list(windows.split(batch or max(1, TOKENS_PER_PASS // windows.shape[1])))
        self.blocks = decoder_blocks(model)
        self.position = 0
        with torch.no_grad(), _plain_arithmetic(self.device):
            self._calls = Calls(model, decoder_of(model), self.blocks, self.batches, self._in_memory)
        self.states = self._calls.states

    @property
    def nbytes(self) -> int:
        """Memory of the hidden states and of what blocks are given with them."""
        return sum(state.nbytes for state in self.states) + self._calls.nbytes

    @property
    def reached(self) -> bool:
        """Whether the model calls the present block on text; it passes over cross-attention to images."""
        return self.position in self._calls.order

    def moments(
        self, matrices: Sequence[Matrix], weights: dict[str, Float[Tensor, "windows context"]] | None = None
    ) -> Moments:
        """What the given matrices of the present block are fed; the states stay where they are.

        `weights` of every window's tokens by module, where tokens do not count alike.
        """
        moments, block = Moments(), self.blocks[self.position]
        if not self.reached:
            return moments
        alike: dict[str, Tensor] = {}
        hooks, span = [], slice(0, 0)

        def count(name: str, inputs: Tensor) -> None:
            own = weights.get(name) if weights else None
            if own is not None and inputs.shape[0] not in (span.stop - span.start, own[span].numel()):
                raise SourceError(
                    f"{name}: its inputs are {tuple(inputs.shape)} for {span.stop - span.start} windows, so that its "
                    "tokens cannot be weighted; take --objective outputs"
                )
            moments.add(name, inputs, alike, None if own is None else own[span])

        for matrix in matrices:
            module = self.model.get_submodule(matrix.name) if matrix.expert is None else None
            if module is not None and linear_shape(module) is not None:
                hooks.append(
                    module.register_forward_pre_hook(lambda _, inputs, name=matrix.name: count(name, inputs[0]))
                )
        with torch.no_grad(), self.on_device(block):
            for number, batch in enumerate(self.batches):
                alike.clear()
                span = slice(span.stop, span.stop + len(batch))
                self.through(block, number)
        for hook in hooks:
            hook.remove()
        return moments

    def advance(self) -> None:
        """Carry the states through the present block, as it is now, to the next."""
        block = self.blocks[self.position]
        if self.reached:
            with torch.no_grad(), self.on_device(block):
                for number, state in enumerate(self.states):
                    self.states[number] = self.through(block, number, True).to(state.device)
        self._calls.forget(self.position)
        self.position += 1

    @contextlib.contextmanager
    def on_device(self, block: nn.Module) -> Iterator[None]:
        """A block on the stream's device, in plain float32 arithmetic."""
        home = device_of(block)
        with _plain_arithmetic(self.device):
            block.to(self.device)
            yield
            block.to(home)

    def through(self, block: nn.Module, number: int, keep: bool = False) -> Float[Tensor, "*states hidden"]:
        """Return what a block makes of a batch's hidden states, in place of the present one; it must be on the device.

        With `keep` later blocks are handed its other outputs. A block that the model passes over changes nothing.
        """
        if not self.reached:
            return self.states[number].to(self.device)
        return self._calls.run(self.position, block, self.states[number], number, self.device, keep)

    @contextlib.contextmanager
    def _in_memory(self, number: int) -> Iterator[torch.device]:
        """A block filled and on the device; on a CPU a batch takes 10 s through 135 M parameters."""
        block = self.blocks[number]
        if self._pieces is not None:
            self._pieces.fill(number)
        with self.on_device(block):
            yield self.device
        if self._pieces is not None:
            self._pieces.empty(number)


@contextlib.contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: sums over 100,000 tokens must keep their small entries."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
