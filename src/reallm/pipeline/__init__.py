"""The pipeline: source → walk → plan → fit → write.

Every finished matrix is saved at once to a work folder next to the output, so that an interrupted run can resume. One
rename creates the output folder when all its files are complete.
"""

from reallm.pipeline.compress_settings import Settings
from reallm.pipeline.cost import Estimate, analysis_seconds, estimate, work_bytes
from reallm.pipeline.job import Forecast, Job
from reallm.pipeline.prepare_job import prepare
from reallm.pipeline.run_job import compress, run

__all__ = [
    "Estimate",
    "Forecast",
    "Job",
    "Settings",
    "compress",
    "analysis_seconds",
    "estimate",
    "prepare",
    "run",
    "work_bytes",
]
