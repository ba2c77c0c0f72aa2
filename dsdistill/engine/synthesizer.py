"""The contract between a paper and the engine.

A method is a frozen dataclass: the object is its settings. It writes `Synthesizer.start` (what is learned
and from where it starts) and `Synthesizer.step` (the paper's inner page); the engine owns everything else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dsdistill.core.config import check_names, to_dict, validate
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine.shared import Shared
from dsdistill.errors import BadData, UnknownName
from dsdistill.labels import HardLabels, Labels
from dsdistill.networks import Need, NetworkSpec
from dsdistill.parameterizations import Form, Parameterization, Plain
from dsdistill.recipe import Recipe, method_title
from dsdistill.synthetic import SyntheticDataset

Metrics = Mapping[str, Tensor]
"""What a step reports: detached scalar tensors by name, each of which must be finite."""


class Preset(NamedTuple):
    """Settings that were published: where, and what differs from the defaults."""

    source: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """An independent unit of a run: a key, unique in the run, and the classes it makes images of."""

    key: str
    classes: tuple[int, ...]


@dataclass
class State:
    """Everything that changes during synthesis, and nothing else: this is what a checkpoint holds.

    ``extras`` are tensors of fixed shape, or anything with ``state_dict`` and ``load_state_dict`` (modules,
    schedulers). The engine moves images and labels to the run's device after `Synthesizer.start`.
    """

    images: Parameterization
    labels: Labels
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a method may use: real training data, device, named random streams. There are no globals.

    ``source`` lives on ``device`` and gives no way to the test split; ``rng`` and ``classes`` are those of the
    current job; ``chunk`` is how many images should pass a network at a time (memory and cache, not maths);
    ``recipe`` says how the set is being made (empty in a run made by hand); ``shared`` keeps what all jobs need and
    is costly to make (trained networks); ``store`` is the folder of what other runs can use, too (experts), None to
    keep nothing on the disk.
    """

    source: ImageSource
    device: torch.device
    rng: Rng
    classes: tuple[int, ...]
    chunk: int
    recipe: Recipe = field(default_factory=lambda: Recipe(method={}, seed=0, source={}))
    shared: Shared = field(default_factory=Shared, repr=False)
    store: Path | None = None
    _networks: dict[tuple[NetworkSpec, str], nn.Module] = field(default_factory=dict, repr=False)

    def scoped(self, job: Job) -> "Run":
        """The same run as a job of it sees it."""
        return replace(self, rng=self.rng.scoped(job.key), classes=job.classes)

    @property
    def couples_batches(self) -> bool:
        """Whether a network in use normalises by the statistics of a batch, all of which must then pass at once.

        It does not while its batch normalisation is in evaluation mode, where gradient matching puts it.
        """
        parts = (part for network in self._networks.values() for part in network.modules())
        return any(isinstance(part, _BatchNorm) and (part.training or part.running_mean is None) for part in parts)

    def network(self, spec: NetworkSpec, iteration: int, *, name: str = "network") -> nn.Module:
        """A freshly initialised network of stream ``name`` at ``iteration``, its parameters frozen.

        It is in training mode, so that batch normalisation takes the statistics of its batch, but drops nothing out:
        what it makes of an image must not change while a step looks at it twice.

        One module is kept for each spec and name and refilled in place, so the network of an earlier iteration
        changes with this call; a method that needs several at once gives them different names.
        """
        shape, classes, generator = self.source.shape, self.source.num_classes, self.rng.at(name, iteration)
        kept = self._networks.get((spec, name))
        if kept is None:
            network = spec.build(shape, classes, generator=generator, device=self.device)
        else:
            network = spec.refresh(kept, shape, classes, generator=generator, device=self.device)
        self._networks[spec, name] = network
        return frozen(network)


def frozen(network: nn.Module) -> nn.Module:
    """The network itself, ready to look at images: in training mode, without dropout, its parameters fixed."""
    network.train()
    for part in network.modules():
        if isinstance(part, _DropoutNd):
            part.eval()
    return network.requires_grad_(False)


_Shared = TypeVar("_Shared", bound="Synthesizer")


def no_method(cls: type[_Shared]) -> type[_Shared]:
    """Mark what methods share, and is none by itself: it cannot be made, and no list of methods has it."""
    cls.__abstractmethods__ = cls.__abstractmethods__ | {"paper"}
    return cls


