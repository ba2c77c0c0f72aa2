"""Class activation maps: where in an image a network sees its class.

Zhou et al., Learning Deep Features for Discriminative Localization (arXiv 1512.04150). With the last feature map F of a
network that averages it over all places, and the weights w_y of class y in its last layer, the map of an image is
Σ_c w_yc F_c. The gradient of the logit of y with respect to F is w_y / (places) there, so up to a factor this is::

    Σ_c F_c ∂z_y/∂F_c

which also says what each place adds to the logit where a network flattens its last map instead of averaging it. Here it
is cut off below 0, brought to [0, 1] by its least and largest value, and enlarged (bilinear) to the image.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dsdistill.errors import InvalidSetting
from dsdistill.networks import activation_taps, tapped


def last_maps(network: nn.Module, shape: tuple[int, int, int], name: str = "the network") -> str:
    """Name of the module that returns the last feature map: that of the last activation of a convolution.

    Args:
        network: any module that returns logits.
        shape: (C, H, W) of one image.
        name: what to call it in messages.

    Raises:
        InvalidSetting: there is none.
    """
    taps = activation_taps(network, shape)
    if not taps:
        raise InvalidSetting(
            "network",
            name,
            "one with feature maps: convolutions with activations that are modules (convnet, resnet18)",
        )
    return taps[-1]


def activation_maps(network: nn.Module, layer: str, images: Tensor, classes: Tensor) -> Tensor:
    """Maps (B, H, W) in [0, 1] of where images show their classes; 0 throughout where nothing stands out.

    Args:
        network: in evaluation mode.
        layer: the module whose result is the last feature map; see `last_maps`.
        images: (B, C, H, W), standardised.
        classes: (B,) int64, on their device.
    """
    with torch.enable_grad(), tapped(network, [layer]) as found:
        logits = network(images.detach().requires_grad_())
        maps = found[layer]
        wanted = logits.gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(wanted, maps)
    return in_unit(torch.relu((maps.detach() * gradient).sum(1)), (images.shape[2], images.shape[3]))


def in_unit(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) brought to [0, 1] each, a constant one to 0, and then to a size: (B, H, W)."""
    low, high = (values[:, None, None] for values in maps.flatten(1).aminmax(dim=1))
    spread = high - low
    unit = torch.where(spread > 0, (maps - low) / spread.where(spread > 0, torch.ones_like(spread)), 0)
    return interpolate(unit[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def share_inside(maps: Tensor, boxes: Tensor) -> Tensor:
    """How much of each map lies in each of its boxes, in [0, 1]; where a map is 0 throughout, of the area.

    Args:
        maps: (n, H, W), not negative.
        boxes: (n, k, 4) int64, top, left, height and width in pixels.

    Returns:
        (n, k), float64, on the CPU.
    """
    wide = maps.detach().to("cpu", torch.float64)
    empty = (wide == 0).flatten(1).all(1)
    wide = torch.where(empty[:, None, None], 1.0, wide)
    # sums[i, y, x] is what lies above row y and left of column x, so four corners make a box.
    sums = torch.nn.functional.pad(wide.cumsum(1).cumsum(2), (1, 0, 1, 0))
    top, left, height, width = boxes.cpu().unbind(2)
    which = torch.arange(len(wide))[:, None]
    below, right = top + height, left + width
    inside = sums[which, below, right] - sums[which, top, right] - sums[which, below, left] + sums[which, top, left]
    return inside / sums[:, -1, -1, None]
