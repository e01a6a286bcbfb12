"""How a model calls its decoder blocks: what they are given with the hidden states, for every batch of token ids.

One pass of the first batch through the real blocks shows in which order they are called, what they put out and what of
it later ones are given. Then every batch passes through the model with stand-ins for its blocks, which return the
hidden states as they are: that costs one embedding per batch. An argument of a block is one of these:

of the batch  made of token ids or positions: stored, once where it is equal in all batches
handed on     an output of an earlier block: taken from that block when it runs in the stream
shared        a container that blocks write into (shared keys and values): one for each batch

Both passes of the first batch are compared. An argument that is none of these is refused, as is a model that does more
between two blocks than hand the hidden states on: the stream would not be what the compressed model computes.
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

from reallm.errors import ReallmError, SourceError
from reallm.model.nested import Path, leaves, moved, overwrite, rebuilt, tensors, writable

Arguments = dict[int | str, Any]  # by place (the hidden states are 0) or by name
Forward = Callable[..., Any]
# What a block's forward is replaced by: (its number, its own forward, the hidden states' and all other arguments)
Instead = Callable[[int, Forward, Arguments], Any]

# Compared by value in both passes; an object of any other kind may hide tensors.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


class _Reached(Exception):
    """Ends a forward pass once it has called the last block."""


@dataclass(frozen=True)
class _Handed:
    """Stands for an output of an earlier block."""

    block: int
    path: Path


@dataclass(frozen=True)
class _Like:
    """Shape and dtype of a tensor that a block puts out."""

    shape: torch.Size
    dtype: torch.dtype

    def stand_in(self, windows: int, of: int) -> Tensor:
        """Return zeros that take no memory, for `windows` windows instead of `of`."""
        return torch.zeros((), dtype=self.dtype).expand([windows if size == of else size for size in self.shape])


class _States:
    """Stands for the hidden states that a block puts out."""


class Calls:
    """The arguments of every block and batch, and what blocks hand to later ones as a stream advances."""

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Tensor],
        around: Callable[[int], contextlib.AbstractContextManager[torch.device]],
    ) -> None:
        """Pass the first batch (windows, context) through the real blocks and all through stand-ins, without gradients.

        Inside `around(number)` a block is in memory, on the device that it yields.
        Errors: SourceError for a model whose blocks cannot be run one by one.
        """
        self._passes = _Passes(type(model).__name__, decoder, blocks)
        watch = _Watch(self._passes, around)
        self._passes.run(batches[0], watch)
        if not watch.order:
            raise self._passes.refusal("it calls no decoder block")
        self.order = watch.order  # blocks that are called; some may not be (cross-attention to images)
        self._shared, self._in_place, self._home = watch.shared, watch.in_place, self._passes.home
        self.states, self._arguments = self._collected(batches, watch)
        self._left: list[dict[_Handed, Tensor]] = [{} for _ in batches]

    @property
    def nbytes(self) -> int:
        """Memory of the arguments and of what blocks have handed on, every storage once."""
        storages = {
            storage._cdata: storage.nbytes()
            for leaf in tensors([list(self._arguments.values()), [list(left.values()) for left in self._left]])
            if (storage := leaf.untyped_storage()) is not None
        }
        return sum(storages.values())

    def run(
        self, number: int, block: nn.Module, state: Tensor, batch: int, device: torch.device, keep: bool = False
    ) -> Tensor:
        """Return what `block`, in place of the block `number`, makes of the hidden states of a batch.

        With `keep` later blocks are handed what this one puts out and writes.
        """
        own, left = self._arguments[number][batch], self._left[batch]

        def given(_: Path, leaf: Any) -> Any:
            leaf = left[leaf] if isinstance(leaf, _Handed) else leaf
            if not isinstance(leaf, Tensor):
                return leaf
            on_device = leaf.to(device)
            return on_device.clone() if self._in_place and on_device is leaf else on_device

        arguments = rebuilt(own, given)
        output = _call(block, given((), state), arguments)
        if keep:
            for key in self._shared & set(own):
                overwrite(own[key], moved(arguments[key], self._home))
            wanted = self._wanted_of(number)
            found = {path: leaf for path, leaf in leaves(output) if path in wanted}
            left.update({_Handed(number, path): leaf.to(self._home) for path, leaf in found.items()})
        return states_of(output)

    def forget(self, number: int) -> None:
        """Drop the arguments of a block, and outputs that no later block is given."""
        self._arguments.pop(number, None)
        for left in self._left:
            for handed in [handed for handed in left if handed.path not in self._wanted_of(handed.block)]:
                del left[handed]

    def _wanted_of(self, number: int) -> set[Path]:
        """Which outputs of a block are given to others that are still to run."""
        return {
            leaf.path
            for rows in self._arguments.values()
            for _, leaf in leaves(rows[0])
            if isinstance(leaf, _Handed) and leaf.block == number
        }

    def _collected(self, batches: Sequence[Tensor], watch: _Watch) -> tuple[list[Tensor], dict[int, list[Arguments]]]:
        """(hidden states before the first block by batch, arguments by block and batch)."""
        states: list[Tensor] = []
        arguments: dict[int, list[Arguments]] = {number: [] for number in self.order}
        before: dict[Any, Any] | None = None
        for batch in batches:
            collecting = _Collecting(self._passes, watch, len(batch), len(batches[0]))
            self._passes.run(batch, collecting)
            if not states:
                collecting.compare(watch)
            else:
                collecting.share({number: rows[0] for number, rows in arguments.items()})
            states.append(collecting.states)
            for number, own in collecting.arguments.items():
                arguments[number].append(own)
            after = _attributes(self._passes.blocks)
            if before is not None and any(before.get(key) is not value for key, value in after.items()):
                raise self._passes.refusal("it stores tensors of each batch in its decoder blocks")
            before = after
        return states, arguments


class _Passes:
    """Forward passes of a decoder in which something else is done in place of its blocks."""

    def __init__(self, name: str, decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.name, self.decoder, self.blocks = name, decoder, blocks
        held = (*decoder.parameters(), *decoder.buffers())
        self.home = next((tensor.device for tensor in held if not tensor.is_meta), torch.device("cpu"))

    def run(self, batch: Int[Tensor, "windows context"], instead: Instead) -> None:
        """Run the decoder on token ids until `instead`, which takes the place of blocks, ends it.

        Errors: SourceError for a decoder that fails on token ids alone.
        """
        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for number, block in enumerate(self.blocks):
                block.forward = _replaced(number, block.forward, instead)
            self.decoder(input_ids=batch.to(self.home), use_cache=False)
        except _Reached:
            pass
        except (ReallmError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the forward of a family raises
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


def _replaced(number: int, forward: Forward, instead: Instead) -> Forward:
    def called(*arguments: Any, **named: Any) -> Any:
        return instead(number, forward, {**dict(enumerate(arguments)), **named})

    return called


class _Watch:
    """The pass through the real blocks: their order, arguments and outputs."""

    def __init__(self, passes: _Passes, around: Callable[[int], Any]) -> None:
        self.order: list[int] = []
        self.arguments: dict[int, Arguments] = {}
        self.outputs: dict[int, Any] = {}  # containers around `_Like`, `_States` and plain values
        self.shared: set[int | str] = set()  # arguments that blocks write into
        self.in_place = False  # whether a block changes tensors that it is given
        self._passes, self._around = passes, around
        self._last: tuple[Tensor, int] | None = None  # hidden states and their version
        self._links: dict[int, tuple[weakref.ref[Tensor], _Handed]] = {}  # outputs by id
        self._contents: dict[int, tuple[Any, list[Any]]] = {}  # containers by id, as the last block left them

    def __call__(self, number: int, forward: Forward, arguments: Arguments) -> Any:
        self._check_call(number, arguments)
        with self._around(number) as device:
            lent = moved(arguments, device)
            contents = {key: _content(value) for key, value in lent.items() if writable(value)}
            versions = [(tensor, tensor._version) for tensor in tensors(lent)]
            states = lent.pop(0)
            output = forward(states, *_placed(lent), **_named(lent))
            self.in_place |= any(tensor._version != version for tensor, version in versions)
            output = moved(output, self._passes.home)
        for key, before in contents.items():
            if not _alike(before, _content(lent[key])):
                self.shared.add(key)
                overwrite(arguments[key], moved(lent[key], self._passes.home))
            self._contents[id(arguments[key])] = arguments[key], _content(arguments[key])
        return self._noted(number, output)

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
            if content is not None and not _alike(content, _content(value)):
                raise refusal(f"it changes {_argument(key)} between blocks {self.order[-1]} and {number}")
        for path, leaf in leaves(arguments):
            if not isinstance(leaf, (*_PLAIN, Tensor)):
                raise refusal(f"{_argument(path[0])} of block {number} is a {type(leaf).__name__}")
        self.order.append(number)
        others = {key: value for key, value in arguments.items() if key != 0}
        self.arguments[number] = rebuilt(others, lambda _, leaf: self._linked(leaf))

    def _is_last(self, states: Tensor) -> bool:
        assert self._last is not None
        last, version = self._last
        return last._version == version and (states is last or _equal(states, last))

    def _linked(self, leaf: Any) -> Any:
        found, handed = self._links.get(id(leaf), (None, None))
        return handed if found is not None and found() is leaf else leaf

    def _noted(self, number: int, output: Any) -> Any:
        states = states_of(output)
        self._last = states, states._version
        for path, leaf in leaves(output):
            if isinstance(leaf, Tensor):
                self._links[id(leaf)] = weakref.ref(leaf), _Handed(number, path)

        def like(_: Path, leaf: Any) -> Any:
            if leaf is states:
                return _States()
            return _Like(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf

        self.outputs[number] = rebuilt(output, like)
        return output


def nbytes_per_token(model: nn.Module, decoder: nn.Module, blocks: Sequence[nn.Module]) -> int | None:
    """Return what a stream will hold of every token: hidden states and arguments. None where only a run can tell.

    The model is on the meta device but for its buffers; what lies outside the blocks gets numbers that take no memory.
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for module in decoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in inside:
                module._parameters[name] = _different_rows(parameter)
    passes = _Passes(type(model).__name__, decoder, blocks)
    probes: list[_Probe] = []
    with torch.no_grad(), contextlib.suppress(SourceError):
        for in_tuple in (False, True):
            probes = [_Probe(in_tuple), _Probe(in_tuple)]
            for probe, ids in zip(probes, _PROBED, strict=True):
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
    return math.ceil(held / _PROBED[0].numel()) + (_shared_nbytes(blocks) if probes[0].shares else 0)


