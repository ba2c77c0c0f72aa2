"""A small multilayer perceptron, the plainest network of the distillation benchmarks."""

from torch import Tensor, nn

from dsdistill.errors import InvalidSetting
from dsdistill.networks.base import Network, check_sizes


class MLP(Network):
    """in - ``width`` - ``width`` - ``num_classes`` with ReLU (as in Zhao, Mopuri & Bilen, arXiv 2006.05929).

    Args:
        shape: ``(C, H, W)`` of one image.
        num_classes: number of logits.
        width: units of both hidden layers.

    Raises:
        InvalidSetting: a size is below 1.
    """

    options = ("width",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, width: int = 128) -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        if width < 1:
            raise InvalidSetting("width", width, "must be at least 1")
        inputs = shape[0] * shape[1] * shape[2]
        self.hidden = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Output of the second hidden layer, ``(N, C, H, W) -> (N, width)``."""
        features: Tensor = self.hidden(images.flatten(1))
        return features
