"""Training experts on real images against a plain loop, on random images of CIFAR-10's size.

An expert-epoch is one pass of one network over all images, kept as a snapshot. The plain loop has its images on the
device as well, standardised once, and takes mini-batches by their indices.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.speed import pairs
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from benchmarks.speed.stage import SHAPE, make_source, precision
from dsdistill.augmentations import SiameseViews
from dsdistill.core.device import default_chunk, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, frozen
from dsdistill.experts import ExpertTraining, FlatTraining, PlainTraining
from dsdistill.experts.growth import Growth
from dsdistill.experts.shards import Expert
from dsdistill.experts.shelf import MemoryShelf
from dsdistill.experts.trainer import Pace, Trainer
from dsdistill.networks import FlatNetwork, NetworkSpec

MODULE = "benchmarks.speed.experts"
TRAININGS: dict[str, type[ExpertTraining]] = {"plain": PlainTraining, "flat": FlatTraining}
TARGETS = {"cpu": 1.5, "cuda": 3.0}
CHECKED = {"per_class": 30, "batch": 128, "experts": 2}  # most, in the equality check
CHECKED_EPOCHS = {torch.float64: 2, torch.float32: 1}  # in float32, kinks of ReLUs add up over steps
_TINY = 1e-12  # added to denominators by plain programs


def make_training(options: argparse.Namespace) -> ExpertTraining:
    """The settings of the paper, but for the number of epochs."""
    return TRAININGS[options.training](epochs=options.epochs, batch_size=options.batch)


def make_run(options: argparse.Namespace, kind: type[ImageSource] = ImageSource) -> Run:
    """What `dsdistill.synthesize` hands to a method, without a store: experts stay in memory."""
    device = torch.device(options.device)
    settle_allocator(device)
    source = make_source(options, kind).train_only().to(device)
    classes = tuple(range(source.num_classes))
    return Run(source, device, Rng(options.seed, device=device), classes, default_chunk(source.shape, device))


def make_trainer(run: Run, options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Trainer:
    """What trains experts for dsdistill; it compiles once, if it does."""
    network = FlatNetwork(frozen(run.network(NetworkSpec(), 0)))
    return Trainer(run, make_training(options), NetworkSpec(), network, dtype, options.seed, options.compiled)


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """A function that trains fresh experts with dsdistill."""
    run = make_run(options)
    trainer = make_trainer(run, options)

    def train() -> None:
        growth = Growth(run, trainer, MemoryShelf(), options.epochs, options.together)
        growth.train(range(options.experts))

    return train


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that trains fresh experts the plain way, one by one."""
    device, training = torch.device(options.device), make_training(options)
    source = make_source(options)
    images = source.normalization.standardize(source.images).to(device)
    labels = source.targets.to(device)
    criterion = nn.CrossEntropyLoss().to(device)
    torch.manual_seed(options.seed)

    def train() -> None:
        for _ in range(options.experts):
            network = PlainConvNet(options.classes).to(device)
            network.train()
            optimizer = torch.optim.SGD(network.parameters(), lr=training.lr, momentum=0, weight_decay=0)
            trajectory = [_snapshot(network)]
            for _ in range(options.epochs):
                total = 0.0
                for rows in torch.split(torch.randperm(len(labels)), training.batch_size):
                    index = rows.to(device)
                    shown = random_view(images[index], OPS[int(torch.randint(len(OPS), ()))], shared=False)
                    loss = _step(training, network, optimizer, criterion, shown, labels[index])
                    total += loss.item() * len(rows)
                trajectory.append(_snapshot(network))

    return train


def _step(
    training: ExpertTraining,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Callable[..., Tensor],
    shown: Tensor,
    wanted: Tensor,
) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = criterion(network(shown), wanted)
    loss.backward()
    if isinstance(training, FlatTraining):
        _look_around(training, network, criterion, shown, wanted)
    optimizer.step()
    return loss.detach()


def _look_around(
    training: FlatTraining, network: nn.Module, criterion: Callable[..., Tensor], shown: Tensor, wanted: Tensor
) -> None:
    """Replace the gradients that a network holds by those of a sharpness-aware step in its generalised form."""
    parameters = list(network.parameters())
    with torch.no_grad():
        old = [_gradient(p).clone() for p in parameters]
        norm = torch.norm(torch.stack([(torch.abs(p) * g).norm(p=2) for p, g in zip(parameters, old, strict=True)]))
        away = [torch.pow(p, 2) * g * training.rho / (norm + _TINY) for p, g in zip(parameters, old, strict=True)]
        for p, e in zip(parameters, away, strict=True):
            p.add_(e)
            p.grad = None
    criterion(network(shown), wanted).backward()
    with torch.no_grad():
        for p, e in zip(parameters, away, strict=True):
            p.sub_(e)
        inner = sum((_gradient(p) * g).sum() for p, g in zip(parameters, old, strict=True))
        length = sum(_gradient(p).pow(2).sum() for p in parameters)
        for p, g in zip(parameters, old, strict=True):
            across = g - inner / (length + _TINY) * _gradient(p)
            _gradient(p).sub_(across, alpha=training.alpha)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _snapshot(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in network.parameters()]


