"""Dataset condensation with gradient matching, on a page (Zhao, Mopuri & Bilen, arXiv 2006.05929)::

    repeat K times:
        draw θ
        for t = 1 .. T:
            S ← S − η ∇_S Σ_c D( ∇_θ ℓ(A_c(T_c)),  ∇_θ ℓ(A_c(S_c)) )        one SGD step, see `match_gradients`
            unless t = T:  train θ on S for ς epochs                        SGD

The views A_c are the identity for DC and Siamese for DSA (Zhao & Bilen, arXiv 2102.08259), which also trains θ on
random views of S. A step of the engine is one t, so a run goes on in the middle of the inner loop: θ is part of the
state.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from dsdistill.augmentations import Augmentation
from dsdistill.data import ImageSource
from dsdistill.engine import Job, Metrics, PerClass, Run, State, frozen
from dsdistill.errors import BadData
from dsdistill.labels import Labels, SoftLabels
from dsdistill.matching.gradients import (
    gradient_chunk,
    match_gradients,
    matched_weights,
    refuse_unsettled,
    settle_batchnorm,
)
from dsdistill.matching.views import ClassViews
from dsdistill.networks import Need, NetworkSpec
from dsdistill.objectives import GradientDistance, global_cosine, layerwise_cosine, squared_error
from dsdistill.parameterizations import places_of
from dsdistill.training import TrainingRecipe, TrainingSet, make_optimizer, train

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Published T and ς by images per class."""

_DISTANCES: dict[str, GradientDistance] = {
    "layerwise": layerwise_cosine,
    "squared": squared_error,
    "cosine": global_cosine,
}


def loops(ipc: int) -> tuple[int, int]:
    """Image steps T per network, and epochs ς of training in between, for ``ipc`` images per class.

    Published for 1, 10, 20, 30, 40 and 50. Between these both are interpolated and rounded; above 50 they stay at
    (50, 10), which the authors advise there, beside (20, 25), with real images to start from.

    Example:
        >>> loops(10), loops(5), loops(200)
        ((10, 50), (5, 23), (50, 10))
    """
    if ipc >= max(LOOPS):
        return LOOPS[max(LOOPS)]
    low = max(known for known in LOOPS if known <= ipc)
    high = min(known for known in LOOPS if known > ipc)
    share = (ipc - low) / (high - low)
    outer, epochs = (round(a + share * (b - a)) for a, b in zip(LOOPS[low], LOOPS[high], strict=True))
    return outer, epochs


