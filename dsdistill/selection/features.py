"""The network whose features images are chosen by, and what it or any function makes of images, class by class."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from dsdistill.augmentations import Siamese
from dsdistill.core.config import settings_digest, validate
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run
from dsdistill.experts import train_on_real
from dsdistill.networks import Need, NetworkSpec, embed
from dsdistill.networks.passing import pass_rows, takes_batch_statistics
from dsdistill.training import TrainingRecipe

logger = logging.getLogger("dsdistill")
_NEEDS: tuple[Need, ...] = ("features",)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """The network whose features images are chosen by.

    Raises:
        InvalidSetting: a field has the wrong type.
    """

    network: NetworkSpec = NetworkSpec()
    """Network that is trained and then asked for features, its input to the classifier."""
    training: TrainingRecipe | None = TrainingRecipe(augmentation=Siamese())
    """How it is trained on the real images; None leaves it random."""

    def __post_init__(self) -> None:
        validate(self)

    def check(self, source: ImageSource) -> None:
        """Refuse images that the network does not fit.

        Raises:
            InvalidSetting: naming the network and what it needs.
        """
        self.network.require(_NEEDS, source.shape, source.num_classes)

    def build(self, run: Run) -> nn.Module:
        """The network; trained once in a run, and found again by a run that was interrupted afterwards.

        It is the same in every job of the run.

        Raises:
            Stopped: the run was asked to stop.
        """
        rng = run.rng.scoped("").within(self._name)
        source = run.source
        network = self.network.build(
            source.shape, source.num_classes, generator=rng.at("network"), device=run.device
        ).requires_grad_(False)
        recipe = self.training
        if recipe is not None:
            network.load_state_dict(run.shared.get(self._name, lambda: _trained(run, network, recipe, rng)))
        return network

    @property
    def _name(self) -> str:
        """Of its streams and of what is kept: two extractors in one run must not be mixed up."""
        return f"extractor-{settings_digest(self)}"


def _trained(run: Run, network: nn.Module, recipe: TrainingRecipe, rng: Rng) -> Mapping[str, Tensor]:
    logger.info("training a network on the real images (%d epochs) to choose images by its features", recipe.epochs)
    train_on_real(run, network, recipe, rng)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def class_features(run: Run, extractor: Extractor) -> Iterator[Tensor]:
    """Features (n_c, D) of all images of each class of the run, one class at a time, in storage order.

    Images are as they are stored, without augmentation, and the network is in evaluation mode. Memory is that of the
    largest class, or of all where the network has batch normalisation without statistics of its own, as then they pass
    mixed (see `image_outputs`).
    """
    network = extractor.build(run).eval()
    yield from _by_class(run, lambda images: embed(network, images), mixed=takes_batch_statistics(network))


def class_outputs(run: Run, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """What ``function`` makes of all images of each class of the run, one class at a time, in storage order.

    Without gradients; images are as they are stored, without augmentation. Memory is that of the largest class; that
    of all where a network of the run couples the images of a batch, as then they pass mixed (see `image_outputs`).

    Args:
        function: images (m, C, H, W) -> one row for each, (m, ...); the logits of a network, say, which its caller
            has put into evaluation mode.
    """
    yield from _by_class(run, function, mixed=run.couples_batches)


def image_outputs(run: Run, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What ``function`` makes of each of the images (M, C, H, W), (M, ...), without gradients.

    `Run.chunk` of them pass at a time. Where a network of the run couples the images of a batch, they pass in random
    order, the same in every job, as a batch of one class would have statistics of its own.

    Args:
        function: as for `class_outputs`.
        images: on the run's device.
    """
    return _rows(run, lambda rows: function(images[rows]), len(images), mixed=run.couples_batches)


def _by_class(run: Run, function: Callable[[Tensor], Tensor], *, mixed: bool) -> Iterator[Tensor]:
    offsets, counts = run.source.offsets, run.source.counts
    if mixed:  # of all classes, so that what is made of one does not depend on the others of the job
        found = _rows(run, partial(_shown, run, function, 0), len(run.source), mixed=True)
        for index in run.classes:
            yield found[offsets[index] : offsets[index + 1]]
    else:
        for index in run.classes:
            yield _rows(run, partial(_shown, run, function, offsets[index]), counts[index], mixed=False)


def _shown(run: Run, function: Callable[[Tensor], Tensor], first: int, rows: Tensor) -> Tensor:
    return function(run.source.gather(rows + first))


def _rows(run: Run, function: Callable[[Tensor], Tensor], count: int, *, mixed: bool) -> Tensor:
    order = run.rng.scoped("").at("outputs", device="cpu") if mixed else None
    return pass_rows(function, count, run.chunk, run.device, order)
