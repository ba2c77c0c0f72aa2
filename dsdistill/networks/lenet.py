"""LeNet-5 with ReLU and max pooling, as in the distillation benchmarks (LeCun, Bottou, Bengio & Haffner, 1998)."""

from torch import Tensor, nn

from dsdistill.networks.base import Network, check_least, check_sizes
from dsdistill.networks.plain import Layer, plain_trunk


class LeNet(Network):
    """Twice [conv 5x5 -> ReLU -> max-pool 2x2] with 6 and 16 channels, then 120 and 84 hidden units; no norm.

    Args:
        shape: ``(C, H, W)`` of one image, at least 16 pixels each way. One-channel images get padding 2 in the first
            conv, so 28 pixels become 32, and 12 pixels are enough.
        num_classes: number of logits.

    Raises:
        InvalidSetting: the images are smaller.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        gray = shape[0] == 1
        check_least("lenet", shape, 12 if gray else 16)
        layers = [Layer(6, 5, 2 if gray else 0, True), Layer(16, 5, 0, True)]
        self.blocks, size = plain_trunk(shape, layers, "none")
        self.hidden = nn.Sequential(nn.Linear(size, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.classifier = nn.Linear(84, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Output of the second hidden layer, ``(N, C, H, W) -> (N, 84)``."""
        features: Tensor = self.hidden(self.blocks(images).flatten(1))
        return features
