"""Which methods with which settings `matching` compares, and how they are scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dsdistill.augmentations import flip_first
from dsdistill.engine import Synthesizer
from dsdistill.evaluation import EvaluationProtocol, get_protocol
from dsdistill.methods import DC, DM, DSA, FYI, IDC, NCFM, DataDAM, Herding, KCenter, KMeans, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Plain
from dsdistill.selection import Extractor
from dsdistill.training import TrainingRecipe


@dataclass(frozen=True)
class Plan:
    """``methods(ipc)`` are the rows by name; ``network`` and ``epochs`` replace the protocol's where they are given."""

    methods: Callable[[int], Mapping[str, Synthesizer]]
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
    return _methods(network, extractor, settings, ipc)


def _short(ipc: int) -> dict[str, Synthesizer]:
    """CIFAR-10 with networks of half the usual width: each method for about a minute on one core."""
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
    wrapped: dict[str, Synthesizer] = {f"FYI+{name}": FYI(base=made[name]) for name in ("DM", "DataDAM", "DSA")}
    return made | wrapped


def _published(ipc: int) -> dict[str, Synthesizer]:
    """CIFAR-10 with the settings of papers and codes, for a GPU."""
    name = f"cifar10/ipc{ipc}"
    made: dict[str, Synthesizer] = {"RandomReal": RandomReal(ipc=ipc), "KMeans": KMeans(ipc=ipc)}
    made |= {cls.__name__: cls.preset(name) for cls in (DataDAM, DM, DSA, NCFM, DC, IDC)}
    for base in ("DataDAM", "DM", "DSA"):
        made[f"FYI+{base}"] = FYI(base=made[base])
        made[f"FYI+{base}, flips first"] = FYI(base=replace(made[base], augmentation=flip_first()))
    return made | {"DataDAM, repo": DataDAM.preset(f"{name}/repo")}


PLANS = {
    "digits": Plan(_digits, seeds=4, networks=3, epochs=150, network=NetworkSpec(width=32, depth=2)),
    "short": Plan(_short, seeds=3, networks=1, epochs=100, network=NetworkSpec(width=64)),
    "published": Plan(_published, seeds=1, networks=5),
}
