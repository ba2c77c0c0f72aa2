"""The unit of a study: one method with its budget, one synthesis seed, one way of scoring, on one set of images.

A cell is known by a sha256 of everything that decides its result, so what was done once is found again, and whatever
changes makes a new cell. Versions, devices and threads, which touch only the last bits, are recorded instead.
"""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from dsdistill.core.config import require_instance, to_dict, validate
from dsdistill.core.storage import sha256
from dsdistill.data import ImageSource, load
from dsdistill.engine import Synthesizer
from dsdistill.errors import BadData, InvalidSetting, UnknownName
from dsdistill.evaluation import EvaluationProtocol
from dsdistill.experts import Committee
from dsdistill.methods import RandomReal, create_method

_FORMAT = 1
# Where images lie and are kept does not decide what they are.
_PLACES = ("root", "download", "storage", "device")


@dataclass(frozen=True)
class DataReference:
    """Images by name or folder with options of `dsdistill.data.load`, or an `ImageSource`, as a task carries them."""

    data: str | Path | ImageSource
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.data, ImageSource) and self.options:
            raise InvalidSetting("load", dict(self.options), "only data by name or folder are loaded; this is a source")
        known = inspect.signature(load).parameters.keys() - {"data"}
        for name in sorted(self.options.keys() - known):
            raise UnknownName("option of load", name, sorted(known))

    @property
    def key(self) -> str:
        """Tells references of one study apart."""
        if isinstance(self.data, ImageSource):
            return f"source {self.data.fingerprint}"
        return f"{self.data} {sorted(self.options.items())}"

    def open(self) -> ImageSource:
        """The images. Errors as `dsdistill.data.load`."""
        return self.data if isinstance(self.data, ImageSource) else load(self.data, **self.options)

    def describe(self, source: ImageSource) -> dict[str, Any]:
        """What decides the images that ``source`` was opened as, in plain containers; part of a cell's key.

        Test images are known by the options alone: they are not opened for this.
        """
        loading = {}
        if not isinstance(self.data, ImageSource):
            parameters = inspect.signature(load).parameters
            chosen = {name: p.default for name, p in parameters.items() if name not in ("data", *_PLACES)}
            loading = {name: self.options.get(name, default) for name, default in chosen.items()}
        # The digest of whitening matrices is left out: it holds the last bits of this machine's arithmetic.
        standardized = {name: value for name, value in source.normalization.to_json().items() if name != "digest"}
        return {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "normalization": standardized,
            "mirror_safe": source.mirror_safe,
            "loading": to_dict(loading),
        }


@dataclass(frozen=True)
class Asked:
    """Teachers of a study: where they are, and by whose digests they are known again."""

    folders: tuple[str, ...]
    digests: tuple[str, ...]
    performances: tuple[float | None, ...]

    @classmethod
    def of(cls, folders: str | Path | Sequence[str | Path]) -> "Asked":
        """Those of the folders now. Errors as `Committee.load`."""
        return cls._loaded(folders)[0]

    @classmethod
    def _loaded(cls, folders: str | Path | Sequence[str | Path]) -> "tuple[Asked, Committee]":
        several = [folders] if isinstance(folders, (str, Path)) else list(folders)
        for folder in several:
            require_instance("teachers", folder, (str, Path), "a folder of teachers: other processes open it, too")
        committee = Committee.load(several)
        asked = cls(
            tuple(str(Path(folder).absolute()) for folder in several),
            tuple(one.digest for one in committee),
            tuple(one.performance for one in committee),
        )
        return asked, committee

    def load(self) -> Committee:
        """The teachers.

        Raises:
            BadData: they are others than when the study began. And what `Committee.load` does.
        """
        found, committee = self._loaded(self.folders)
        if found != self:
            raise BadData(
                f"the teachers in {', '.join(self.folders)}, or their priors, are others than when the study began; "
                "run the study again"
            )
        return committee

    def to_json(self, voting: bool) -> list[dict[str, Any]]:
        """What of them decides a result, wherever they are; priors only where several vote by them."""
        known = zip(self.digests, self.performances, strict=True)
        by_prior = voting and len(self.digests) > 1
        return [{"digest": digest, "performance": prior if by_prior else None} for digest, prior in known]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the sets of a study are scored; see `dsdistill.evaluation.evaluate`."""

    protocol: EvaluationProtocol
    """How networks are trained."""
    repeats: Annotated[int, Ge(1)] = 5
    """Fresh networks per row."""
    baselines: tuple[str, ...] = ("random",)
    """Rows beside the set's."""
    whole_epochs: Annotated[int, Ge(1)] | None = None
    """Epochs of the whole-training-set row, None for the protocol's."""
    seed: int | None = None
    """Seed of networks and random images; None for the cell's own, so that seeds are independent of one another."""
    teachers: Asked | None = None
    """Who is asked about sets and random images, where the protocol learns from teachers."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Cell:
    """One unit of a study.

    ``data`` is what `DataReference.describe` says of the images, ``own`` the teachers in the folder that the method
    names.
    """

    data: Mapping[str, Any]
    method: Synthesizer
    seed: int
    scoring: Scoring
    own: Asked | None = None

    @cached_property
    def key(self) -> str:
        """sha256 of everything that decides the result; the same in every process."""
        canonical = json.dumps({"format": _FORMAT, **self.describe()}, sort_keys=True, separators=(",", ":"))
        return sha256(canonical.encode())

    @property
    def ipc(self) -> int:
        """Budget in stored images per class."""
        return int(self.method.ipc)  # type: ignore[attr-defined]  # `with_ipc` has made sure of it

    @property
    def whole(self) -> bool:
        """Whether this cell is there for the score of the whole training set, and for nothing else."""
        return "whole" in self.scoring.baselines

    @property
    def evaluation_seed(self) -> int:
        """Seed of networks and of random images."""
        return self.seed if self.scoring.seed is None else self.scoring.seed

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, in plain containers."""
        scoring = self.scoring
        return {
            "data": dict(self.data),
            "method": to_dict(self.method) if self.own is None else _with_digests(self.method, self.own),
            "seed": self.seed,
            "evaluation": {
                "protocol": to_dict(scoring.protocol),
                "repeats": scoring.repeats,
                "seed": self.evaluation_seed,
                "baselines": sorted(scoring.baselines),
                "whole_epochs": scoring.whole_epochs if self.whole else None,
                **({} if scoring.teachers is None else {"teachers": asked_json(scoring)}),
            },
        }

    def check(self, source: ImageSource) -> None:
        """Refuse what would fail for certain, before any work.

        Raises:
            BadData: a class is smaller than the budget, there is no test split, or what else the method refuses.
            InvalidSetting: the method or the network does not fit the images.
        """
        if not source.has_test:
            raise BadData(f"{source.name!r} has no test split to score on; load it with one")
        self.scoring.protocol.network.check(source.shape, source.num_classes)
        self.method.check(source.train_only())


