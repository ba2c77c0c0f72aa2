from dataclasses import replace

import pytest
import torch
from methods.stepping import CPU, run_of

from dsdistill import estimate
from dsdistill.augmentations import CutMix, Siamese
from dsdistill.engine import Rehearsal, Shared
from dsdistill.errors import Stopped
from dsdistill.experts import train_on_real
from dsdistill.methods import NCFM
from dsdistill.networks import NetworkSpec, parameter_digest
from dsdistill.training import TrainingRecipe, TrainingSet, train

SMALL = NetworkSpec(width=4, depth=1)
BRIEF = TrainingRecipe(epochs=2, batch_size=9, lr=0.05, augmentation=Siamese(), mix=CutMix(probability=0.5))


def built(run, spec=SMALL):
    source = run.source
    return spec.build(source.shape, source.num_classes, generator=run.rng.at("network"), device=CPU)


@pytest.fixture
def steps(monkeypatch):
    """Epoch of every step that is made."""
    made, rate = [], TrainingRecipe.learning_rate
    monkeypatch.setattr(TrainingRecipe, "learning_rate", lambda self, epoch: made.append(epoch) or rate(self, epoch))
    return made


@pytest.mark.parametrize("rows", [None, [30, 2, 17, 5, 0]], ids=["all", "some"])
def test_it_is_the_training_loop_on_the_real_images(rows, source):
    run = run_of(source)
    network, twin = built(run), built(run)
    train_on_real(run, network, BRIEF, run.rng.within("x", 3), rows=None if rows is None else torch.tensor(rows))
    kept = rows or range(36)
    data = TrainingSet.of(source.normalization.standardize(source.images[list(kept)]), source.targets[list(kept)])
    train(twin, data, BRIEF, run.rng.within("x", 3), num_classes=3, mirror_safe=True, chunk=run.chunk)
    assert parameter_digest(network) == parameter_digest(twin)
    assert parameter_digest(network) != parameter_digest(built(run))


def test_flips_are_left_out_where_they_change_the_class(source):
    flips = replace(BRIEF, augmentation=Siamese(("flip",)), mix=None)
    run = run_of(source.with_mirror_safe(False))
    with_flips, without = built(run), built(run)
    train_on_real(run, with_flips, flips, run.rng)
    train_on_real(run, without, replace(flips, augmentation=None), run.rng)
    assert parameter_digest(with_flips) == parameter_digest(without)


def test_the_network_is_frozen_afterwards(source):
    run = run_of(source)
    network = built(run)
    train_on_real(run, network, BRIEF, run.rng)
    assert network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_streams_decide(source):
    run = run_of(source)
    networks = [built(run) for _ in range(3)]
    for network, name in zip(networks, "aab", strict=True):
        train_on_real(run, network, BRIEF, run.rng.within(name))
    digests = [parameter_digest(network) for network in networks]
    assert digests[0] == digests[1] != digests[2]


def test_an_optimizer_goes_on_with_its_momentum(source):
    run, digests = run_of(source), []
    for again in (True, False):
        network = built(run)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for part in range(2):
            kept = optimizer if again or part == 0 else torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
            train_on_real(run, network, BRIEF, run.rng.within("x", part), optimizer=kept)
        digests.append(parameter_digest(network))
    assert digests[0] != digests[1]


def test_it_gives_way_after_each_epoch(source, steps):
    asked = []

    def give_way():
        asked.append(len(steps))
        if len(asked) == 3:
            raise Stopped(15, 0, None)

    run = replace(run_of(source), shared=Shared(give_way=give_way))
    with pytest.raises(Stopped):
        train_on_real(run, built(run), replace(BRIEF, epochs=9), run.rng)
    assert asked == [4, 8, 12]


# Rehearsals --------------------------------------------------------------------------------------------------


def rehearsed(source, recipe):
    rehearsal = Rehearsal()
    run = replace(run_of(source), shared=Shared(rehearsal=rehearsal))
    network = built(run)
    train_on_real(run, network, recipe, run.rng)
    return network, rehearsal


def test_a_rehearsal_makes_a_few_steps_and_counts_the_others(source, steps, monkeypatch):
    clock = iter([10.0, 16.0])  # three steps take six seconds
    monkeypatch.setattr("dsdistill.experts.training.time.perf_counter", lambda: next(clock))
    _, rehearsal = rehearsed(source, replace(BRIEF, epochs=25))
    assert len(steps) == 1 + 3
    assert rehearsal.seconds == pytest.approx(2.0 * (25 * 4 - 4))


def test_a_training_as_short_as_its_rehearsal_is_made_whole(source, steps):
    network, rehearsal = rehearsed(source, replace(BRIEF, epochs=1))
    run = run_of(source)
    twin = built(run)
    train_on_real(run, twin, replace(BRIEF, epochs=1), run.rng)
    assert len(steps) == 4 + 4
    assert rehearsal.seconds == 0
    assert parameter_digest(network) == parameter_digest(twin)


def test_an_estimate_never_trains_in_full(source, steps):
    method = NCFM(
        ipc=1,
        iterations=3,
        real_batch=4,
        frequencies=8,
        networks=20,
        pretraining=replace(BRIEF, epochs=1000),
        network=SMALL,
    )
    found = estimate(method, source, device="cpu")
    assert len(steps) == 3 * 4  # of 80,000, once for each of its three looks
    longer = estimate(replace(method, pretraining=replace(BRIEF, epochs=100_000)), source, device="cpu")
    assert longer.seconds > 10 * found.seconds
    pool = 20 * 2 * 4 * sum(parameter.numel() for parameter in built(run_of(source)).parameters())
    alone = estimate(replace(method, networks=1), source, device="cpu")
    assert found.disk - alone.disk == pytest.approx(pool * 19 // 20, abs=9)  # the settings take a byte or two
