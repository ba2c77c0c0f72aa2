"""VGG-11 for small images (Simonyan & Zisserman, arXiv 1409.1556), with one linear layer in place of three."""

from torch import Tensor, nn

from dsdistill.networks.base import Network, check_least, check_sizes
from dsdistill.networks.plain import Layer, plain_trunk


class VGG11(Network):
    """Eight convs 3x3 (64; 128; 256, 256; 512, 512; 512, 512 channels) with ReLU, the map halved after each group.

    Args:
        shape: ``(C, H, W)`` of one image, at least 32 pixels each way. One-channel images get padding 3 in the first
            conv, so 28 pixels become 32 and are enough.
        num_classes: number of logits.
        norm: after each conv: "none", "batch", "layer", "instance" or "group"; see `normalization`.

    Raises:
        InvalidSetting: the images are smaller, or the norm is unknown.
    """

    options = ("norm",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, norm: str = "instance") -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        gray = shape[0] == 1
        check_least("vgg11", shape, 28 if gray else 32)
        layers = [Layer(64, 3, 3 if gray else 1, True), Layer(128, 3, 1, True)]
        for channels in (256, 512, 512):
            layers += [Layer(channels, 3, 1, False), Layer(channels, 3, 1, True)]
        self.blocks, size = plain_trunk(shape, layers, norm)
        self.classifier = nn.Linear(size, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Flattened map of the last block, ``(N, C, H, W) -> (N, 512 * h * w)``, 512 of 32 px images."""
        maps: Tensor = self.blocks(images)
        return maps.flatten(1)
