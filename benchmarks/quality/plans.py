"""Which methods with which settings `matching` compares, and how they are scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from dsdistill.augmentations import flip_first
from dsdistill.engine import Synthesizer
from dsdistill.evaluation import EvaluationProtocol, get_protocol
from dsdistill.experts import Experts, FlatTraining, PlainTraining, SmoothTraining
from dsdistill.generative import Fusion, Models
from dsdistill.matching import TrajectoryMatching
from dsdistill.methods import (
    AST,
    D4M,
    DATM,
    DC,
    DM,
    DSA,
    EVLF,
    FTD,
    FYI,
    IDC,
    MGD3,
    MTT,
    NCFM,
    DataDAM,
    Diffusion,
    Herding,
    KCenter,
    KMeans,
    Minimax,
    RandomReal,
)
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Plain
from dsdistill.selection import Extractor
from dsdistill.training import TrainingRecipe


@dataclass(frozen=True)
class Plan:
    """``methods(ipc)`` are the rows by name; ``network`` and ``epochs`` replace the protocol's where they are given.

    Beside rows that FYI wraps, those of ``bases`` are compared with the row that they name. ``family`` is part of the
    name of the result, and ``default`` the protocol.
    """

    methods: Callable[[int], Mapping[str, Synthesizer]]
    family: str = "matching"
    default: str = "dsa"
    bases: Mapping[str, str] = field(default_factory=dict)
    seeds: int = 3
    networks: int = 2
    epochs: int | None = None
    network: NetworkSpec | None = None

    def protocol(self, name: str) -> EvaluationProtocol:
        """A named protocol with the plan's changes."""
        changes = {"epochs": self.epochs, "network": self.network}
        return replace(get_protocol(name), **{field: value for field, value in changes.items() if value is not None})


def _methods(
    network: NetworkSpec, extractor: Extractor, settings: Mapping[str, Mapping[str, object]], ipc: int
) -> dict[str, Synthesizer]:
    """All selection rules and methods with their settings, each with the same network and budget."""
    made: dict[str, Synthesizer] = {
        "RandomReal": RandomReal(ipc=ipc),
        "KMeans": KMeans(ipc=ipc, extractor=extractor),
        "KCenter": KCenter(ipc=ipc, extractor=extractor),
        "Herding": Herding(ipc=ipc, extractor=extractor),
    }
    for cls in (DC, DSA, DM, DataDAM, IDC, NCFM):
        made[cls.__name__] = cls(ipc=ipc, network=network, **settings.get(cls.__name__, {}))
    return made


def _followed(
    network: NetworkSpec, ipc: int, shared: Mapping[str, object], average: float, experts: Mapping[str, Experts]
) -> dict[str, Synthesizer]:
    """The methods that follow experts; ``experts`` are "plain", "flat" and "smooth" ones."""
    settings: dict[str, object] = {"ipc": ipc, "network": network, **shared}
    # Smooth experts have momentum, so their students have too: up to ten times the way for the same step size.
    slower = {name: share * float(shared[name]) for name, share in (("lr_student", 0.4), ("lr_lr", 0.1))}  # type: ignore[arg-type]
    return {
        "MTT": MTT(**settings, experts=experts["plain"]),
        "FTD": FTD(**settings, experts=experts["flat"], average=average),
        "AST": AST(**settings | slower, experts=experts["smooth"]),
        "DATM": DATM(**settings, experts=experts["flat"], guard=1.1),
    }


def _experts(count: int, epochs: int, batch_size: int, lr: float) -> dict[str, Experts]:
    shared = {"epochs": epochs, "batch_size": batch_size}
    return {
        "plain": Experts(count=count, training=PlainTraining(**shared, lr=lr)),
        "flat": Experts(count=count, training=FlatTraining(**shared, lr=lr)),
        "smooth": Experts(count=count, training=SmoothTraining(**shared, lr=lr / 6)),
    }


