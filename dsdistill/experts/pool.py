"""A pool of networks trained on the real images of a run, each kept as it was before and after.

NCFM (Wang et al., arXiv 2502.20653) looks at images with networks between the two: w = l·w_initial + (1 − l)·w_final.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dsdistill.core.config import settings_digest
from dsdistill.engine import Run, Shared
from dsdistill.errors import InvalidSetting
from dsdistill.experts.training import train_on_real
from dsdistill.networks import NetworkSpec, embed
from dsdistill.training import TrainingRecipe

logger = logging.getLogger("dsdistill")
_pools: "WeakKeyDictionary[Shared, dict[tuple[NetworkSpec, TrainingRecipe, int], Pool]]" = WeakKeyDictionary()


class Pool:
    """``size`` networks of one make, their weights resident on the run's device as flat vectors.

    Network i is kept as `member_name` says among what the jobs of the run share, so an interrupted pool goes on where
    it was. It has streams of its own, so it does not depend on how many others there are. In a rehearsal one is
    trained, a little, and the others are counted.

    The modules that `mix` and `final` return are two, refilled at each call, `frozen` as `dsdistill.engine` says.

    Attributes:
        width: length D of the networks' features.

    Args:
        run: of the whole or of any job; all of them see the same pool.
        spec: what to build.
        recipe: how to train it.
        size: number of networks.

    Raises:
        InvalidSetting: a network stopped being finite while it was trained.
        Stopped: the run was asked to stop.
        OutOfSpace: the disk is full.
    """

    def __init__(self, run: Run, spec: NetworkSpec, recipe: TrainingRecipe, size: int) -> None:
        name = pool_name(spec, recipe)
        self._mixed, self._final = (run.network(spec, 0, name=f"{name}/{use}") for use in ("mixed", "final"))
        self._weights = [
            (kept["initial"].to(run.device), kept["final"].to(run.device)) for kept in _made(run, spec, recipe, size)
        ]
        with torch.no_grad():
            blank = torch.zeros(2, *run.source.shape, device=run.device)
            self.width = embed(self.final(0), blank).shape[1]

    @classmethod
    def of(cls, run: Run, spec: NetworkSpec, recipe: TrainingRecipe, size: int) -> "Pool":
        """The pool of a run, made at the first call; arguments and errors as in `Pool`."""
        pools = _pools.setdefault(run.shared, {})
        if (spec, recipe, size) not in pools:
            pools[spec, recipe, size] = cls(run, spec, recipe, size)
        return pools[spec, recipe, size]

    def __len__(self) -> int:
        return len(self._weights)

    def mix(self, index: int, share: float) -> nn.Module:
        """Network ``index`` with weights share·initial + (1 − share)·final.

        Running statistics of batch norms are mixed alike, but in training mode nothing reads them.
        """
        initial, final = self._weights[index]
        return _fill(self._mixed, torch.lerp(final, initial, share))

    def final(self, index: int) -> nn.Module:
        """Network ``index`` as it was after training."""
        return _fill(self._final, self._weights[index][1])


def pool_name(spec: NetworkSpec, recipe: TrainingRecipe) -> str:
    """Of a pool's streams and of what is kept: two pools in one run must not be mixed up."""
    return f"pool-{settings_digest([spec, recipe])}"


def member_name(spec: NetworkSpec, recipe: TrainingRecipe, index: int) -> str:
    """Under which `Shared` keeps the weights of network ``index`` before and after training, "initial" and "final"."""
    return f"{pool_name(spec, recipe)}/{index}"


def _made(run: Run, spec: NetworkSpec, recipe: TrainingRecipe, size: int) -> list[Mapping[str, Tensor]]:
    rehearsal = run.shared.rehearsal
    if rehearsal is None:
        return [_member(run, spec, recipe, index) for index in range(size)]
    begin, seconds, disk = time.perf_counter(), rehearsal.seconds, rehearsal.disk
    first = _member(run, spec, recipe, 0)
    rehearsal.seconds += (size - 1) * (time.perf_counter() - begin + rehearsal.seconds - seconds)
    rehearsal.disk += (size - 1) * (rehearsal.disk - disk)
    return [first, *({key: tensor.clone() for key, tensor in first.items()} for _ in range(size - 1))]


def _member(run: Run, spec: NetworkSpec, recipe: TrainingRecipe, index: int) -> Mapping[str, Tensor]:
    """Weights of network ``index`` before and after training: found, or made."""

    def make() -> dict[str, Tensor]:
        rng, source = run.rng.scoped("").within(pool_name(spec, recipe), index), run.source  # no job's own
        network = spec.build(source.shape, source.num_classes, generator=rng.at("network"), device=run.device)
        initial = _flat(network)
        logger.info("training network %d of the pool on the real images, %d epochs", index + 1, recipe.epochs)
        train_on_real(run, network, recipe, rng)
        final = _flat(network)
        if not bool(torch.isfinite(final).all()):
            raise InvalidSetting("lr", recipe.lr, f"network {index} of the pool diverged in training: lower it")
        return {"initial": initial, "final": final}

    return run.shared.get(member_name(spec, recipe, index), make)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers in their order, less those that count: a mean of counters means nothing."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            yield tensor


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in _tensors(network)])


@torch.no_grad()
def _fill(network: nn.Module, weights: Tensor) -> nn.Module:
    targets = list(_tensors(network))
    for target, values in zip(targets, torch.split(weights, [one.numel() for one in targets]), strict=True):
        target.copy_(values.view(target.shape))
    return network
