"""Scales of groups, and how they are stored; shared by every format that has groups.

A group is `group_size` neighbouring inputs of one output row; the last group of a row may be shorter, and
`group_size=0` means one group a row. Stored either as float16, one each (bfloat16 for matrices whose numbers are
beyond its range, see `range.py`), or in two levels: 8 bits against
one float32 per block of 256 groups (method of QLoRA's double quantisation, Dettmers et al.,
arXiv:2305.14314, with our own companding). Signed scales, which some formats need, spend one of the 8 bits
on the sign.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from reallm.errors import FormatError
from reallm.formats.base import Shape, Tensors, empty

FLOAT16 = "float16"
BFLOAT16 = "bfloat16"
TWO_LEVEL = "two_level"
KINDS = (FLOAT16, TWO_LEVEL, BFLOAT16)
ROLES = {"scales": "scales", "scales_max": "scales"}

_BLOCK = 256  # groups that share one float32
_LEVELS = {torch.uint8: 255, torch.int8: 127}
_ONE_EACH = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def check_groups(owner: str, group_size: int, kind: str) -> None:
    """Raise FormatError unless `group_size` >= 0 and `kind` is a known way to store scales."""
    if group_size < 0:
        raise FormatError(f"{owner}: group_size={group_size} is negative; 0 means one group a row")
    if kind not in KINDS:
        raise FormatError(f"{owner}: scales={kind!r} is not one of {', '.join(KINDS)}")


def groups_per_row(in_features: int, group_size: int) -> int:
    """Groups of one row; the last may be shorter."""
    return -(-in_features // group_size) if group_size else 1


def grid(shape: Shape, group_size: int) -> Shape:
    """Shape of the scales of a matrix: (out_features, groups a row)."""
    return shape[0], groups_per_row(shape[1], group_size)


def expand_groups(values: Shaped[Tensor, "out groups"], in_features: int, group_size: int) -> Shaped[Tensor, "out in"]:
    """One value per group -> one value per weight."""
    return values.repeat_interleave(_width(in_features, group_size), dim=1)[:, :in_features]


def expand_columns(
    scales: Shaped[Tensor, "out groups"], start: int, count: int, group_size: int
) -> Shaped[Tensor, "out count"]:
    """The scales of `count` columns from column `start` on, one a weight; a view where all are of one group."""
    # One group may be wider than a row, and its width 0.
    first, last = (column // group_size if scales.shape[1] > 1 else 0 for column in (start, start + count - 1))
    if first == last:
        return scales[:, first : first + 1].expand(-1, count)
    columns = torch.arange(start, start + count, device=scales.device)
    return scales[:, columns // group_size]


def apply_scales(
    values: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"], group_size: int
) -> Float[Tensor, "out in"]:
    """Every value times the scale of its group."""
    rows, inputs = values.shape
    if group_size and inputs % group_size == 0:  # a view of the groups spares a copy of the scales' spread
        return (values.reshape(rows, -1, group_size) * scales[..., None]).view(rows, inputs)
    return values * expand_groups(scales, inputs, group_size)


def split_groups(
    weight: Float[Tensor, "out in"], group_size: int, fill: float = 0.0
) -> Float[Tensor, "out groups width"]:
    """Split rows into groups; the short last group is filled up with `fill`."""
    width = _width(weight.shape[1], group_size)
    missing = -weight.shape[1] % width
    return torch.nn.functional.pad(weight, (0, missing), value=fill).view(weight.shape[0], -1, width)


def layout(kind: str, count: int, signed: bool = False) -> Tensors:
    """What `pack` writes for `count` scales, on the meta device."""
    if kind in _ONE_EACH:
        return {"scales": empty((count,), _ONE_EACH[kind])}
    blocks = -(-count // _BLOCK)
    return {"scales": empty((count,), _code_dtype(signed)), "scales_max": empty((blocks,), torch.float32)}


def pack(kind: str, scales: Float[Tensor, "out groups"], signed: bool = False) -> Tensors:
    """Store scales, row-major; they are >= 0 unless `signed`."""
    flat = scales.detach().reshape(-1)
    if kind in _ONE_EACH:
        largest_held = torch.finfo(_ONE_EACH[kind]).max
        return {"scales": flat.clamp(-largest_held, largest_held).to(_ONE_EACH[kind])}
    codes, largest = _compand(flat, _code_dtype(signed))
    return {"scales": codes, "scales_max": largest}


def unpack(kind: str, tensors: Tensors, shape: Shape) -> Float[Tensor, "out groups"]:
    """The inverse of `pack`, float32; `shape` is that of the scales."""
    stored = tensors["scales"]
    if kind in _ONE_EACH:
        return stored.to(torch.float32).view(shape)
    return _decompand(stored, tensors["scales_max"]).view(shape)


def fake_quantize(kind: str, scales: Float[Tensor, "out groups"], signed: bool = False) -> Float[Tensor, "out groups"]:
    """Scales as they come back from the file: what codes must be chosen against."""
    return unpack(kind, pack(kind, scales, signed), (scales.shape[0], scales.shape[1]))


def _width(in_features: int, group_size: int) -> int:
    """Columns of a full group; a group wider than a row is the row, and takes no memory for what it lacks."""
    return min(group_size or in_features, in_features)


def _code_dtype(signed: bool) -> torch.dtype:
    return torch.int8 if signed else torch.uint8


def _compand(flat: Float[Tensor, " n"], dtype: torch.dtype) -> tuple[Integer[Tensor, " n"], Float[Tensor, " blocks"]]:
    """8-bit codes of the square root of |scale| against the block's largest, with the scale's sign.

    The square root keeps a group 100 times below its block's largest within 4 %; equal steps would be off
    by 20 % there, and one outlier group would spoil its 255 neighbours.
    """
    blocks = _blocks(flat)
    largest = blocks.abs().amax(1)
    # A block of zero groups (pruned heads) would divide by 0.
    ratio = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
    codes = (ratio.abs().clamp(max=1).sqrt() * _LEVELS[dtype]).round() * ratio.sign()
    return codes.to(dtype).reshape(-1)[: flat.numel()], largest


def _decompand(codes: Tensor, largest: Float[Tensor, " blocks"]) -> Float[Tensor, " n"]:
    ratio = _blocks(codes.to(torch.float32)) / _LEVELS[codes.dtype]
    return (ratio * ratio.abs() * largest[:, None]).reshape(-1)[: codes.numel()]


def _blocks(flat: Tensor) -> Tensor:
    missing = -flat.numel() % _BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, _BLOCK)