def _digits(ipc: int) -> dict[str, Synthesizer]:
    """8x8 grey digits: each method for a quarter of a minute or less on two cores; flips change digits, so no FYI."""
    network = NetworkSpec(width=32, depth=2)
    extractor = Extractor(network=network, training=TrainingRecipe(epochs=20, lr=0.05))
    pretraining = TrainingRecipe(epochs=15, batch_size=64, lr=0.05)
    settings = {
        "DC": {"iterations": 60, "real_batch": 64, "outer_loop": 3, "inner_epochs": 5, "init": "real"},
        "DSA": {"iterations": 60, "real_batch": 64, "outer_loop": 3, "inner_epochs": 5},
        "DM": {"iterations": 300, "real_batch": 64},
        "DataDAM": {"iterations": 300, "real_batch": 64},
        # Tiles of 4 x 4 pixels show no digit; the step size is for images of this size.
        "IDC": {
            "form": Plain(),
            "iterations": 10,
            "inner_steps": 20,
            "trained_on": 256,
            "lr_size": 8,
            "lr_images": 0.05,
        },
        "NCFM": {
            "iterations": 400,
            "real_batch": 128,
            "frequencies": 512,
            "networks": 3,
            "pretraining": pretraining,
            "lr_images": 0.01,
        },
    }
    followed = {
        "iterations": 400,
        "student_steps": 10,
        "max_start_epoch": 4,
        "lr_images": 10.0,
        "lr_student": 0.05,
        "lr_lr": 1e-4,
    }
    return _methods(network, extractor, settings, ipc) | _followed(
        network, ipc, followed, 0.98, _experts(5, epochs=5, batch_size=64, lr=0.05)
    )


def _short(ipc: int) -> dict[str, Synthesizer]:
    """CIFAR-10 with networks of half the usual width: each method for about a minute on one core.

    Those that follow experts take two, and their experts a few minutes more on a part of the images (``--per_class``).
    """
    network = NetworkSpec(width=64)
    extractor = Extractor(network=network, training=TrainingRecipe(epochs=1, lr=0.03))
    pretraining = TrainingRecipe(epochs=1, batch_size=128, lr=0.03)
    settings = {
        "DC": {"iterations": 5, "real_batch": 64, "outer_loop": 5, "inner_epochs": 10, "init": "real"},
        "DSA": {"iterations": 5, "real_batch": 64, "outer_loop": 5, "inner_epochs": 10},
        "DM": {"iterations": 200, "real_batch": 64},
        "DataDAM": {"iterations": 200, "real_batch": 64},
        "IDC": {"iterations": 1, "inner_steps": 25, "trained_on": 512},
        "NCFM": {
            "iterations": 60,
            "real_batch": 64,
            "frequencies": 512,
            "networks": 1,
            "pretraining": pretraining,
            "lr_images": 0.01,
        },
    }
    made = _methods(network, extractor, settings, ipc)
    coded = {"power": 1.0, "network": replace(network, norm="batch")}  # what the authors' code does, with as many steps
    made["DataDAM, repo"] = DataDAM(ipc=ipc, **{**settings["DataDAM"], **coded})
    followed = {
        "iterations": 100,
        "student_steps": 10,
        "max_start_epoch": 2,
        "lr_images": 300.0 * ipc,
        "lr_student": 0.02,
        "lr_lr": 1e-6,
    }
    made |= _followed(network, ipc, followed, 0.95, _experts(4, epochs=3, batch_size=128, lr=0.02))
    wrapped: dict[str, Synthesizer] = {f"FYI+{name}": FYI(base=made[name]) for name in ("DM", "DataDAM", "DSA", "MTT")}
    return made | wrapped


