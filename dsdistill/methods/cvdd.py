"""CV-DD (Cui et al., Dataset Distillation via Committee Voting, arXiv 2501.07575).

SRe2L++ with a committee. For each image index two teachers are drawn, and the better a teacher was when a set was
distilled with it alone (its prior performance α_k, in percent), the more its loss counts::

    w = softmax(α / τ) over those drawn, τ = 5,     L = Σ_k w_k ( CE_k + α_bn R_k )

with CE_k and R_k as in SRe2L (R_k has its own factor 10 on the first layer). Labels are those of the whole committee,
with w at temperature 10, by the statistics of each half batch (batch-specific soft labels): protocol "cvdd".

Pairs, as in the authors' code: where every pair can be had once, each has an index, in lexicographic order (five
teachers at ipc 10); else each index draws one at random. At ipc 1 it is the two of highest prior, or those that are
named (`fixed`): the code takes others for CIFAR-10 and ImageNette (MobileNetV2 and DenseNet-121) and CIFAR-100
(ShuffleNetV2 and MobileNetV2), which are presets.

Departures from the authors' code: as in SRe2L. The generator of its start images ("medium" patches) was not published;
`dsdistill.matching.patches` says what is done instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Preset, Run
from dsdistill.errors import InvalidSetting
from dsdistill.experts import RECIPES, Committee, Teachers, teacher_name
from dsdistill.matching.fitting import LEAST_SHARE
from dsdistill.matching.recovery import Recovery, Voter
from dsdistill.networks import NetworkSpec

MODELS = ("resnet18", "resnet50", "shufflenet_v2_x0_5", "mobilenet_v2", "densenet121")
"""The committee of the paper at 32 and 64 pixels, in its order, as torchvision names them."""
_SMALL = Teachers(
    networks=tuple(NetworkSpec(f"torchvision:{name}", stem="small") for name in MODELS), training=RECIPES["cvdd_cifar"]
)
_LARGE = Teachers(networks=tuple(NetworkSpec(f"torchvision:{name.replace('x0_5', 'x1_0')}") for name in MODELS))
_NETTE = Teachers(networks=_LARGE.networks, training=RECIPES["cvdd_imagenette"])


@dataclass(frozen=True, kw_only=True)
class CVDD(Recovery):
    """Committee voting: recovery by pairs of teachers, each weighted by what it was worth alone."""

    paper: ClassVar[str] = "Cui et al., Dataset Distillation via Committee Voting, arXiv 2501.07575"
    alone: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]] = {
        "small": Preset("authors' code, 32 and 64 pixels", {"shift": 4, "teachers": _SMALL}),
        **{
            f"{data}/ipc1": Preset(f"authors' code, {data} at IPC 1", {"ipc": 1, "fixed": pair, **settings})
            for data, pair, settings in (
                ("cifar10", ("mobilenet_v2", "densenet121"), {"shift": 4, "teachers": _SMALL}),
                ("cifar100", ("shufflenet_v2", "mobilenet_v2"), {"shift": 4, "teachers": _SMALL}),
                ("imagenette", ("mobilenet_v2", "densenet121"), {"shift": 32, "teachers": _NETTE}),
            )
        },
        "large": Preset(
            "authors' code, 224 pixels; on ImageNet-1K teachers have the weights of torchvision",
            {"shift": 32, "teachers": _LARGE},
        ),
    }

    voting: Literal["prior", "equal", "random"] = "prior"
    """Weights of the drawn teachers: by prior performance, the same, or drawn for each index."""
    drawn: Annotated[int, Ge(1)] = 2
    """Teachers drawn for each image index."""
    temperature: Annotated[float, Gt(0)] = 5.0
    """τ of the vote by prior performance, in percent."""
    fixed: tuple[str, ...] = ()
    """Names of the teachers that recover every index, instead of drawn ones; or parts of names that tell them apart."""
    init: Literal["noise", "patches"] = "patches"
    """Where images start: from mosaics of real patches of middling difficulty, or from N(0, 1)."""

    teachers: Teachers = _SMALL
    """The committee; with a vote by prior performance, a folder whose teachers have one (`dsdistill prior`)."""

    def check(self, source: ImageSource) -> None:
        """Refuse what `Recovery.check` refuses, and a vote that cannot be held, before a teacher is trained.

        Raises:
            BadData, InvalidSetting: naming the place and the mend.
        """
        super().check(source)
        if self.teachers.folder is None and self.voting == "prior":
            raise InvalidSetting(
                "CVDD.voting",
                self.voting,
                "teachers without a folder have no prior performance: make one (dsdistill teachers, dsdistill prior) "
                "and name it as teachers.folder, or let them vote 'equal'",
            )
        if self.teachers.folder is None and self.fixed:
            self._named([teacher_name(spec) for spec in self.teachers.networks])
        elif self.teachers.folder is None and len(self.teachers.networks) < self.drawn:
            raise InvalidSetting(
                "CVDD.drawn",
                self.drawn,
                f"the committee has {len(self.teachers.networks)}: name more teachers.networks",
            )

    def least_share(self, iteration: int) -> float:
        return LEAST_SHARE

    def prepare(self, run: Run) -> None:
        committee = Committee.of(run, self.teachers)
        if not self.fixed and len(committee) < self.drawn:
            raise InvalidSetting("CVDD.drawn", self.drawn, f"the committee has {len(committee)} teachers")
        self._named([teacher.name for teacher in committee])
        if self.voting == "prior":
            committee.performances()  # refuses before any work what is unknown
        super().prepare(run)

    def voters(self, run: Run, index: int) -> tuple[Voter, ...]:
        committee, draws = Committee.of(run, self.teachers), run.rng.scoped("").within("committee", index)
        members = self.members(committee, index, draws)
        if self.voting == "prior":
            weights = torch.softmax(committee.performances()[list(members)] / self.temperature, 0)
        elif self.voting == "random":
            weights = torch.rand(len(members), generator=draws.at("weights", device="cpu"))
            weights = weights / weights.sum()
        else:
            weights = torch.full((len(members),), 1 / len(members))
        return tuple(Voter(*pair) for pair in zip(members, weights.tolist(), strict=True))

    def members(self, committee: Committee, index: int, draws: Rng) -> tuple[int, ...]:
        """Places in the committee of those that recover the images of an index."""
        if self.fixed:
            return self._named([teacher.name for teacher in committee])
        choices = list(combinations(range(len(committee)), self.drawn))
        if self.ipc == 1 and self.voting == "prior":
            best = torch.sort(committee.performances(), descending=True, stable=True).indices[: self.drawn]
            return tuple(sorted(best.tolist()))
        if self.ipc == len(choices):
            return choices[index]
        return choices[int(torch.randint(len(choices), (), generator=draws.at("members", device="cpu")))]

    def _named(self, names: Sequence[str]) -> tuple[int, ...]:
        """Places of the teachers in `fixed` among those of these names."""
        places = []
        for part in self.fixed:
            found = [place for place, name in enumerate(names) if part == name]
            found = found or [place for place, name in enumerate(names) if part in name]
            if len(found) != 1 or found[0] in places:
                allowed = f"part of one name among {', '.join(names)}, each named once"
                raise InvalidSetting("CVDD.fixed", part, allowed)
            places += found
        return tuple(sorted(places))
