"""The pipeline: source → walk → plan → fit → write.

Finished matrices are kept in a work folder beside the output as they come, so that an interrupted run goes
on from there; the output folder appears by one rename when everything is in it.
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
