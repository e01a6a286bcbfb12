"""Load the calibration text of a job as windows of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from reallm.calibrate.windows import SELF, generate_windows, windows_from_files
from reallm.hf import load_tokenizer
from reallm.pipeline.compress_settings import Settings
from reallm.source import Source
from reallm.source.devices import multiplies_bfloat16

# (matrix just finished, weights done, total weights); or (phase, units done, total units), starting with 0 done
Progress = Callable[[str, int, int], None]
GENERATION = "writing text to calibrate on"  # a phase, counted in tokens

_MAX_FLOAT32_PARAMETERS = 2_000_000_000


def phase_callback(progress: Progress | None, phase: str, total: int) -> Callable[[int, int], None]:
    """Report the start of a phase to `progress`, and return a callback (done, total) for the rest of the phase."""
    if progress is None:
        return lambda done, total: None
    progress(phase, 0, total)
    return functools.partial(progress, phase)


def calibration_windows(
    source: Source, settings: Settings, model: Callable[[], torch.nn.Module], progress: Progress | None = None
) -> Tensor:
    """Return token ids (windows, context) for calibration. `model` is called only if the model generates the text."""
    tokenizer, context = load_tokenizer(source.label), _context(source, settings)
    if settings.calibration == (SELF,):
        windows = settings.calibration_windows
        on_progress = phase_callback(progress, GENERATION, windows * context)
        return generate_windows(model(), tokenizer, windows, context, settings.seed, settings.device, on_progress)
    return windows_from_files(settings.calibration, tokenizer, settings.calibration_windows, context)


def clamp_windows(source: Source, settings: Settings) -> Settings:
    """Reduce the number of windows to those in the text, and the context to the model's maximum.

    Costs, file layouts and the choice of held-out text use these numbers, so they are determined once, before any work.
    Errors: TextError if the text does not fill one window.
    """
    if not settings.calibration:
        return settings
    windows = settings.calibration_windows
    if settings.calibration != (SELF,):
        tokenizer = load_tokenizer(source.label)
        windows = len(windows_from_files(settings.calibration, tokenizer, windows, _context(source, settings)))
    return dataclasses.replace(settings, calibration_windows=windows, calibration_context=_context(source, settings))


def _context(source: Source, settings: Settings) -> int:
    limit = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(settings.calibration_context, limit or settings.calibration_context)


def calculation_dtype(source: Source) -> torch.dtype:
    """Return float32 for models that fit twice into the memory of a workstation; bfloat16 for larger ones."""
    return torch.float32 if source.total_parameters < _MAX_FLOAT32_PARAMETERS else torch.bfloat16


def gradient_dtype(source: Source, device: str) -> torch.dtype:
    """Return the dtype for gradients of the end-to-end loss: bfloat16 on a CPU that multiplies it natively.

    Sums stay in float32. Precision suffices, because only means over thousands of squared gradients are used.
    """
    on_cpu = torch.device(device).type == "cpu"
    return torch.bfloat16 if on_cpu and multiplies_bfloat16() else calculation_dtype(source)
