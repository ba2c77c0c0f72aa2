"""Image sets that diffusion models draw: autoencoders, denoisers, text, fusion, sampling.

diffusers and transformers are imported by this package alone, and only where something of theirs is used.
"""

from dsdistill.generative.fusion import Fusion
from dsdistill.generative.models import Models
from dsdistill.generative.pretrained import Weights
from dsdistill.generative.redraw import Redraw
from dsdistill.generative.sampling import DIT, Sampler

__all__ = ["DIT", "Fusion", "Models", "Redraw", "Sampler", "Weights"]
