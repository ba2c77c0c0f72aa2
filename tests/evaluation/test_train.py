import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.augmentations import CutMix, Mixup, Siamese
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource, Normalization
from dsdistill.errors import DistillError, InvalidSetting
from dsdistill.evaluation import EvaluationProtocol
from dsdistill.evaluation.examine import accuracy, confusion, fresh_network
from dsdistill.networks import NetworkSpec, parameter_digest
from dsdistill.networks import spec as spec_module
from dsdistill.training import TrainingSet, train, train_together
from dsdistill.training import loop as train_module

SHAPE = (3, 4, 6)
RNG = Rng(5, job="repeat/0")


def examples(count=11, classes=3, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *shape, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def training_set(images, targets):
    return TrainingSet.of(images, targets)


def slow_train(network, images, targets, protocol, rng, augmentation=None):
    """The loop of any textbook: one image after the other, the update written out."""
    order, views = rng.at("order"), rng.at("views")
    speeds = [torch.zeros_like(parameter) for parameter in network.parameters()]
    network.train()
    for epoch in range(protocol.epochs):
        rate = protocol.lr * (protocol.gamma if epoch >= protocol.epochs // 2 + protocol.milestone_delay else 1)
        shuffled = torch.randperm(len(targets), generator=order).tolist()
        for begin in range(0, len(targets), protocol.batch_size):
            rows = shuffled[begin : begin + protocol.batch_size]
            record = (
                augmentation.sample(len(rows), tuple(images.shape[1:]), views, per="image") if augmentation else None
            )
            loss = torch.zeros(())
            for position, row in enumerate(rows):
                image = images[row : row + 1]
                if record is not None:
                    image = augmentation.apply(image, record, [position])
                logits = network(image)[0]
                loss = loss + logits.exp().sum().log() - logits[targets[row]]
            gradients = torch.autograd.grad(loss / len(rows), list(network.parameters()))
            with torch.no_grad():
                for parameter, speed, gradient in zip(network.parameters(), speeds, gradients, strict=True):
                    speed.mul_(protocol.momentum).add_(gradient + protocol.weight_decay * parameter)
                    parameter.sub_(rate * speed)


def close(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [NetworkSpec("mlp", width=8), NetworkSpec(width=4, depth=1)], ids=lambda spec: spec.name
)
@pytest.mark.parametrize("batch_size", [4, 100])
def test_training_is_sgd_written_out(spec, batch_size):
    images, targets = examples()
    protocol = EvaluationProtocol(
        network=spec, epochs=7, lr=0.2, momentum=0.8, weight_decay=0.05, batch_size=batch_size, gamma=0.3
    )
    network = fresh_network(protocol, SHAPE, 3, RNG)
    reference, before = copy.deepcopy(network), copy.deepcopy(network)
    train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    slow_train(reference, images, targets, protocol, RNG)
    close(network, reference)
    pairs = zip(network.parameters(), before.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 0.05  # the agreement above is about something


@pytest.mark.parametrize("mirror_safe", [True, False])
def test_each_image_gets_its_own_view_and_flips_only_where_they_are_safe(mirror_safe):
    images, targets = examples()
    ops = Siamese(("flip", "crop", "color"))
    protocol = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=4, lr=0.2, batch_size=4, augmentation=ops)
    network = fresh_network(protocol, SHAPE, 3, RNG)
    reference = copy.deepcopy(network)
    train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=mirror_safe)
    kept = ops if mirror_safe else Siamese(("crop", "color"))
    slow_train(reference, images, targets, protocol, RNG, kept)
    close(network, reference)


def test_only_flips_and_no_mirror_safety_means_no_views():
    images, targets = examples()
    plain = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=2)
    flips = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=2, augmentation=Siamese(("flip",)))
    digests = []
    for protocol in (plain, flips):
        network = fresh_network(protocol, SHAPE, 3, RNG)
        train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=False)
        digests.append(parameter_digest(network))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_add_up_to_the_batch(chunk, monkeypatch):
    images, targets = examples()
    protocol = EvaluationProtocol(network=NetworkSpec(width=4, depth=1), epochs=3, lr=0.1, batch_size=8)
    network = fresh_network(protocol, SHAPE, 3, RNG)
    whole = copy.deepcopy(network)
    train(whole, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    monkeypatch.setattr(train_module, "default_chunk", lambda shape, device: chunk)
    train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    close(network, whole)


def test_batch_normalisation_gets_each_batch_whole(monkeypatch):
    monkeypatch.setattr(train_module, "default_chunk", lambda shape, device: 2)
    images, targets = examples(8)
    protocol = EvaluationProtocol(
        network=NetworkSpec(width=4, depth=1, norm="batch"),
        epochs=1,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        batch_size=8,
    )
    network = fresh_network(protocol, SHAPE, 3, RNG)
    reference = copy.deepcopy(network)
    train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    reference.train()
    loss = nn.functional.cross_entropy(reference(images), targets)
    for parameter, gradient in zip(
        reference.parameters(), torch.autograd.grad(loss, list(reference.parameters())), strict=True
    ):
        parameter.data -= 0.1 * gradient
    close(network, reference)


class NoHostSync(TorchDispatchMode):
    """Fails when the host waits for a floating-point value or for the shape of a result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "equal", "nonzero", "masked_select"), func
        return func(*args, **(kwargs or {}))


def test_training_never_waits_for_the_device():
    images, targets = examples()
    protocol = EvaluationProtocol(network=NetworkSpec(width=4, depth=1), epochs=2, batch_size=4)
    network = fresh_network(protocol, SHAPE, 3, RNG)
    with NoHostSync():
        train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        float(images.sum())  # the trap works


# Testing a network -------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """In training mode it answers at random and depends on its batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(72, 3))

    def forward(self, images):
        return self.head(self.norm(images))


