import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.augmentations import CutMix, Mixup, PadCrop, ResizedCrop, Siamese
from dsdistill.core.rng import Rng
from dsdistill.errors import InvalidSetting
from dsdistill.networks import NetworkSpec, parameter_digest
from dsdistill.training import Distillation, Lesson, TrainingRecipe, TrainingSet, train, train_together
from dsdistill.training.batches import epochs_of

SHAPE = (3, 4, 6)
RNG = Rng(5, job="repeat/0")
CLASSES = {"num_classes": 3, "mirror_safe": True}
MLP = NetworkSpec("mlp", width=8)
BATCHNORM = NetworkSpec(width=4, depth=1, norm="batch")


def examples(count=11):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *SHAPE, generator=generator)
    return TrainingSet.of(images, torch.randint(3, (count,), generator=generator))


def built(spec=MLP, seed=0):
    return spec.build(SHAPE, 3, generator=torch.Generator().manual_seed(seed), device="cpu")


def teacher(images):
    return 4 * images.mean((2, 3))


def close(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def differ(one, other):
    with pytest.raises(AssertionError):
        close(one, other)


# Sub-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taught", [False, True], ids=["classes", "teacher"])
def test_sub_batches_are_halves_accumulated_by_hand(taught):
    kind = Distillation(temperature=2.0) if taught else None
    recipe = TrainingRecipe(
        epochs=3, batch_size=7, lr=0.1, weight_decay=0.0, momentum=0.0, sub_batches=2, distillation=kind
    )
    data, network = examples(), built(BATCHNORM)
    reference, whole = copy.deepcopy(network), copy.deepcopy(network)
    train(network, data, recipe, RNG, teacher=teacher if taught else None, **CLASSES)
    order = RNG.at("order")
    reference.train()
    for epoch in range(3):
        for rows in torch.split(torch.randperm(11, generator=order), 7):  # 7 = 4 + 3 images, 4 = 2 + 2
            images, targets = data.fetch(rows)
            total = [torch.zeros_like(parameter) for parameter in reference.parameters()]
            half = -(-len(rows) // 2)
            for part, wanted in ((images[:half], targets[:half]), (images[half:], targets[half:])):
                logits = reference(part)  # normalised by its own statistics, and the running ones follow
                if taught:
                    soft = softmax(teacher(part) / 2, 1)
                    loss = kl_div(log_softmax(logits / 2, 1), soft, reduction="batchmean") * len(part) / len(rows)
                else:
                    loss = cross_entropy(logits, wanted) * len(part) / len(rows)
                for one, more in zip(total, torch.autograd.grad(loss, list(reference.parameters())), strict=True):
                    one += more
            with torch.no_grad():
                for parameter, gradient in zip(reference.parameters(), total, strict=True):
                    parameter -= recipe.learning_rate(epoch) * gradient
    close(network, reference)
    counted = [buffer for name, buffer in network.named_buffers() if "num_batches" in name]
    assert [int(one) for one in counted] == [3 * 2 * 2]
    train(
        whole,
        data,
        TrainingRecipe(epochs=3, batch_size=7, lr=0.1, weight_decay=0.0, momentum=0.0, distillation=kind),
        RNG,
        teacher=teacher if taught else None,
        **CLASSES,
    )
    differ(network, whole)  # the batch as a whole has other statistics


def test_without_batch_norm_sub_batches_only_split_the_work():
    data, network = examples(), built()
    twin = copy.deepcopy(network)
    train(network, data, TrainingRecipe(epochs=3, batch_size=7, lr=0.1, sub_batches=3), RNG, **CLASSES)
    train(twin, data, TrainingRecipe(epochs=3, batch_size=7, lr=0.1), RNG, **CLASSES)
    close(network, twin)


def test_more_sub_batches_than_images_are_one_each():
    data, network = examples(5), built(BATCHNORM)
    train(network, data, TrainingRecipe(epochs=1, batch_size=4, sub_batches=4), RNG, **CLASSES)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())


# Teachers and lessons ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("chunk", [2, None])
def test_learning_from_a_teacher_written_out(chunk, share):
    kind = Distillation(temperature=3.0, squared=True, hard_share=share)
    mix = Mixup(alpha=0.8)
    recipe = TrainingRecipe(
        epochs=4,
        batch_size=4,
        optimizer="adamw",
        lr=0.01,
        weight_decay=0.1,
        schedule="cosine",
        warmup=1,
        decay_only_weights=True,
        augmentation=PadCrop(pad=1),
        mix=mix,
        distillation=kind,
    )
    data, network = examples(), built()
    reference = copy.deepcopy(network)
    train(network, data, recipe, RNG, teacher=teacher, chunk=chunk, **CLASSES)
    order, views, mixes = (RNG.at(name) for name in ("order", "views", "mix"))
    weights = [one for name, one in reference.named_parameters() if name.endswith("weight")]
    biases = [one for name, one in reference.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], weight_decay=0.1)
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = [0.0001, 0.01, 0.0075, 0.0025][epoch]
        for rows in torch.split(torch.randperm(11, generator=order), 4):
            images, targets = data.fetch(rows)
            images = PadCrop(pad=1).apply(images, PadCrop(pad=1).sample(len(rows), SHAPE, views, per="image"))
            record = mix.sample(len(rows), SHAPE, mixes)
            images, targets = mix.apply(images, record), mix.targets(targets, record, 3)
            logits, soft = reference(images), softmax(teacher(images) / 3, 1)
            loss = (1 - share) * 9 * kl_div(log_softmax(logits / 3, 1), soft, reduction="batchmean")
            loss = loss + share * cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    close(network, reference)


