"""Checksums of tensors: written into the manifest, verified when an artifact is loaded.

They detect damaged or mixed-up files. They are not a signature: whoever can write the tensors can write the manifest
too. A file's entry is the concatenation of the checksums of its tensors, sorted by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reallm.checkpoint.validation import Entry, read_header
from reallm.errors import ArtifactError

DIGITS = 32  # of sha256, in hex: 128 bits per tensor, 0.03 % of a 135M model at 3 bits
_CHUNK = 1 << 22


def compute_checksums(files: Iterable[Path]) -> dict[str, str]:
    """Return the manifest's checksums by file name, computed from the files on disk.

    Errors: ArtifactError for a file that is not safetensors.
    """
    return {file.name: "".join(checksum for _, checksum in _tensor_checksums(file)) for file in sorted(files)}


def placeholder_checksums(files: Mapping[str, int]) -> dict[str, str]:
    """Return zeros of the length that the checksums will have. `files`: number of tensors by file name."""
    return {name: "0" * (DIGITS * count) for name, count in files.items()}


def verify(files: Iterable[Path], checksums: Mapping[str, str]) -> None:
    """Compare weight files with the checksums of the manifest; an old artifact without checksums passes.

    Errors: ArtifactError naming the first tensor that differs, or a file that the manifest does not list.
    """
    files = sorted(files)
    if not checksums:
        return
    if {file.name for file in files} != set(checksums):
        odd = sorted({file.name for file in files} ^ set(checksums))[0]
        raise ArtifactError(f"{odd!r:.200} is a weight file of another artifact, or missing; copy the artifact again")
    for file in files:
        expected, found = checksums[file.name], _tensor_checksums(file)
        if len(expected) != DIGITS * len(found):
            raise ArtifactError(
                f"{file}: holds {len(found)} tensors, which do not match the checksums in config.json; copy it again"
            )
        for place, (name, checksum) in enumerate(found):
            if checksum != expected[DIGITS * place : DIGITS * (place + 1)]:
                raise ArtifactError(
                    f"{file}: tensor {name!r} is not as it was written (checksum); copy the artifact again, "
                    "or skip the check: eval, generate and info take --no-verify, reallm.load takes verify=False"
                )


def _tensor_checksums(file: Path) -> list[tuple[str, str]]:
    """Return (name, checksum) of every tensor, sorted by name; hashing runs in threads, since it releases the GIL."""
    entries, _ = read_header(file)
    names = sorted(entries)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _checksum(file, name, entries[name]), names)
        return list(zip(names, found, strict=True))


def _checksum(file: Path, name: str, entry: Entry) -> str:
    """Return the checksum of name, dtype, shape and bytes of one tensor."""
    digest = hashlib.sha256(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode())
    with file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        remaining = entry.nbytes
        while remaining:
            chunk = stream.read(min(remaining, _CHUNK))
            if not chunk:
                raise ArtifactError(f"{file}: became shorter while it was read")
            digest.update(chunk)
            remaining -= len(chunk)
    return digest.hexdigest()[:DIGITS]
