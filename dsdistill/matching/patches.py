"""Real patches that a teacher recognises, and mosaics of them: RDED's, and the start of SRe2L++ and CV-DD.

RDED (Sun et al., On the Diversity and Realism of Distilled Dataset, arXiv 2312.03526) draws a pool of real images of a
class, cuts random square crops out of each, and keeps of each image the crop that the teacher takes most surely for
its class: a crop of S/f pixels in the middle of S x S pixels of mean colour, by its cross-entropy. The best ones of the
pool, f² to an image, are put together.

CV-DD and SRe2L++ start from such mosaics of "medium" difficulty, whose generator was not published. Here: the crops of
a pool, sorted by their loss, are cut in three equal parts, and mosaics take random ones of the middle part.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from dsdistill.augmentations import ResizedCrop
from dsdistill.engine import Run, Shared
from dsdistill.experts import Teacher

POOL, CROPS = 300, 5


class Patches(NamedTuple):
    """The best crop of each image of a pool of one class, the one with the lowest loss first.

    ``rows`` (n,), storage indices of the images, on the run's device; ``boxes`` (n, 4), top, left, height and width,
    and ``losses`` (n,), on the CPU.
    """

    rows: Tensor
    boxes: Tensor
    losses: Tensor

    def take(self, places: Tensor) -> "Patches":
        """Those at places (m,)."""
        return Patches(self.rows[places.to(self.rows.device)], self.boxes[places], self.losses[places])


def factor_of(shape: tuple[int, int, int]) -> int:
    """Patches along each side of a mosaic that RDED takes: 2 from 128 pixels on, else 1."""
    return 2 if min(shape[1:]) >= 128 else 1


@torch.no_grad()
def recognised_patches(
    run: Run, teacher: Teacher, label: int, factor: int, pool: int = POOL, crops: int = CROPS
) -> Patches:
    """The best of ``crops`` random crops of each of ``pool`` random images of a class (all of a smaller class)."""
    rng = run.rng.scoped("").within("patches", label)
    rows = run.source.per_class_indices([label], pool, rng.at("pool"))
    shape = run.source.shape
    views = ResizedCrop(scale=(0.08, 1.0), ratio=(1.0, 1.0), flip=0.0)
    boxes = views.sample(len(rows) * crops, shape, rng.at("crops", device="cpu"), per="image").boxes
    size = (shape[1] // factor, shape[2] // factor)
    losses = patch_losses(run, teacher, label, rows.repeat_interleave(crops), boxes, size).view(-1, crops)
    best = losses.argmin(1)
    kept = boxes.view(-1, crops, 4)[torch.arange(len(rows)), best]
    least, order = torch.sort(losses[torch.arange(len(rows)), best], stable=True)
    return Patches(rows[order.to(rows.device)], kept[order], least)


@torch.no_grad()
def patch_losses(run: Run, teacher: Teacher, label: int, rows: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cross-entropy (n,), on the CPU, of crops of real images that are brought to a size and framed in mean colour.

    Args:
        rows: (n,) storage indices of the images, on the run's device.
        boxes: (n, 4) int64, top, left, height and width, on the CPU.
    """
    parts = zip(torch.split(rows, run.chunk), torch.split(boxes, run.chunk), strict=True)
    return torch.cat([_losses(run, teacher, label, cut(run, *part, size)) for part in parts])


