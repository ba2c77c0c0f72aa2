"""The network that gives features, kept through a run, and choices of every class."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dsdistill.core.rng import Rng
from dsdistill.engine import Job, Run, Shared
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch, UnknownName
from dsdistill.networks import NetworkSpec, embed
from dsdistill.networks import spec as spec_module
from dsdistill.selection import (
    Extractor,
    choose,
    class_features,
    class_outputs,
    features,
    herding_indices,
    image_outputs,
    pick,
)
from dsdistill.training import TrainingRecipe

SMALL = NetworkSpec(width=4, depth=1)
RANDOM = Extractor(network=SMALL, training=None)
TRAINED = Extractor(network=SMALL, training=TrainingRecipe(epochs=2, batch_size=8, lr=0.1))


def run_of(source, *, seed=0, chunk=100, shared=None, classes=(0, 1, 2)):
    rng = Rng(seed)
    return Run(source.train_only(), torch.device("cpu"), rng, classes, chunk, shared=shared or Shared())


@pytest.fixture
def trainings(monkeypatch):
    """Networks trained so far."""
    made, train = [], features.train_on_real
    monkeypatch.setattr(features, "train_on_real", lambda run, network, *rest: made.append(train(run, network, *rest)))
    return made


def test_features_are_those_of_the_stored_images(source):
    run = run_of(source)
    network = TRAINED.build(run)
    for index, found in enumerate(class_features(run, TRAINED)):
        images = source.normalization.standardize(source.images[12 * index : 12 * (index + 1)])
        assert torch.allclose(found, embed(network, images), atol=1e-6)
        assert not found.requires_grad


@pytest.mark.parametrize("chunk", [5, 100])
def test_outputs_of_any_function_come_class_by_class(source, chunk):
    run, seen = run_of(source, chunk=chunk, classes=(2, 0)), []
    network = SMALL.build(source.shape, 3, generator=torch.Generator().manual_seed(0), device="cpu")

    def logits(images):
        seen.append(len(images))
        return network(images)

    found = class_outputs(run, logits)
    assert not seen  # nothing before it is asked for
    for index, rows in zip((2, 0), found, strict=True):
        images = source.normalization.standardize(source.images[12 * index : 12 * (index + 1)])
        assert rows.shape == (12, 3)
        assert torch.allclose(rows, network(images), atol=1e-6)
        assert not rows.requires_grad
    assert max(seen) <= chunk
    assert sum(seen) == 24


def test_images_do_not_see_one_another(source):
    batch = replace(TRAINED, network=replace(SMALL, norm="batch"))
    one, whole = (list(class_features(run_of(source, chunk=chunk), batch)) for chunk in (36, 100))
    few = list(class_features(run_of(source, chunk=5, shared=_as_made(source, batch)), batch))
    for left, right, third in zip(one, whole, few, strict=True):
        assert torch.allclose(left, right, atol=1e-5)
        assert torch.allclose(third, right, atol=1e-5)


def coupled(run):
    """Logits of a network that takes the statistics of its batch, as experts with batch normalisation do."""
    return run.network(replace(SMALL, norm="batch"), 0)


def mixed_by_hand(run, network, count=36):
    """Outputs for images in storage order that passed in the order of the run's stream."""
    order = torch.randperm(count, generator=run.rng.scoped("").at("outputs", device="cpu"))
    found = torch.zeros(count, 3)
    for rows in torch.tensor_split(order, -(-count // run.chunk)):
        found[rows] = network(run.source.gather(rows))
    return found


@pytest.mark.parametrize("job", ["", "class/1"])
def test_images_of_a_coupled_batch_pass_mixed(job, source):
    run = run_of(source, chunk=10, classes=(2, 1))
    network = coupled(run)
    run = run.scoped(Job(job, (2, 1)))
    wanted = mixed_by_hand(run, network)
    for index, found in zip((2, 1), class_outputs(run, network), strict=True):
        rows = torch.arange(12 * index, 12 * (index + 1))
        assert torch.equal(found, wanted[rows])
        assert not torch.allclose(found, network(source.gather(rows)), atol=0.01)  # a batch of one class
    assert torch.equal(image_outputs(run, network, source.gather(torch.arange(36))), wanted)


def test_images_that_do_not_couple_pass_in_their_order(source):
    run = run_of(source, chunk=5)
    network, images = run.network(SMALL, 0), source.gather(torch.arange(12))
    parts = torch.cat([network(part) for part in images.split(5)])
    assert torch.equal(image_outputs(run, network, images), parts)
    assert torch.equal(next(class_outputs(run, network)), parts)


def test_an_extractor_without_statistics_of_its_own_sees_mixed_images(source, monkeypatch):
    def factory(shape, classes):
        norm = nn.BatchNorm1d(192, affine=False, track_running_stats=False)
        return nn.Sequential(nn.Flatten(), norm, nn.Linear(192, classes))

    monkeypatch.setattr(spec_module, "_registered", {"own": factory})
    extractor = Extractor(network=NetworkSpec("own"), training=None)
    first = next(class_features(run_of(source, chunk=12), extractor))
    # The brightness of a class is gone where each of its images is compared with its like.
    assert first.mean() < -0.5


def _as_made(source, extractor):
    run = run_of(source)
    extractor.build(run)
    return run.shared


def test_the_network_learns_from_the_real_images(source):
    patient = replace(TRAINED, training=replace(TRAINED.training, epochs=30))
    images, targets = source.normalization.standardize(source.images), source.targets

    def right(extractor):
        return int((extractor.build(run_of(source)).eval()(images).argmax(1) == targets).sum())

    assert right(RANDOM) < 24
    assert right(patient) > 34


def test_it_is_trained_once_in_a_run(source, trainings):
    run = run_of(source)
    together = choose(run, "herding", TRAINED, 3)
    for index in run.classes:  # one job for each class
        (alone,) = choose(run.scoped(Job(f"class/{index}", (index,))), "herding", TRAINED, 3)
        assert torch.equal(alone, together[index])
    assert len(trainings) == 1
    choose(run, "herding", replace(TRAINED, network=replace(SMALL, width=8)), 3)
    assert len(trainings) == 2
    choose(run, "herding", RANDOM, 3)
    assert len(trainings) == 2


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_run_that_was_interrupted_finds_it_again(source, tmp_path, trainings, norm):
    extractor = replace(TRAINED, network=replace(SMALL, norm=norm))
    first, second = (
        list(class_features(run_of(source, shared=Shared(tmp_path / "shared")), extractor)) for _ in range(2)
    )
    assert len(trainings) == 1
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("extractor", [TRAINED, RANDOM], ids=["trained", "random"])
def test_the_seed_of_the_run_makes_the_network(source, extractor):
    zero, again, one = (next(class_features(run_of(source, seed=seed), extractor)) for seed in (0, 0, 1))
    assert torch.equal(zero, again)
    assert not torch.allclose(zero, one)


def test_choices_are_storage_indices_of_their_class(source):
    for rule in ("kmeans", "kcenter", "herding", herding_indices):
        for index, rows in zip((2, 0), choose(run_of(source, classes=(2, 0)), rule, RANDOM, 5), strict=True):
            assert len(set(rows.tolist())) == 5
            assert source.targets[rows].tolist() == [index] * 5


def test_a_small_class_gives_all_it_has(source):
    fewer = source.subset([*range(12), 12, 13, *range(24, 36)])
    assert [len(rows) for rows in choose(run_of(fewer), "kmeans", RANDOM, 5)] == [5, 2, 5]


def test_a_rule_of_ones_own(source):
    def first(found, count, generator):
        assert found.shape == (12, 64)
        assert generator.device.type == "cpu"
        return torch.arange(count)

    assert [rows.tolist() for rows in choose(run_of(source), first, RANDOM, 2)] == [[0, 1], [12, 13], [24, 25]]


def test_features_of_ones_own(source):
    """Of each class the image at which the given feature is largest is that farthest from 0."""

    def farthest(found, count, generator):
        return found[:, 0].abs().argsort(descending=True)[:count]

    peaks = {2: 7, 0: 3}
    given = (torch.nn.functional.one_hot(torch.tensor(peak), 12)[:, None].float() for peak in peaks.values())
    chosen = pick(run_of(source, classes=tuple(peaks)), farthest, given, 1)
    assert [rows.tolist() for rows in chosen] == [[24 + 7], [3]]


@pytest.mark.parametrize("rule", ["kmeans", "kcenter", "herding", "representative"])
def test_choosing_is_picking_by_the_features_of_the_network(source, rule):
    given = list(class_features(run_of(source), RANDOM))
    for chosen, picked in zip(
        choose(run_of(source), rule, RANDOM, 4), pick(run_of(source), rule, given, 4), strict=True
    ):
        assert torch.equal(chosen, picked)


def test_a_choice_does_not_depend_on_the_other_classes(source):
    given = list(class_features(run_of(source), RANDOM))
    together = pick(run_of(source), "representative", given, 5)
    (alone,) = pick(run_of(source, classes=(1,)), "representative", given[1:2], 5)
    assert torch.equal(alone, together[1])


def test_features_that_are_no_row_for_each_image_are_refused(source):
    with pytest.raises(ShapeMismatch, match=r"features of class 'green' has shape \(11, 1\), expected \(12, D\)"):
        pick(run_of(source), "herding", [torch.zeros(12, 1), torch.zeros(11, 1), torch.zeros(12, 1)], 2)


def test_mistakes_are_named(source):
    with pytest.raises(UnknownName, match="unknown rule 'kcentre'; did you mean 'kcenter'"):
        choose(run_of(source), "kcentre", RANDOM, 2)
    wild = replace(TRAINED, network=replace(SMALL, norm="none"), training=replace(TRAINED.training, lr=1e20))
    with pytest.raises(BadData, match=r"class 'red': .*lower the step size"):
        choose(run_of(source), "kcenter", wild, 2)
    with pytest.raises(InvalidSetting, match="depth"):
        Extractor(network=NetworkSpec(depth=9)).check(source)
    with pytest.raises(InvalidSetting, match=r"Extractor\.network"):
        Extractor(network="convnet")
