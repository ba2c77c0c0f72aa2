"""Experts trained ahead of the runs that use them."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods.stepping import run_of
from torch import nn

from dsdistill import train_experts
from dsdistill.data.cache import cache_folder
from dsdistill.errors import BadData, DeviceUnavailable, InvalidSetting, Stopped
from dsdistill.evaluation import experts as scored
from dsdistill.evaluation.experts import score_experts
from dsdistill.experts import Experts, PlainTraining, Trajectories, estimate_experts
from dsdistill.experts.trainer import Trainer
from dsdistill.networks import NetworkSpec, register_network

SMALL = NetworkSpec(width=4, depth=1)
EXPERTS = Experts(count=2, training=PlainTraining(epochs=3, batch_size=12, lr=0.5))


def test_experts_made_ahead_are_those_of_a_run(source, tmp_path):
    made = train_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    alone = Trajectories(run_of(source), EXPERTS, SMALL, 3)
    assert (made.epochs, made.count) == (3, 2)
    assert made.nbytes == sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    for index in range(2):
        assert torch.equal(made.snapshots(index, range(4)), alone.snapshots(index, range(4)))
    assert train_experts(source, EXPERTS, SMALL, epochs=1, store=str(tmp_path), device="cpu").folder == made.folder


def test_without_a_store_it_is_the_cache(source):
    made = train_experts(source, EXPERTS, SMALL, epochs=1, device="cpu")
    assert made.folder.is_relative_to(cache_folder())


def test_an_estimate_writes_nothing_and_knows_what_is_there(source, tmp_path):
    cost = estimate_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())
    assert (cost.count, cost.epochs, cost.device) == (2, 3, "cpu")
    assert cost.seconds > 0
    made = train_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    assert cost.folder == str(made.folder)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in made.folder.glob("expert*"))
    assert cost.disk == made.nbytes - headers
    again = estimate_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    assert (again.seconds, again.disk) == (0, 0)
    assert f"2 experts of 3 epochs on cpu, beyond those in {made.folder}" in str(again)
    assert cost.to_json()["disk"] == cost.disk


def test_a_signal_ends_it_and_the_same_call_continues(source, tmp_path, monkeypatch):
    epoch, trained = Trainer.epoch, []

    def signalled(self, experts, pace, **more):
        epoch(self, experts, pace, **more)
        trained.append(experts[0].index)
        if len(trained) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "epoch", signalled)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after 4 epochs of experts, kept in .*experts") as caught:
        train_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    assert caught.value.exit_code == 143
    made = train_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    assert trained == [0, 0, 0, 1, 1, 1]
    assert caught.value.path == made.folder
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"source": "digits"}, InvalidSetting),
        ({"experts": PlainTraining()}, InvalidSetting),
        ({"network": "convnet"}, InvalidSetting),
        ({"network": NetworkSpec(depth=9)}, InvalidSetting),
        ({"epochs": 0}, InvalidSetting),
        ({"epochs": 4}, InvalidSetting),
        ({"chunk": 0}, InvalidSetting),
        ({"device": "cuda:99"}, DeviceUnavailable),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, error, source, tmp_path):
    given = {"source": source, "experts": EXPERTS, "network": SMALL, "device": "cpu", "store": tmp_path, **arguments}
    with pytest.raises(error):
        train_experts(given.pop("source"), **given)
    assert not list(Path(tmp_path).iterdir())


def test_the_caller_s_random_numbers_stay(source, tmp_path):
    before = torch.get_rng_state()
    train_experts(source, EXPERTS, SMALL, store=tmp_path, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_their_accuracy_is_that_of_the_last_snapshots(norm, source, tmp_path):
    spec = NetworkSpec(width=4, depth=1, norm=norm)
    made = train_experts(source, EXPERTS, spec, store=tmp_path, device="cpu")
    score = score_experts(made, source)
    images, targets = source.test.gather(torch.arange(15)), source.test.targets
    for index, found in enumerate(score.values):
        logits = made.network(made.snapshots(index, [3])[0], images)
        assert found == pytest.approx(float((logits.argmax(1) == targets).float().mean()))
    assert score.n == 2
    assert score_experts(made, source, most=1).values == score.values[:1]
    with pytest.raises(BadData):
        score_experts(made, source.train_only())


def test_test_images_of_a_coupled_batch_pass_mixed(source, tmp_path, monkeypatch):
    """In their stored order each part would be one class, and the brightness that tells classes apart be gone."""
    monkeypatch.setattr(scored, "default_chunk", lambda shape, device: 5)
    made = train_experts(source, EXPERTS, replace(SMALL, norm="batch"), store=tmp_path, device="cpu")
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    images, targets = source.test.gather(torch.arange(15)), source.test.targets

    def accuracy(index, rows):
        theta = made.snapshots(index, [3])[0]
        right = [(made.network(theta, images[part]).argmax(1) == targets[part]).sum() for part in rows.split(5)]
        return sum(map(int, right)) / 15

    score = score_experts(made, source)
    assert list(score.values) == [accuracy(index, order) for index in range(2)]
    assert score.mean > sum(accuracy(index, torch.arange(15)) for index in range(2)) / 2 + 0.2


def test_networks_with_dropout_stay_students(source, tmp_path):
    def factory(shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(math.prod(shape), classes))

    register_network("dropping", factory)
    made = train_experts(source, EXPERTS, NetworkSpec("dropping"), epochs=1, store=tmp_path, device="cpu")
    score_experts(made, source)
    network = made.network.module
    assert network.training
    assert not network[1].training
    assert not network[2].weight.requires_grad


class Dropping(nn.Linear):
    def forward(self, images):
        return super().forward(nn.functional.dropout(images.flatten(1), 0.5, self.training))


def test_experts_that_no_method_would_follow_are_not_trained(source, tmp_path):
    register_network("functional", lambda shape, classes: Dropping(math.prod(shape), classes))
    with pytest.raises(InvalidSetting, match="draws random numbers"):
        train_experts(source, EXPERTS, NetworkSpec("functional"), epochs=1, store=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())
