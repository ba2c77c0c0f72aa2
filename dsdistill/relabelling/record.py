"""What one pass over a set shows, drawn ahead and kept as integers, so that it can be shown again to the last bit.

An epoch is an order of all images, a view of each, and for every mini-batch the partners and the share and box of its
mix. It is a function of (seed, epoch), whatever was drawn before it. Whether a view is computed for one image or for a
batch makes no difference to its bits, so neither does who computes it: a teacher, a training loop, or the workers of a
`torch.utils.data.DataLoader`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsdistill.augmentations import CropViews, MixViews, PadCrop, ResizedCrop
from dsdistill.core.rng import Rng
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.training import TrainingRecipe

_NO_BOX = (-1, -1, -1, -1)
_NUMBERS = 7  # of a view


class Show(NamedTuple):
    """One mini-batch: rows of the set (B,) int64, their views, their mix; None for what there is not."""

    rows: Tensor
    views: CropViews | None
    mix: MixViews | None


@dataclass(frozen=True, eq=False)
class EpochRecord:
    """One pass over N images of shape (C, H, W) in mini-batches.

    Attributes:
        order: (N,) int64, the image at each position.
        views: of the images in that order; None where they are shown as they are.
        partner: (N,) int64, position within its own mini-batch of what is mixed into an image; None without a mix.
        shares: (batches,) float64, what an image keeps of itself; None without a mix.
        boxes: (batches, 4) int64, top, left, bottom, right of the partner's pixels; -1 where there is none.
    """

    recipe: TrainingRecipe
    shape: tuple[int, int, int]
    order: Tensor
    views: CropViews | None = None
    partner: Tensor | None = None
    shares: Tensor | None = None
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return (len(self.order) - 1) // self.recipe.batch_size + 1

    @classmethod
    def draw(
        cls, recipe: TrainingRecipe, count: int, shape: tuple[int, int, int], rng: Rng, epoch: int
    ) -> "EpochRecord":
        """The record of ``epoch`` over ``count`` images, from the streams "order", "views" and "mix"."""
        order = torch.randperm(count, generator=rng.at("order", epoch, device="cpu"))
        views = None
        if isinstance(recipe.augmentation, (ResizedCrop, PadCrop)):
            views = recipe.augmentation.sample(count, shape, rng.at("views", epoch, device="cpu"), per="image")
        if recipe.mix is None:
            return cls(recipe, shape, order, views)
        generator = rng.at("mix", epoch, device="cpu")
        drawn = [recipe.mix.sample(len(part), shape, generator) for part in torch.split(order, recipe.batch_size)]
        return cls(
            recipe,
            shape,
            order,
            views,
            torch.cat([mix.partner for mix in drawn]),
            torch.tensor([mix.share for mix in drawn], dtype=torch.float64),
            torch.tensor([mix.box or _NO_BOX for mix in drawn]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored; see `layout`."""
        made = {"order": self.order.to(torch.int32)}
        if self.views is not None:
            made["views"] = self.views.numbers()
        if self.partner is not None and self.shares is not None and self.boxes is not None:
            made["partner"] = self.partner.to(_position_type(self.recipe.batch_size))
            made["share"], made["box"] = self.shares, self.boxes.to(torch.int16)
        return made

    @classmethod
    def of_tensors(
        cls, stored: Mapping[str, Tensor], recipe: TrainingRecipe, count: int, shape: tuple[int, int, int]
    ) -> "EpochRecord":
        """Inverse of `tensors`.

        Raises:
            BadData: the tensors are no such record of ``count`` images.
        """
        expected = layout(recipe, count, shape)
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
        if found != expected:
            raise BadData(f"the record of an epoch holds {found}, expected {expected}")
        order = stored["order"].long()
        if not torch.equal(order.sort().values, torch.arange(count)):
            raise BadData("the order of an epoch does not name every image once")
        views = None
        if recipe.augmentation is not None:
            views = CropViews.of_numbers(stored["views"], shape)
        if recipe.mix is None:
            return cls(recipe, shape, order, views)
        partner = stored["partner"].long()
        for part in torch.split(partner, recipe.batch_size):
            if not torch.equal(part.sort().values, torch.arange(len(part))):
                raise BadData("the partners of a mini-batch are no permutation of it")
        return cls(recipe, shape, order, views, partner, stored["share"], stored["box"].long())

    def batch(self, number: int) -> Show:
        """What mini-batch ``number`` shows."""
        begin = number * self.recipe.batch_size
        span = slice(begin, begin + self.recipe.batch_size)
        rows = self.order[span]
        views = None if self.views is None else self.views.rows(torch.arange(begin, begin + len(rows)))
        return Show(rows, views, None if self.partner is None else self._mix(number, self.partner[span]))

    def _mix(self, number: int, partner: Tensor) -> MixViews:
        """The mix of mini-batch ``number``, for images whose partners are these."""
        assert self.shares is not None
        assert self.boxes is not None
        top, left, bottom, right = self.boxes[number].tolist()
        box = None if top < 0 else (top, left, bottom, right)
        return MixViews(self.shape, len(partner), partner, float(self.shares[number]), box)

    def batches(self) -> Iterator[Show]:
        """All mini-batches in turn."""
        return map(self.batch, range(len(self)))

    def shown(self, images: Tensor, number: int) -> Tensor:
        """Mini-batch ``number``, viewed and mixed.

        Args:
            images: (N, C, H, W), all of the set, in its order.

        Returns:
            (B, C, H, W), on their device.
        """
        return self.shown_together(images, range(number, number + 1))

    def shown_together(self, images: Tensor, numbers: range) -> Tensor:
        """Consecutive mini-batches one after the other, as `shown` shows each; views are taken at once."""
        size = self.recipe.batch_size
        rows = self.order[numbers.start * size : numbers.stop * size]
        at = torch.arange(numbers.start * size, numbers.start * size + len(rows))
        views = None if self.views is None else self.views.rows(at)
        seen = viewed(images[rows.to(images.device, non_blocking=True)], views, self.recipe)
        parts = zip(torch.split(seen, size), numbers, strict=True)
        return torch.cat([mixed(part, self.batch(number).mix, self.recipe) for part, number in parts])

    def shown_one(self, images: Tensor, position: int) -> Tensor:
        """The image at ``position`` of the order, (C, H, W): equal to the last bit to its row of `shown`."""
        number, within = divmod(position, self.recipe.batch_size)
        positions = [position]
        if self.partner is not None:
            positions.append(position - within + int(self.partner[position]))
        at = torch.tensor(positions)
        views = None if self.views is None else self.views.rows(at)
        seen = viewed(images[self.order[at]], views, self.recipe)
        pair = None if self.partner is None else self._mix(number, torch.tensor([1, 0]))
        return mixed(seen, pair, self.recipe)[0]

    def labels(self, number: int, targets: Tensor, num_classes: int) -> Tensor:
        """Labels of the images of mini-batch ``number``, mixed as their pixels are.

        Args:
            targets: (N,) classes, or (N, K) probabilities or logits, of all images.
            num_classes: K.

        Returns:
            (B, K), weighted by the share of pixels; (B,) where classes are given and nothing is mixed.
        """
        show = self.batch(number)
        return blended(targets[show.rows.to(targets.device, non_blocking=True)], show.mix, self.recipe, num_classes)

    def pairs(self, number: int, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (B,) of the images of mini-batch ``number``, and of their partners, of (N,) classes of all images."""
        show = self.batch(number)
        own = classes[show.rows.to(classes.device)]
        return own, own if show.mix is None else own[show.mix.partner.to(classes.device)]


def viewed(images: Tensor, views: CropViews | None, recipe: TrainingRecipe) -> Tensor:
    """Images (B, C, H, W) under their views."""
    return images if views is None or recipe.augmentation is None else recipe.augmentation.apply(images, views)


def mixed(images: Tensor, mix: MixViews | None, recipe: TrainingRecipe) -> Tensor:
    """Images (B, C, H, W) of a mini-batch, mixed."""
    return images if mix is None or recipe.mix is None else recipe.mix.apply(images, mix)


def blended(own: Tensor, mix: MixViews | None, recipe: TrainingRecipe, num_classes: int) -> Tensor:
    """Labels of a mini-batch, (B,) classes or (B, K), mixed as `mixed` does its pixels; see `EpochRecord.labels`."""
    if mix is None or recipe.mix is None or mix.share == 1:
        return own
    return recipe.mix.targets(own, mix, num_classes)


def layout(
    recipe: TrainingRecipe, count: int, shape: tuple[int, int, int]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of `EpochRecord.tensors` for ``count`` images: 4 to 22 bytes an image, 16 a mini-batch."""
    batches = -(-count // recipe.batch_size)
    made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"order": (torch.int32, (count,))}
    if recipe.augmentation is not None:
        made["views"] = (torch.int16, (count, _NUMBERS))
    if recipe.mix is not None:
        made["partner"] = (_position_type(recipe.batch_size), (count,))
        made["share"], made["box"] = (torch.float64, (batches,)), (torch.int16, (batches, 4))
    return made


def require_recordable(recipe: TrainingRecipe) -> None:
    """Refuse views that cannot be kept as a few whole numbers for each image.

    Raises:
        InvalidSetting: naming the augmentation.
    """
    if recipe.augmentation is not None and not isinstance(recipe.augmentation, (ResizedCrop, PadCrop)):
        raise InvalidSetting(
            "augmentation",
            recipe.augmentation,
            "labels are kept for ResizedCrop and PadCrop; views of another kind are labelled while a network trains "
            "(evaluate with teachers)",
        )


def _position_type(batch_size: int) -> torch.dtype:
    return torch.int16 if batch_size <= 2**15 else torch.int32
