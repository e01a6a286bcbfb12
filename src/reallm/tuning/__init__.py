"""Fine-tuning after compression: codes are frozen; float tensors train block by block, end to end, or on a task."""

from reallm.tuning.tune_settings import DEFAULT_TRAIN, LOSSES, METHODS, Settings
from reallm.tuning.tuning_run import TuneResult, run, tune

__all__ = ["DEFAULT_TRAIN", "LOSSES", "METHODS", "Settings", "TuneResult", "run", "tune"]
