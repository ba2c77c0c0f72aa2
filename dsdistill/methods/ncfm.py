"""NCFM (Wang et al., Dataset Distillation with Neural Characteristic Function, arXiv 2502.20653).

Learns pixels S such that features of a synthetic class and of the real one have the same characteristic function
Φ(t) = mean exp(j⟨t, v⟩), at frequencies t that are random, or that a network ψ learns to put where the two differ::

    min_S max_ψ  Σ_c 300 · mean_t sqrt( α (|Φ_c(t)| − |Φ̃_c(t)|)² + 2β (|Φ_c(t)| |Φ̃_c(t)| − Re Φ_c Φ̃_c*) )
               + w Σ_c mean_{s ∈ S_c} CE( f_final(A(s)), c ),     v = φ_θ(A_ωc(x)) / ‖φ_θ(A_ωc(x))‖₂

θ = l·θ_initial + (1 − l)·θ_final, l ~ U(0, 1), of one of 20 networks trained on the real images beforehand. Views ω are
shared by the real and synthetic images of a class; the second sum ("calibration") has views of its own. A stored image
holds factor² smaller ones. Pixels are updated, and kept, in [0, 1].

Departures from the authors' code (de92fb8); docs/methods/ncfm.md says more of them:

- Each step draws its real images at random, and so do the tiles that images start as; the code always takes the first
  of a class, 1024 in a step.
- One update of all images in a step, for both sums and all classes; the code makes two for each class, in each of which
  AdamW also moves the images of all other classes by their old moments.
- All classes of a step share their frequencies; the code draws anew for each. What is expected is the same.
- No weight decay of pixels (5e-4 in the code), which pulls them to black.
- Gradients are those of the present pixels; the code decodes images ahead, in a thread.
- ψ learns. In the code it stands still: the slope of −loss is added to that of the loss, which was not cleared. Here it
  makes one step of plain ascent in each iteration, by the slope that the same backward pass finds; the code means one
  for each class, with momentum 0.5.
- ψ turns a noise vector into each frequency ("network"), or into the standard deviations of 16 normal ones ("mixture",
  as in the paper), for features of any length; the code has 64 frequencies of 4 distinct values, of length 2048.
- The step size of the images is halved at a plateau, with or without ψ; the code halves it twice with ψ.
  Losses are looked at 20 steps at a time.
- Batch norms, where a network has them, see all classes of a side at once; the code passes class by class.
- For α = β the distance is computed as √α |Φ − Φ̃|, which it equals, without a floor.
- Exactly ``iterations`` updates are made; the last one is clamped and saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dsdistill.augmentations import Augmentation, CutMix, always_flip_color_cutout
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, PerClass, Preset, Run, State
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Pool
from dsdistill.matching import ClassViews, class_positions, match_characters, refuse_whitened, unit_step
from dsdistill.networks import Need, NetworkSpec, has_batchnorm, reinitialize_
from dsdistill.parameterizations import Form, Tiled
from dsdistill.training import TrainingRecipe

PRETRAINING = TrainingRecipe(
    epochs=60,
    batch_size=128,
    lr=0.01,
    milestones=(2 / 3, 5 / 6),
    gamma=0.2,
    augmentation=always_flip_color_cutout(("color", "crop")),  # CutMix takes cutout's place
    mix=CutMix(probability=0.5),
)
_PER_SCALE = 16  # frequencies that share the scales of one component of the mixture
_READ = 20  # steps between two looks at their losses, each of which waits for the device

_CODE = "config/ of the authors' code, de92fb8, less its weight decay"
_LEARNED = f"our combination: 1,024 frequencies from section 5.1 of the paper; layers of ψ and all else from {_CODE}"
_PAPER = f"sections 4.2.2 and 5.1 of the paper; all else from {_CODE}"
_CELLS = [
    *((data, ipc) for data in ("cifar10", "cifar100", "tiny_imagenet") for ipc in (1, 10, 50)),
    *((f"imagenet_{name}", ipc) for name in ("nette", "woof", "fruit", "meow", "squawk", "yellow") for ipc in (1, 10)),
]


def _published(data: str, ipc: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"ipc": ipc}
    if data.startswith("imagenet_"):
        settings["pretraining"] = replace(PRETRAINING, epochs=80)
    if (data, ipc) == ("cifar100", 10):
        settings |= {"optimizer": "sgd", "lr_images": 0.01, "momentum": 0.5}
    return settings


@dataclass(frozen=True, kw_only=True)
class NCFM(PerClass):
    """Characteristic functions: features of synthetic and real classes agree at random or at learned frequencies."""

    paper: ClassVar[str] = (
        "Wang et al., Dataset Distillation with Neural Characteristic Function: A Minmax Perspective, CVPR 2025, "
        "arXiv 2502.20653"
    )
    network_needs: ClassVar[tuple[Need, ...]] = ("features",)
    presets: ClassVar[Mapping[str, Preset]] = {
        name: preset
        for data, ipc in _CELLS
        for name, preset in (
            (f"{data}/ipc{ipc}", Preset(_CODE, _published(data, ipc))),
            (f"{data}/ipc{ipc}/network", Preset(_LEARNED, _published(data, ipc) | {"sampling": "network"})),
            (f"{data}/ipc{ipc}/mixture", Preset(_PAPER, _published(data, ipc) | {"sampling": "mixture"})),
        )
    }

    iterations: Annotated[int, Ge(1)] = 20_000
    """Outer steps."""
    real_batch: Annotated[int, Ge(1)] = 1024
    """Real images per class and step, without replacement; a smaller class gives all it has."""
    sampling: Literal["normal", "network", "mixture"] = "normal"
    """Frequencies: N(0, 1); made by the sampling network; or normal with standard deviations that it makes."""
    frequencies: Annotated[int, Ge(2)] | None = None
    """How many in each step; null: 4096 normal ones, 1024 of a sampling network."""
    lr_sampling: Annotated[float, Gt(0)] = 1e-3
    """SGD step size of the sampling network, which climbs the loss."""
    alpha: Annotated[float, Ge(0)] = 0.5
    """α, weight of the difference of amplitudes (diversity)."""
    beta: Annotated[float, Ge(0)] = 0.5
    """β, weight of the difference of phases (realism)."""
    calibration: Annotated[float, Ge(0)] = 1.0
    """w, weight of the cross-entropy of trained networks on the synthetic images."""
    networks: Annotated[int, Ge(1)] = 20
    """Networks trained on the real images before the first step."""
    pretraining: TrainingRecipe = PRETRAINING
    """How they are trained."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What updates the images."""
    lr_images: Annotated[float, Gt(0)] = 1e-3
    """Its step size, on pixels in [0, 1]."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of SGD; AdamW has its usual moments instead."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decay of AdamW, towards black."""
    patience: Annotated[int, Ge(1)] | None = 500
    """Steps without a lower loss after which the step size is halved; null: never."""
    form: Form = Tiled(factor=2)
    """What a stored image is: Plain pixels, or Tiled (several small images in one)."""
    network: NetworkSpec = NetworkSpec()
    """Network of the pool."""
    augmentation: Augmentation | None = always_flip_color_cutout()
    """Views shared by the real and synthetic images of a class; flips are left out where they change the class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha == self.beta == 0:
            raise InvalidSetting("NCFM.alpha", self.alpha, "alpha or beta must be above 0: else nothing is matched")
        if self.sampling == "mixture" and self._count <= _PER_SCALE:
            allowed = f"more than {_PER_SCALE} for a mixture, so that it has 2 components"
            raise InvalidSetting("NCFM.frequencies", self.frequencies, allowed)

    @property
    def steps(self) -> int:
        return self.iterations

    @property
    def _count(self) -> int:
        return self.frequencies or (4096 if self.sampling == "normal" else 1024)

    def check(self, source: ImageSource) -> None:
        """Refuse whitened images, and what `PerClass.check` refuses.

        Raises:
            BadData, InvalidSetting: as there.
        """
        super().check(source)
        refuse_whitened(type(self).__name__, source)

    def prepare(self, run: Run) -> None:
        self._pool(run)

    def start(self, run: Run, job: Job) -> State:
        images, labels = self.random_real(run)
        if self.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                images.parameters(), lr=self.lr_images, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(images.parameters(), lr=self.lr_images, momentum=self.momentum)
        state = State(images, labels, {"images": optimizer})
        if self.sampling != "normal":
            psi = sampling_network(self._pool(run).width, run.rng.at("psi")).to(run.device)
            state.extras["psi"] = psi
            state.optimizers["psi"] = torch.optim.SGD(psi.parameters(), lr=self.lr_sampling)
        if self.patience is not None:
            state.extras["plateau"] = ReduceLROnPlateau(optimizer, factor=0.5, patience=self.patience)
            state.extras["losses"] = torch.zeros(_READ, device=run.device)
        return state

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        pool, draw = self._pool(run), run.rng.at("network", iteration, device="cpu")
        which, share = int(torch.randint(len(pool), (), generator=draw)), float(torch.rand((), generator=draw))
        for optimizer in state.optimizers.values():
            optimizer.zero_grad()
        frequencies = self._frequencies(run, state, iteration, pool.width)
        loss = self._match(run, state, iteration, pool.mix(which, share), frequencies)
        calibration = self._calibrate(run, state, iteration, pool.final(which))
        unit_step(state.optimizers["images"], state.images, run.source, clamp=True)
        state.images.constrain()
        self._watch_plateau(state, iteration, (loss + calibration) / len(run.classes))
        return {"loss": loss, "calibration": calibration}

    def _pool(self, run: Run) -> Pool:
        return Pool.of(run, self.network, self.pretraining, self.networks)

    def _frequencies(self, run: Run, state: State, iteration: int, width: int) -> Tensor:
        """(n, D), differentiable in ψ where there is one."""
        normal = partial(torch.randn, generator=run.rng.at("frequencies", iteration), device=run.device)
        if self.sampling == "normal":
            return normal(self._count, width)
        psi = state.extras["psi"]
        if self.sampling == "network":
            made: Tensor = psi(normal(self._count, width))
            return made
        scales: Tensor = psi(normal(-(-self._count // _PER_SCALE), width))
        return scales.repeat_interleave(_PER_SCALE, 0)[: self._count] * normal(self._count, width)

    def _match(self, run: Run, state: State, iteration: int, network: nn.Module, frequencies: Tensor) -> Tensor:
        """The distance of characteristic functions; its gradient goes to the images, and uphill to ψ."""
        loss, slope = match_characters(
            run,
            state,
            iteration,
            network=network,
            frequencies=frequencies,
            weights=(self.alpha, self.beta),
            real_batch=self.real_batch,
            views=ClassViews.drawn(self.augmentation, run, iteration),
        )
        if slope is not None:
            frequencies.backward(-slope)  # type: ignore[no-untyped-call]
            state.optimizers["psi"].step()
        return loss

    def _calibrate(self, run: Run, state: State, iteration: int, network: nn.Module) -> Tensor:
        """Cross-entropy of a trained network on the synthetic images, weighted; its gradient is added to theirs."""
        total = torch.zeros((), device=run.device)
        if self.calibration == 0:
            return total
        views = ClassViews.drawn(self.augmentation, replace(run, rng=run.rng.within("calibration")), iteration)
        position, multiplicity = class_positions(run, state), state.images.multiplicity
        sizes = multiplicity.new_zeros(len(run.classes)).index_add(0, position, multiplicity)
        items = len(position) if has_batchnorm(network) else max(1, run.chunk // int(multiplicity.max()))
        for group in torch.split(torch.arange(len(position)), items):
            images, stored = state.images.decode(group)
            owner = position[stored]
            logits = network(views.show(images, owner))
            each = F.cross_entropy(logits, state.labels.target(stored), reduction="none")
            loss = self.calibration * (each / sizes[owner].to(each.device, non_blocking=True)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def _watch_plateau(self, state: State, iteration: int, loss: Tensor) -> None:
        """Halve the step size of the images where the loss no longer falls; losses are read in groups."""
        if self.patience is None:
            return
        losses = state.extras["losses"]
        losses[iteration % _READ] = loss
        if (iteration + 1) % _READ == 0:
            for value in losses.tolist():
                state.extras["plateau"].step(value)


def sampling_network(width: int, generator: torch.Generator) -> nn.Sequential:
    """ψ: noise (M, D) -> (M, D) in (−1, 1), three linear layers with batch norm; parameters from ``generator``."""
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for activation in (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh()):
            layers += [nn.Linear(width, width), nn.BatchNorm1d(width), activation]
        network = nn.Sequential(*layers)
    network = network.to_empty(device=generator.device)
    reinitialize_(network, generator)
    return network
