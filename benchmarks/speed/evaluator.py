"""Training and testing one network on a small set against a plain loop, on random images of CIFAR-10's size."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed import pairs
from benchmarks.speed.reference import OPS, PlainConvNet, given_view, random_view
from dsdistill.augmentations import Siamese
from dsdistill.core.device import default_chunk, settle_allocator
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.evaluation import EvaluationProtocol, get_protocol
from dsdistill.evaluation.examine import accuracy, confusion, fresh_network
from dsdistill.training import TrainingSet, train

MODULE = "benchmarks.speed.evaluator"
SHAPE = (3, 32, 32)


def make_data(options: argparse.Namespace) -> tuple[Tensor, Tensor, ImageSource]:
    """Random synthetic images, their targets, and a random test split."""
    generator = torch.Generator().manual_seed(options.seed)
    targets = torch.arange(options.classes).repeat_interleave(options.ipc)
    images = torch.randn(len(targets), *SHAPE, generator=generator)
    test = torch.randint(0, 256, (options.test, *SHAPE), generator=generator, dtype=torch.uint8)
    names = [f"class {c}" for c in range(options.classes)]
    source = ImageSource("random images", names, test, torch.arange(options.test) % options.classes)
    device = torch.device(options.device)
    return images.to(device), targets.to(device), source.to(device)


def make_protocol(epochs: int) -> EvaluationProtocol:
    """The "dsa" protocol with fewer epochs."""
    return replace(get_protocol("dsa"), name="dsa (changed: epochs)", epochs=epochs)


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """A function that trains and tests one network as `dsdistill.evaluate` does."""
    images, targets, test = make_data(options)
    settle_allocator(test.device)
    protocol, repeat = make_protocol(options.epochs), iter(range(sys.maxsize))

    def score() -> None:
        rng = Rng(options.seed, job=f"repeat/{next(repeat)}", device=test.device)
        network = fresh_network(protocol, SHAPE, options.classes, rng)
        train(network, TrainingSet.of(images, targets), protocol, rng, num_classes=10, mirror_safe=True)
        accuracy(confusion(network, test, chunk=default_chunk(SHAPE, test.device)))

    return score


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that trains and tests one network the plain way."""
    images, targets, test = make_data(options)
    torch.manual_seed(options.seed)
    trained_on = TensorDataset(images, targets)
    tested_on = TensorDataset(test.normalization.standardize(test.images), test.targets)
    protocol = make_protocol(options.epochs)

    def score() -> None:
        network = PlainConvNet(options.classes).to(images.device)
        criterion = nn.CrossEntropyLoss().to(images.device)
        training = DataLoader(trained_on, batch_size=256, shuffle=True, num_workers=0)
        testing = DataLoader(tested_on, batch_size=256, shuffle=False, num_workers=0)
        rate = protocol.lr
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=0.0005)
        for epoch in range(options.epochs):
            _epoch(network, training, criterion, optimizer)
            if epoch == options.epochs // 2:
                rate *= 0.1
                optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=0.0005)
        with torch.no_grad():
            _epoch(network, testing, criterion, None)

    return score


def _epoch(
    network: nn.Module,
    loader: DataLoader[tuple[Tensor, ...]],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[float, float]:
    """One pass, counting loss and accuracy on the host after every batch."""
    device = next(network.parameters()).device
    network.train(optimizer is not None)
    total, right, seen = 0.0, 0, 0
    for images, targets in loader:
        images, targets = images.float().to(device), targets.long().to(device)
        if optimizer is not None:
            images = random_view(images, OPS[np.random.randint(len(OPS))], shared=False)  # noqa: NPY002
        output = network(images)
        loss = criterion(output, targets)
        right += int(np.sum(np.equal(np.argmax(output.cpu().data.numpy(), axis=-1), targets.cpu().data.numpy())))
        total += loss.item() * len(targets)
        seen += len(targets)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return total / seen, right / seen


def check(options: argparse.Namespace, dtype: torch.dtype, epochs: int, tolerance: float) -> pairs.Equality:
    """How far training moves the parameters, in both programs from the same weights, order and views.

    Raises:
        pydantic.ValidationError: they differ by more than rounding.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        images, targets, _ = make_data(options)
        protocol, rng = make_protocol(epochs), Rng(options.seed, job="repeat/0", device=images.device)
        network = fresh_network(protocol, SHAPE, options.classes, rng)
        plain = PlainConvNet(options.classes).to(images.device).copy_from(network)
        start = _flat(network)
        train(network, TrainingSet.of(images, targets), protocol, rng, num_classes=10, mirror_safe=True)
        _slow_train(plain, images, targets, protocol, rng)
    finally:
        torch.set_default_dtype(before)
    quantity = f"movement of the parameters in {epochs} epochs"
    return pairs.equality(quantity, _flat(network) - start, _flat(plain) - start, tolerance)


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def _slow_train(network: nn.Module, images: Tensor, targets: Tensor, protocol: EvaluationProtocol, rng: Rng) -> None:
    order, views = rng.at("order", device="cpu"), rng.at("views", device="cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=protocol.lr, momentum=0.9, weight_decay=0.0005)
    for epoch in range(protocol.epochs):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate(epoch)
        for rows in torch.randperm(len(targets), generator=order).split(256):
            record = Siamese().sample(len(rows), SHAPE, views, per="image")
            pieces = zip(images[rows], record.ops, record.values, strict=True)
            batch = torch.stack([given_view(image, op, values) for image, op, values in pieces])
            loss = nn.functional.cross_entropy(network(batch), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    parser = pairs.parser(__doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--test", type=int, default=2000, help="test images")
    options = parser.parse_args()
    if options.worker:
        program = loops if options.worker == "loops" else ours
        short = argparse.Namespace(**{**vars(options), "epochs": 2})
        return pairs.work(options, [program(short)], program(options), steps=1)
    equality = [check(options, torch.float32, 1, 1e-3), check(options, torch.float64, 12, 1e-10)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    content = {
        "kind": "speed",
        "title": f"Evaluator, 3x32x32, {options.classes * options.ipc} images, protocol dsa, {options.epochs} epochs "
        f"and {options.test} test images",
        "unit": "network trained and tested",
        "settings": {name: getattr(options, name) for name in ("ipc", "classes", "epochs", "test")},
        "warmups": 1,
        "target": 1.5,
        "equality": [one.model_dump() for one in equality],
    }
    pairs.publish(options, MODULE, "speed-evaluator", content)


if __name__ == "__main__":
    main()
