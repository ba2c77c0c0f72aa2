"""The ConvNet of the dataset distillation literature.

Architecture of Gidaris & Komodakis (arXiv 1804.09458), made the field's standard by Zhao, Mopuri & Bilen (Dataset
Condensation, arXiv 2006.05929).
"""

from torch import Tensor, nn

from dsdistill.errors import InvalidSetting
from dsdistill.networks.base import Network, check_sizes, normalization

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "swish": nn.SiLU,
}
POOLINGS = ("none", "max", "avg")


def largest_depth(shape: tuple[int, int, int]) -> int:
    """How often an image ``(C, H, W)`` can be halved; the first conv enlarges those of 1 channel by 4 pixels."""
    channels, height, width = shape
    margin = 4 if channels == 1 else 0
    return (min(height, width) + margin).bit_length() - 1


def default_depth(shape: tuple[int, int, int]) -> int:
    """Blocks by image size, as published: 3 up to 32 pixels, 4 up to 64, 5 above; fewer if the map would vanish."""
    size = max(shape[1:])
    return max(1, min(3 if size <= 32 else 4 if size <= 64 else 5, largest_depth(shape)))


class ConvNet(Network):
    """``depth`` times [conv 3x3 -> norm -> act -> pool 2x2], then one linear layer on the flattened map.

    The parts of block k are the modules ``blocks.k.conv``, ``blocks.k.norm``, ``blocks.k.act`` and
    ``blocks.k.pool``, so a tap reaches the map after each activation, before pooling.

    Args:
        shape: ``(C, H, W)`` of one image. One-channel images get padding 3 in the first conv, so 28 pixels
            become 32.
        num_classes: number of logits.
        width: channels of every conv.
        depth: number of blocks.
        norm: "none", "batch", "layer", "instance" (group norm with one group per channel) or "group" (4 groups).
        activation: "sigmoid", "relu", "leaky_relu" (slope 0.01) or "swish".
        pooling: "none", "max" or "avg".

    Raises:
        InvalidSetting: a value is not one of these, or pooling would leave no pixel.
    """

    options = ("width", "depth", "norm", "activation", "pooling")

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        activation: str = "relu",
        pooling: str = "avg",
    ) -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        _check_settings(shape, width, depth, activation, pooling)
        channels, height, width_px = shape
        blocks = []
        for index in range(depth):
            padding = 3 if index == 0 and channels == 1 else 1
            height, width_px = height + 2 * padding - 2, width_px + 2 * padding - 2
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(channels, width, 3, padding=padding))
            block.add_module("norm", normalization(norm, width, height, width_px))
            block.add_module("act", ACTIVATIONS[activation]())
            block.add_module("pool", _pool(pooling))
            blocks.append(block)
            channels = width
            if pooling != "none":
                height, width_px = height // 2, width_px // 2
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels * height * width_px, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Flattened map of the last block, ``(N, C, H, W) -> (N, width * h * w)``."""
        maps: Tensor = self.blocks(images)
        return maps.flatten(1)


def _pool(pooling: str) -> nn.Module:
    if pooling == "max":
        return nn.MaxPool2d(2)
    return nn.AvgPool2d(2) if pooling == "avg" else nn.Identity()


def _check_settings(shape: tuple[int, int, int], width: int, depth: int, activation: str, pooling: str) -> None:
    if activation not in ACTIVATIONS:
        raise InvalidSetting("activation", activation, f"choose one of {', '.join(ACTIVATIONS)}")
    if pooling not in POOLINGS:
        raise InvalidSetting("pooling", pooling, f"choose one of {', '.join(POOLINGS)}")
    if width < 1 or depth < 1:
        name, value = ("width", width) if width < 1 else ("depth", depth)
        raise InvalidSetting(name, value, "must be at least 1")
    deepest = largest_depth(shape)
    if pooling != "none" and depth > deepest:
        mend = f"use depth {deepest} or less" if deepest else "use pooling='none' or the network mlp"
        raise InvalidSetting("depth", depth, f"images of shape {shape} can be halved {deepest} times at most; {mend}")