def _published(ipc: int) -> dict[str, Synthesizer]:
    """CIFAR-10 with the settings of papers and codes, for a GPU."""
    name = f"cifar10/ipc{ipc}"
    made: dict[str, Synthesizer] = {"RandomReal": RandomReal(ipc=ipc), "KMeans": KMeans(ipc=ipc)}
    made |= {cls.__name__: cls.preset(name) for cls in (DataDAM, DM, DSA, NCFM, DC, IDC)}
    made |= {cls.__name__: _fewer(cls.preset(name)) for cls in (MTT, FTD, AST, DATM) if name in cls.presets}
    if "MTT" in made:
        made["FYI+MTT"] = FYI(base=made["MTT"])
    for base in ("DataDAM", "DM", "DSA"):
        made[f"FYI+{base}"] = FYI(base=made[base])
        made[f"FYI+{base}, flips first"] = FYI(base=replace(made[base], augmentation=flip_first()))
    return made | {"DataDAM, repo": DataDAM.preset(f"{name}/repo")}


def _fewer(method: TrajectoryMatching) -> Synthesizer:
    """With 20 experts instead of 100: the published count takes a day."""
    return replace(method, experts=replace(method.experts, count=20))


FUSED, REPLACED = "residual", "authors' fusion"


def _drawn(models: Models, iterations: int, fusion: Fusion, ipc: int) -> dict[str, Synthesizer]:
    """Methods that draw, without fusion, with it, and with the authors' module, which has no residual."""
    fusions = {"": None, f", {FUSED}": fusion, f", {REPLACED}": replace(fusion, residual=False)}
    made: dict[str, Synthesizer] = {"RandomReal": RandomReal(ipc=ipc), "Diffusion": Diffusion(ipc=ipc, models=models)}
    for ending, one in fusions.items():
        made[f"MGD3{ending}" if one is None else f"EVLF{ending}"] = EVLF(ipc=ipc, models=models, fusion=one)
        made[f"D4M{ending}"] = D4M(ipc=ipc, models=models, fusion=one)
        made[f"Minimax{ending}"] = Minimax(ipc=ipc, models=models, fusion=one, iterations=iterations, decay=0.995)
    made["MGD3"] = MGD3(ipc=ipc, models=models)  # which an EVLF without fusion is, to the last bit
    return made


_FUSIONS = {
    f"{name}, {fusion}": "MGD3" if name == "EVLF" else name
    for name in ("EVLF", "D4M", "Minimax")
    for fusion in (FUSED, REPLACED)
}


def _drawn_digits(ipc: int) -> dict[str, Synthesizer]:
    return _drawn(Models(samples=500_000), 600, Fusion(), ipc)


def _drawn_gpu(ipc: int) -> dict[str, Synthesizer]:
    """Models that a GPU trains in about three minutes, with and without what each method adds to plain drawing."""
    models = Models(size="small", max_seconds=120)
    return {
        "RandomReal": RandomReal(ipc=ipc),
        "Diffusion": Diffusion(ipc=ipc, models=models),
        "MGD3": MGD3(ipc=ipc, models=models),
        f"EVLF, {FUSED}": EVLF(ipc=ipc, models=models),
        "Minimax": Minimax(ipc=ipc, models=models, iterations=4000, decay=0.999),
        "D4M": D4M(ipc=ipc, models=models),
    }


PLANS = {
    "drawn_gpu": Plan(
        _drawn_gpu,
        family="drawn",
        default="minimax",
        bases={f"EVLF, {FUSED}": "MGD3", "Minimax": "Diffusion"},
        networks=1,
        epochs=300,
        network=NetworkSpec(),
    ),
    "drawn": Plan(
        _drawn_digits,
        family="drawn",
        default="minimax",
        bases=_FUSIONS,
        seeds=4,
        networks=3,
        epochs=300,
        network=NetworkSpec(width=32, depth=2),
    ),
    "digits": Plan(_digits, seeds=4, networks=3, epochs=150, network=NetworkSpec(width=32, depth=2)),
    "short": Plan(_short, seeds=3, networks=1, epochs=100, network=NetworkSpec(width=64)),
    "published": Plan(_published, seeds=1, networks=5),
}