def _shared_nbytes(blocks: Sequence[nn.Module]) -> int:
    """Keys and values of a token that blocks leave for later ones, which are seen only when they run: of two kinds."""
    keys = [m.weight for block in blocks for path, m in block.named_modules() if path.endswith("k_proj")]
    return max((2 * 2 * weight.shape[0] * weight.itemsize for weight in keys), default=0)


# Two windows of different tokens
_PROBED = torch.arange(8)[None], torch.arange(8, 16)[None]


def _different_rows(parameter: Tensor) -> nn.Parameter:
    column = torch.linspace(-1, 1, parameter.shape[0] if parameter.ndim else 1, dtype=torch.float32).to(parameter.dtype)
    column = column.reshape(-1, *[1] * (parameter.ndim - 1)) if parameter.ndim else column[0]
    return nn.Parameter(column.expand(parameter.shape), requires_grad=False)


class _Probe:
    """A pass through stand-ins of which nothing is known but whether they return a tuple."""

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


class _Collecting:
    """A pass through stand-ins: the hidden states before the first block, and the arguments of all."""

    states: Tensor

    def __init__(self, passes: _Passes, watch: _Watch, windows: int, of: int) -> None:
        self.arguments: dict[int, Arguments] = {}
        self._passes, self._order, self._outputs, self._shared = passes, watch.order, watch.outputs, watch.shared
        self._sizes = windows, of
        self._links: dict[int, tuple[Tensor, _Handed]] = {}  # outputs by id, held so that it is not given again

    def __call__(self, number: int, _: Forward, arguments: Arguments) -> Any:
        if number != self._order[len(self.arguments)]:
            raise self._passes.refusal("which decoder blocks it calls depends on the text")
        states = arguments.pop(0)
        if not self.arguments:
            self.states = states
        self.arguments[number] = {
            key: value if key in self._shared else rebuilt(value, lambda _, leaf: self._linked(leaf))
            for key, value in arguments.items()
        }
        if number == self._order[-1]:
            raise _Reached
        return self._output(number, states)

    def _linked(self, leaf: Any) -> Any:
        return self._links[id(leaf)][1] if id(leaf) in self._links else leaf

    def _output(self, number: int, states: Tensor) -> Any:
        def stand_in(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, _States | _Like):
                return leaf
            # A tensor of its own over the same numbers, so that it is known which block's it is.
            made = states.detach() if isinstance(leaf, _States) else leaf.stand_in(*self._sizes)
            self._links[id(made)] = made, _Handed(number, path)
            return made

        return rebuilt(self._outputs[number], stand_in)

    def compare(self, watch: _Watch) -> None:
        """Errors: SourceError for an argument that differs from the one in the pass through the real blocks."""
        for number, found in self.arguments.items():
            real = watch.arguments[number]
            for key in {**real, **found}:
                if key in self._shared and key in real and key in found:
                    continue
                theirs, ours = (dict(leaves(own[key])) if key in own else None for own in (real, found))
                if theirs is None or ours is None or set(theirs) != set(ours) or not _alike_all(theirs, ours):
                    raise self._passes.refusal(f"{_argument(key)} of block {number} is made of earlier blocks' outputs")
        watch.arguments.clear()

    def share(self, first: dict[int, Arguments]) -> None:
        """Put the first batch's tensors in place of those that are equal."""
        compared: dict[tuple[int, int], tuple[Tensor, Tensor, bool]] = {}  # both are held: ids are not given again

        def shared(leaf: Any, other: Any) -> Any:
            if not (isinstance(leaf, Tensor) and isinstance(other, Tensor)):
                return leaf
            key = id(leaf), id(other)
            if key not in compared:
                compared[key] = leaf, other, _equal(leaf, other)
            return other if compared[key][2] else leaf

        for number, own in self.arguments.items():
            for key in set(own) - self._shared:
                theirs = dict(leaves(first[number].get(key)))
                own[key] = rebuilt(own[key], lambda path, leaf, theirs=theirs: shared(leaf, theirs.get(path)))


