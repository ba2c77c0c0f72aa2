"""FTD: what it adds to trajectory matching, flat experts and the moving average."""

from dataclasses import fields, replace

import pytest
import torch
from methods.following import table_of
from methods.stepping import begin, run_of

from dsdistill import synthesize
from dsdistill.experts import Experts, FlatTraining
from dsdistill.methods import FTD, FYI, MTT
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Mirrored, Tiled

SMALL = NetworkSpec(width=4, depth=1)
FEW = Experts(count=2, training=FlatTraining(epochs=3, batch_size=12, lr=0.05))
METHOD = FTD(
    ipc=2,
    iterations=5,
    student_steps=2,
    max_start_epoch=2,
    lr_images=5.0,
    average=0.8,
    network=SMALL,
    experts=FEW,
)


def test_the_average_follows_the_images(source):
    run = run_of(source)
    state = begin(METHOD, run)
    expected = state.images.pixels.detach().clone()
    assert torch.equal(state.extras["average"].pixels, expected)
    for iteration in range(4):
        METHOD.step(run, state, iteration)
        expected = 0.8 * expected + 0.2 * state.images.pixels.detach()
        assert torch.allclose(state.extras["average"].pixels, expected, atol=1e-6)
    assert not torch.allclose(expected, state.images.pixels, atol=1e-4)


@pytest.mark.parametrize(("decay", "left"), [(0.9999, 0.6065), (0.9995, 0.0820), (0.999, 0.00672), (0.995, 1.3e-11)])
def test_what_is_left_of_the_start_after_5000_steps(decay, left):
    from dsdistill.methods.ftd import _follow_slowly

    slow, fast = (torch.nn.Linear(1, 1, bias=False).double() for _ in range(2))
    slow.weight.data.fill_(1)
    fast.weight.data.fill_(0)
    for _ in range(5000):
        _follow_slowly(slow, fast, decay)
    assert slow.weight.item() == pytest.approx(left, rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"average": 0.9}, True), ({"average": 0.8}, False), ({"average": 0.99, "store": "last"}, False)],
    ids=str,
)
def test_a_run_too_short_for_its_average_is_warned_of(changes, told, source, caplog):
    replace(METHOD, **changes).prepare(run_of(source))  # 0.9**5 = 0.59, 0.8**5 = 0.33
    message = "FTD.average = 0.9: after 5 iterations, 59 % of each stored image is the one it started from"
    assert (message in caplog.text) is told
    assert bool(caplog.records) is told


def test_the_average_of_images_that_stand_still_has_a_closed_form():
    from dsdistill.methods.ftd import _follow_slowly

    slow, fast = torch.nn.Linear(3, 1).double(), torch.nn.Linear(3, 1).double()
    start = slow.weight.detach().clone()
    for _ in range(200):
        _follow_slowly(slow, fast, 0.99)
    assert torch.allclose(slow.weight, fast.weight + 0.99**200 * (start - fast.weight), atol=1e-12)


def test_the_images_learn_as_in_mtt_with_the_same_experts(source):
    plain = MTT(**{field.name: getattr(METHOD, field.name) for field in fields(MTT)})
    made = [synthesize(method, source, progress=False) for method in (replace(METHOD, store="last"), plain)]
    assert torch.equal(made[0].tensors()[0], made[1].tensors()[0])


@pytest.mark.parametrize("form", [METHOD.form, Tiled(factor=2)], ids=["pixels", "tiles"])
def test_what_is_stored(source, form):
    method = replace(METHOD, form=form)
    run = run_of(source)
    state = begin(method, run)
    for iteration in range(3):
        method.step(run, state, iteration)
    average, last = state.extras["average"].pixels.clone(), state.images.pixels.detach().clone()
    assert torch.equal(method.finish(run, state).images.pixels.detach(), average)
    assert torch.equal(replace(method, store="last").finish(run, state).images.pixels.detach(), last)
    assert torch.equal(state.images.pixels, last)


@pytest.mark.parametrize("store", ["images", "pairs"])
def test_the_average_is_stored_under_fyi_too(source, store):
    method = FYI(base=METHOD, store=store)
    run = run_of(source)
    state = begin(method, run)
    for iteration in range(3):
        method.step(run, state, iteration)
    made = method.finish(run, state)
    stored = made.images.base if store == "pairs" else made.images
    assert isinstance(made.images, Mirrored) is (store == "pairs")
    assert torch.equal(stored.pixels.detach(), state.extras["average"].pixels)


def test_settings_by_default():
    method = FTD()
    training = method.experts.training
    assert (method.average, method.store, training.rho, training.alpha) == (0.9995, "average", 0.01, 1.0)
    assert (training.adaptive, training.lr, training.epochs, training.batch_size) == (True, 0.01, 50, 256)


def test_presets_are_those_of_the_authors():
    assert table_of(FTD, "experts.training.rho", "experts.training.alpha", "average") == {
        "cifar10/ipc1": (1, 50, 2, 2, None, 100, 1e-7, 0.01, 5000, 0.01, 0.3, 0.9999, True),
        "cifar10/ipc10": (10, 30, 2, 20, None, 100, 1e-5, 0.001, 5000, 0.01, 0.3, 0.9995, True),
        "cifar10/ipc50": (50, 30, 2, 40, None, 1000, 1e-5, 0.01, 5000, 0.01, 1.0, 0.999, False),
        "cifar100/ipc1": (1, 40, 3, 20, None, 1000, 1e-5, 0.01, 5000, 0.01, 1.0, 0.9995, True),
        "cifar100/ipc10": (10, 20, 2, 40, None, 1000, 1e-5, 0.01, 5000, 0.01, 1.0, 0.9995, True),
        "cifar100/ipc50": (50, 80, 2, 40, 1000, 1000, 1e-5, 0.01, 5000, 0.01, 1.0, 0.999, True),
        "tiny_imagenet/ipc1": (1, 30, 2, 10, None, 10_000, 1e-4, 0.01, 5000, 0.01, 1.0, 0.999, False),
        "tiny_imagenet/ipc10": (10, 20, 2, 40, 500, 10_000, 1e-4, 0.01, 5000, 0.01, 1.0, 0.999, False),
    }
    for name in FTD.presets:
        training = replace(FTD.preset(name).experts.training, alpha=1.0)
        assert replace(FTD.preset(name).experts, training=training) == FTD().experts
