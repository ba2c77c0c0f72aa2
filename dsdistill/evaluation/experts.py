"""What experts of trajectory methods have learned: their accuracy on the test split."""

from dsdistill.core.device import default_chunk
from dsdistill.data import ImageSource
from dsdistill.engine import frozen
from dsdistill.evaluation.examine import accuracy, confusion
from dsdistill.evaluation.statistics import Score
from dsdistill.experts import Trajectories


def score_experts(trajectories: Trajectories, source: ImageSource, *, most: int = 5) -> Score:
    """Accuracies of the last snapshots of the first ``most`` experts on the test split of ``source``.

    A network with batch normalisation takes the statistics of the test images that pass together, as no others are
    kept.

    Raises:
        BadData: the source has no test split, or it is closed.
    """
    values, network, test = [], trajectories.network, source.test
    for index in range(min(most, trajectories.count)):
        theta = trajectories.snapshots(index, [trajectories.epochs])[0]
        module, images = network.load(theta), test.to(theta.device)
        values.append(accuracy(confusion(module, images, chunk=default_chunk(images.shape, theta.device))))
        frozen(module)  # `confusion` leaves dropout in the mode of the whole
    return Score(tuple(values))
