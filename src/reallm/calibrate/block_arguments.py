"""Record the arguments with which a model calls its decoder blocks, for every batch of token ids.

One forward pass of the first batch through the real blocks records their order, their outputs and which outputs later
blocks receive. Then every batch passes through the model with placeholders instead of blocks, which return the hidden
states unchanged: this costs one embedding per batch. An argument of a block is one of these:

per batch     computed from token ids or positions: stored, only once if it is equal in all batches
block output  an output of an earlier block: taken from that block when it runs in the block-wise forward
shared        a container that blocks write into (shared keys and values): one for each batch

The two passes of the first batch are compared. Any other argument raises SourceError, and so does a model that changes
the hidden states between two blocks: the block-wise forward would differ from what the compressed model computes.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from reallm.calibrate.nested_tensors import Path, leaves, map_leaves, overwrite, tensors, to_device, writable
from reallm.errors import ReallmError, SourceError

Arguments = dict[int | str, Any]  # by position (the hidden states are 0) or by name
Forward = Callable[..., Any]
# Replaces a block's forward: (block number, the block's own forward, its arguments, hidden states included) -> output
BlockOverride = Callable[[int, Forward, Arguments], Any]

# Compared by value between the two passes; objects of any other type may contain tensors.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


class _BlockReached(Exception):
    """Stop a forward pass at the last block."""


@dataclass(frozen=True)
class _BlockOutput:
    """Reference to an output of an earlier block."""

    block: int
    path: Path


@dataclass(frozen=True)
class _TensorSpec:
    """Shape and dtype of an output tensor of a block."""

    shape: torch.Size
    dtype: torch.dtype

    def placeholder(self, windows: int, of: int) -> Tensor:
        """Return zeros that take no memory; dimensions of size `of` (recorded windows) become `windows`."""
        return torch.zeros((), dtype=self.dtype).expand([windows if size == of else size for size in self.shape])


class _HiddenStates:
    """Marks the hidden states in the output of a block."""


class BlockCalls:
    """The arguments of every block and batch, and the block outputs that later blocks receive."""

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Tensor],
        block_context: Callable[[int], contextlib.AbstractContextManager[torch.device]],
    ) -> None:
        """Run the first batch (windows, context) through the real blocks, and all batches through placeholders.

        Inside `block_context(number)` the weights of a block are in memory, on the device that the context yields.
        The caller disables gradients.
        Errors: SourceError for a model whose blocks cannot be run one by one.
        """
        self._passes = _Passes(type(model).__name__, decoder, blocks)
        real_pass = _RealPass(self._passes, block_context)
        self._passes.run(batches[0], real_pass)
        if not real_pass.order:
            raise self._passes.refusal("it calls no decoder block")
        self.order = real_pass.order  # of the blocks that are called; some may not be (cross-attention to images)
        self._shared, self._in_place, self._home = real_pass.shared, real_pass.in_place, self._passes.home
        self.states, self._arguments = self._collect(batches, real_pass)
        self._stored_outputs: list[dict[_BlockOutput, Tensor]] = [{} for _ in batches]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the arguments and of the stored block outputs, every storage once."""
        storages = {
            storage._cdata: storage.nbytes()
            for leaf in tensors(
                [list(self._arguments.values()), [list(stored.values()) for stored in self._stored_outputs]]
            )
            if (storage := leaf.untyped_storage()) is not None
        }
        return sum(storages.values())

    def run(
        self, number: int, block: nn.Module, state: Tensor, batch: int, device: torch.device, keep: bool = False
    ) -> Tensor:
        """Return the hidden states that `block`, in place of block `number`, computes from those of a batch.

        With `keep` the other outputs, and writes into shared containers, are stored for later blocks.
        """
        own, stored = self._arguments[number][batch], self._stored_outputs[batch]

        def to_argument(_: Path, leaf: Any) -> Any:
            leaf = stored[leaf] if isinstance(leaf, _BlockOutput) else leaf
            if not isinstance(leaf, Tensor):
                return leaf
            on_device = leaf.to(device)
            return on_device.clone() if self._in_place and on_device is leaf else on_device

        arguments = map_leaves(own, to_argument)
        output = _call(block, to_argument((), state), arguments)
        if keep:
            for key in self._shared & set(own):
                overwrite(own[key], to_device(arguments[key], self._home))
            wanted = self._needed_outputs(number)
            found = {path: leaf for path, leaf in leaves(output) if path in wanted}
            stored.update({_BlockOutput(number, path): leaf.to(self._home) for path, leaf in found.items()})
        return output_states(output)

    def forget(self, number: int) -> None:
        """Drop the arguments of a block, and stored outputs that no later block needs."""
        self._arguments.pop(number, None)
        for stored in self._stored_outputs:
            for key in [key for key in stored if key.path not in self._needed_outputs(key.block)]:
                del stored[key]

    def _needed_outputs(self, number: int) -> set[Path]:
        """Return the paths of a block's outputs that blocks still to run receive."""
        return {
            leaf.path
            for rows in self._arguments.values()
            for _, leaf in leaves(rows[0])
            if isinstance(leaf, _BlockOutput) and leaf.block == number
        }

    def _collect(
        self, batches: Sequence[Tensor], real_pass: _RealPass
    ) -> tuple[list[Tensor], dict[int, list[Arguments]]]:
        """Return (hidden states before the first block by batch, arguments by block and batch)."""
        states: list[Tensor] = []
        arguments: dict[int, list[Arguments]] = {number: [] for number in self.order}
        before: dict[Any, Any] | None = None
        for batch in batches:
            collector = _PlaceholderPass(self._passes, real_pass, len(batch), len(batches[0]))
            self._passes.run(batch, collector)
            if not states:
                collector.compare(real_pass)
            else:
                collector.share({number: rows[0] for number, rows in arguments.items()})
            states.append(collector.states)
            for number, own in collector.arguments.items():
                arguments[number].append(own)
            after = _attributes(self._passes.blocks)
            if before is not None and any(before.get(key) is not value for key, value in after.items()):
                raise self._passes.refusal("it stores tensors of each batch in its decoder blocks")
            before = after
        return states, arguments


