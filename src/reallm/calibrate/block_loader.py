"""Load a dense model one decoder block at a time; tensors outside the blocks stay in memory.

Weights are read from the source tensor by tensor; unloaded tensors are on the meta device. Buffers that a model
computes itself (rotary frequencies, masks) are real from the start: no file has them.
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
from reallm.source.decoder_blocks import decoder_blocks
from reallm.source.limits import loading_limits
from reallm.source.model_source import Source
from reallm.source.transformers_logging import silence_transformers
from reallm.source.walk import build_model


def init_empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a causal language model of a config, its parameters on the meta device, its buffers computed."""

    def move_to_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # A parameter that is on the meta device already keeps its identity: it may be shared.
        return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move_to_meta)
    try:
        return build_model(config, dtype)
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Slot:
    """An attribute of a module that holds a tensor of the state dict."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    def set(self, tensor: Tensor) -> None:
        tensors = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        tensors[self.name] = tensor


class BlockLoader:
    """Load and unload the blocks of a dense model, which is in eval mode, in one dtype and on the CPU.

    Tensors shared by several blocks stay in memory, like everything outside the blocks. lm_head is never read unless it
    is tied to the embedding: no block needs it.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        """Build the model and load everything outside the blocks.

        Errors: SourceError for a model without a list of decoder blocks, OSError for missing files.
        """
        self._source = source
        with silence_transformers(), loading_limits(source.label, SourceError, source.tensors):
            self.model = init_empty_model(source.config, dtype).eval().requires_grad_(False)
        self._plan = getattr(self.model, "_get_dtype_plan", lambda _: {})(dtype)
        self._block_tensors: dict[int, dict[str, list[_Slot]]] = defaultdict(dict)
        outside: dict[str, list[_Slot]] = {}
        for home, name, slots in self._tensors():
            (outside if home is None else self._block_tensors[home])[name] = slots
        self._load(outside)

    def load_block(self, block: int) -> None:
        """Load the original weights of a block."""
        self._load(self._block_tensors[block])

    def unload_block(self, block: int) -> None:
        """Free the weights of a block."""
        for slots in self._block_tensors[block].values():
            meta_tensor = _parameter_like(slots[0].tensor, slots[0].tensor.to("meta"))
            for slot in slots:
                slot.set(meta_tensor)

    def _load(self, tensors: dict[str, list[_Slot]]) -> None:
        for name, slots in tensors.items():
            read = self._source.read(name)
            loaded = _parameter_like(slots[0].tensor, read.to(self._target_dtype(name, slots[0].tensor, read)))
            for slot in slots:
                slot.set(loaded)

    def _target_dtype(self, name: str, meta_tensor: Tensor, read: Tensor) -> torch.dtype:
        """Return the dtype that `from_pretrained` uses: some parameters stay in float32, in some families."""
        if not read.is_floating_point():
            return read.dtype
        exceptions = (dtype for pattern, dtype in self._plan.items() if fnmatch.fnmatchcase(name, f"*{pattern}*"))
        return next(exceptions, meta_tensor.dtype)

    def _tensors(self) -> Iterator[tuple[int | None, str, list[_Slot]]]:
        """Yield (block or None, name, all slots) of every tensor of the state dict except an untied lm_head."""
        numbers = defaultdict(set)
        for number, block in enumerate(decoder_blocks(self.model)):
            for module in block.modules():
                numbers[id(module)].add(number)
        names: dict[int, str] = {}
        slots_by_id: dict[int, dict[tuple[int, str], _Slot]] = defaultdict(dict)
        for path, module in self.model.named_modules(remove_duplicate=False):
            for own in _own_names(module):
                tensor = getattr(module, own)
                names.setdefault(id(tensor), f"{path}.{own}" if path else own)
                slots_by_id[id(tensor)][id(module), own] = _Slot(module, own)
        head = self.model.get_output_embeddings()
        for key, slots in slots_by_id.items():
            homes = [numbers.get(id(slot.module), {None}) for slot in slots.values()]
            found = set().union(*homes)
            if all(slot.module is head for slot in slots.values()):
                continue
            yield next(iter(found)) if len(found) == 1 else None, names[key], list(slots.values())


def _own_names(module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own parameters and persistent buffers."""
    yield from (name for name, tensor in module._parameters.items() if tensor is not None)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name


def _parameter_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor as a parameter if `like` is one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor
