"""Training experts, epoch by epoch: one by one, or several of one make as one stacked computation.

All draws of an epoch come from streams of the expert and the epoch, made on the CPU: an expert that goes on after an
interruption is, on one machine, the same to the last bit, and it starts equally on every device. Experts of one seed
start equally and see the same images in the same order whatever their training is.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import vmap

from dsdistill.core.device import synchronize
from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.engine import Run
from dsdistill.errors import InvalidSetting
from dsdistill.experts.base import Batch, ExpertTraining, Learner
from dsdistill.experts.shards import Expert
from dsdistill.networks import FlatNetwork, NetworkSpec, has_batchnorm
from dsdistill.networks.rules import SGD, Moments

WARM_UP, TIMED = 1, 3
"""Steps that are not timed, and steps after them that are, to learn how long a training takes."""


class Pace:
    """Learns how long a step takes from the first few, and says so.

    Attributes:
        steps: made so far.
        seconds: of one step; None before it is known.
    """

    def __init__(self, device: torch.device, tell: Callable[[float], None] = lambda _: None) -> None:
        self._device, self._tell = device, tell
        self.steps, self._begin = 0, 0.0
        self.seconds: float | None = None

    def tick(self) -> None:
        """A step was made."""
        self.steps += 1
        if self.steps in (WARM_UP, WARM_UP + TIMED):
            synchronize(self._device)
            now = time.perf_counter()
            if self.steps > WARM_UP:
                self.seconds = (now - self._begin) / TIMED
                self._tell(self.seconds)
            self._begin = now


@dataclass
class Trainer:
    """Makes experts of one make.

    Args:
        run: whose source they are trained on; nothing is drawn from its streams.
        training: how.
        spec: what is trained.
        network: of that make, on the run's device, without dropout and running statistics.
        dtype: of snapshots.
        seed: of the experts.
        compiled: see `Experts`.
    """

    run: Run
    training: ExpertTraining
    spec: NetworkSpec
    network: FlatNetwork
    dtype: torch.dtype
    seed: int
    compiled: bool = False
    rule: SGD = field(init=False)

    def __post_init__(self) -> None:
        self.rule = SGD(momentum=self.training.momentum, weight_decay=self.training.weight_decay)
        suited = self.training.augmentation.suited(self.run.source.mirror_safe) if self.training.augmentation else None
        self._augmentation = suited
        self._directions: dict[int, Callable[..., Tensor]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last batch may be smaller."""
        return -(-len(self.run.source) // self.training.batch_size)

    def fresh(self, index: int) -> Expert:
        """Expert ``index`` before training."""
        source = self.run.source
        built = self.spec.build(
            source.shape, source.num_classes, generator=self._rng(index).at("network"), device=self.run.device
        )
        theta = FlatNetwork(built).vector().cpu()
        velocity = torch.zeros_like(theta) if self.training.momentum else None
        return Expert(index, [theta.to(self.dtype, copy=True)], theta, velocity)

    def epoch(self, experts: Sequence[Expert], pace: Pace, *, limit: int | None = None) -> None:
        """One more epoch of experts that have as many behind them; they stay as they are if it is not finished.

        Args:
            pace: ticks after each step.
            limit: make so many steps only.

        Raises:
            InvalidSetting: an expert stopped being finite, or the network cannot be stacked.
        """
        rng, number = self._rng(experts[0].index), experts[0].epochs
        with isolated_global_rng(self.run.device):  # of which somebody's network may draw
            seed_global(rng.integer("global", number), self.run.device)
            self._add(experts, *self._trained(experts, number, pace, limit))

    def _trained(self, experts: Sequence[Expert], number: int, pace: Pace, limit: int | None) -> tuple[Tensor, Moments]:
        """Parameters and velocities after epoch ``number``, those of several experts stacked."""
        training = self.training
        theta = self._stacked([expert.theta for expert in experts])
        moments: Moments = ()
        if training.momentum:
            fresh = training.restarts(number)
            kept = [expert.velocity for expert in experts if expert.velocity is not None]
            moments = (torch.zeros_like(theta) if fresh else self._stacked(kept),)
        rate = torch.tensor(training.learning_rate(number), dtype=theta.dtype, device=theta.device)
        factor = torch.tensor(training.loss_factor(number), dtype=theta.dtype, device=theta.device)
        for step, batch in enumerate(self._batches(experts, number)):
            if step == limit:
                break
            direction = self._direction(theta, batch, factor, len(experts))
            # Velocities begin as zeros, so no step needs to be told apart as the first.
            theta, moments = self.rule.step(theta, direction, moments, rate, 1)
            pace.tick()
        return theta, moments

    def _direction(self, theta: Tensor, batch: Batch, factor: Tensor, count: int) -> Tensor:
        if count not in self._directions:
            self._directions[count] = self._directed(count)
        try:
            return self._directions[count](theta, *batch, factor)
        except (RuntimeError, ValueError) as error:
            if self.compiled and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                told = f"a step of this network cannot be compiled here ({str(error).splitlines()[0]})"
                raise InvalidSetting("Experts.compiled", True, f"{told}: false trains without") from error
            if count == 1 or "vmap" not in str(error):
                raise
            allowed = f"this network cannot be stacked ({str(error).splitlines()[0]}): 1 trains experts one by one"
            raise InvalidSetting("Experts.together", count, allowed) from error

    def _directed(self, count: int) -> Callable[..., Tensor]:
        """The recipe's direction as a function of θ, the tensors of a batch and the factor, for ``count`` experts."""
        module, training = self.network.module, self.training
        chunk = None if has_batchnorm(module) else max(1, self.run.chunk // count)
        pure = self.compiled or count > 1
        # No tensor has a memory format inside vmap, and a compiler chooses it.
        learner = Learner(self.network if pure else _ChannelsLast(module), chunk, pure=pure)

        def direction(theta: Tensor, clean: Tensor, shown: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
            return training.direction(learner, theta, Batch(clean, shown, targets), factor)

        wanted: Callable[..., Tensor] = direction if count == 1 else vmap(direction, in_dims=(0, 0, 0, 0, None))
        return torch.compile(wanted, dynamic=False) if self.compiled else wanted

    def _batches(self, experts: Sequence[Expert], epoch: int) -> Iterator[Batch]:
        """Mini-batches of an epoch; those of several experts are stacked, (K, B, ...)."""
        source, device = self.run.source, self.run.device
        rngs = [self._rng(expert.index) for expert in experts]
        views = [rng.at("views", epoch) for rng in rngs]
        orders = [
            torch.randperm(len(source), generator=rng.at("order", epoch)).to(device, non_blocking=True) for rng in rngs
        ]
        parts = [torch.split(order, self.training.batch_size) for order in orders]
        for rows in zip(*parts, strict=True):
            batches = [self._shown(mine, generator) for mine, generator in zip(rows, views, strict=True)]
            yield batches[0] if len(batches) == 1 else Batch(*map(torch.stack, zip(*batches, strict=True)))

    def _shown(self, rows: Tensor, generator: torch.Generator) -> Batch:
        clean, targets = self.run.source.gather(rows), self.run.source.targets[rows]
        if self._augmentation is None:
            return Batch(clean, clean, targets)
        record = self._augmentation.sample(
            len(rows), self.run.source.shape, generator, per="image", device=self.run.device
        )
        return Batch(clean, self._augmentation.apply(clean, record), targets)

    def _add(self, experts: Sequence[Expert], theta: Tensor, moments: Moments) -> None:
        ends, velocities = (
            theta.cpu().view(len(experts), -1),
            [moment.cpu().view(len(experts), -1) for moment in moments],
        )
        rows = ends.to(self.dtype, copy=True)
        good = torch.isfinite(rows).all(1)
        for expert, fine in zip(experts, good.tolist(), strict=True):
            if not fine:
                raise InvalidSetting(
                    f"{type(self.training).__name__}.lr",
                    self.training.lr,
                    f"expert {expert.index} diverged in epoch {expert.epochs + 1} of its training: lower it",
                )
        for position, expert in enumerate(experts):
            expert.rows.append(rows[position].clone())
            expert.theta = ends[position].clone()
            expert.velocity = velocities[0][position].clone() if velocities else None

    def _stacked(self, vectors: Sequence[Tensor]) -> Tensor:
        """(P,) of one, (K, P) of several, on the run's device."""
        return (vectors[0] if len(vectors) == 1 else torch.stack(list(vectors))).to(self.run.device)

    def _rng(self, index: int) -> Rng:
        return Rng(self.seed).within("expert", index)


class _ChannelsLast(FlatNetwork):
    """A network whose convolutions are quicker on the CPU if they are differentiated once; twice, they are slower."""

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        named = super().named(theta)
        if theta.device.type != "cpu":
            return named
        # Maps follow the weights.
        return {
            name: part.to(memory_format=torch.channels_last) if part.dim() == 4 else part
            for name, part in named.items()
        }
