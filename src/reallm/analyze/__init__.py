"""What structure the matrices of a model have that a code could use, by the weights alone; nothing is compressed.

`spectrum`, `scales`, `locality` and `orders` look at a matrix beside Gaussian noise of the same scales, `shifts` at the
matrix alone; `control` fits codecs to it, to a shuffled copy and to that noise.
"""

from reallm.analyze.control import DEFAULT_CODECS, CodecErrors, codec_errors, shuffled
from reallm.analyze.locality import Autocorrelation, autocorrelation, predictable_bits
from reallm.analyze.matrix import Structure, structure_of
from reallm.analyze.orders import View, look, views
from reallm.analyze.running import Scope, Work, analyze, prepare, seconds
from reallm.analyze.scales import kurtosis, noise_like, scale_bits, unscaled
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
    "Work",
    "analyze",
    "autocorrelation",
    "codec_errors",
    "kurtosis",
    "look",
    "marchenko_pastur",
    "noise_like",
    "predictable_bits",
    "prepare",
    "scale_bits",
    "seconds",
    "shifts",
    "shuffled",
    "spectrum",
    "structure_of",
    "top_share",
    "unscaled",
    "views",
]
