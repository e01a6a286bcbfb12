"""The pipeline: source → walk → plan → fit → write.

Finished matrices are kept in a work folder beside the output as they come, so that an interrupted run goes
on from there; the output folder appears by one rename when everything is in it.
"""

from reallm.pipeline.cost import Estimate, analysis_seconds, estimate, work_bytes
from reallm.pipeline.job import Forecast, Job
from reallm.pipeline.preparing import prepare
from reallm.pipeline.running import compress, run
from reallm.pipeline.settings import Settings

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
