"""Tensors that transformers fuses from several stored tensors when it loads a family, read one stored tensor at a time.

Most mixture-of-experts models are saved expert by expert and run with all experts in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reallm.checkpoint.headers import Header, read_tensor

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True)
class FusedExperts:
    """A tensor (experts, rows, columns): `experts` lists, per expert, the stored tensors concatenated along rows."""

    experts: tuple[tuple[Header, ...], ...]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype, equal for all stored tensors."""
        return self.experts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (experts, rows, columns)."""
        rows, columns = sum(part.shape[0] for part in self.experts[0]), self.experts[0][0].shape[1:]
        return (len(self.experts), rows, *columns)

    def read(self, index: int | None = None) -> Tensor:
        """Read all experts, or one by index."""
        if index is not None:
            return torch.cat([read_tensor(part) for part in self.experts[index]])
        return torch.stack([self.read(expert) for expert in range(len(self.experts))])


def map_state_dict(skeleton: nn.Module, headers: Mapping[str, Header]) -> dict[str, Header | FusedExperts] | None:
    """Map each tensor of the state dict, tied ones excepted, to stored tensors, by transformers' rules for the family.

    None if loading does more than rename tensors and fuse experts, or if this version of transformers differs.
    Errors: ValueError for experts with missing or surplus tensors.
    """
    try:
        return _map_state_dict(skeleton, headers)
    except (ImportError, AttributeError, TypeError):  # internals of transformers, not a public interface
        return None


def transformers_names(skeleton: nn.Module, headers: Mapping[str, Header]) -> dict[str, str] | None:
    """Return transformers' name for every tensor of the files, in the state dict or not.

    None if this version of transformers differs.
    """
    try:
        return {key: name for key, name, _ in _rename_keys(skeleton, headers)}
    except (ImportError, AttributeError, TypeError):  # internals of transformers, not a public interface
        return None


def _rename_keys(
    skeleton: nn.Module, headers: Mapping[str, Header]
) -> Iterator[tuple[str, str, tuple[WeightConverter, str] | None]]:
    """Yield (key, name in the model, (converter, matched pattern) or None) of every tensor.

    Follows `from_pretrained`: keys in natural order, all renamings, then at most one converter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = skeleton.base_model_prefix, skeleton.state_dict()
    for key in sorted(headers, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        yield key, name, None if pattern is None else (by_pattern[pattern], pattern)


def _map_state_dict(skeleton: nn.Module, headers: Mapping[str, Header]) -> dict[str, Header | FusedExperts] | None:
    state = skeleton.state_dict()
    found: dict[str, Header | FusedExperts] = {}
    groups: dict[str, tuple[WeightConverter, dict[str, list[Header]]]] = {}
    for key, name, converted in _rename_keys(skeleton, headers):
        if name not in state:
            continue
        if converted is None:
            found.setdefault(name, headers[key])
        else:
            converter, parts = groups.setdefault(name, (converted[0], {}))
            parts.setdefault(converted[1], []).append(headers[key])
    for name, (converter, parts) in groups.items():
        if name in found or (merged := _fused_experts(name, converter, parts)) is None:
            return None
        found[name] = merged
    return found


def _fused_experts(name: str, converter: WeightConverter, parts: Mapping[str, list[Header]]) -> FusedExperts | None:
    """Return the fused experts of one tensor; None if its converter does anything else.

    Errors: ValueError naming the tensor if its experts have different numbers of stored tensors.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), step.dim) for step in converter.operations]
    joined = [(MergeModulelist, 0), (Concatenate, 1)][: len(converter.source_patterns)]
    if steps != joined or len(converter.target_patterns) != 1:
        return None
    counts = {pattern: len(parts.get(pattern, ())) for pattern in converter.source_patterns}
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{count} of {pattern}" for pattern, count in counts.items())
        raise ValueError(f"{name!r} needs equally many tensors of each kind, and there are {found}")
    columns = [parts[pattern] for pattern in converter.source_patterns]
    kinds = {(part.dtype, part.shape[1:]) for column in columns for part in column}
    heights = {tuple(part.shape[0] for part in expert if part.shape) for expert in zip(*columns, strict=True)}
    if len(kinds) != 1 or len(heights) != 1 or any(len(part.shape) != 2 for part in columns[0]):
        return None
    return FusedExperts(tuple(zip(*columns, strict=True)))
