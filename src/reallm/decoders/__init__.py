"""Small nets from latents to weights: a frozen config, and a pure call on one flat vector of parameters.

They know nothing of formats: how their parameters are stored is `formats/parameters.py`, how they are trained `fit/`.
"""

from reallm.decoders.codebook_net import CodebookNet
from reallm.decoders.conv import ConvNet

__all__ = ["CodebookNet", "ConvNet"]