def check(options: argparse.Namespace, dtype: torch.dtype) -> list[pairs.Equality]:
    """How far training moves each parameter, in both programs from the same weights, orders and views.

    The bound on the largest difference is strict in float64 only: in float32 a value within rounding of the kink of a
    ReLU may fall on either side of it, so there the median parameter has to agree, not every one.

    Raises:
        pydantic.ValidationError: they differ by more than rounding.
    """
    with precision(dtype) as kind:
        run, training = make_run(options, kind), make_training(options)
        trainer = make_trainer(run, options, dtype)
        experts = [trainer.fresh(index) for index in range(options.experts)]
        size, pace = options.together, Pace(run.device)
        for group in (experts[begin : begin + size] for begin in range(0, len(experts), size)):
            for _ in range(options.epochs):
                trainer.epoch(group, pace)
        moved = torch.stack([torch.stack(expert.rows[1:]) - expert.rows[0] for expert in experts])
        slow = torch.stack([_slow_movement(run, training, options, expert) for expert in experts])
    strict, loose = (1e-9, 1e-9) if dtype == torch.float64 else (1e-3, 0.1)
    ours, plain = (ends.flatten(0, 1).T for ends in (moved, slow))
    return [
        pairs.equality("movement, largest", ours, plain, loose),
        pairs.equality("movement, median parameter", ours, plain, strict, median=True),
    ]


def _slow_movement(run: Run, training: ExpertTraining, options: argparse.Namespace, expert: Expert) -> Tensor:
    """(epochs, P): how far the plain loop is from the start after each epoch, images shown one by one."""
    source, rng = run.source, Rng(options.seed).within("expert", expert.index)
    flat, plain = FlatNetwork(frozen(run.network(NetworkSpec(), 0))), PlainConvNet(source.num_classes).to(run.device)
    plain.copy_from(flat.load(expert.rows[0].to(run.device)))
    optimizer = torch.optim.SGD(plain.parameters(), lr=training.lr)
    assert training.augmentation is not None
    rows_after = []
    for epoch in range(options.epochs):
        views = rng.at("views", epoch)
        order = torch.randperm(len(source), generator=rng.at("order", epoch))
        for rows in torch.split(order, training.batch_size):
            index = rows.to(run.device)
            record = training.augmentation.sample(len(rows), SHAPE, views, per="image")
            assert isinstance(record, SiameseViews)
            pieces = zip(source.gather(index), record.ops, record.values, strict=True)
            shown = torch.stack([given_view(*piece) for piece in pieces])
            _step(training, plain, optimizer, nn.functional.cross_entropy, shown, source.targets[index])
        rows_after.append(torch.cat([parameter.flatten() for parameter in _snapshot(plain)]))
    return torch.stack(rows_after) - expert.rows[0]


def main() -> None:
    parser = pairs.parser(__doc__)
    parser.add_argument("--training", choices=TRAININGS, default="plain")
    parser.add_argument("--experts", type=int, default=1, help="trained in each timing")
    parser.add_argument("--together", type=int, default=1, help="of them at once, by dsdistill")
    parser.add_argument("--compiled", action="store_true", help="by dsdistill")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=256, help="real images of each class")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    options = parser.parse_args()
    if options.worker:
        program = loops(options) if options.worker == "loops" else ours(options)
        return pairs.work(options, [program], program, steps=1)
    small = {name: min(most, getattr(options, name)) for name, most in CHECKED.items()}
    equality = [
        one
        for dtype, epochs in CHECKED_EPOCHS.items()
        for one in check(argparse.Namespace(**{**vars(options), **small, "epochs": epochs}), dtype)
    ]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    names = ("training", "experts", "together", "compiled", "epochs", "classes", "per_class", "batch")
    epochs = "one epoch" if options.epochs == 1 else f"{options.epochs} epochs"
    many = "one expert" if options.experts == 1 else f"{options.experts} experts"
    content = {
        "kind": "speed",
        "title": f"Experts ({options.training}), 3x32x32, {many}, {epochs} over "
        f"{options.classes * options.per_class} images in batches of {options.batch}"
        + (", compiled" if options.compiled else ""),
        "unit": f"training of {many}",
        "settings": {name: getattr(options, name) for name in names},
        "warmups": 1,
        "target": TARGETS.get(torch.device(options.device).type, 1.5),
        "equality": [one.model_dump() for one in equality],
    }
    way = "-compiled" if options.compiled else ""
    pairs.publish(options, MODULE, f"speed-experts-{options.training}{way}", content)


if __name__ == "__main__":
    main()
