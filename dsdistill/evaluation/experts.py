"""What experts of trajectory methods have learned: their accuracy on the test split."""

import torch
from torch import Tensor, nn

from dsdistill.core.device import default_chunk
from dsdistill.data import ImageSource
from dsdistill.evaluation.statistics import Score
from dsdistill.experts import Trajectories
from dsdistill.networks.passing import pass_rows, takes_batch_statistics
from dsdistill.networks.probe import evaluation_mode


def score_experts(trajectories: Trajectories, source: ImageSource, *, most: int = 5) -> Score:
    """Accuracies of the last snapshots of the first ``most`` experts on the test split of ``source``.

    A network with batch normalisation takes the statistics of the test images that pass together, as no others are
    kept; they pass in a random order, always the same one.

    Raises:
        BadData: the source has no test split, or it is closed.
    """
    values, network, test = [], trajectories.network, source.test
    for index in range(min(most, trajectories.count)):
        theta = trajectories.snapshots(index, [trajectories.epochs])[0]
        module, images = network.load(theta), test.to(theta.device)
        with evaluation_mode(module):
            values.append(int((_predictions(module, images) == images.targets).sum()) / len(images))
    return Score(tuple(values))


def _predictions(module: nn.Module, images: ImageSource) -> Tensor:
    def predict(rows: Tensor) -> Tensor:
        predicted: Tensor = module(images.gather(rows)).argmax(1)
        return predicted

    mixed = torch.Generator().manual_seed(0) if takes_batch_statistics(module) else None
    return pass_rows(predict, len(images), default_chunk(images.shape, images.device), images.device, mixed)
