"""The plain programs that dsdistill is timed against, and a slow exact one it must agree with.

Written the way research scripts of the field are (a module built anew in each iteration, a Python loop over classes,
parameters of views gathered in Python lists, a data loader over tensors), in our own words. No script was copied.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")


class PlainConvNet(nn.Module):
    """ConvNet of depth 3 and width 128 for 32 x 32 colour images; parameters in the order of dsdistill's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for _ in range(3):
            layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128, affine=True)]
            layers += [nn.ReLU(inplace=True), nn.AvgPool2d(kernel_size=2, stride=2)]
            channels = 128
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(128 * 4 * 4, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, 2048)."""
        features: Tensor = self.features(images)
        return features.reshape(len(images), -1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(self.embed(images))
        return logits

    @torch.no_grad()
    def copy_from(self, network: nn.Module) -> "PlainConvNet":
        """Take over the parameters of dsdistill's network."""
        for mine, theirs in zip(self.parameters(), network.parameters(), strict=True):
            mine.copy_(theirs)
        return self


# -- random views, a batch at a time -----------------------------------------------------------------------------


def random_view(images: Tensor, op: str, *, shared: bool) -> Tensor:
    """Show a batch under ``op`` with parameters from the global generator, one draw per image or one for all."""
    return _VIEWS[op](images, shared)


def _color(images: Tensor, shared: bool) -> Tensor:
    images = images + (_draw(images, shared) - 0.5)
    mean = images.mean(dim=1, keepdim=True)
    images = (images - mean) * (_draw(images, shared) * 2) + mean
    mean = images.mean(dim=[1, 2, 3], keepdim=True)
    return (images - mean) * (_draw(images, shared) + 0.5) + mean


def _crop(images: Tensor, shared: bool) -> Tensor:
    count, _, height, width = images.shape
    shift = int(height * 0.125 + 0.5)
    down = _draw_integers(images, -shift, shift, shared)
    right = _draw_integers(images, -shift, shift, shared)
    batch, rows, columns = _positions(count, height, width, images.device)
    rows = torch.clamp(rows + down + 1, 0, height + 1)
    columns = torch.clamp(columns + right + 1, 0, width + 1)
    padded = F.pad(images, [1, 1, 1, 1, 0, 0, 0, 0])
    return padded.permute(0, 2, 3, 1).contiguous()[batch, rows, columns].permute(0, 3, 1, 2)


def _cutout(images: Tensor, shared: bool) -> Tensor:
    count, _, height, width = images.shape
    side = int(height * 0.5 + 0.5)
    row = _draw_integers(images, 0, height - side % 2, shared)
    column = _draw_integers(images, 0, width - side % 2, shared)
    batch, rows, columns = _positions(count, side, side, images.device)
    rows = torch.clamp(rows + row - side // 2, 0, height - 1)
    columns = torch.clamp(columns + column - side // 2, 0, width - 1)
    mask = torch.ones(count, height, width, dtype=images.dtype, device=images.device)
    mask[batch, rows, columns] = 0
    return images * mask.unsqueeze(1)


def _flip(images: Tensor, shared: bool) -> Tensor:
    return torch.where(_draw(images, shared) < 0.5, images.flip(3), images)


def _scale(images: Tensor, shared: bool) -> Tensor:
    ratio = 1.2
    across = torch.rand(len(images)) * (ratio - 1 / ratio) + 1 / ratio
    down = torch.rand(len(images)) * (ratio - 1 / ratio) + 1 / ratio
    return _warp(images, [[[across[i], 0, 0], [0, down[i], 0]] for i in range(len(images))], shared)


def _rotate(images: Tensor, shared: bool) -> Tensor:
    angles = (torch.rand(len(images)) - 0.5) * 2 * 15 / 180 * math.pi
    matrices = [
        [[torch.cos(angles[i]), -torch.sin(angles[i]), 0], [torch.sin(angles[i]), torch.cos(angles[i]), 0]]
        for i in range(len(images))
    ]
    return _warp(images, matrices, shared)


def _warp(images: Tensor, matrices: list[list[list[float | Tensor]]], shared: bool) -> Tensor:
    theta = torch.tensor(matrices, dtype=torch.float)
    if shared:
        theta = theta[:1].repeat(len(theta), 1, 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, align_corners=False)


def _draw(images: Tensor, shared: bool) -> Tensor:
    values = torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)
    return values[:1].repeat(len(images), 1, 1, 1) if shared else values


def _draw_integers(images: Tensor, low: int, high: int, shared: bool) -> Tensor:
    values = torch.randint(low, high + 1, (len(images), 1, 1), device=images.device)
    return values[:1].repeat(len(images), 1, 1) if shared else values


def _positions(count: int, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    ranges = (torch.arange(size, device=device) for size in (count, height, width))
    return torch.meshgrid(*ranges, indexing="ij")


_VIEWS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


# -- one view of one image, for the equality check ---------------------------------------------------------------


def given_view(image: Tensor, op: str, values: Tensor) -> Tensor:
    """Show one square image (C, H, W) under ``op`` with the parameters of a dsdistill record."""
    u, v, w = values.to(image.dtype)
    if op == "color":
        image = image + u
        image = (image - image.mean(0)) * v + image.mean(0)
        return (image - image.mean()) * w + image.mean()
    if op == "flip":
        return image.flip(2) if u else image
    size = image.shape[1]
    down, right = int(u), int(v)
    if op == "crop":
        padded = F.pad(image, [size] * 4)
        return padded[:, size + down : 2 * size + down, size + right : 2 * size + right]
    if op == "cutout":
        side = int(0.5 * size + 0.5)
        top, left = down - side // 2, right - side // 2
        mask = torch.ones_like(image)
        mask[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        return image * mask
    zero = torch.zeros_like(u)
    rows = (
        [[u, zero, zero], [zero, v, zero]] if op == "scale" else [[u.cos(), -u.sin(), zero], [u.sin(), u.cos(), zero]]
    )
    grid = F.affine_grid(torch.stack([torch.stack(row) for row in rows])[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]