def _losses(run: Run, teacher: Teacher, label: int, patches: Tensor) -> Tensor:
    """Cross-entropy (n,), on the CPU, of patches in the middle of mean colour."""
    _, height, width = run.source.shape
    below, right = height - patches.shape[2], width - patches.shape[3]
    framed = pad(patches, (right // 2, right - right // 2, below // 2, below - below // 2))
    wanted = torch.full((len(patches),), label, device=patches.device)
    return cross_entropy(teacher.network(framed), wanted, reduction="none").cpu()


def cut(run: Run, rows: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops of real images at storage indices (n,), brought to (height, width): (n, C, height, width), standardised."""
    _, height, width = run.source.shape
    down = resizing(boxes[:, 0], boxes[:, 2], height, size[0]).to(run.device)
    across = resizing(boxes[:, 1], boxes[:, 3], width, size[1]).to(run.device)
    images = run.source.gather(rows)
    return torch.einsum("nyh,nchw,nxw->ncyx", down, images, across)


def resizing(starts: Tensor, lengths: Tensor, full: int, size: int) -> Tensor:
    """Matrices (n, size, full) that bring pixels start .. start + length - 1 of ``full`` to ``size``, antialiased.

    Triangular filters as those of torchvision's `resize`: as wide as the step between results where that is larger than
    a pixel, cut off at the ends of the crop, 1 in sum.
    """
    begin, length = starts.double()[:, None, None], lengths.double()[:, None, None]
    step = length / size
    centre = (torch.arange(size).double()[None, :, None] + 0.5) * step
    place = torch.arange(full).double()[None, None, :] - begin
    weight = (1 - (place + 0.5 - centre).abs() / step.clamp_min(1.0)).clamp_min(0.0)
    weight = weight * ((place >= 0) & (place < length))
    return (weight / weight.sum(2, keepdim=True)).float()


def mosaics(patches: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """Images (n, C, H, W) of f x f patches each.

    Args:
        patches: f² tensors (n, C, h, w), row by row of the mosaic.
        shape: (C, H, W). Where f does not divide a side, the first cells get a pixel more; cells take nearest pixels.
    """
    factor = round(len(patches) ** 0.5)
    heights, widths = ([side // factor + (place < side % factor) for place in range(factor)] for side in shape[1:])
    cells = [_nearest(part, heights[place // factor], widths[place % factor]) for place, part in enumerate(patches)]
    return torch.cat([torch.cat(cells[begin : begin + factor], 3) for begin in range(0, factor**2, factor)], 2)


def _nearest(patches: Tensor, height: int, width: int) -> Tensor:
    down = torch.arange(height, device=patches.device) * patches.shape[2] // height
    across = torch.arange(width, device=patches.device) * patches.shape[3] // width
    return patches[:, :, down][:, :, :, across]


def middling_mosaics(run: Run, teacher: Teacher, classes: Sequence[int], index: int) -> Tensor:
    """One mosaic (B, C, H, W) for each class, of patches of middling difficulty; other indices take other patches.

    Patches are drawn without replacement from the middle third of the pool, and again where that is used up.
    """
    factor = factor_of(run.source.shape)
    size = (run.source.shape[1] // factor, run.source.shape[2] // factor)
    known = _known.setdefault(run.shared, {})
    cells: list[list[Tensor]] = [[] for _ in range(factor**2)]
    for label in classes:
        if label not in known:
            known[label] = recognised_patches(run, teacher, label, factor)
        chosen = _from_the_middle(run, known[label], label, index * factor**2, factor**2)
        for cell, patch in zip(cells, cut(run, chosen.rows, chosen.boxes, size), strict=True):
            cell.append(patch)
    return mosaics([torch.stack(cell) for cell in cells], run.source.shape)


def _from_the_middle(run: Run, ranked: Patches, label: int, begin: int, count: int) -> Patches:
    """Patches ``begin`` to ``begin + count - 1`` of an endless row: the middle third shuffled, shuffled again, ..."""
    size = len(ranked.rows)
    middle = torch.arange(size // 3, max(size // 3 + 1, 2 * size // 3))
    rng = run.rng.scoped("").within("mosaics", label)
    turns = range(begin // len(middle), (begin + count - 1) // len(middle) + 1)
    row = [middle[torch.randperm(len(middle), generator=rng.at("order", turn, device="cpu"))] for turn in turns]
    skipped = begin - turns[0] * len(middle)
    return ranked.take(torch.cat(row)[skipped : skipped + count])


_known: "WeakKeyDictionary[Shared, dict[int, Patches]]" = WeakKeyDictionary()
