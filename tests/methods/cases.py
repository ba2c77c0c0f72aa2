"""The smallest settings of every registered method that still do something: a run takes well under a second."""

from dataclasses import replace

from dsdistill.engine import Synthesizer
from dsdistill.experts import Experts, FlatTraining, PlainTraining, SmoothTraining, Teachers
from dsdistill.generative.fusion import Fusion
from dsdistill.generative.models import Models
from dsdistill.generative.sampling import Sampler
from dsdistill.methods import (
    AST,
    CDA,
    CVDD,
    D4M,
    DATM,
    DC,
    DM,
    DSA,
    EVLF,
    FTD,
    FYI,
    IDC,
    INFER,
    MGD3,
    MTT,
    NCFM,
    NRRDD,
    RDED,
    DataDAM,
    Diffusion,
    Herding,
    KCenter,
    KMeans,
    Minimax,
    RandomReal,
    SRe2L,
)
from dsdistill.networks import NetworkSpec
from dsdistill.selection import Extractor
from dsdistill.training import TrainingRecipe

SMALL = NetworkSpec(width=4, depth=1)
BRIEF = Extractor(network=SMALL, training=TrainingRecipe(epochs=1, batch_size=16))
FOLLOWED = {"ipc": 2, "iterations": 4, "student_steps": 3, "max_start_epoch": 2, "network": SMALL, "lr_images": 5.0}
TEACHERS = Teachers(
    networks=(NetworkSpec(width=4, depth=1, norm="batch"),), training=TrainingRecipe(epochs=1, batch_size=16)
)
TWO_TEACHERS = replace(TEACHERS, networks=(*TEACHERS.networks, NetworkSpec(width=6, depth=1, norm="batch")))
BLURRED = {"ipc": 2, "models": Models(samples=40), "sampler": Sampler(steps=3), "classes_together": 2}
GUIDED = {**BLURRED, "sampler": Sampler(kind="ddpm", steps=3), "until": 0}

CASES: dict[str, Synthesizer] = {
    "AST": AST(**FOLLOWED, experts=Experts(count=2, training=SmoothTraining(epochs=3, batch_size=12))),
    "CDA": CDA(ipc=2, iterations=4, classes_together=2, teachers=TEACHERS),
    "CVDD": CVDD(ipc=2, iterations=4, voting="equal", teachers=TWO_TEACHERS),
    "D4M": D4M(**BLURRED),
    "DataDAM": DataDAM(ipc=2, iterations=4, real_batch=4, network=NetworkSpec(width=4, depth=2)),
    "DATM": DATM(**FOLLOWED, guard=50.0, experts=Experts(count=2, training=FlatTraining(epochs=3, batch_size=12))),
    "DC": DC(ipc=2, iterations=2, outer_loop=3, inner_epochs=2, real_batch=4, batch_size=4, network=SMALL),
    "Diffusion": Diffusion(**BLURRED),
    "DM": DM(ipc=2, iterations=4, real_batch=4, network=SMALL),
    "DSA": DSA(ipc=2, iterations=2, outer_loop=3, inner_epochs=2, real_batch=4, batch_size=4, network=SMALL),
    "EVLF": EVLF(**GUIDED, fusion=Fusion(width=8, heads=2, layers=1, text_width=8, steps=2)),
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
    "INFER": INFER(ipc=2, iterations=4, teachers=TWO_TEACHERS),
    "KCenter": KCenter(ipc=2, extractor=BRIEF),
    "KMeans": KMeans(ipc=2, extractor=BRIEF),
    "MGD3": MGD3(**GUIDED),
    "Minimax": Minimax(**BLURRED, iterations=3, batch_size=4, classes_at_once=2),
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
    "NRRDD": NRRDD(ipc=2, iterations=4, teachers=TEACHERS),
    "RandomReal": RandomReal(ipc=2),
    "RDED": RDED(ipc=2, pool=6, crops=2, teachers=TEACHERS),
    "SRe2L": SRe2L(ipc=2, iterations=4, classes_together=2, problems_together=2, teachers=TEACHERS),
}
