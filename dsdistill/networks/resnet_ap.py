"""Residual networks that pool averages where others stride (Zhao, Mopuri & Bilen, arXiv 2006.05929; Kim et al., IDC,
arXiv 2205.14959, whose ResNetAP-10 for ImageNet this is)."""

from torch import Tensor, nn

from dsdistill.networks.base import FanOutConv2d, Network, check_least, check_sizes, normalization, small_stem


class PooledBlock(nn.Module):
    """Two 3x3 convs and a shortcut, ``(N, inputs, H, W) -> (N, outputs, h, w)``, halved by a mean over 2x2 or not.

    The inner map is halved after its activation, that of the shortcut before its norm.

    Args:
        conv: makes convolutions from (inputs, outputs, kernel, padding, bias).
        bias: whether the convolutions have biases.
        halve: whether the result is half as high and wide, rounded down.
        size: height and width of the input, which only the "layer" norm needs.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: str,
        size: tuple[int, int],
        *,
        halve: bool,
        conv: type[nn.Conv2d] = nn.Conv2d,
        bias: bool = False,
    ) -> None:
        super().__init__()
        halved = (size[0] // 2, size[1] // 2) if halve else size
        self.conv1 = conv(inputs, outputs, 3, padding=1, bias=bias)
        self.norm1 = normalization(norm, outputs, *size)
        self.act1 = nn.ReLU()
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = normalization(norm, outputs, *halved)
        self.shortcut = nn.Sequential()
        if halve or inputs != outputs:
            self.shortcut.add_module("conv", conv(inputs, outputs, 1, bias=bias))
            if halve:
                self.shortcut.add_module("pool", nn.AvgPool2d(2))
            self.shortcut.add_module("norm", normalization(norm, outputs, *halved))
        self.act2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Shapes as above."""
        inner = self.pool(self.act1(self.norm1(self.conv1(maps))))
        result: Tensor = self.act2(self.norm2(self.conv2(inner)) + self.shortcut(maps))
        return result


def pooled_stages(
    size: tuple[int, int], blocks: int, norm: str, *, conv: type[nn.Conv2d] = nn.Conv2d, bias: bool = False
) -> tuple[nn.Sequential, tuple[int, int]]:
    """Four stages of ``blocks`` blocks (64, 128, 256, 512 channels) on maps of ``size``, and the size of the result."""
    inputs, stages = 64, []
    for outputs in (64, 128, 256, 512):
        # A 1x1 map under instance norm is constant, so the smallest maps are not halved a last time.
        halve = outputs != inputs and (size[0] // 2) * (size[1] // 2) > 1
        first = PooledBlock(inputs, outputs, norm, size, halve=halve, conv=conv, bias=bias)
        size = (size[0] // 2, size[1] // 2) if halve else size
        others = [
            PooledBlock(outputs, outputs, norm, size, halve=False, conv=conv, bias=bias) for _ in range(blocks - 1)
        ]
        stages.append(nn.Sequential(first, *others))
        inputs = outputs
    return nn.Sequential(*stages), size


class ResNet18AP(Network):
    """ResNet-18 for small images with averages in place of strides, and one linear layer on the flattened map.

    Args:
        shape: ``(C, H, W)`` of one image, at least 8 pixels each way.
        num_classes: number of logits.
        norm: "none", "batch", "layer", "instance" or "group"; see `normalization`.

    Raises:
        InvalidSetting: the images are smaller than 8 pixels, or the norm is unknown.
    """

    options = ("norm",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, norm: str = "instance") -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        check_least("resnet18_ap", shape, 8)
        channels, height, width = shape
        self.stem = small_stem(channels, 64, norm, (height, width))
        self.stages, size = pooled_stages((height, width), 2, norm)
        self.classifier = nn.Linear(512 * size[0] * size[1], num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Flattened map of the last stage, ``(N, C, H, W) -> (N, 512 * h * w)``, 512 * 16 of 32 px images."""
        maps: Tensor = self.stages(self.stem(images))
        return maps.flatten(1)


class ResNetAP10(Network):
    """Stem, four stages of one block (64, 128, 256, 512), global mean, one linear layer.

    The stem is a conv 3x3 for images up to 64 pixels, a conv 3x3 and a mean over 2x2 up to 128, and a conv 7x7 and a
    mean over 4x4 above; the larger side decides. Convolutions are `FanOutConv2d` and have biases only without norms.
    (For CIFAR the authors' class is half as wide.)

    Args:
        shape: ``(C, H, W)`` of one image, at least 8 pixels each way; 16 where the stem halves, 32 where it quarters.
        num_classes: number of logits.
        norm: "none", "batch", "layer", "instance" or "group"; see `normalization`.

    Raises:
        InvalidSetting: the images are smaller, or the norm is unknown.
    """

    options = ("norm",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, norm: str = "instance") -> None:
        super().__init__()
        check_sizes(shape, num_classes)
        channels, height, width = shape
        largest = max(height, width)
        kernel, pool = (3, 1) if largest <= 64 else (3, 2) if largest <= 128 else (7, 4)
        check_least(f"resnet_ap10 for sides up to {largest}", shape, 8 * pool)
        bias = norm == "none"
        self.stem = nn.Sequential()
        self.stem.add_module("conv", FanOutConv2d(channels, 64, kernel, padding=kernel // 2, bias=bias))
        self.stem.add_module("norm", normalization(norm, 64, height, width))
        self.stem.add_module("act", nn.ReLU())
        self.stem.add_module("pool", nn.AvgPool2d(pool) if pool > 1 else nn.Identity())
        self.stages, _ = pooled_stages((height // pool, width // pool), 1, norm, conv=FanOutConv2d, bias=bias)
        self.classifier = nn.Linear(512, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Spatial mean of the last stage, ``(N, C, H, W) -> (N, 512)``."""
        maps: Tensor = self.stages(self.stem(images))
        return maps.mean((2, 3))
