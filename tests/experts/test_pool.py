import copy
import gc
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from methods.stepping import CPU, run_of

from dsdistill.engine import Job, Rehearsal, Shared
from dsdistill.errors import InvalidSetting
from dsdistill.experts import Pool, train_on_real
from dsdistill.experts import pool as module
from dsdistill.networks import NetworkSpec, parameter_digest
from dsdistill.training import TrainingRecipe

SMALL = NetworkSpec(width=4, depth=1)
BATCHED = replace(SMALL, norm="batch")
BRIEF = TrainingRecipe(epochs=2, batch_size=9, lr=0.05)


def by_hand(run, spec, index):
    """Network ``index`` of the pool before and after its training."""
    rng, source = run.rng.within(module.pool_name(spec, BRIEF), index), run.source
    network = spec.build(source.shape, source.num_classes, generator=rng.at("network"), device=CPU)
    before = copy.deepcopy(network)
    train_on_real(run, network, BRIEF, rng)
    return before, network


def floats(network):
    return {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


@pytest.fixture
def trainings(monkeypatch):
    """Which networks were trained, by their streams."""
    made = []
    monkeypatch.setattr(
        module, "train_on_real", lambda run, network, recipe, rng: made.append(rng.job.split("\x1e")[-1])
    )
    return made


@pytest.mark.parametrize("spec", [SMALL, BATCHED, NetworkSpec("mlp", width=3)], ids=["instance", "batch", "mlp"])
def test_networks_are_those_trained_by_hand_and_everything_between(spec, source):
    run = run_of(source)
    pool = Pool(run, spec, BRIEF, 2)
    assert len(pool) == 2
    for index in (1, 0):
        before, after = by_hand(run, spec, index)
        final = floats(pool.final(index))
        assert all(torch.equal(final[name], tensor) for name, tensor in floats(after).items())
        for share in (0.0, 0.3, 1.0):
            mixed = floats(pool.mix(index, share))
            assert mixed.keys() == floats(before).keys()
            for name, initial in floats(before).items():
                wanted = share * initial + (1 - share) * floats(after)[name]
                torch.testing.assert_close(mixed[name], wanted, rtol=1e-6, atol=1e-7)
        assert parameter_digest(before) != parameter_digest(after)
    if spec is BATCHED:
        assert any("running" in name for name in floats(pool.mix(0, 0.5)))


def test_what_a_forward_pass_leaves_in_a_batch_norm_is_gone_at_the_next_call(source):
    pool = Pool(run_of(source), BATCHED, BRIEF, 1)
    before = copy.deepcopy(floats(pool.mix(0, 0.5)))
    pool.mix(0, 0.5)(torch.randn(4, *source.shape, generator=torch.Generator().manual_seed(0)))
    after = floats(pool.mix(0, 0.5))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_networks_only_look(source):
    run = run_of(source)
    pool = Pool(run, BATCHED, BRIEF, 1)
    for network in (pool.mix(0, 0.5), pool.final(0)):
        assert network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert pool.mix(0, 0.1) is pool.mix(0, 0.9)  # refilled, not built again
    assert pool.mix(0, 0.1) is not pool.final(0)
    assert run.couples_batches  # the engine knows of them
    assert pool.width == 4 * 4 * 4


def test_a_network_does_not_depend_on_the_others_nor_on_the_job(source, monkeypatch):
    run = run_of(source)
    small = Pool(run, SMALL, BRIEF, 1)
    large = Pool(run_of(source).scoped(Job("class/1", (1,))), SMALL, BRIEF, 2)
    assert parameter_digest(small.final(0)) == parameter_digest(large.final(0))
    assert parameter_digest(large.final(0)) != parameter_digest(Pool(run_of(source, seed=1), SMALL, BRIEF, 1).final(0))
    first, second = (copy.deepcopy(floats(large.mix(index, 1.0))) for index in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in ("blocks.0.conv.weight", "classifier.weight"))


def test_a_run_has_one_pool(source, trainings):
    run = run_of(source)
    pool = Pool.of(run, SMALL, BRIEF, 3)
    assert Pool.of(run.scoped(Job("class/1", (1,))), SMALL, BRIEF, 3) is pool
    assert trainings == ["0", "1", "2"]
    assert Pool.of(run_of(source), SMALL, BRIEF, 3) is not pool
    assert len(trainings) == 6


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [(replace(SMALL, activation="swish"), BRIEF), (SMALL, replace(BRIEF, lr=0.04))],
    ids=["network", "recipe"],
)
def test_pools_of_one_shape_do_not_share_their_networks(spec, recipe, source, tmp_path):
    run = replace(run_of(source), shared=Shared(tmp_path))
    first, second = Pool.of(run, SMALL, BRIEF, 2), Pool.of(run, spec, recipe, 2)
    alone = Pool(run_of(source), spec, recipe, 2)
    weights = parameter_digest(first.final(0))
    for index in range(2):
        assert parameter_digest(second.final(index)) == parameter_digest(alone.final(index))
    assert parameter_digest(first._final) == weights  # which a step may still look at
    assert weights not in [parameter_digest(second.final(index)) for index in range(2)]
    assert len(list(tmp_path.iterdir())) == 4
    one, other = (floats(pool.mix(0, 1.0)) for pool in (first, second))
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])  # streams of their own


