"""What structure the matrices of a model have that a code could use, by the weights alone; nothing is compressed.

`spectrum`, `scales`, `locality` and `orders` look at a matrix beside Gaussian noise of the same scales, `shifts` at the
matrix alone; `control` fits codecs to it, to a shuffled copy and to that noise.
"""

from reallm.analyze.control import DEFAULT_CODECS, CodecErrors, codec_errors, shuffle
from reallm.analyze.locality import Autocorrelation, autocorrelation, predictable_bits
from reallm.analyze.matrix import Structure, analyze_matrix
from reallm.analyze.orders import View, describe_view, views
from reallm.analyze.run_analysis import AnalysisJob, Scope, analyze, estimate_seconds, prepare
from reallm.analyze.scale_statistics import kurtosis, noise_like, remove_scales, scale_bits
from reallm.analyze.shifts import Shift, Shifts, shifts
from reallm.analyze.spectrum import Spectrum, marchenko_pastur, spectrum, top_share

__all__ = [
    "DEFAULT_CODECS",
    "Autocorrelation",
    "CodecErrors",
    "Scope",
    "Shift",
    "Shifts",
    "Spectrum",
    "Structure",
    "View",
    "AnalysisJob",
    "analyze",
    "autocorrelation",
    "codec_errors",
    "kurtosis",
    "describe_view",
    "marchenko_pastur",
    "noise_like",
    "predictable_bits",
    "prepare",
    "scale_bits",
    "estimate_seconds",
    "shifts",
    "shuffle",
    "spectrum",
    "analyze_matrix",
    "top_share",
    "remove_scales",
    "views",
]
