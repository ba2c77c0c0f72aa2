"""Labelled real images, kept as bytes on a device or in a file, and the ways to draw from them."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsdistill.data import measure
from dsdistill.data.checks import check_size, checked_counts, require_same_classes, stratified
from dsdistill.data.draws import Plan, draw, make_plan
from dsdistill.data.normalize import Normalization
from dsdistill.data.store import PixelStore, ResidentPixels, not_resident
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

_CLOSED = "the test split is closed during synthesis; only dsdistill.evaluate opens it"
_MAX_PLANS = 256


class Batch(NamedTuple):
    """Standardised float32 images (M, C, H, W) and their int64 class indices (M,), on one device."""

    images: Tensor
    targets: Tensor


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    path: Path
    reason: str


class ImageSource:
    """Labelled images of one shape, kept as uint8 and sorted by class. Can be sent to another process.

    Args:
        name: what to call the data in messages and records.
        classes: class names in the order of their indices, all different.
        images: uint8 (N, C, H, W), or a `PixelStore`. A tensor already sorted by class is kept without a copy: do
            not change it afterwards.
        targets: integer class indices (N,).
        normalization: how pixels are standardised; measured on the images when None.
        mirror_safe: False when a left-right flip may change the class (digits).
        open_test: makes the test split; called once, on first use of `test`.
        skipped: files that could not be decoded and were left out.
        fingerprint: that of the images, where it was computed before.

    Attributes:
        store: the images, class after class; within a class in the order given.
        targets: int64 (N,), ascending, on the device of the source.
        counts: images of each class.
        offsets: K + 1 numbers; class c are the images ``offsets[c]`` to ``offsets[c + 1] - 1``.

    Raises:
        BadData: wrong dtype, a target that names no class, a class without images, repeated class names.
        ShapeMismatch: images are not four-dimensional, or not as many as targets.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        images: Tensor | PixelStore,
        targets: Tensor,
        *,
        normalization: Normalization | None = None,
        mirror_safe: bool = True,
        open_test: "Callable[[], ImageSource] | None" = None,
        skipped: Sequence[Skipped] = (),
        fingerprint: str | None = None,
    ) -> None:
        self.name, self.classes, self.mirror_safe = name, tuple(classes), mirror_safe
        self.counts = checked_counts(name, self.classes, images, targets)
        store = ResidentPixels(images) if isinstance(images, Tensor) else images
        targets = targets.to(store.device, torch.int64)
        if bool((targets[1:] < targets[:-1]).any()):
            targets, order = torch.sort(targets, stable=True)
            store = store.subset(order)
        self.store, self.targets, self.skipped = store, targets, tuple(skipped)
        starts = torch.tensor((0, *self.counts)).cumsum(0)
        self.offsets: tuple[int, ...] = tuple(starts.tolist())
        self.normalization = _measured(store) if normalization is None else normalization
        if self.normalization.channels != self.shape[0]:
            raise ShapeMismatch(f"{name}: images", store.shape, f"(N, {self.normalization.channels}, H, W)")
        self._open_test = open_test if open_test is None or isinstance(open_test, _Once) else _Once(open_test)
        self._test: ImageSource | None = None
        self._closed = False
        self._fingerprint = fingerprint
        self._plans: dict[tuple[tuple[int, ...], int], Plan] = {}

    def __len__(self) -> int:
        return len(self.store)

    def __getstate__(self) -> dict[str, Any]:
        # What is drawn from and what opens the test split travel; constants and an opened split are made again.
        return {**vars(self), "_plans": {}, "_test": None}

    def __repr__(self) -> str:
        test = "closed" if self._closed else "none" if not self.has_test else "opened" if self._test else "not opened"
        fingerprint = self._fingerprint if self._fingerprint else "not computed"
        return (
            f"ImageSource(name={self.name!r}, images={len(self)}, shape={self.shape}, classes={self.classes!r}, "
            f"counts={self.counts}, normalization={self.normalization!r}, mirror_safe={self.mirror_safe}, "
            f"device={str(self.device)!r}, test={test!r}, fingerprint={fingerprint!r}, skipped={len(self.skipped)})"
        )

    @property
    def device(self) -> torch.device:
        """Where the images are kept; of images in a file, where they are delivered."""
        return self.store.device

    @property
    def images(self) -> Tensor:
        """uint8 (N, C, H, W), class after class, for sources that keep them in memory.

        Raises:
            BadData: the images are in a file, so that they need not fit in memory.
        """
        if not isinstance(self.store, ResidentPixels):
            raise not_resident(self.name, self.store)
        return self.store.images

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.store.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.classes)

    @property
    def fingerprint(self) -> str:
        """sha256 of class names, shape, pixels and targets; the same on every device. Computed on first use."""
        if self._fingerprint is None:
            self._fingerprint = measure.fingerprint(self.classes, self.store.shape, self.store.chunks(), self.targets)
        return self._fingerprint

    # Draws -------------------------------------------------------------------------------------------------

    def per_class(self, classes: Sequence[int], size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` images of each class, uniformly and without replacement.

        Nothing waits for the device, unless the images are in a file or classes are huge (see
        `dsdistill.data.draws`).

        Args:
            classes: class indices, each at most once.
            size: images per class; a class with fewer gives all it has (see `sizes_per_class`).
            generator: lives on the source's device.

        Returns:
            Standardised images (M, C, H, W) and targets (M,), class after class in the order of ``classes``.
            The first j images of a class are a uniform draw of j.

        Raises:
            InvalidSetting: no class, an unknown or repeated class, size < 1, or a generator on another device.
        """
        indices = self.per_class_indices(classes, size, generator)
        return Batch(self.gather(indices), self.targets.index_select(0, indices))

    def per_class_indices(self, classes: Sequence[int], size: int, generator: torch.Generator) -> Tensor:
        """Storage indices (M,) of the draw that `per_class` makes with the same generator, to `gather` in parts."""
        self._check_generator(generator)
        return draw(self._plan(classes, size), generator)

    def sizes_per_class(self, classes: Sequence[int], size: int) -> list[int]:
        """How many images `per_class` gives for each class: ``size``, or all of a smaller class."""
        check_size(size)
        return [min(size, self.counts[index]) for index in self._checked_classes(classes)]

    def gather(self, indices: Tensor) -> Tensor:
        """Standardised float32 images (M, C, H, W) at int64 storage indices (M,) on the source's device."""
        return self.normalization.standardize(self.store.take(indices))

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass over all images in batches of ``size``, the last one smaller; shuffled when a generator is given.

        Raises:
            InvalidSetting: size < 1, or a generator on another device.
        """
        check_size(size)
        if generator is None:
            return self._in_order(size)
        self._check_generator(generator)
        return self._shuffled(size, torch.randperm(len(self), generator=generator, device=self.device))

    # Other sources -----------------------------------------------------------------------------------------

    @property
    def has_test(self) -> bool:
        """Whether `test` can be opened."""
        return self._open_test is not None

    @property
    def test(self) -> "ImageSource":
        """The test split on this source's device, with its normalization; opened on first use and then kept.

        Raises:
            BadData: there is none, it is closed (see `train_only`), or its classes or shape differ.
        """
        if self._closed:
            raise BadData(_CLOSED)
        if self._open_test is None:
            raise BadData(
                f"{self.name} has no test split; add a test/ folder beside train/, "
                "or give from_dataset a second data set: from_dataset(train, test)"
            )
        if self._test is None:
            self._test = self._adopt(self._open_test())
        return self._test

    def train_only(self) -> "ImageSource":
        """The same images without any way to reach the test split."""
        other = copy.copy(self)
        other._open_test, other._test, other._closed = None, None, True
        return other

    def to(self, device: torch.device | str) -> "ImageSource":
        """The same source on another device; itself when it is there already."""
        moved = self.store.to(device)
        if moved is self.store:
            return self
        other = self._derived(moved, self.targets)
        other._fingerprint = self._fingerprint
        return other

    def with_mirror_safe(self, mirror_safe: bool) -> "ImageSource":
        """The same source with another statement on whether a left-right flip keeps the class."""
        other = copy.copy(self)
        other.mirror_safe, other._test = mirror_safe, None
        return other

    def normalized_by(self, normalization: Normalization) -> "ImageSource":
        """The same source, test split included, standardised by other statistics.

        Raises:
            ShapeMismatch: another number of channels.
        """
        if normalization.channels != self.shape[0]:
            raise ShapeMismatch(f"{self.name}: images", self.shape, f"({normalization.channels}, H, W)")
        other = copy.copy(self)
        other.normalization, other._test = normalization, None
        return other

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageSource":
        """The images at the given storage indices; classes, normalization and test split stay.

        Raises:
            BadData: an index out of range, or a class left without images.
        """
        chosen = torch.as_tensor(indices, device=self.device)
        if chosen.ndim != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool or not len(chosen):
            raise BadData(f"a subset of {self.name} needs a non-empty list of integer indices (M,), got {indices!r}")
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= len(self):
            raise BadData(f"index {low if low < 0 else high} is not in {self.name}: use 0 to {len(self) - 1}")
        return self._derived(self.store.subset(chosen.to(torch.int64)), self.targets[chosen])

    def split(self, fraction: float, generator: torch.Generator) -> "tuple[ImageSource, ImageSource]":
        """Hold out a random ``fraction`` of every class: (fit, held out), see `stratified`.

        Raises:
            InvalidSetting: fraction not between 0 and 1.
            BadData: a class has a single image.
        """
        kept, held = stratified(self.name, self.classes, self.counts, fraction, generator)
        return self.subset(kept), self.subset(held)

    def _derived(self, store: PixelStore, targets: Tensor) -> "ImageSource":
        other = type(self)(
            self.name,
            self.classes,
            store,
            targets,
            normalization=self.normalization,
            mirror_safe=self.mirror_safe,
            open_test=self._open_test,
            skipped=self.skipped,
        )
        other._closed = self._closed
        return other

    def _adopt(self, test: "ImageSource") -> "ImageSource":
        require_same_classes(self.name, self.classes, test.classes)
        if test.shape != self.shape:
            raise ShapeMismatch(f"{self.name}: a test image", test.shape, f"{self.shape} as in the train split")
        adopted = copy.copy(test.to(self.device))
        adopted.normalization, adopted.mirror_safe = self.normalization, self.mirror_safe
        return adopted

    def _in_order(self, size: int) -> Iterator[Batch]:
        for images, targets in zip(self.store.chunks(size), torch.split(self.targets, size), strict=True):
            yield Batch(self.normalization.standardize(images), targets.clone())

    def _shuffled(self, size: int, order: Tensor) -> Iterator[Batch]:
        for indices in torch.split(order, size):
            yield Batch(self.gather(indices), self.targets.index_select(0, indices))

    def _plan(self, classes: Sequence[int], size: int) -> Plan:
        key = (tuple(classes), size)
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(self._checked_classes(classes), size)
        return self._plans[key]

    def _make_plan(self, classes: tuple[int, ...], size: int) -> Plan:
        check_size(size)
        counts = [self.counts[index] for index in classes]
        return make_plan(counts, [self.offsets[index] for index in classes], size, self.device)

    def _checked_classes(self, classes: Sequence[int]) -> tuple[int, ...]:
        chosen = tuple(classes)
        last = self.num_classes - 1
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= index <= last for index in chosen):
            raise InvalidSetting("classes", chosen, f"name at least one class of {self.name}, 0 to {last}, each once")
        return chosen

    def _check_generator(self, generator: torch.Generator) -> None:
        if generator.device.type != self.device.type:
            raise InvalidSetting("generator", str(generator.device), f"must live on the source's device, {self.device}")


class _Once:
    """Calls a function on first use and keeps what it gave; sources derived from one another share it."""

    def __init__(self, function: Callable[[], ImageSource]) -> None:
        self._function = function
        self._result: ImageSource | None = None

    def __call__(self) -> ImageSource:
        if self._result is None:
            self._result = self._function()
        return self._result

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.Pickler(_Nowhere()).dump(self._function)
        except Exception as error:  # picklers and the objects in their way raise nearly anything
            raise BadData(
                f"the source cannot be sent to another process: what opens its test split cannot be pickled ({error}); "
                "use a function and data sets defined in a module, or send source.train_only()"
            ) from error
        return {"_function": self._function, "_result": None}


class _Nowhere(io.RawIOBase):
    """Takes all bytes and keeps none."""

    def write(self, data: Any) -> int:
        return len(data)


def _measured(store: PixelStore) -> Normalization:
    if isinstance(store, ResidentPixels):
        return Normalization.measure(store.images)
    histograms = measure.Histograms(store.shape[1])
    for _ in histograms.watching(store.chunks()):
        pass
    return histograms.normalization()