def source_of(count=50):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, *SHAPE), generator=generator).to(torch.uint8)
    targets = torch.arange(count) % 3
    return ImageSource("s", "abc", images, targets, normalization=Normalization((0.4,) * 3, (0.2,) * 3))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_accuracy_is_the_share_of_right_answers_in_evaluation_mode(chunk):
    source = source_of()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Noisy().train()
    network.norm.running_mean.copy_(torch.tensor([0.5, -0.5, 0.1]))
    right = 0
    reference = copy.deepcopy(network).eval()
    for index in range(50):
        image = (source.images[index].float() / 255 - 0.4) / 0.2
        logits = reference(image[None])[0].tolist()
        right += logits.index(max(logits)) == int(source.targets[index])
    assert 5 < right < 45
    state = copy.deepcopy(network.state_dict())
    table = confusion(network, source, chunk=chunk)
    assert accuracy(table) == right / 50
    assert table.sum(1).tolist() == [17, 17, 16]
    assert network.training  # as it was
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


# Fresh networks ----------------------------------------------------------------------------------------------


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


def seeded(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return linear()


SHARED = seeded(3)
STATE = seeded(4).state_dict()


def pretrained(shape, classes):
    network = linear()
    network.load_state_dict(STATE)
    return network


def own_seed(shape, classes):
    return seeded(7)


def a_copy_of_one(shape, classes):
    return copy.deepcopy(SHARED)


def the_same_object(shape, classes):
    return SHARED


def constant(shape, classes):
    network = linear()
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    return network


class Counting:
    """Each call gives other weights, whatever the seed."""

    calls = 0

    def __call__(self, shape, classes):
        self.calls += 1
        return seeded(self.calls)


def pretrained_backbone(shape, classes):
    backbone = nn.Linear(72, 8)
    backbone.load_state_dict({"weight": torch.linspace(-1, 1, 8 * 72).view(8, 72), "bias": torch.linspace(0, 1, 8)})
    return nn.Sequential(nn.Flatten(), backbone, nn.ReLU(), nn.Linear(8, classes))


@pytest.mark.parametrize(
    "factory",
    [pretrained, own_seed, a_copy_of_one, the_same_object, constant, Counting(), pretrained_backbone],
    ids=["pretrained", "own seed", "copy", "same object", "constant", "counting", "pretrained backbone"],
)
def test_networks_that_are_not_fresh_are_refused(factory, monkeypatch):
    monkeypatch.setattr(spec_module, "_registered", {"suspect": factory})
    with pytest.raises(DistillError, match=r"not fresh|new network at each call"):
        fresh_network(EvaluationProtocol(network=NetworkSpec("suspect")), SHAPE, 3, RNG)


def test_a_fresh_network_follows_from_the_repeat_alone(monkeypatch):
    monkeypatch.setattr(spec_module, "_registered", {"fine": lambda shape, classes: Noisy()})
    for spec in (NetworkSpec("fine"), NetworkSpec("mlp", width=4), NetworkSpec(width=4, depth=1, norm="batch")):
        protocol = EvaluationProtocol(network=spec)
        one, again, other, third = (
            parameter_digest(fresh_network(protocol, SHAPE, 3, rng))
            for rng in (RNG, RNG, Rng(5, job="repeat/1"), Rng(6, job="repeat/0"))
        )
        assert one == again
        assert len({one, other, third}) == 3
    built = NetworkSpec("mlp", width=4).build(SHAPE, 3, generator=RNG.at("network"), device="cpu")
    fresh = fresh_network(EvaluationProtocol(network=NetworkSpec("mlp", width=4)), SHAPE, 3, RNG)
    assert parameter_digest(built) == parameter_digest(fresh)
    assert fresh.training
    assert all(parameter.requires_grad for parameter in fresh.parameters())


# Mixes, other optimisers, several networks --------------------------------------------------------------------


@pytest.mark.parametrize("mix", [CutMix(probability=0.5), Mixup(probability=1.0)], ids=repr)
def test_mixed_batches_are_trained_on_with_their_mixed_targets(mix):
    images, targets = examples()
    protocol = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=6, lr=0.1, batch_size=4, mix=mix)
    network = fresh_network(protocol, SHAPE, 3, RNG)
    reference, plain = copy.deepcopy(network), copy.deepcopy(network)
    train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    order, mixes = RNG.at("order"), RNG.at("mix")
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate(epoch)
        for rows in torch.split(torch.randperm(11, generator=order), 4):
            record = mix.sample(len(rows), SHAPE, mixes)
            soft = record.share * nn.functional.one_hot(targets[rows], 3).float()
            soft = soft + (1 - record.share) * nn.functional.one_hot(targets[rows][record.partner], 3).float()
            log_probabilities = reference(mix.apply(images[rows], record)).log_softmax(1)
            optimizer.zero_grad()
            (-(soft * log_probabilities).sum() / len(rows)).backward()
            optimizer.step()
    close(network, reference)
    train(plain, training_set(images, targets), replace(protocol, mix=None), RNG, num_classes=3, mirror_safe=True)
    with pytest.raises(AssertionError):
        close(network, plain)


