"""Gradients of the end-to-end loss with respect to every block's output: one file per window, read block by block.

Each value takes one byte: an 8-bit float (e4m3) with a power-of-two scale per token. The relative error of 3 % is
negligible compared with the sampling error.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reallm.checkpoint import save_tensors
from reallm.errors import ArtifactError, RecipeError

_EIGHT_BITS = torch.float8_e4m3fn


@dataclass(frozen=True)
class Gradients:
    """The gradients of windows; `files` has one file per window, in order."""

    files: Sequence[Path]

    def missing_windows(self) -> list[int]:
        """Return the indices of windows that have no file yet."""
        return [number for number, file in enumerate(self.files) if not file.is_file()]

    def write(self, window: int, gradients: Float[Tensor, "blocks context hidden"]) -> None:
        """Write a window's file."""
        largest = gradients.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # the last token has gradient 0
        # One more halving: in float32, log2 of a quotient just below a power of two can round up to it.
        scales = torch.exp2(torch.floor(torch.log2(torch.finfo(_EIGHT_BITS).max / largest)) - 1)
        codes = (gradients * scales).to(_EIGHT_BITS).view(torch.uint8)
        save_tensors({"gradients": codes, "scales": scales[..., 0]}, self.files[window])

    def read(self, block: int, windows: slice, device: str | torch.device) -> Float[Tensor, "windows context hidden"]:
        """Return the gradients of a block, float32.

        Errors: ArtifactError naming the damaged file.
        """
        codes, scales = zip(*(self._read(file, block) for file in self.files[windows]), strict=True)
        numbers = torch.stack(codes).to(device).view(_EIGHT_BITS).float()
        return numbers / torch.stack(scales).to(device)[..., None]

    def remove(self) -> None:
        """Delete the files."""
        for file in self.files:
            file.unlink(missing_ok=True)

    @staticmethod
    def nbytes(windows: int, blocks: int, context: int, hidden: int) -> int:
        """Return the bytes of the files of this many windows."""
        return windows * blocks * context * (hidden + 4)

    @staticmethod
    def _read(path: Path, block: int) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice("gradients")[block], file.get_slice("scales")[block]
        except SafetensorError as error:
            raise ArtifactError(f"{path}: damaged ({error}); remove {path.parent} to start again") from error


def check_disk_space(folder: Path, nbytes: int) -> None:
    """Raise RecipeError if the disk has less free space than `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise RecipeError(
            f"--block-error loss needs {nbytes / 1e9:.1f} GB for gradients in {folder}, where {free / 1e9:.1f} GB are "
            "free; use fewer --block-windows, or --block-error outputs"
        )