def test_pools_of_different_size_share_networks(source, trainings):
    run = run_of(source)
    Pool.of(run, SMALL, BRIEF, 1)
    Pool.of(run, SMALL, BRIEF, 3)
    assert trainings == ["0", "1", "2"]


def test_a_pool_ends_with_its_run(source, trainings):
    gc.collect()
    before = len(module._pools)
    run = run_of(source)
    Pool.of(run, SMALL, BRIEF, 1)
    assert len(module._pools) == before + 1
    del run
    gc.collect()
    assert len(module._pools) == before


def test_an_interrupted_pool_goes_on_where_it_was(source, tmp_path, monkeypatch):
    whole = Pool(run_of(source), SMALL, BRIEF, 3)
    made = []

    def interrupted(run, network, recipe, rng):
        made.append(rng.job.split("\x1e")[-1])
        if len(made) == 2:
            raise KeyboardInterrupt
        train_on_real(run, network, recipe, rng)

    monkeypatch.setattr(module, "train_on_real", interrupted)
    for attempt in range(2):
        run = replace(run_of(source), shared=Shared(tmp_path / "shared"))
        if attempt == 0:
            with pytest.raises(KeyboardInterrupt):
                Pool(run, SMALL, BRIEF, 3)
            kept = [unquote(path.name) for path in Path(tmp_path / "shared").iterdir()]
            assert kept == [module.member_name(SMALL, BRIEF, 0)]
        else:
            pool = Pool(run, SMALL, BRIEF, 3)
    assert made == ["0", "1", "1", "2"]
    for index in range(3):
        assert parameter_digest(pool.mix(index, 0.4)) == parameter_digest(whole.mix(index, 0.4))


def test_a_network_that_diverges_is_refused_and_not_kept(source, tmp_path):
    run = replace(run_of(source), shared=Shared(tmp_path))
    with pytest.raises(InvalidSetting, match=r"network 0 of the pool diverged"):
        Pool(run, replace(SMALL, norm="none"), replace(BRIEF, lr=1e20, epochs=4), 1)
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_trains_one_network_a_little_and_counts_the_others(source, monkeypatch):
    steps = []
    rate = TrainingRecipe.learning_rate
    monkeypatch.setattr(TrainingRecipe, "learning_rate", lambda self, epoch: steps.append(epoch) or rate(self, epoch))
    recipe, costs = replace(BRIEF, epochs=50), []
    for size in (1, 5):
        steps.clear()
        rehearsal = Rehearsal()
        pool = Pool(replace(run_of(source), shared=Shared(rehearsal=rehearsal)), SMALL, recipe, size)
        assert len(steps) == 4
        assert len(pool) == size
        costs.append((rehearsal.seconds, rehearsal.disk))
    weights = sum(tensor.numel() for tensor in floats(pool.final(4)).values())
    assert [disk for _, disk in costs] == [2 * 4 * weights, 5 * 2 * 4 * weights]
    assert costs[1][0] > costs[0][0] > 0
