"""Random views of images, drawn first and applied after, so that they can be shared and replayed."""

from dsdistill.augmentations.base import Augmentation, Views
from dsdistill.augmentations.siamese import Siamese, SiameseViews

__all__ = ["Augmentation", "Siamese", "SiameseViews", "Views"]