class _Passes:
    """Forward passes of a decoder whose blocks' forward methods are overridden."""

    def __init__(self, name: str, decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.name, self.decoder, self.blocks = name, decoder, blocks
        held = (*decoder.parameters(), *decoder.buffers())
        self.home = next((tensor.device for tensor in held if not tensor.is_meta), torch.device("cpu"))

    def run(self, batch: Int[Tensor, "windows context"], override: BlockOverride) -> None:
        """Run the decoder on token ids with `override` called instead of each block, until it raises _BlockReached.

        Errors: SourceError for a decoder that fails on token ids alone.
        """
        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for number, block in enumerate(self.blocks):
                block.forward = _override_forward(number, block.forward, override)
            self.decoder(input_ids=batch.to(self.home), use_cache=False)
        except _BlockReached:
            pass
        except (ReallmError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # forward methods raise errors of any type
            reason = (str(error).splitlines() or ["no message"])[0]
            raise self.refusal(f"its forward pass over token ids fails ({type(error).__name__}: {reason})") from error
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def refusal(self, reason: str) -> SourceError:
        """Return the error for a model whose blocks cannot be run one by one, with the remedy."""
        return SourceError(
            f"{self.name}: {reason}; it can be neither calibrated nor tuned block by block: compress it without "
            "--calibration, tune it with --method end-to-end"
        )


def _override_forward(number: int, forward: Forward, override: BlockOverride) -> Forward:
    def call(*arguments: Any, **named: Any) -> Any:
        return override(number, forward, {**dict(enumerate(arguments)), **named})

    return call


class _RealPass:
    """The pass through the real blocks; records their order, arguments and outputs."""

    def __init__(self, passes: _Passes, block_context: Callable[[int], Any]) -> None:
        self.order: list[int] = []
        self.arguments: dict[int, Arguments] = {}
        self.outputs: dict[int, Any] = {}  # nested containers of `_TensorSpec`, `_HiddenStates` and plain values
        self.shared: set[int | str] = set()  # arguments that blocks write into
        self.in_place = False  # whether a block changes its arguments in place
        self._passes, self._block_context = passes, block_context
        self._last: tuple[Tensor, int] | None = None  # hidden states and their version counter
        self._links: dict[int, tuple[weakref.ref[Tensor], _BlockOutput]] = {}  # outputs by id
        self._contents: dict[int, tuple[Any, list[Any]]] = {}  # containers by id, after the last block

    def __call__(self, number: int, forward: Forward, arguments: Arguments) -> Any:
        self._check_call(number, arguments)
        with self._block_context(number) as device:
            on_device = to_device(arguments, device)
            contents = {key: _content(value) for key, value in on_device.items() if writable(value)}
            versions = [(tensor, tensor._version) for tensor in tensors(on_device)]
            states = on_device.pop(0)
            output = forward(states, *_positional(on_device), **_keyword(on_device))
            self.in_place |= any(tensor._version != version for tensor, version in versions)
            output = to_device(output, self._passes.home)
        for key, before in contents.items():
            if not _same_content(before, _content(on_device[key])):
                self.shared.add(key)
                overwrite(arguments[key], to_device(on_device[key], self._passes.home))
            self._contents[id(arguments[key])] = arguments[key], _content(arguments[key])
        return self._record_output(number, output)

    def _check_call(self, number: int, arguments: Arguments) -> None:
        refusal = self._passes.refusal
        if number in self.order:
            raise refusal(f"it calls decoder block {number} more than once in a pass")
        if self.order and number < self.order[-1]:
            raise refusal(f"it calls decoder block {number} after block {self.order[-1]}")
        states = arguments.get(0)
        if not isinstance(states, Tensor):
            raise refusal(f"decoder block {number} is called without positional hidden states")
        if self._last is not None and not self._is_last(states):
            raise refusal(f"it changes the hidden states between blocks {self.order[-1]} and {number}")
        for key, value in arguments.items():
            _, content = self._contents.get(id(value), (None, None))
            if content is not None and not _same_content(content, _content(value)):
                raise refusal(f"it changes {_argument(key)} between blocks {self.order[-1]} and {number}")
        for path, leaf in leaves(arguments):
            if not isinstance(leaf, (*_PLAIN, Tensor)):
                raise refusal(f"{_argument(path[0])} of block {number} is a {type(leaf).__name__}")
        self.order.append(number)
        others = {key: value for key, value in arguments.items() if key != 0}
        self.arguments[number] = map_leaves(others, lambda _, leaf: self._link(leaf))

    def _is_last(self, states: Tensor) -> bool:
        assert self._last is not None
        last, version = self._last
        return last._version == version and (states is last or _equal(states, last))

    def _link(self, leaf: Any) -> Any:
        found, block_output = self._links.get(id(leaf), (None, None))
        return block_output if found is not None and found() is leaf else leaf

    def _record_output(self, number: int, output: Any) -> Any:
        states = output_states(output)
        self._last = states, states._version
        for path, leaf in leaves(output):
            if isinstance(leaf, Tensor):
                self._links[id(leaf)] = weakref.ref(leaf), _BlockOutput(number, path)

        def like(_: Path, leaf: Any) -> Any:
            if leaf is states:
                return _HiddenStates()
            return _TensorSpec(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf

        self.outputs[number] = map_leaves(output, like)
        return output


def nbytes_per_token(model: nn.Module, decoder: nn.Module, blocks: Sequence[nn.Module]) -> int | None:
    """Return the bytes per token that a hidden-state cache will take: hidden states and arguments.

    None if only a real run can tell. The model is on the meta device except for its buffers; parameters outside the
    blocks are replaced by values that take no memory.
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for module in decoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in inside:
                module._parameters[name] = _distinct_rows(parameter)
    passes = _Passes(type(model).__name__, decoder, blocks)
    probes: list[_Probe] = []
    with torch.no_grad(), contextlib.suppress(SourceError):
        for in_tuple in (False, True):
            probes = [_Probe(in_tuple), _Probe(in_tuple)]
            for probe, ids in zip(probes, _PROBE_IDS, strict=True):
                passes.run(ids, probe)
            if all(probe.in_order for probe in probes):
                break
    if not all(probe.in_order for probe in probes):
        return None
    known = {
        id(first) for first, other in zip(*(probe.tensors for probe in probes), strict=False) if _equal(first, other)
    }
    of_batch = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in probes[0].tensors if id(t) not in known
    }
    held = probes[0].states.nbytes + sum(of_batch.values())
    return math.ceil(held / _PROBE_IDS[0].numel()) + (_shared_nbytes(blocks) if probes[0].shares else 0)


def _shared_nbytes(blocks: Sequence[nn.Module]) -> int:
    """Return the bytes per token of keys and values shared between blocks: two layer types, known only from a run."""
    keys = [m.weight for block in blocks for path, m in block.named_modules() if path.endswith("k_proj")]
    return max((2 * 2 * weight.shape[0] * weight.itemsize for weight in keys), default=0)


# Two windows of different tokens.
_PROBE_IDS = torch.arange(8)[None], torch.arange(8, 16)[None]


def _distinct_rows(parameter: Tensor) -> nn.Parameter:
    column = torch.linspace(-1, 1, parameter.shape[0] if parameter.ndim else 1, dtype=torch.float32).to(parameter.dtype)
    column = column.reshape(-1, *[1] * (parameter.ndim - 1)) if parameter.ndim else column[0]
    return nn.Parameter(column.expand(parameter.shape), requires_grad=False)


class _Probe:
    """A pass through placeholders, of whose outputs only the type is assumed: a tensor, or a tuple of it and Nones."""

    states: Tensor

    def __init__(self, in_tuple: bool) -> None:
        self.in_order, self.shares = False, False
        self.tensors: list[Tensor] = []
        self._in_tuple, self._last = in_tuple, -1
        self._output: Tensor | None = None

    def __call__(self, number: int, _: Forward, arguments: Arguments) -> Any:
        states = arguments.pop(0)
        if self._output is None:
            self.states = states
        self.in_order = number > self._last and (self._output is None or states is self._output)
        self.tensors += tensors(arguments)
        self.shares |= any(writable(value) and not len(value) for value in arguments.values())
        self._last, self._output = number, states.detach()
        return (self._output, None, None) if self._in_tuple else self._output


class _PlaceholderPass:
    """A pass through placeholders; collects hidden states before the first block and the arguments of all blocks."""

    states: Tensor

    def __init__(self, passes: _Passes, real_pass: _RealPass, windows: int, of: int) -> None:
        self.arguments: dict[int, Arguments] = {}
        self._passes, self._order = passes, real_pass.order
        self._outputs, self._shared = real_pass.outputs, real_pass.shared
        self._sizes = windows, of
        self._links: dict[int, tuple[Tensor, _BlockOutput]] = {}  # outputs by id; the reference keeps ids unique

    def __call__(self, number: int, _: Forward, arguments: Arguments) -> Any:
        if number != self._order[len(self.arguments)]:
            raise self._passes.refusal("which decoder blocks it calls depends on the text")
        states = arguments.pop(0)
        if not self.arguments:
            self.states = states
        self.arguments[number] = {
            key: value if key in self._shared else map_leaves(value, lambda _, leaf: self._link(leaf))
            for key, value in arguments.items()
        }
        if number == self._order[-1]:
            raise _BlockReached
        return self._output(number, states)

    def _link(self, leaf: Any) -> Any:
        return self._links[id(leaf)][1] if id(leaf) in self._links else leaf

    def _output(self, number: int, states: Tensor) -> Any:
        def placeholder(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, _HiddenStates | _TensorSpec):
                return leaf
            # A new tensor object over the same storage, so that its id tells which block it comes from.
            made = states.detach() if isinstance(leaf, _HiddenStates) else leaf.placeholder(*self._sizes)
            self._links[id(made)] = made, _BlockOutput(number, path)
            return made

        return map_leaves(self._outputs[number], placeholder)

    def compare(self, real_pass: _RealPass) -> None:
        """Raise SourceError for an argument that differs from the one in the pass through the real blocks."""
        for number, found in self.arguments.items():
            real = real_pass.arguments[number]
            for key in {**real, **found}:
                if key in self._shared and key in real and key in found:
                    continue
                theirs, ours = (dict(leaves(own[key])) if key in own else None for own in (real, found))
                if theirs is None or ours is None or set(theirs) != set(ours) or not _all_equal(theirs, ours):
                    raise self._passes.refusal(
                        f"{_argument(key)} of block {number} depends on outputs of earlier blocks"
                    )
        real_pass.arguments.clear()

    def share(self, first: dict[int, Arguments]) -> None:
        """Replace tensors by the first batch's if they are equal."""
        compared: dict[tuple[int, int], tuple[Tensor, Tensor, bool]] = {}  # references keep ids unique

        def share_leaf(leaf: Any, other: Any) -> Any:
            if not (isinstance(leaf, Tensor) and isinstance(other, Tensor)):
                return leaf
            key = id(leaf), id(other)
            if key not in compared:
                compared[key] = leaf, other, _equal(leaf, other)
            return other if compared[key][2] else leaf

        for number, own in self.arguments.items():
            for key in set(own) - self._shared:
                theirs = dict(leaves(first[number].get(key)))
                own[key] = map_leaves(own[key], lambda path, leaf, theirs=theirs: share_leaf(leaf, theirs.get(path)))


def output_states(output: Any) -> Tensor:
    """Return the hidden states in a block's output: the output itself, or the first item of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _call(block: nn.Module, states: Tensor, arguments: Arguments) -> Any:
    return block(states, *_positional(arguments), **_keyword(arguments))


def _positional(arguments: Arguments) -> list[Any]:
    return [arguments[key] for key in sorted(key for key in arguments if isinstance(key, int))]


def _keyword(arguments: Arguments) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if isinstance(key, str)}


def _argument(key: int | str) -> str:
    return f"the argument {key!r}" if isinstance(key, str) else f"positional argument {key}"


def _content(container: Any) -> list[Any]:
    return [item for path, leaf in leaves(container) for item in (*path, leaf)]


def _same_content(one: list[Any], other: list[Any]) -> bool:
    """Return whether two lists hold the same objects, or equal plain values."""
    return len(one) == len(other) and all(
        a is b or (isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b) for a, b in zip(one, other, strict=True)
    )


def _all_equal(one: dict[Path, Any], other: dict[Path, Any]) -> bool:
    return all(_equal(leaf, other[path]) for path, leaf in one.items())


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    numbers = one.is_floating_point() or one.is_complex()
    return torch.equal(one, other) or (numbers and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def _attributes(blocks: Sequence[nn.Module]) -> dict[tuple[int, str], Tensor]:
    """Return the tensors that modules of blocks hold, except parameters; the references keep ids unique."""
    return dict(_named_attributes(blocks))


def _named_attributes(blocks: Sequence[nn.Module]) -> Iterator[tuple[tuple[int, str], Tensor]]:
    for block in blocks:
        for module in block.modules():
            for name, value in (*vars(module).items(), *module._buffers.items()):
                if isinstance(value, Tensor):
                    yield (id(module), name), value