def named_methods(methods: str | Synthesizer | Iterable[str | Synthesizer]) -> list[Synthesizer]:
    """Methods by name or instance, as instances; a name stands for its default settings.

    Raises:
        UnknownName: with the nearest known name.
        InvalidSetting: no method at all.
    """
    several = [methods] if isinstance(methods, (str, Synthesizer)) else list(methods)
    if not several:
        raise InvalidSetting("methods", several, "at least one method, by name or instance")
    for method in several:
        if not isinstance(method, (str, Synthesizer)):
            raise InvalidSetting(
                "methods", method, "names of methods, or instances such as dd.methods.DM(iterations=9)"
            )
    return [create_method(method) if isinstance(method, str) else method for method in several]


def make_cells(
    data: Mapping[str, Any],
    methods: Iterable[Synthesizer],
    *,
    budgets: Iterable[int],
    seeds: Iterable[int],
    scoring: Scoring,
) -> dict[str, Cell]:
    """All cells of a grid by key: whole curves of the first seed first, and the whole-set row last.

    The whole training set is scored once, beside a set of one random image per class that nothing is made of.
    """
    rows = tuple(row for row in scoring.baselines if row != "whole")
    budgets, seeds = sorted(set(budgets)), list(dict.fromkeys(seeds))
    variants = [method.with_ipc(ipc) for ipc in budgets for method in methods]
    owned = [own_teachers(variant) for variant in variants]
    cells = [
        Cell(data, variant, seed, replace(scoring, baselines=rows, whole_epochs=None), own)
        for seed in seeds
        for variant, own in zip(variants, owned, strict=True)
    ]
    if "whole" in scoring.baselines:
        cells.append(Cell(data, RandomReal(ipc=1), seeds[0], replace(scoring, baselines=("whole",))))
    return {cell.key: cell for cell in cells}


def scoring_json(scoring: Scoring) -> dict[str, Any]:
    """A grid's way of scoring, in plain containers."""
    told = {**asdict(scoring), "protocol": to_dict(scoring.protocol), "baselines": list(scoring.baselines)}
    return told | {"teachers": None if scoring.teachers is None else asked_json(scoring)}


def asked_json(scoring: Scoring) -> list[dict[str, Any]]:
    """What of a study's teachers decides a result."""
    assert scoring.teachers is not None
    return scoring.teachers.to_json(scoring.protocol.vote_temperature is not None)


def own_teachers(method: Synthesizer) -> Asked | None:
    """Those in the folder that a method, or the one it wraps, names; None where it names none.

    Raises:
        BadArtifact: as `Committee.load`.
    """
    teachers = getattr(getattr(method, "base", method), "teachers", None)
    folder = getattr(teachers, "folder", None)
    return None if folder is None else Asked.of(folder)


def _with_digests(method: Any, own: Asked) -> dict[str, Any]:
    """Settings of a method, in plain containers, with what its teachers are in the place of where they are."""
    plain = dict(to_dict(method))
    if "base" in plain:
        return plain | {"base": _with_digests(method.base, own)}
    return plain | {"teachers": {**plain["teachers"], "folder": own.to_json(True)}}
