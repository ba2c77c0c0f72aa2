"""The smallest settings of every registered method that still do something: a run takes well under a second."""

from dsdistill.engine import Synthesizer
from dsdistill.experts import Experts, FlatTraining, PlainTraining, SmoothTraining
from dsdistill.methods import (
    AST,
    DATM,
    DC,
    DM,
    DSA,
    FTD,
    FYI,
    IDC,
    MTT,
    NCFM,
    DataDAM,
    Herding,
    KCenter,
    KMeans,
    RandomReal,
)
from dsdistill.networks import NetworkSpec
from dsdistill.selection import Extractor
from dsdistill.training import TrainingRecipe

SMALL = NetworkSpec(width=4, depth=1)
BRIEF = Extractor(network=SMALL, training=TrainingRecipe(epochs=1, batch_size=16))
FOLLOWED = {"ipc": 2, "iterations": 4, "student_steps": 3, "max_start_epoch": 2, "network": SMALL, "lr_images": 5.0}

CASES: dict[str, Synthesizer] = {
    "AST": AST(**FOLLOWED, experts=Experts(count=2, training=SmoothTraining(epochs=3, batch_size=12))),
    "DataDAM": DataDAM(ipc=2, iterations=4, real_batch=4, network=NetworkSpec(width=4, depth=2)),
    "DATM": DATM(**FOLLOWED, guard=50.0, experts=Experts(count=2, training=FlatTraining(epochs=3, batch_size=12))),
    "DC": DC(ipc=2, iterations=2, outer_loop=3, inner_epochs=2, real_batch=4, batch_size=4, network=SMALL),
    "DM": DM(ipc=2, iterations=4, real_batch=4, network=SMALL),
    "DSA": DSA(ipc=2, iterations=2, outer_loop=3, inner_epochs=2, real_batch=4, batch_size=4, network=SMALL),
    "FTD": FTD(**FOLLOWED, experts=Experts(count=2, training=FlatTraining(epochs=3, batch_size=12))),
    "FYI": FYI(base=DM(ipc=2, iterations=4, real_batch=4, network=SMALL)),
    "Herding": Herding(ipc=2, extractor=BRIEF),
    "IDC": IDC(
        ipc=1,
        iterations=2,
        inner_steps=3,
        real_batch=4,
        synthetic_batch=3,
        pretraining=1,
        trained_on=8,
        batch_size=6,
        network=SMALL,
    ),
    "KCenter": KCenter(ipc=2, extractor=BRIEF),
    "KMeans": KMeans(ipc=2, extractor=BRIEF),
    "MTT": MTT(**FOLLOWED, experts=Experts(count=2, training=PlainTraining(epochs=3, batch_size=12))),
    "NCFM": NCFM(
        ipc=1,
        iterations=4,
        real_batch=4,
        frequencies=8,
        sampling="network",
        networks=2,
        pretraining=BRIEF.training,
        network=SMALL,
    ),
    "RandomReal": RandomReal(ipc=2),
}