def states_of(output: Any) -> Tensor:
    """Return the hidden states in what a block puts out: all of it, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def _call(block: nn.Module, states: Tensor, arguments: Arguments) -> Any:
    return block(states, *_placed(arguments), **_named(arguments))


def _placed(arguments: Arguments) -> list[Any]:
    return [arguments[key] for key in sorted(key for key in arguments if isinstance(key, int))]


def _named(arguments: Arguments) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if isinstance(key, str)}


def _argument(key: int | str) -> str:
    return f"the argument {key!r}" if isinstance(key, str) else f"positional argument {key}"


def _content(container: Any) -> list[Any]:
    return [item for path, leaf in leaves(container) for item in (*path, leaf)]


def _alike(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists hold the same objects, or plain values that are equal."""
    return len(one) == len(other) and all(
        a is b or (isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b) for a, b in zip(one, other, strict=True)
    )


def _alike_all(one: dict[Path, Any], other: dict[Path, Any]) -> bool:
    return all(_equal(leaf, other[path]) for path, leaf in one.items())


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    numbers = one.is_floating_point() or one.is_complex()
    return torch.equal(one, other) or (numbers and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def _attributes(blocks: Sequence[nn.Module]) -> dict[tuple[int, str], Tensor]:
    """Tensors that modules of blocks hold, but for parameters; held, so that no id is given again."""
    return dict(_named_attributes(blocks))


def _named_attributes(blocks: Sequence[nn.Module]) -> Iterator[tuple[tuple[int, str], Tensor]]:
    for block in blocks:
        for module in block.modules():
            for name, value in (*vars(module).items(), *module._buffers.items()):
                if isinstance(value, Tensor):
                    yield (id(module), name), value
