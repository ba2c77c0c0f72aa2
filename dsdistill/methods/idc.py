"""Efficient parameterisation and gradient matching along real training (Kim et al., Dataset Condensation via Efficient
Synthetic-Data Parameterization, arXiv 2205.14959).

A stored image holds f x f small ones (`Tiled`), so a class teaches with f² times as many images for the same bytes.
They are learned by matching gradients, as in DC, but along the training of networks on real data, which does not
overfit the few synthetic images::

    repeat K times:
        draw θ (and pretrain it on real data, where asked)
        for t = 1 .. T:
            for each class c:  S_c ← S_c − η ∇ Σ_convolutions d( ∇_θ ℓ(A_c(T_c)), ∇_θ ℓ(A_c(decode(S_c))) )
            train θ on some real images (2000 of CIFAR, else 500)

d is the squared or the absolute difference, A_c one view for both sides. Pixels live in [0, 1], and η belongs there:
``lr_images`` · (ipc / 10) · (size / ``lr_size``)², as published.

The authors make an optimiser step per class on one tensor, so momentum carries every class on while others have their
turn. Networks do not change meanwhile, so classes are independent, and the C turns of a pass are done as one: with
momentum μ^C and step size η (1 − μ^C) / (1 − μ), a class is at each of its own turns where C single steps would have
brought it, until pixels are clamped.

Departures from the authors' code: what is clamped, and saved, is each class as it would be at its own next turn, where
the code takes all classes at one moment, so that the last gradient of its last class has counted once there, and here
(1 − μ^C) / (1 − μ) times; pixels are clamped at the end of each outer iteration, the last one included, not at the
start of the next; images start as random real ones of their class, not as the first ones, made small by the decoder's
own tile sizes (see `Tiled`); a class smaller than the batch gives all it has; real images, to match and to train on,
are drawn afresh for each step, where the code goes through epochs; networks have a mini-batch size of their own, where
the code takes that of matching; they are not trained after the last update, which nothing sees; CIFAR-100 is
standardised by its own statistics, not by those of CIFAR-10. Batch normalisation, if a network has it, is fixed while
matching, as in DC; in the code it stays in training mode. Networks are pretrained anew for each outer iteration; the
pool of saved networks that the code takes for ImageNet-100 is left out, and so is the form that bounds what ImageNet-10
at 20 images per class decodes to while it is matched: a random ``synthetic_batch`` of all tiles is matched there.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from dsdistill.augmentations import Augmentation, CutMix, Mix, always_flip_color_cutout
from dsdistill.core.device import synchronize
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, PerClass, Preset, Run, Shared, State, frozen
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import train_on_real
from dsdistill.matching import (
    ClassViews,
    gradient_chunk,
    match_gradients,
    matched_weights,
    refuse_unsettled,
    refuse_whitened,
    settle_batchnorm,
    unit_step,
)
from dsdistill.networks import Need, NetworkSpec
from dsdistill.objectives import GradientDistance, absolute_error, squared_error
from dsdistill.parameterizations import Form, Plain, Tiled
from dsdistill.training import TrainingRecipe, make_optimizer

_DISTANCES: dict[str, GradientDistance] = {"squared": squared_error, "l1": absolute_error}
_CONVOLUTIONS = 4  # dimensions of the weights that are matched
_SOURCE = "misc/reproduce.py and argument.py of the authors' code"


def _presets() -> dict[str, Preset]:
    """f = 2 (3 on ImageNet); and one image per stored image, which the paper calls IDC-I, as the variant "f1".

    "imagenet10" is a folder of the user's own; docs/methods/idc.md says of which classes and size.
    """
    grey = {"distance": "l1", "lr_images": 1e-4, "trained_on": 500}
    uncut = {"augmentation": always_flip_color_cutout(("color", "crop")), "mix": None}
    large = {
        "distance": "l1",
        "lr_images": 3e-3,
        "lr_size": 224,
        "trained_on": 500,
        "iterations": 500,
        "pretraining": 10,
        "mix": CutMix(probability=1.0),
        "network": NetworkSpec("resnet_ap10"),
    }
    rows: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
        ("cifar10", (1, 10, 50), 2, {}),
        ("cifar100", (10, 20), 2, {}),
        ("svhn", (1, 10, 50), 2, {"trained_on": 500}),
        ("mnist", (1, 10, 50), 2, grey | {"lr_size": 28} | uncut),
        ("fashion_mnist", (1, 10, 50), 2, grey),
        ("imagenet10", (10, 20), 3, large),
    ]
    made = {}
    for data, budgets, factor, settings in rows:
        for ipc in budgets:
            tiled = settings | {"ipc": ipc, "form": Tiled(factor=factor)}
            # Digits lose the cutout and CutMix only where they are made small.
            plain = {name: value for name, value in tiled.items() if data != "mnist" or name not in uncut}
            made[f"{data}/ipc{ipc}"] = Preset(_SOURCE, tiled)
            made[f"{data}/ipc{ipc}/f1"] = Preset(_SOURCE, plain | {"form": Plain()})
    return made


@dataclass(frozen=True, kw_only=True)
class IDC(PerClass):
    """Small images in one stored image, matched in gradient along the training of networks on real data."""

    paper: ClassVar[str] = (
        "Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022, arXiv 2205.14959"
    )
    network_needs: ClassVar[tuple[Need, ...]] = ("second-order",)
    presets: ClassVar[Mapping[str, Preset]] = _presets()

    form: Form = Tiled(factor=2)
    """What a stored image is: Tiled (several small images in one), or Plain pixels (IDC-I)."""
    iterations: Annotated[int, Ge(1)] = 2000
    """K, networks drawn; each sees inner_steps updates of the images."""
    inner_steps: Annotated[int, Ge(1)] = 100
    """T, updates of the images per network."""
    real_batch: Annotated[int, Ge(1)] = 64
    """Real images per class and step, without replacement; a smaller class gives all it has."""
    synthetic_batch: Annotated[int, Ge(1)] = 128
    """Most decoded images per class and step, drawn at random."""
    lr_images: Annotated[float, Gt(0)] = 5e-3
    """SGD step size on pixels in [0, 1], at 10 stored images per class of lr_size pixels a side; it grows with both."""
    lr_size: Annotated[int, Ge(1)] = 32
    """Image size that lr_images is meant for."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of that SGD, per class turn."""
    distance: Literal["squared", "l1"] = "squared"
    """Distance of the gradients of convolutions: squared or absolute error, summed."""
    network: NetworkSpec = NetworkSpec()
    """Network whose random initialisations are trained on real data and give the gradients."""
    pretraining: Annotated[int, Ge(0)] = 0
    """Epochs on all real images before a network gives its first gradients."""
    trained_on: Annotated[int, Ge(1)] = 2000
    """Random real images that a network is trained on between two updates, rounded up to whole mini-batches."""
    lr_network: Annotated[float, Gt(0)] = 0.01
    """Step size of that training."""
    momentum_network: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Its SGD momentum, which lasts as long as the network."""
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    """Its L2 penalty."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Its real images per step."""
    mix: Mix | None = CutMix(probability=0.5)
    """Its mixing of images and labels."""
    network_augmentation: Augmentation | None = always_flip_color_cutout(("color", "crop"))
    """Its views, drawn for each image; flips are left out where they change the class."""
    augmentation: Augmentation | None = always_flip_color_cutout(("color", "crop", "cutout"))
    """Views shared by the real and synthetic images of a class; flips are left out where they change the class."""

    @property
    def steps(self) -> int:
        return self.iterations * self.inner_steps

    def check(self, source: ImageSource) -> None:
        """Refuse whitened images, a single class, a network without convolutions or whose batch normalisation cannot be
        settled, and what `PerClass.check` refuses.

        Raises:
            BadData, InvalidSetting: see there.
        """
        super().check(source)
        refuse_whitened("IDC", source)
        if source.num_classes < 2:
            raise BadData(f"IDC matches gradients of a classifier, and {source.name!r} has one class: give two or more")
        network = self.network.build(source.shape, source.num_classes, generator=torch.Generator(), device="cpu")
        if not matched_weights(network, _CONVOLUTIONS):
            raise InvalidSetting(
                "IDC.network", self.network.name, "a network with 2-D convolutions, whose gradients are matched"
            )
        refuse_unsettled("IDC.network", self.network.name, network)

    def start(self, run: Run, job: Job) -> State:
        images, labels = self.random_real(run)
        network = run.network(self.network, 0)
        # One step for a class's own turn and those of the others, which momentum carries it through.
        turns = len(run.classes)
        rate = self._rate(run.source.shape) * (1 - self.momentum**turns) / (1 - self.momentum)
        optimizers = {
            "images": torch.optim.SGD(images.parameters(), lr=rate, momentum=self.momentum**turns),
            "network": make_optimizer(list(network.parameters()), self._recipe(1), run.device),
        }
        return State(images, labels, optimizers, {"network": network})

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        k, t = divmod(iteration, self.inner_steps)
        last = t == self.inner_steps - 1
        if t == 0:
            self._renew(run, state, k)
        network, optimizer = state.extras["network"], state.optimizers["images"]
        settle_batchnorm(run, frozen(network), iteration)
        optimizer.zero_grad()
        loss = match_gradients(
            run,
            state,
            iteration,
            network=network,
            weights=matched_weights(network, _CONVOLUTIONS),
            distance=_DISTANCES[self.distance],
            real_batch=self.real_batch,
            views=ClassViews.drawn(self.augmentation, run, iteration),
            synthetic_batch=self.synthetic_batch,
        )
        unit_step(optimizer, state.images, run.source, clamp=last)
        state.images.constrain()
        if not last:
            draws = run.rng.at("trained_on", iteration)
            whole = -(-self.trained_on // self.batch_size) * self.batch_size
            rows = torch.randperm(len(run.source), generator=draws, device=run.device)[:whole]
            # Part of a step: it is rehearsed in full, and a request to stop waits for the end of the step.
            self._train(run, state, 1, run.rng.within("training", iteration), Shared(), rows)
        return {"loss": loss}

    def _rate(self, shape: tuple[int, int, int]) -> float:
        """The step size of one class turn, by the authors' rule."""
        return self.lr_images * self.ipc / 10 * (shape[1] * shape[2]) / self.lr_size**2

    def _renew(self, run: Run, state: State, k: int) -> None:
        """Another network, with an optimiser of its own."""
        network = state.extras["network"] = run.network(self.network, k)
        state.optimizers["network"] = make_optimizer(list(network.parameters()), self._recipe(1), run.device)
        if self.pretraining:
            self._pretrain(run, state, k)

    def _pretrain(self, run: Run, state: State, k: int) -> None:
        """Train network ``k`` on all real images. In a rehearsal a few steps of the first, which counts for all."""
        rng, rehearsal = run.rng.within("pretraining", k), run.shared.rehearsal
        if rehearsal is None:
            self._train(run, state, self.pretraining, rng, Shared(), None)
        elif k == 0:
            synchronize(run.device)
            begin, before = time.perf_counter(), rehearsal.seconds
            self._train(run, state, self.pretraining, rng, Shared(rehearsal=rehearsal), None)
            synchronize(run.device)
            rehearsal.seconds += (self.iterations - 1) * (time.perf_counter() - begin + rehearsal.seconds - before)

    def _train(self, run: Run, state: State, epochs: int, rng: Rng, shared: Shared, rows: Tensor | None) -> None:
        run = replace(run, shared=shared, chunk=gradient_chunk(run))
        network, optimizer = state.extras["network"], state.optimizers["network"]
        train_on_real(run, network, self._recipe(epochs), rng, rows=rows, optimizer=optimizer)

    def _recipe(self, epochs: int) -> TrainingRecipe:
        return TrainingRecipe(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr_network,
            momentum=self.momentum_network,
            weight_decay=self.weight_decay,
            milestones=(),
            augmentation=self.network_augmentation,
            mix=self.mix,
        )
