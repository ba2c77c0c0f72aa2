"""Networks trained on the real images of a run."""

from dsdistill.experts.ahead import ExpertsEstimate, estimate_experts, train_experts
from dsdistill.experts.base import Batch, ExpertTraining, Learner
from dsdistill.experts.flat import FlatTraining
from dsdistill.experts.plain import PlainTraining
from dsdistill.experts.pool import Pool
from dsdistill.experts.smooth import SmoothTraining
from dsdistill.experts.training import train_on_real
from dsdistill.experts.trajectories import Experts, Trajectories

__all__ = [
    "Batch",
    "ExpertTraining",
    "Experts",
    "ExpertsEstimate",
    "FlatTraining",
    "Learner",
    "PlainTraining",
    "Pool",
    "SmoothTraining",
    "Trajectories",
    "estimate_experts",
    "train_experts",
    "train_on_real",
]
