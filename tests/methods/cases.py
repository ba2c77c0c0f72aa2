"""The smallest settings of every registered method that still do something: a run takes well under a second."""

from dsdistill.engine import Synthesizer
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec

SMALL = NetworkSpec(width=4, depth=1)

CASES: dict[str, Synthesizer] = {
    "DM": DM(ipc=2, iterations=4, real_batch=4, network=SMALL),
    "RandomReal": RandomReal(ipc=2),
}