@dataclass(frozen=True, kw_only=True)
class GradientCondensation(PerClass):
    """What DC and DSA share: every setting, and the algorithm, `condense`."""

    network_needs: ClassVar[tuple[Need, ...]] = ("second-order",)

    iterations: Annotated[int, Ge(1)] = 1000
    """K, networks drawn; each sees outer_loop updates of the images."""
    outer_loop: Annotated[int, Ge(1)] | None = None
    """T, updates of the images per network; None: the published number for ipc."""
    inner_epochs: Annotated[int, Ge(1)] | None = None
    """ς, epochs that a network is trained on the synthetic images between two updates; None: the published number."""
    init: Literal["noise", "real"] = "noise"
    """What the images start as: N(0, 1) in standardised units, or random real images."""
    real_batch: Annotated[int, Ge(1)] = 256
    """Real images per class and step, without replacement; a smaller class gives all it has."""
    lr_images: Annotated[float, Gt(0)] | None = None
    """SGD step size on standardised pixels; None: 0.1, but 0.01 where the network is "mlp"."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of that SGD, and of that on the logits of soft labels."""
    lr_network: Annotated[float, Gt(0)] = 0.01
    """Step size of training networks on the synthetic images, by SGD without decay."""
    momentum_network: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Momentum of that training, which lasts as long as the network."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Stored images per step of that training."""
    distance: Literal["layerwise", "squared", "cosine"] = "layerwise"
    """D: one minus the cosine for each output of each layer; the squared error; one minus the cosine of all weights."""
    labels: Literal["hard", "soft"] = "hard"
    """Labels fixed to the class, or probabilities learned together with the images."""
    lr_labels: Annotated[float, Gt(0)] = 0.1
    """SGD step size on the logits of soft labels; not used for hard ones."""
    network: NetworkSpec = NetworkSpec()
    """Network whose random initialisations give the gradients."""
    augmentation: Augmentation | None = None
    """Views that both sides of a class share, and those of each image that networks train on; without unsafe flips."""

    @property
    def loops(self) -> tuple[int, int]:
        """T and ς in use."""
        outer, epochs = loops(self.ipc)
        return self.outer_loop or outer, self.inner_epochs or epochs

    @property
    def steps(self) -> int:
        return self.iterations * self.loops[0]

    @property
    def starts_from_real(self) -> bool:
        return self.init == "real"

    def check(self, source: ImageSource) -> None:
        """Refuse a single class, whose cross-entropy has no gradient, a network whose batch normalisation cannot be
        settled, and what `PerClass.check` refuses.

        Raises:
            BadData, InvalidSetting: see there.
        """
        super().check(source)
        if source.num_classes < 2:
            raise BadData(
                f"{type(self).__name__} matches gradients of a classifier, and {source.name!r} has one class: "
                "give two or more, or use a method that matches features, such as DM"
            )
        network = self.network.build(source.shape, source.num_classes, generator=torch.Generator(), device="cpu")
        refuse_unsettled(f"{type(self).__name__}.network", self.network.name, network)

    def start(self, run: Run, job: Job) -> State:
        images, hard = self.noise(run) if self.init == "noise" else self.random_real(run)
        rate = self.lr_images or (0.01 if self.network.name == "mlp" else 0.1)
        labels: Labels = hard
        optimizers: dict[str, torch.optim.Optimizer] = {
            "images": torch.optim.SGD(images.parameters(), lr=rate, momentum=self.momentum)
        }
        if self.labels == "soft":
            labels = SoftLabels.from_hard(hard)
            optimizers["labels"] = torch.optim.SGD(labels.parameters(), lr=self.lr_labels, momentum=self.momentum)
        state = State(images, labels, optimizers)
        self._renew(run, state, 0)
        return state

    @abstractmethod
    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        """One t: `condense`."""

    def condense(self, run: Run, state: State, iteration: int) -> Metrics:
        """Update the images by the gradients of one network as it is, then train it on them unless it is done."""
        outer, epochs = self.loops
        k, t = divmod(iteration, outer)
        if t == 0:
            self._renew(run, state, k)
        network = frozen(state.extras["network"])
        settle_batchnorm(run, network, iteration)
        learners = [optimizer for name, optimizer in state.optimizers.items() if name != "network"]
        for optimizer in learners:
            optimizer.zero_grad()
        loss = match_gradients(
            run,
            state,
            iteration,
            network=network,
            weights=matched_weights(network),
            distance=_DISTANCES[self.distance],
            real_batch=self.real_batch,
            views=ClassViews.drawn(self.augmentation, run, iteration),
        )
        for optimizer in learners:
            optimizer.step()
        state.images.constrain()
        if t < outer - 1:
            self._train(run, state, network, epochs, iteration)
        return {"loss": loss}

    def _recipe(self, epochs: int) -> TrainingRecipe:
        return TrainingRecipe(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr_network,
            momentum=self.momentum_network,
            weight_decay=0.0,
            milestones=(),
            augmentation=self.augmentation,
        )

    def _renew(self, run: Run, state: State, k: int) -> None:
        """Another network. With momentum it has an optimiser of its own; without, there is nothing to keep of one."""
        network = state.extras["network"] = run.network(self.network, k)
        if self.momentum_network:
            state.optimizers["network"] = make_optimizer(list(network.parameters()), self._recipe(1), run.device)

    def _train(self, run: Run, state: State, network: nn.Module, epochs: int, iteration: int) -> None:
        """Train θ on the synthetic images as they are now."""
        train(
            network.requires_grad_(True),
            stored_set(run, state),
            self._recipe(epochs),
            run.rng.within("inner", iteration),
            num_classes=run.source.num_classes,
            mirror_safe=run.source.mirror_safe,
            chunk=gradient_chunk(run),
            optimizer=state.optimizers.get("network"),
        )
        frozen(network)


@torch.no_grad()
def stored_set(run: Run, state: State) -> TrainingSet:
    """The stored items as they are now; a mini-batch of them holds every image that they decode to."""
    images, owner = state.images.decode()
    images, targets = images.detach(), state.labels.target(owner)
    places = places_of(owner, state.images.multiplicity, images.device)

    def fetch(rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = places(rows)
        return images.index_select(0, chosen), targets.index_select(0, chosen)

    return TrainingSet(fetch, state.images.count, run.source.shape, run.device)