def test_lessons_are_what_is_learned():
    kind = Distillation(temperature=2.0, hard_share=0.5)
    recipe = TrainingRecipe(
        epochs=3, batch_size=4, lr=0.1, distillation=kind, augmentation=ResizedCrop(), mix=CutMix(probability=1.0)
    )
    data, network = examples(), built()
    twin, other = copy.deepcopy(network), copy.deepcopy(network)
    train(network, data, recipe, RNG, teacher=teacher, **CLASSES)
    kept = [list(epoch) for epoch in epochs_of(data, recipe, RNG, teacher=teacher, **CLASSES)]

    def never(rows):
        raise AssertionError("nothing is to be fetched")

    replayed = TrainingSet(never, 11, SHAPE, torch.device("cpu"), lambda epoch: iter(kept[epoch]))
    train(twin, replayed, recipe, Rng(77), **CLASSES)
    assert parameter_digest(twin) == parameter_digest(network)
    train(other, replayed._replace(lessons=lambda epoch: iter(kept[0])), recipe, RNG, **CLASSES)
    differ(twin, other)


def test_lessons_are_split_like_any_batch():
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    data = examples(7)
    images, classes = data.fetch(torch.arange(7))
    for given in (None, classes):
        lessons = data._replace(lessons=lambda epoch, given=given: iter([Lesson(images, logits, given)]))
        recipe = TrainingRecipe(epochs=2, lr=0.1, distillation=Distillation(hard_share=0.0 if given is None else 0.5))
        network = built()
        twin = copy.deepcopy(network)
        train(network, lessons, recipe, RNG, chunk=2, **CLASSES)
        train(twin, lessons, recipe, RNG, chunk=100, **CLASSES)
        close(network, twin)


def test_teachers_do_not_wait_for_the_device():
    class NoHostSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "equal", "nonzero", "masked_select")
            return func(*args, **(kwargs or {}))

    recipe = TrainingRecipe(epochs=2, batch_size=4, mix=Mixup(), distillation=Distillation(hard_share=0.5))
    network, data = built(BATCHNORM), examples()
    drawn = list(next(epochs_of(data, recipe, RNG, teacher=teacher, **CLASSES)))
    with NoHostSync():
        train(network, data._replace(lessons=lambda epoch: iter(drawn)), recipe, RNG, **CLASSES)


# Beginning and ending in between -----------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [1, 3])
def test_a_training_that_goes_on_ends_as_if_it_had_not_stopped(begin):
    recipe = TrainingRecipe(
        epochs=4, batch_size=4, lr=0.1, augmentation=Siamese(), mix=CutMix(), schedule="cosine", optimizer="adam"
    )
    data, network, seen = examples(), built(BATCHNORM), []
    kept = {}

    def keep(epoch, one):
        kept[epoch] = copy.deepcopy((one, optimizer.state_dict()))

    optimizer = torch.optim.Adam(network.parameters(), weight_decay=5e-4, fused=True)
    train(network, data, recipe, RNG, optimizer=optimizer, watch=keep, **CLASSES)
    again, state = kept[begin]
    other = torch.optim.Adam(again.parameters(), weight_decay=5e-4, fused=True)
    other.load_state_dict(state)
    train(again, data, recipe, RNG, optimizer=other, begin=begin, watch=lambda epoch, _: seen.append(epoch), **CLASSES)
    assert seen == list(range(begin + 1, 5))
    assert parameter_digest(again) == parameter_digest(network)


def test_a_limit_is_a_number_of_steps():
    rates, watched = [], []

    class Counted(TrainingRecipe):
        def learning_rate(self, epoch):
            rates.append(epoch)
            return super().learning_rate(epoch)

    recipe = Counted(epochs=4, batch_size=4)
    train(built(), examples(), recipe, RNG, limit=5, watch=lambda epoch, _: watched.append(epoch), **CLASSES)
    assert rates == [0, 0, 0, 1, 1]
    assert watched == [1]


# Refusals ----------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused_before_any_step():
    data, network = examples(), built()
    before = parameter_digest(network)
    plain, taught = TrainingRecipe(epochs=1), TrainingRecipe(epochs=1, distillation=Distillation())
    lessons = data._replace(lessons=lambda epoch: iter(()))
    with pytest.raises(InvalidSetting, match=r"distillation.*lessons of the set, or a teacher"):
        train(network, data, taught, RNG, **CLASSES)
    with pytest.raises(InvalidSetting, match=r"distillation = None.*lessons"):
        train(network, lessons, plain, RNG, **CLASSES)
    with pytest.raises(InvalidSetting, match=r"distillation = None.*teacher"):
        train(network, data, plain, RNG, teacher=teacher, **CLASSES)
    for one, recipe in ((data, taught), (lessons, plain)):
        with pytest.raises(InvalidSetting, match=r"together.*one by one"):
            train_together([network, built(seed=1)], [one, one], recipe, [RNG, RNG], **CLASSES)
    assert parameter_digest(network) == before


@pytest.mark.parametrize(
    "settings", [{"decay_only_weights": True}, {"optimizer": "adam", "schedule": "cosine"}], ids=str
)
def test_networks_trained_together_know_the_same_settings(settings):
    recipe = TrainingRecipe(**{"epochs": 4, "lr": 0.01, "batch_size": 4, "weight_decay": 0.5, "warmup": 1, **settings})
    networks = [built(NetworkSpec(width=4, depth=1), seed) for seed in range(2)]
    together, rngs = copy.deepcopy(networks), [Rng(0), Rng(1)]
    for network, rng in zip(networks, rngs, strict=True):
        train(network, examples(), recipe, rng, **CLASSES)
    train_together(together, [examples()] * 2, recipe, rngs, **CLASSES)
    for one, other in zip(networks, together, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
