"""A committee of teachers: trained on the real images once, kept where other runs find them, asked together.

::

    STORE/teachers/DIGEST/teacher.json, ...   one of them; see `dsdistill.experts.teacher`
    STORE/teachers/DIGEST/progress/           its training, after each epoch, until it is finished
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsdistill.augmentations import PadCrop
from dsdistill.core import storage
from dsdistill.core.config import from_dict, validate
from dsdistill.core.device import default_chunk
from dsdistill.data import ImageSource
from dsdistill.engine import Run, Shared
from dsdistill.errors import BadArtifact, InvalidSetting
from dsdistill.experts.schooling import schooled, teacher_folder
from dsdistill.experts.teacher import MANIFEST, Teacher
from dsdistill.networks import NetworkSpec
from dsdistill.training import TrainingRecipe

SQUEEZE = TrainingRecipe(epochs=200, batch_size=128, lr=0.1, schedule="cosine", augmentation=PadCrop())
"""How teachers are trained unless told otherwise: 200 epochs of SGD with a cosine, as SRe2L does on CIFAR-100."""
ORDER = "committee.json"
"""Names of the members of a folder in their order, which pairs and start images depend on."""


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Which teachers a method asks for.

    Raises:
        InvalidSetting: a field has the wrong type, there is no network, or one is listed twice.
    """

    networks: tuple[NetworkSpec, ...] = (NetworkSpec("resnet18", norm="batch"),)
    """What they are; each with batch normalisation, whose running statistics are part of a teacher."""
    training: TrainingRecipe | None = SQUEEZE
    """How they are trained on the real images; null with a folder."""
    seed: int = 0
    """Of their training, whatever the seed of the run is: runs with other seeds share them."""
    folder: str | None = None
    """Folder of teachers that are there already (`dsdistill teachers`). Networks and training then are not used, and
    not recorded: () and null."""

    def __post_init__(self) -> None:
        # Files hold plain mappings; a tuple of settings is rebuilt here.
        if isinstance(self.networks, (tuple, list)):
            specs = tuple(from_dict(NetworkSpec, one) if isinstance(one, Mapping) else one for one in self.networks)
            object.__setattr__(self, "networks", specs)
        if self.folder is not None:
            object.__setattr__(self, "networks", ())
            object.__setattr__(self, "training", None)
        validate(self)
        if self.folder is not None:
            return
        if self.training is None:
            raise InvalidSetting("Teachers.training", None, "how they are trained, as there is no folder of them")
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise InvalidSetting("Teachers.networks", self.networks, "at least one network, each once")

    def require(self, method: str, *, alone: bool) -> None:
        """Refuse a folder without teachers, and several for a method that takes one, by a look at the folder.

        Raises:
            BadArtifact: there is none. InvalidSetting: there are several.
        """
        if self.folder is None:
            return
        found = len(recorded_performances(Path(self.folder)))
        if not found:
            Committee.load(self.folder)  # which says what is wrong
        if alone and found > 1:
            told = f"that of a single one of the {found} in it: {method} takes one teacher"
            raise InvalidSetting("teachers.folder", self.folder, told)

    def folders(self, source: ImageSource, store: Path) -> list[Path]:
        """Where they are once a run on these images, with that store, has had them."""
        if self.folder is not None:
            return [Path(self.folder)]
        training = self.training or SQUEEZE
        return [teacher_folder(store, source, spec, training, self.seed) for spec in self.networks]


