"""With which step size networks are trained: that of the protocol, or one that the set itself carries."""

import logging
import math
from collections.abc import Iterable

from torch import Tensor

from dsdistill.errors import BadData
from dsdistill.exchange.arrays import LEARNED_LR
from dsdistill.protocols import EvaluationProtocol
from dsdistill.synthetic import SyntheticDataset

logger = logging.getLogger("dsdistill")


def step_sizes(protocol: EvaluationProtocol, synthetic: SyntheticDataset, rows: Iterable[str]) -> dict[str, float]:
    """The initial step size of each row. A learned one is the set's own: baselines keep that of the protocol.

    A learned step size that the protocol does not use is named in a warning.

    Raises:
        BadData: the protocol would use the set's step size, but it is not one positive, finite number.
    """
    sizes = dict.fromkeys(rows, protocol.lr)
    learned = synthetic.learned.get(LEARNED_LR)
    if learned is None:
        return sizes
    if protocol.learned_lr:
        sizes["synthetic"] = _usable(learned, protocol)
    else:
        shown = ", ".join(f"{value:.4g}" for value in learned.flatten().tolist())
        logger.warning("the set carries a learned step size (%s), which protocol %s does not use", shown, protocol.name)
    return sizes


def _usable(learned: Tensor, protocol: EvaluationProtocol) -> float:
    values = learned.flatten().tolist()
    if len(values) != 1 or not math.isfinite(values[0]) or values[0] <= 0:
        raise BadData(
            f"the set carries the learned step size {values[0] if len(values) == 1 else values}, but protocol "
            f"{protocol.name} trains with one that is a positive, finite number; learned_lr=False trains with the "
            f"protocol's own, {protocol.lr:.4g}"
        )
    return float(values[0])
