"""Random views of images, drawn first and applied after, so that they can be shared and replayed."""

from dsdistill.augmentations.base import Augmentation, Views
from dsdistill.augmentations.chain import Chain, ChainViews, always_flip_color_cutout, flip_first
from dsdistill.augmentations.mixes import CutMix, Mix, Mixup, MixViews
from dsdistill.augmentations.siamese import Siamese, SiameseViews

__all__ = [
    "Augmentation",
    "Chain",
    "ChainViews",
    "CutMix",
    "Mix",
    "MixViews",
    "Mixup",
    "Siamese",
    "SiameseViews",
    "Views",
    "always_flip_color_cutout",
    "flip_first",
]
