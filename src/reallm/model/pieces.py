"""A dense model of which a piece is in memory: what lies outside its decoder blocks, and a block while it is wanted.

Weights come from the source tensor by tensor; what is not wanted lies on the meta device. Tables that a model makes
for itself (rotary frequencies, masks) are real from the start: no file has them.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from reallm.errors import SourceError
from reallm.model.decoder import decoder_blocks
from reallm.model.silence import quiet
from reallm.model.source import Source
from reallm.model.untrusted import bounded
from reallm.model.walk import model_of_config


def hollow_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model of a config: its parameters are on the meta device, its buffers are made."""

    def emptied(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # One that is empty already keeps its identity: it may be shared.
        return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)
    try:
        return model_of_config(config, dtype)
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Slot:
    """A place of a module that a tensor of the state dict lies in."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    def put(self, tensor: Tensor) -> None:
        places = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        places[self.name] = tensor


class Pieces:
    """A dense model in eval mode, in one dtype on the CPU, that is filled and emptied block by block.

    What several blocks share stays in memory, like everything outside the blocks. The head is never read unless it is
    the embedding: no block needs it.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        """Everything outside the blocks is filled.

        Errors: SourceError for a model whose blocks cannot be told apart, OSError for files that are gone.
        """
        self._source = source
        with quiet(), bounded(source.label, SourceError, source.tensors):
            self.model = hollow_model(source.config, dtype).eval().requires_grad_(False)
        self._plan = getattr(self.model, "_get_dtype_plan", lambda _: {})(dtype)
        self._of_block: dict[int, dict[str, list[_Slot]]] = defaultdict(dict)
        outside: dict[str, list[_Slot]] = {}
        for home, name, slots in self._tensors():
            (outside if home is None else self._of_block[home])[name] = slots
        self._fill(outside)

    def fill(self, block: int) -> None:
        """Read the original weights of a block."""
        self._fill(self._of_block[block])

    def empty(self, block: int) -> None:
        """Forget the weights of a block."""
        for slots in self._of_block[block].values():
            hollow = _as(slots[0].tensor, slots[0].tensor.to("meta"))
            for slot in slots:
                slot.put(hollow)

    def _fill(self, tensors: dict[str, list[_Slot]]) -> None:
        for name, slots in tensors.items():
            read = self._source.read(name)
            filled = _as(slots[0].tensor, read.to(self._dtype_of(name, slots[0].tensor, read)))
            for slot in slots:
                slot.put(filled)

    def _dtype_of(self, name: str, hollow: Tensor, read: Tensor) -> torch.dtype:
        """As `from_pretrained` does it: some parameters stay in float32, in some families."""
        if not read.is_floating_point():
            return read.dtype
        kept = (dtype for pattern, dtype in self._plan.items() if fnmatch.fnmatchcase(name, f"*{pattern}*"))
        return next(kept, hollow.dtype)

    def _tensors(self) -> Iterator[tuple[int | None, str, list[_Slot]]]:
        """(its block or None, a name, all its places) of every tensor of the state dict but an untied head."""
        numbers = defaultdict(set)
        for number, block in enumerate(decoder_blocks(self.model)):
            for module in block.modules():
                numbers[id(module)].add(number)
        names: dict[int, str] = {}
        places: dict[int, dict[tuple[int, str], _Slot]] = defaultdict(dict)
        for path, module in self.model.named_modules(remove_duplicate=False):
            for own in _own_names(module):
                tensor = getattr(module, own)
                names.setdefault(id(tensor), f"{path}.{own}" if path else own)
                places[id(tensor)][id(module), own] = _Slot(module, own)
        head = self.model.get_output_embeddings()
        for key, slots in places.items():
            homes = [numbers.get(id(slot.module), {None}) for slot in slots.values()]
            found = set().union(*homes)
            if all(slot.module is head for slot in slots.values()):
                continue
            yield next(iter(found)) if len(found) == 1 else None, names[key], list(slots.values())


def _own_names(module: nn.Module) -> Iterator[str]:
    """Names of the parameters and persistent buffers that a module holds itself."""
    yield from (name for name, tensor in module._parameters.items() if tensor is not None)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name


def _as(model: Tensor, tensor: Tensor) -> Tensor:
    """The tensor as a parameter if `model` is one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(model, nn.Parameter) else tensor
