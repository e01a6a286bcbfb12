"""The text a job is calibrated on, in windows of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reallm.model import Source, load_tokenizer
from reallm.model.calibration import SELF, windows_of_files, windows_written
from reallm.pipeline.settings import Settings

_IN_FLOAT32 = 2_000_000_000  # parameters


def calibration_windows(source: Source, settings: Settings, model: Callable[[], torch.nn.Module]) -> Tensor:
    """Token ids (windows, context) of the settings' calibration. `model` is asked for only to write text itself."""
    tokenizer = load_tokenizer(source.label)
    limit = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context = min(settings.calibration_context, limit or settings.calibration_context)
    if settings.calibration == (SELF,):
        return windows_written(
            model(), tokenizer, settings.calibration_windows, context, settings.seed, settings.device
        )
    return windows_of_files(settings.calibration, tokenizer, settings.calibration_windows, context)


def calculation_dtype(source: Source) -> torch.dtype:
    """float32 for all that a workstation holds twice; 16 bits beyond."""
    return torch.float32 if source.total_parameters < _IN_FLOAT32 else torch.bfloat16
