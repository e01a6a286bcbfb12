"""The text a job is calibrated on, in windows of tokens."""

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

# (matrix just finished, weights done, weights in all), or the same of a phase, which begins with 0 done
Progress = Callable[[str, int, int], None]
GENERATION = "writing text to calibrate on"  # a phase, counted in tokens

_IN_FLOAT32 = 2_000_000_000  # parameters


def phase_callback(progress: Progress | None, phase: str, total: int) -> Callable[[int, int], None]:
    """Tells `progress` that a phase begins, and gives what tells how much of it is done, of how much."""
    if progress is None:
        return lambda done, total: None
    progress(phase, 0, total)
    return functools.partial(progress, phase)


def calibration_windows(
    source: Source, settings: Settings, model: Callable[[], torch.nn.Module], progress: Progress | None = None
) -> Tensor:
    """Token ids (windows, context) of the settings' calibration. `model` is asked for only to write text itself."""
    tokenizer, context = load_tokenizer(source.label), _context(source, settings)
    if settings.calibration == (SELF,):
        windows = settings.calibration_windows
        on_progress = phase_callback(progress, GENERATION, windows * context)
        return generate_windows(model(), tokenizer, windows, context, settings.seed, settings.device, on_progress)
    return windows_from_files(settings.calibration, tokenizer, settings.calibration_windows, context)


def clamp_windows(source: Source, settings: Settings) -> Settings:
    """The settings with as many windows as the text has, if these are fewer, and a context that the model was made for.

    What costs, files and the next text to be held out go by is counted here once, before any work.
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
    """float32 for all that a workstation holds twice; 16 bits beyond."""
    return torch.float32 if source.total_parameters < _IN_FLOAT32 else torch.bfloat16


def gradient_dtype(source: Source, device: str) -> torch.dtype:
    """What gradients of the end-to-end loss are computed in: bfloat16 where a CPU multiplies it, sums apart.

    Only squares of gradients are read, and means of thousands of them.
    """
    on_cpu = torch.device(device).type == "cpu"
    return torch.bfloat16 if on_cpu and multiplies_bfloat16() else calculation_dtype(source)