def test_adamw_is_the_librarys():
    images, targets = examples()
    protocol = EvaluationProtocol(
        network=NetworkSpec("mlp", width=8), epochs=5, optimizer="adamw", lr=0.01, weight_decay=0.1, batch_size=100
    )
    network = fresh_network(protocol, SHAPE, 3, RNG)
    reference = copy.deepcopy(network)
    train(network, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate(epoch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(images), targets).backward()
        optimizer.step()
    close(network, reference)


def test_soft_targets_are_probabilities():
    images, targets = examples()
    protocol = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=3, lr=0.1)
    network = fresh_network(protocol, SHAPE, 3, RNG)
    hard, mean = copy.deepcopy(network), copy.deepcopy(network)
    one_hot = nn.functional.one_hot(targets, 3).float()
    train(network, training_set(images, one_hot), protocol, RNG, num_classes=3, mirror_safe=True)
    train(hard, training_set(images, targets), protocol, RNG, num_classes=3, mirror_safe=True)
    close(network, hard)
    train(mean, training_set(images, torch.full((11, 3), 1 / 3)), protocol, RNG, num_classes=3, mirror_safe=True)
    with pytest.raises(AssertionError):
        close(mean, hard)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augmentation": Siamese(), "mix": CutMix(probability=0.5)},
        {"optimizer": "adamw", "lr": 0.01},
        {"network": NetworkSpec(width=4, depth=2)},
        {"network": NetworkSpec(width=4, depth=1, norm="group", activation="leaky_relu", pooling="max")},
    ],
    ids=str,
)
def test_networks_trained_together_are_those_trained_alone(changes):
    sets = [training_set(*(examples() if seed else (examples()[0].flip(0), examples()[1]))) for seed in range(3)]
    protocol = EvaluationProtocol(
        **{"network": NetworkSpec("mlp", width=8), "epochs": 4, "lr": 0.1, "batch_size": 4, **changes}
    )
    rngs = [Rng(seed) for seed in range(3)]
    alone = [fresh_network(protocol, SHAPE, 3, rng) for rng in rngs]
    together = [copy.deepcopy(network) for network in alone]
    for network, data, rng in zip(alone, sets, rngs, strict=True):
        train(network, data, protocol, rng, num_classes=3, mirror_safe=True)
    train_together(together, sets, protocol, rngs, num_classes=3, mirror_safe=True)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):
        close(alone[0], together[1])


def test_a_watch_sees_every_epoch_and_the_network_in_training_mode():
    seen = []
    protocol = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=3, batch_size=4)
    network = fresh_network(protocol, SHAPE, 3, RNG)
    train(
        network,
        training_set(*examples()),
        protocol,
        RNG,
        num_classes=3,
        mirror_safe=True,
        watch=lambda epoch, network: seen.append((epoch, network.training, parameter_digest(network))),
    )
    assert [(epoch, training) for epoch, training, _ in seen] == [(1, True), (2, True), (3, True)]
    assert seen[-1][2] == parameter_digest(network)
    assert len({digest for *_, digest in seen}) == 3


def test_sets_of_different_size_are_not_trained_together():
    images, targets = examples()
    protocol = EvaluationProtocol(network=NetworkSpec("mlp", width=8), epochs=1)
    networks = [fresh_network(protocol, SHAPE, 3, Rng(seed)) for seed in range(2)]
    sets = [training_set(images, targets), training_set(images[:5], targets[:5])]
    with pytest.raises(InvalidSetting, match=r"\[11, 5\].*one size"):
        train_together(networks, sets, protocol, [Rng(0), Rng(1)], num_classes=3, mirror_safe=True)