class Committee(Sequence[Teacher]):
    """Teachers for the same classes and pixels.

    Raises:
        InvalidSetting: there is none, or two share a name.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        names = [member.name for member in members]
        if not names or len(set(names)) < len(names):
            raise InvalidSetting("members", names, "at least one teacher, each with a name of its own")
        self._members = tuple(members)

    @classmethod
    def of(cls, run: Run, teachers: Teachers) -> "Committee":
        """Those of a run: loaded, found or trained at the first call, and checked against its images.

        Raises:
            BadData: they were trained on something else; see `Teacher.check`.
            BadArtifact: the folder holds none, or a damaged one.
            InvalidSetting: a network does not fit, or stopped being finite while it was trained.
            Stopped: the run was asked to stop; finished epochs are kept.
        """
        made = _made.setdefault(run.shared, {})
        if teachers not in made:
            if teachers.folder is not None:
                found = cls.load(teachers.folder, device=run.device)
                found.check(run.source)
            else:
                training = teachers.training or SQUEEZE
                found = cls([schooled(run, spec, training, teachers.seed) for spec in teachers.networks])
            made[teachers] = found
        return made[teachers]

    @classmethod
    def load(cls, folder: str | Path | Sequence[str | Path], device: torch.device | str = "cpu") -> "Committee":
        """The teacher of a folder, or those of the folders in it: as they were trained, further ones by name.

        Args:
            folder: or several such, whose teachers are taken one after the other.
            device: where their networks shall live.

        Raises:
            BadArtifact: there is none, one is damaged, or one that was named when they were trained is not finished.
            InvalidSetting: two share a name.
        """
        if not isinstance(folder, (str, Path)):
            return cls([member for one in folder for member in cls.load(one, device)])
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            return cls([Teacher.load(folder, device)])
        places = sorted(place.parent for place in folder.glob(f"*/{MANIFEST}"))
        if not places and trained_order(folder):
            told = f"is a committee whose training is not finished ({', '.join(trained_order(folder))})"
            raise BadArtifact(folder, f"{told}: run the same `dsdistill teachers` again")
        if not places:
            raise BadArtifact(folder, f"holds no teacher: no {MANIFEST} here or in a folder below (dsdistill teachers)")
        order = {name: place for place, name in enumerate(trained_order(folder))}
        unfinished = sorted(order.keys() - {place.name for place in places})
        if unfinished:
            raise BadArtifact(
                folder,
                f"is a committee without {', '.join(unfinished)}, whose training is not finished: run the same "
                f"`dsdistill teachers` again, or take the name out of {ORDER}",
            )
        places.sort(key=lambda place: order.get(place.name, len(order)))
        return cls([Teacher.load(place, device) for place in places])

    def check(self, source: ImageSource) -> None:
        """Refuse images that a member was not trained for; see `Teacher.check`."""
        for member in self:
            member.check(source)

    @overload
    def __getitem__(self, index: int) -> Teacher: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Teacher, ...]: ...

    def __getitem__(self, index: int | slice) -> Teacher | tuple[Teacher, ...]:
        return self._members[index]

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self._members)

    def __repr__(self) -> str:
        return f"Committee({', '.join(f'{one.name}: {100 * one.accuracy:.1f} %' for one in self)})"

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(member.nbytes for member in self)

    def performances(self) -> Tensor:
        """Priors (M,) of the members, in percent.

        Raises:
            InvalidSetting: of a member none is known, and there are several.
        """
        known = [member.performance for member in self]
        if len(known) == 1:
            return torch.tensor([known[0] or 0.0])
        unknown = [member.name for member in self if member.performance is None]
        if unknown:
            raise InvalidSetting(
                "performance",
                None,
                f"unknown for {', '.join(unknown)}: measure it with `dsdistill prior`, or let all vote alike",
            )
        return torch.tensor([one for one in known if one is not None])

    def weights(self, temperature: float) -> Tensor:
        """softmax(performance / temperature) (M,), as CV-DD lets its members vote; errors as in `performances`."""
        return torch.softmax(self.performances() / temperature, 0)

    @torch.no_grad()
    def logits(
        self, images: Tensor, weights: Tensor | None = None, *, batch_statistics: bool = False, parts: int = 1
    ) -> Tensor:
        """Weighted mean of the members' logits, (B, K), float32.

        Args:
            images: (B, C, H, W), float32, standardised as the members know them.
            weights: (M,), 1 in sum; None for the same of each.
            batch_statistics: batch normalisation, and nothing else, works as in training (batch-specific soft labels,
                CV-DD), each part with statistics of its own; running statistics are neither used nor moved.
            parts: nearly equal parts of the images that then pass one by one.
        """
        shares = [1 / len(self)] * len(self) if weights is None else weights.tolist()
        _, channels, height, width = images.shape
        size = default_chunk((channels, height, width), images.device)
        pieces = torch.tensor_split(images, parts) if batch_statistics else torch.split(images, size)
        total: Tensor | None = None
        for member, share in zip(self, shares, strict=True):
            with by_batch(member.network, batch_statistics):
                told = torch.cat([member.network(piece).float() for piece in pieces if len(piece)])
            total = told * share if total is None else total + told * share
        assert total is not None
        return total


def recorded_performances(folder: Path) -> list[float | None]:
    """Priors of the teachers of a folder as their manifests say, of the whole ones; nothing is loaded."""
    alone = folder / MANIFEST
    found = []
    for place in [alone] if alone.exists() else sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            found.append(storage.read_manifest(place).get("performance"))
        except BadArtifact:  # whoever uses it will be told
            continue
    return found


def trained_order(folder: Path) -> list[str]:
    """Names that `train_teachers` wrote into a folder, none where it did not.

    Raises:
        BadArtifact: the file is damaged.
    """
    if not (folder / ORDER).exists():
        return []
    told = storage.read_json(folder / ORDER)
    if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
        raise BadArtifact(folder / ORDER, "is no list of names; delete it to have teachers by alphabet")
    return told


@contextmanager
def by_batch(network: nn.Module, active: bool = True) -> Iterator[None]:
    """Batch normalisation takes the statistics of what passes, and remembers nothing; the rest of the network stays."""
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)] if active else []
    modes = [(part.training, part.track_running_stats) for part in norms]
    for part in norms:
        part.training, part.track_running_stats = True, False
    try:
        yield
    finally:
        for part, (training, tracking) in zip(norms, modes, strict=True):
            part.training, part.track_running_stats = training, tracking


_made: "WeakKeyDictionary[Shared, dict[Teachers, Committee]]" = WeakKeyDictionary()
