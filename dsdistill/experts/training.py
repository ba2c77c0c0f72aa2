"""Training a network on the real images of a run; in a rehearsal, a few steps of it."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsdistill.core.device import synchronize
from dsdistill.core.rng import Rng
from dsdistill.engine import Run, frozen
from dsdistill.training import TrainingRecipe, TrainingSet, train

_REHEARSED = 3  # steps that are timed, after a first one that is not


def train_on_real(
    run: Run,
    network: nn.Module,
    recipe: TrainingRecipe,
    rng: Rng,
    *,
    rows: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    begin: int = 0,
    after: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train ``network`` in place on the real training images of all classes, then leave it `frozen`.

    It gives way to a request to stop after each epoch. In a rehearsal of the run a few steps are made, and the time
    of the others is put down as left out.

    Args:
        rng: streams of this training alone: ``run.rng.within("pool", 3)``.
        rows: storage indices (R,) of the images to train on; all of them if None.
        optimizer: of the network's parameters, to go on with; None makes a new one.
        begin: epochs that it has behind it already.
        after: called after each epoch, with the number of those behind it, before it gives way.

    Raises:
        Stopped: the run was asked to stop.
    """
    source = run.source
    chosen = torch.arange(len(source), device=run.device) if rows is None else rows

    def fetch(places: Tensor) -> tuple[Tensor, Tensor]:
        index = chosen[places]
        return source.gather(index), source.targets[index]

    data = TrainingSet(fetch, len(chosen), source.shape, run.device)

    def watch(epoch: int, _: nn.Module) -> None:
        after(epoch)
        run.shared.give_way()

    def go(limit: int | None) -> None:
        train(
            network.requires_grad_(True),
            data,
            recipe,
            rng,
            num_classes=source.num_classes,
            mirror_safe=source.mirror_safe,
            chunk=run.chunk,
            watch=watch,
            optimizer=optimizer,
            limit=limit,
            begin=begin,
        )

    steps = (recipe.epochs - begin) * -(-len(chosen) // recipe.batch_size)
    rehearsal = run.shared.rehearsal
    if rehearsal is None or steps <= 1 + _REHEARSED:
        go(None)
    else:
        go(1)
        synchronize(run.device)
        started = time.perf_counter()
        go(_REHEARSED)
        synchronize(run.device)
        rehearsal.seconds += (time.perf_counter() - started) / _REHEARSED * (steps - 1 - _REHEARSED)
    frozen(network)