@dataclass(frozen=True, kw_only=True)
class Synthesizer(ABC):
    """A distillation method and its settings.

    The base class of all methods: a frozen, keyword-only dataclass whose fields are the settings, checked when the
    object is made. Subclasses declare ``paper`` (citation), their fields, `start`, and for iterative methods `steps`
    and `step`. Most extend `PerClass`, which brings ``ipc``. ``presets`` are published settings by dataset and budget:
    "cifar10/ipc10", or "cifar10/ipc10/repo" where a paper and its code differ. ``protocol`` is the named one that the
    command line suggests for its sets.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range.
    """

    paper: ClassVar[str]
    network_needs: ClassVar[tuple[Need, ...]] = ()
    presets: ClassVar[Mapping[str, Preset]] = {}
    protocol: ClassVar[str] = "dsa"
    whole_batches: ClassVar[bool] = False
    """Whether the images of a step must pass at once, so that a smaller chunk saves no memory."""

    def __post_init__(self) -> None:
        validate(self)

    @property
    def title(self) -> str:
        """What to call it in tables: the class, and for a wrapper what it wraps."""
        return method_title(to_dict(self))

    @property
    def steps(self) -> int:
        """Outer steps of each job; 0 for methods that only select."""
        return 0

    def with_ipc(self, ipc: int) -> Self:
        """The same method with another budget of stored images per class.

        Raises:
            UnknownName: the method has no such setting.
            InvalidSetting: not an integer of at least 1.
        """
        check_names(type(self), ["ipc"])
        return replace(self, ipc=ipc)  # type: ignore[call-arg]

    def check(self, source: ImageSource) -> None:
        """Refuse a source this method cannot work with, before any work starts and any file is made.

        Every setting that is a network is checked against the images and ``network_needs``.

        Raises:
            InvalidSetting: a network does not fit the images, or lacks what the method needs of it.
        """
        for setting in fields(self):
            if isinstance(network := getattr(self, setting.name), NetworkSpec):
                network.require(self.network_needs, source.shape, source.num_classes)

    def prepare(self, run: Run) -> None:
        """Build what all jobs share (experts, teachers, statistics). Nothing by default."""

    def jobs(self, run: Run) -> Sequence[Job]:
        """Independent units of work, each with its own checkpoint; one for all classes by default."""
        return [Job("all", run.classes)]

    @abstractmethod
    def start(self, run: Run, job: Job) -> State:
        """What is learned, and from where it starts."""

    def step(self, run: Run, state: State, iteration: int) -> Metrics:
        """One outer step of the paper; updates ``state`` in place."""
        raise TypeError(f"{type(self).__name__} has {self.steps} steps but no step()")

    def finish(self, run: Run, state: State) -> SyntheticDataset:
        """Freeze the state into a set with the run's recipe; notes and parents added to that recipe are kept."""
        every = torch.arange(state.images.count)
        return SyntheticDataset(
            images=state.images.subset(every).cpu(),
            labels=state.labels.subset(every).cpu(),
            normalization=run.source.normalization,
            classes=run.source.classes,
            recipe=run.recipe,
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Published settings by name, with changes on top.

        Raises:
            UnknownName: no such preset, or no such setting.
        """
        if name not in cls.presets:
            raise UnknownName(f"preset of {cls.__name__}", name, cls.presets)
        check_names(cls, changes)
        return cls(**{**cls.presets[name].settings, **changes})


@dataclass(frozen=True, kw_only=True)
class PerClass(Synthesizer):
    """A method that makes a given number of images of every class."""

    ipc: Annotated[int, Ge(1)] = 10
    """Synthetic images per class, as stored."""
    form: Form = Plain()
    """What a stored image is: Plain pixels, or Tiled (several small images in one)."""
    on_small_class: Literal["error", "cap", "duplicate"] = "error"
    """What to do with a class that has too few real images to start from: refuse, take fewer, or repeat images."""

    @property
    def starts_from_real(self) -> bool:
        """Whether the images start from real ones, of which a class must then have enough."""
        return True

    def check(self, source: ImageSource) -> None:
        """Refuse a source with a class smaller than its start needs, unless ``on_small_class`` says otherwise.

        Raises:
            BadData: naming the classes and the mends.
            InvalidSetting: the form or the network does not fit the images.
        """
        super().check(source)
        self.form.build([1], source.shape)
        need = self.form.images_per_class(self.ipc)
        small = [f"{name!r} ({n})" for name, n in zip(source.classes, source.counts, strict=True) if n < need]
        if small and self.on_small_class == "error" and self.starts_from_real:
            purpose = f"ipc={self.ipc} images"
            if need != self.ipc:
                purpose = f"the {need} images from which ipc={self.ipc} starts in this form"
            raise BadData(
                f"{len(small)} classes of {source.name!r} have fewer than {purpose}: "
                f"{', '.join(small[:5])}; lower ipc, or set on_small_class to 'cap' (fewer images) "
                "or 'duplicate' (repeated images)"
            )

    def random_real(self, run: Run) -> tuple[Parameterization, HardLabels]:
        """The usual start: images made of distinct random real ones of their class, class-major, with hard labels.

        Plain pixels are real images; other forms resemble them once decoded. A class with too few images gives as
        many stored images as it has real ones ("cap"), or repeats them ("duplicate").
        """
        most = self.form.images_per_class(self.ipc)
        drawn = run.source.per_class_indices(run.classes, most, run.rng.at("init"))
        return self.made_of(run, torch.split(drawn, run.source.sizes_per_class(run.classes, most)))

    def made_of(self, run: Run, chosen: Sequence[Tensor]) -> tuple[Parameterization, HardLabels]:
        """Images that resemble chosen real ones, class-major, with hard labels.

        Args:
            chosen: for each class of the run the storage indices of its real images, best first; they are taken in
                the order in which the form decodes, and again from the first where there are too few.
        """
        images, labels = self._blank(run)
        position = torch.full((run.source.num_classes,), -1)
        position[list(run.classes)] = torch.arange(len(run.classes))
        wanted = position[labels.classes[images.decode().owner]]
        index = chosen[0].new_empty(len(wanted))
        for place, block in enumerate(chosen):
            slots = (wanted == place).nonzero().flatten()
            index[slots.to(index.device)] = block.repeat(-(-len(slots) // len(block)))[: len(slots)]
        images.to(run.device).imitate(run.source.gather(index))
        return images, labels

    def noise(self, run: Run) -> tuple[Parameterization, HardLabels]:
        """A start from N(0, 1) in standardised units, class-major, with hard labels."""
        images, labels = self._blank(run)
        images.fill_noise(run.rng.at("init"))
        return images, labels

    def _blank(self, run: Run) -> tuple[Parameterization, HardLabels]:
        capped = self.on_small_class == "cap"
        items = [min(self.ipc, run.source.counts[c]) if capped else self.ipc for c in run.classes]
        classes = torch.tensor(run.classes).repeat_interleave(torch.tensor(items))
        return self.form.build(items, run.source.shape), HardLabels(classes, run.source.num_classes)
