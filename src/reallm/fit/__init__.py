"""How a matrix's parts are found: one file per way of finding."""

import importlib
import pkgutil

from reallm.fit.dispatch import fit, relative_error, squared_error
from reallm.fit.joint_training import capture_fit_input, train_shared_decoder
from reallm.fit.objective import Objective
from reallm.fit.quality import Quality, gaussian_error, gaussian_quality, gaussian_share

# Every file of this folder registers its ways of fitting when imported.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Objective",
    "Quality",
    "capture_fit_input",
    "fit",
    "gaussian_error",
    "gaussian_quality",
    "gaussian_share",
    "relative_error",
    "squared_error",
    "train_shared_decoder",
]
