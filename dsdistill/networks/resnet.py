"""ResNet-18 for small images (He, Zhang, Ren & Sun, arXiv 1512.03385, section 4.2 stem)."""

from torch import Tensor, nn

from dsdistill.networks.base import Network, check_least, check_sizes, normalization, small_stem


class Block(nn.Module):
    """Two 3x3 convs and a shortcut, ``(N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride))``.

    ``size`` is the height and width of the output, which only the "layer" norm needs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = normalization(norm, outputs, *size)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = normalization(norm, outputs, *size)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.shortcut.add_module("norm", normalization(norm, outputs, *size))
        self.act2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Shapes as above."""
        inner = self.act1(self.norm1(self.conv1(maps)))
        result: Tensor = self.act2(self.norm2(self.conv2(inner)) + self.shortcut(maps))
        return result


class ResNet18(Network):
    """Stem conv 3x3 with stride 1, four stages of two basic blocks (64, 128, 256, 512), global mean, one linear layer.

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
        check_least("resnet18", shape, 8)
        channels, height, width = shape
        self.stem = small_stem(channels, 64, norm, (height, width))
        channels, stages = 64, []
        for outputs in (64, 128, 256, 512):
            # A 1x1 map under instance norm is constant, so the smallest images are not halved a last time.
            stride = 1 if outputs == 64 or max(height, width) <= 2 else 2
            height, width = -(-height // stride), -(-width // stride)
            first = Block(channels, outputs, stride, norm, (height, width))
            stages.append(nn.Sequential(first, Block(outputs, outputs, 1, norm, (height, width))))
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(512, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Spatial mean of the last stage (the 4x4 pooling of 32 px images), ``(N, C, H, W) -> (N, 512)``."""
        maps: Tensor = self.stages(self.stem(images))
        # A mean over two axes, not adaptive pooling: its gradient is deterministic on every device.
        return maps.mean((2, 3))
