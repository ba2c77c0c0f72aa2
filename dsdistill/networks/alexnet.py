"""AlexNet for small images (Krizhevsky, Sutskever & Hinton, NIPS 2012), made a benchmark of distillation by Zhao,
Mopuri & Bilen (arXiv 2006.05929)."""

from torch import Tensor, nn

from dsdistill.networks.base import Network, check_least, check_sizes
from dsdistill.networks.plain import Layer, plain_trunk


class AlexNet(Network):
    """Five convs (128, 192, 256, 192, 192 channels) with ReLU, the map halved after the first, second and last.

    Args:
        shape: ``(C, H, W)`` of one image, at least 8 pixels each way. One-channel images get padding 4 in the first
            conv, so 28 pixels become 32, and 4 pixels are enough.
        num_classes: number of logits.
        norm: after each conv: "none", "batch", "layer", "instance" or "group"; see `normalization`.

    Raises:
        InvalidSetting: the images are smaller, or the norm is unknown.
    """

    options = ("norm",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, norm: str = "none") -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        gray = shape[0] == 1
        check_least("alexnet", shape, 4 if gray else 8)
        layers = [
            Layer(128, 5, 4 if gray else 2, True),
            Layer(192, 5, 2, True),
            Layer(256, 3, 1, False),
            Layer(192, 3, 1, False),
            Layer(192, 3, 1, True),
        ]
        self.blocks, size = plain_trunk(shape, layers, norm)
        self.classifier = nn.Linear(size, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Flattened map of the last block, ``(N, C, H, W) -> (N, 192 * h * w)``, 192 * 16 of 32 px images."""
        maps: Tensor = self.blocks(images)
        return maps.flatten(1)
