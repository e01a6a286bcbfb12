"""Small neural decoders from latents to weights: a frozen config and pure functions of one flat parameter vector.

Decoders do not depend on formats: `formats/parameters.py` stores their parameters, `fit/` trains them.
"""

from reallm.decoders.codebook_net import CodebookNet
from reallm.decoders.conv import ConvNet

__all__ = ["CodebookNet", "ConvNet"]
