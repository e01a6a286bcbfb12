"""Read untrusted input: sizes, shapes and names are checked before anything is allocated from them."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reallm.errors import ArtifactError, ReallmError

# Largest JSON file or header, in bytes: a model of 100,000 matrices stays below half of it.
LARGEST_JSON = 32_000_000
DEEPEST_JSON = 32
# Least bytes of header per list or object: a header of brackets alone would take 100 times its size in memory.
_LEAST_PER_CONTAINER = 8
_MOST_AXES = 16
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # can run code when read
_LENGTH_BYTES = 8  # the field before the header

# Bytes per element by dtype name of the safetensors specification, for the dtypes that torch has.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


def suffix_of(path: Path) -> str:
    """Return a file's suffix in lower case: X.GGUF and TEXT.TXT are accepted too."""
    return path.suffix.lower()


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype name, shape, and its bytes `start` to `end` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of its data."""
        return self.end - self.start


def read_header(path: Path, error: type[ReallmError] = ArtifactError) -> tuple[dict[str, Entry], int]:
    """Return (tensors by name, bytes of length field plus header) of a safetensors file; no data is read.

    The tensors must fill the file from the header to its end, without gaps or overlap.
    Errors: `error` naming the file if any of this fails.
    """
    size = regular_file(path, error).st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > size - _LENGTH_BYTES:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            if length > LARGEST_JSON:
                raise ValueError(f"a header of {length:,} bytes, more than {LARGEST_JSON:,}")
            entries = _parse_entries(file.read(length), _LENGTH_BYTES + length)
        _check_cover(entries.values(), _LENGTH_BYTES + length, size)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: damaged safetensors file ({_short(problem)}); copy or download it again") from problem
    return entries, _LENGTH_BYTES + length


def _parse_entries(header: bytes, offset: int) -> dict[str, Entry]:
    """Parse a header. Errors: ValueError."""
    if (header.count(b"{") + header.count(b"[")) * _LEAST_PER_CONTAINER > len(header) + 100:
        raise ValueError("a header of brackets")
    values = json.loads(header, object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant)
    if not isinstance(values, dict):
        raise ValueError("a header that is not an object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that are not strings")
    return {check_name(name): _entry(name, entry, offset) for name, entry in values.items()}


def _entry(name: str, entry: Any, offset: int) -> Entry:
    """Parse one tensor of a header. Errors: ValueError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has dtype {_short(repr(dtype))}, not one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has shape {_short(shape)} and data_offsets {_short(offsets)}")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"tensor {name!r} of shape {_short(shape)} in {dtype} has {end - start} bytes")
    return Entry(dtype, tuple(shape), offset + start, offset + end)


def _check_cover(entries: Iterable[Entry], begin: int, size: int) -> None:
    """Check that entries fill the bytes `begin` to `size`. Errors: ValueError."""
    end = begin
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {end - begin} of the data")
        end = entry.end
    if end != size:
        reason = f"{size - end} bytes belong to no tensor" if end < size else f"{end - size} bytes are missing"
        raise ValueError(reason)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def read_json(path: Path, error: type[ReallmError] = ArtifactError) -> Any:
    """Read a JSON file of bounded size and depth.

    Errors: `error` naming the file if it is missing, not a regular file, not JSON, too large or too deep.
    """
    if (size := regular_file(path, error).st_size) > LARGEST_JSON:
        raise error(f"{path}: {size:,} bytes of JSON, more than {LARGEST_JSON:,}; no model needs that")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_reject_duplicate_keys)
        count_values(values)
    except (ValueError, RecursionError) as problem:
        raise error(
            f"{path}: is not JSON that can be parsed ({_short(problem)}); copy or download it again"
        ) from problem
    return values


def count_values(values: Any) -> int:
    """Return the number of values in nested lists and objects, containers included.

    Errors: ValueError beyond a depth of DEEPEST_JSON.
    """
    level, count = [values], 1
    for _ in range(DEEPEST_JSON + 1):
        holders = (value for value in level if isinstance(value, dict | list))
        level = [value for holder in holders for value in (holder.values() if isinstance(holder, dict) else holder)]
        count += len(level)
        if not level:
            return count
    raise ValueError(f"nested more than {DEEPEST_JSON} deep")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reject duplicate keys, of which some readers take the first and others the last. Errors: ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} in a header")


def regular_file(path: Path, error: type[ReallmError] = ArtifactError) -> Any:
    """Return the `os.stat_result` of a regular file. Errors: `error` for anything else: reading a pipe never ends."""
    try:
        found = path.stat()
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}") from problem
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is not a regular file")
    return found


def check_folder(folder: Path) -> None:
    """Raise ArtifactError for links out of the folder, and for entries that are neither file nor folder."""
    for path in sorted(folder.iterdir()):
        check_inside(path, folder)
        if not path.is_dir():
            regular_file(path)


def check_inside(path: Path, folder: Path) -> None:
    """Allow links that lead into the folder, or into the blobs of the hub cache that holds the snapshot.

    Errors: ArtifactError for any other link.
    """
    if not path.is_symlink():
        return
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as problem:
        raise ArtifactError(f"{path}: is a link to a missing target or a loop; copy the artifact again") from problem
    homes = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in homes):
        raise ArtifactError(f"{path}: is a link to {target}, outside the folder; copy the file itself if you trust it")


def check_name(name: str) -> str:
    """Return the name of a tensor, a matrix or a file. Errors: ValueError unless it is printable on one line."""
    if not name or len(name) > 1000 or not name.isprintable():
        raise ValueError(f"{_short(repr(name))} is not a name")
    return name


def check_shard_name(name: Any) -> str:
    """Return a file name from an index. Errors: ValueError unless it is a safetensors file of the same folder."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{_short(repr(name))} is not a safetensors file of this folder")
    return check_name(name)


def _short(value: Any) -> str:
    """Return a value as text on one line, at most 200 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
