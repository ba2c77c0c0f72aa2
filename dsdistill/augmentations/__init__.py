"""Random views of images, drawn first and applied after, so that they can be shared and replayed."""

from dsdistill.augmentations.base import Augmentation, Views
from dsdistill.augmentations.chain import Chain, ChainViews, always_flip_color_cutout, flip_first
from dsdistill.augmentations.crops import CropViews, PadCrop, ResizedCrop, least_share
from dsdistill.augmentations.mixes import CutMix, Mix, Mixup, MixViews
from dsdistill.augmentations.patches import PatchShuffle, PatchViews
from dsdistill.augmentations.siamese import Siamese, SiameseViews

__all__ = [
    "Augmentation",
    "Chain",
    "ChainViews",
    "CropViews",
    "CutMix",
    "Mix",
    "MixViews",
    "Mixup",
    "PadCrop",
    "PatchShuffle",
    "PatchViews",
    "ResizedCrop",
    "Siamese",
    "SiameseViews",
    "Views",
    "always_flip_color_cutout",
    "flip_first",
    "least_share",
]
