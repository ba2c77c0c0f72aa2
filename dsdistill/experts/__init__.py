"""Networks trained on the real images of a run."""

from dsdistill.experts.ahead import ExpertsEstimate, estimate_experts, train_experts
from dsdistill.experts.base import Batch, ExpertTraining, Learner
from dsdistill.experts.committee import SQUEEZE, Committee, Teachers, by_batch
from dsdistill.experts.flat import FlatTraining
from dsdistill.experts.importing import import_teacher
from dsdistill.experts.plain import PlainTraining
from dsdistill.experts.pool import Pool
from dsdistill.experts.schooling import schooled, teacher_name, teacher_spec
from dsdistill.experts.smooth import SmoothTraining
from dsdistill.experts.squeeze import (
    RECIPES,
    TeachersEstimate,
    estimate_teachers,
    get_recipe,
    keep_teacher,
    train_teachers,
)
from dsdistill.experts.teacher import Teacher, filled, read_weights, recognised
from dsdistill.experts.training import train_on_real
from dsdistill.experts.trajectories import Experts, Trajectories

__all__ = [
    "RECIPES",
    "SQUEEZE",
    "Batch",
    "Committee",
    "ExpertTraining",
    "Experts",
    "ExpertsEstimate",
    "FlatTraining",
    "Learner",
    "PlainTraining",
    "Pool",
    "SmoothTraining",
    "Teacher",
    "Teachers",
    "TeachersEstimate",
    "Trajectories",
    "by_batch",
    "estimate_experts",
    "estimate_teachers",
    "filled",
    "get_recipe",
    "import_teacher",
    "keep_teacher",
    "read_weights",
    "recognised",
    "schooled",
    "teacher_name",
    "teacher_spec",
    "train_experts",
    "train_on_real",
    "train_teachers",
]
