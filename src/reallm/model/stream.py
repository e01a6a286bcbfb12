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
from reallm.model.devices import device_of
from reallm.model.pieces import Pieces, decoder_blocks
from reallm.model.walk import Matrix, linear_shape

# Tokens a pass: 8,192 of 4,096 hidden numbers are 128 MB in float32, and keep a processor's products large.
TOKENS_PER_PASS = 8192


class _Reached(Exception):
    """Ends a forward pass at the block whose inputs were wanted."""


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
        self._arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with torch.no_grad(), _plain_arithmetic(self.device):
            for size in {len(batch): batch for batch in self.batches}.values():
                self._record_arguments(size)
            self.states = [self._embedded(batch) for batch in self.batches]

    @property
    def nbytes(self) -> int:
        """Memory that the hidden states take."""
        return sum(state.nbytes for state in self.states)

    def moments(
        self, matrices: Sequence[Matrix], weights: dict[str, Float[Tensor, "windows context"]] | None = None
    ) -> Moments:
        """What the given matrices of the present block are fed; the states stay where they are.

        `weights` of every window's tokens by module, where tokens do not count alike.
        """
        moments, block = Moments(), self.blocks[self.position]
        alike: dict[str, Tensor] = {}
        hooks, span = [], slice(0, 0)

        def count(name: str, inputs: Tensor) -> None:
            own = weights.get(name) if weights else None
            moments.add(name, inputs, alike, None if own is None else own[span])

        for matrix in matrices:
            module = self.model.get_submodule(matrix.name) if matrix.expert is None else None
            if module is not None and linear_shape(module) is not None:
                hooks.append(
                    module.register_forward_pre_hook(lambda _, inputs, name=matrix.name: count(name, inputs[0]))
                )
        with torch.no_grad(), self.on_device(block):
            for state in self.states:
                alike.clear()
                span = slice(span.stop, span.stop + len(state))
                self.through(block, state)
        for hook in hooks:
            hook.remove()
        return moments

    def advance(self) -> None:
        """Carry the states through the present block, as it is now, to the next."""
        block = self.blocks[self.position]
        with torch.no_grad(), self.on_device(block):
            for number, state in enumerate(self.states):
                self.states[number] = self.through(block, state).to(state.device)
        self.position += 1

    @contextlib.contextmanager
    def on_device(self, block: nn.Module) -> Iterator[None]:
        """A block on the stream's device, in plain float32 arithmetic."""
        home = device_of(block)
        with _plain_arithmetic(self.device):
            block.to(self.device)
            yield
            block.to(home)

    def through(self, block: nn.Module, state: Tensor) -> Tensor:
        """What a block makes of hidden states that stand before the present one; it must be on the device."""
        rest, named = self._arguments[self.position, len(state)]
        output = block(state.to(self.device), *_moved(rest, self.device), **_moved(named, self.device))
        return output if isinstance(output, Tensor) else output[0]

    def _record_arguments(self, batch: Tensor) -> None:
        """What the model hands each block beside the hidden states (positions, masks): one real forward pass.

        Blocks go to the device one by one here too: on a CPU a batch takes 10 s through 135 M parameters.
        """
        home = self._home

        def note(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], number: int) -> Any:
            if not arguments:
                raise SourceError(f"block {number} is called without positional hidden states; it cannot be calibrated")
            self._arguments[number, len(batch)] = arguments[1:], named
            if self._pieces is not None:
                self._pieces.fill(number)
            block.to(self.device)
            return _moved(arguments, self.device), _moved(named, self.device)

        def leave(block: nn.Module, output: Any, number: int) -> Any:
            block.to(home)
            if self._pieces is not None:
                self._pieces.empty(number)
            return _moved(output, home)

        hooks = [
            block.register_forward_hook(lambda b, _, output, n=number: leave(b, output, n))
            for number, block in enumerate(self.blocks)
        ]
        hooks += [
            block.register_forward_pre_hook(lambda b, a, k, n=number: note(b, a, k, n), with_kwargs=True)
            for number, block in enumerate(self.blocks)
        ]
        self._run(batch)
        for hook in hooks:
            hook.remove()

    def _embedded(self, batch: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            found.append(arguments[0])
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(stop)
        with contextlib.suppress(_Reached):
            self._run(batch)
        hook.remove()
        return found[0]

    def _run(self, batch: Tensor) -> None:
        self.model.get_decoder()(input_ids=batch.to(self._home), use_cache=False)

    @property
    def _home(self) -> torch.device:
        """Where the model lies."""
        return next(p.device for p in self.model.get_decoder().parameters() if not p.is_meta)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device) for inner in value)
    return value


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
