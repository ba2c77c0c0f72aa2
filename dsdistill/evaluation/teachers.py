"""What teachers know of the test split."""

from dsdistill.core.device import default_chunk
from dsdistill.data import ImageSource
from dsdistill.evaluation.examine import accuracy, confusion
from dsdistill.experts import Committee


def score_teachers(committee: Committee, source: ImageSource) -> dict[str, float]:
    """Accuracy of each member on the test split of ``source``, in [0, 1], by name.

    Raises:
        BadData: the source has no test split, or it is closed.
    """
    scores = {}
    for teacher in committee:
        device = next(teacher.network.parameters()).device
        test = source.test.to(device)
        scores[teacher.name] = accuracy(confusion(teacher.network, test, chunk=default_chunk(test.shape, device)))
    return scores
