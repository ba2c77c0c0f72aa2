from dataclasses import replace

import pytest
import torch
from torch import nn

from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.experts import Experts, PlainTraining
from dsdistill.methods import MTT
from dsdistill.networks import ConvNet, Need, NetworkSpec, check_needs, register_network
from dsdistill.networks import spec as spec_module
from dsdistill.networks.spec import BUILTIN

ALL: tuple[Need, ...] = ("features", "maps", "batch-independent", "second-order", "deterministic")
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(spec_module, "_registered", {})


def convolutional(*last):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *last
    )


class Together(nn.Module):
    """Logits relative to those of the batch, without a norm layer."""

    def forward(self, logits):
        return logits - logits.mean(0)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Square(nn.Module):
    def forward(self, values):
        return Once.apply(values)


class Dropping(nn.Module):
    """Functional dropout, which no mode but evaluation silences."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, values):
        return nn.functional.dropout(values, self.rate, self.training)


class DropPath(nn.Module):
    """Stochastic depth that skips so rarely that two results are nearly always the same."""

    def forward(self, values):
        kept = torch.rand(len(values), 1) < 0.999 if self.training else torch.ones(len(values), 1)
        return values * kept


class Counting(nn.Module):
    """Draws nothing, but remembers."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, values):
        self.seen += 1
        return values * self.seen


class ConvolutionalHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = convolutional(), nn.Conv2d(4, 2, 1)

    def forward(self, images):
        return self.head(self.body(images)[:, :, None, None]).flatten(1)


def functional(images_to_maps):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, images):
            return self.head(images_to_maps(self.conv(images)).mean((2, 3)))

    return Network()


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_networks_have_all_but_what_their_kind_lacks(name):
    for need in ALL:
        if (name, need) == ("mlp", "maps"):
            with pytest.raises(InvalidSetting, match=r"'mlp'.* 'maps' .* 0 after .*choose convnet"):
                NetworkSpec(name).require([need], (3, 32, 32), 10)
        else:
            NetworkSpec(name).require([need], (3, 32, 32), 10)


def test_one_map_is_not_enough():
    NetworkSpec("convnet", depth=2).require(["maps"], SHAPE, 10)
    with pytest.raises(InvalidSetting, match=r"'maps' .* 1 after .*2 blocks or more"):
        NetworkSpec("convnet", depth=1).require(["maps"], SHAPE, 10)


@pytest.mark.parametrize("name", [name for name in BUILTIN if "norm" in BUILTIN[name].options])
def test_batch_normalisation_is_seen(name):
    with pytest.raises(InvalidSetting, match=r"'batch-independent' .*batch normalisation.*norm='instance'"):
        NetworkSpec(name, norm="batch").require(["batch-independent"], (3, 32, 32), 10)
    NetworkSpec(name, norm="batch").require(["features"], (3, 32, 32), 10)


@pytest.mark.parametrize(
    ("make", "unmet"),
    [
        (lambda: convolutional(nn.Linear(4, 2)), set()),
        (lambda: convolutional(nn.Dropout(), nn.Linear(4, 2)), set()),
        (lambda: convolutional(nn.Linear(4, 2), Together()), {"batch-independent"}),
        (lambda: convolutional(nn.BatchNorm1d(4), nn.Linear(4, 2)), {"batch-independent"}),
        (lambda: convolutional(Square(), nn.Linear(4, 2)), {"second-order"}),
        (lambda: convolutional(Dropping(0.5), nn.Linear(4, 2)), {"deterministic"}),
        (lambda: convolutional(Dropping(0.0), nn.Linear(4, 2)), set()),
        (lambda: convolutional(DropPath(), nn.Linear(4, 2)), {"deterministic"}),
        (lambda: convolutional(Counting(), nn.Linear(4, 2)), {"deterministic"}),
        (ConvolutionalHead, {"features"}),
        (lambda: functional(torch.relu), {"maps"}),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)), {"maps"}),
    ],
    ids=[
        "all",
        "dropout",
        "coupled",
        "batchnorm",
        "once",
        "dropping",
        "rate 0",
        "drop path",
        "counting",
        "head",
        "functional",
        "linear",
    ],
)
def test_what_a_factorys_network_lacks_is_found_by_running_it(make, unmet):
    register_network("mine", lambda shape, num_classes: make())
    state = torch.get_rng_state()
    for need in ALL:
        if need in unmet:
            with pytest.raises(InvalidSetting, match=f"'mine'.*{need!r}") as error:
                NetworkSpec("mine").require([need], SHAPE, 2)
            assert any(word in str(error.value) for word in ("choose", "give", "needs an embed(images) method"))
        else:
            NetworkSpec("mine").require([need], SHAPE, 2)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was disturbed"


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_networks_are_deterministic(name):
    """With parameters: without, the question has no answer."""
    network = NetworkSpec(name).build((3, 32, 32), 2, generator=torch.Generator().manual_seed(0), device="cpu")
    check_needs(name, network, ["deterministic"], (3, 32, 32))


def test_a_method_that_makes_steps_again_refuses_chance(source):
    def factory(rate):
        return lambda shape, classes: nn.Sequential(nn.Flatten(), Dropping(rate), nn.Linear(192, classes))

    register_network("still", factory(0.0))
    register_network("dropping", factory(0.5))
    experts = Experts(training=PlainTraining(epochs=3))
    method = MTT(ipc=1, max_start_epoch=2, expert_epochs=1, network=NetworkSpec("still"), experts=experts)
    method.check(source)
    with pytest.raises(InvalidSetting, match=r"'dropping'.*'deterministic' of its network"):
        replace(method, network=NetworkSpec("dropping")).check(source)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_each_part_stays(training):
    network = convolutional(nn.Dropout(), nn.Linear(4, 2)).train(training)
    network[0].train(not training)
    modes = [part.training for part in network.modules()]
    check_needs("mine", network, ["deterministic"], SHAPE)
    assert [part.training for part in network.modules()] == modes


def test_chance_is_sought_in_training_mode():
    with pytest.raises(InvalidSetting, match=r"'deterministic' .*draws random numbers.*torch\.nn\.Dropout"):
        check_needs("mine", convolutional(Dropping(0.5), nn.Linear(4, 2)).eval(), ["deterministic"], SHAPE)
    with pytest.raises(InvalidSetting, match=r"'deterministic' .*other results .*same images again"):
        check_needs("mine", convolutional(Counting(), nn.Linear(4, 2)), ["deterministic"], SHAPE)


def test_features_must_be_one_row_per_image():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 2)

        def forward(self, images):
            return self.head(images.flatten(2).flatten(0, 1)).unflatten(0, (-1, 3)).mean(1)

    with pytest.raises(InvalidSetting, match=r"'features' .*\(6, 64\) for 2 images"):
        check_needs("wide", Wide(), ["features"], SHAPE)


def test_require_refuses_what_check_refuses():
    with pytest.raises(InvalidSetting, match="at least 8 x 8"):
        NetworkSpec("resnet18").require([], (3, 7, 7), 10)
    register_network("bad", lambda shape, num_classes: nn.Flatten())
    with pytest.raises(InvalidSetting, match="must return logits"):
        NetworkSpec("bad").require([], SHAPE, 2)
    with pytest.raises(InvalidSetting, match="num_classes = 0"):
        NetworkSpec().require([], SHAPE, 0)


def test_unknown_needs_are_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'features'"):
        check_needs("convnet", ConvNet(SHAPE, 2, width=4), ["feature"], SHAPE)


def test_a_built_in_network_is_examined_without_parameters(monkeypatch):
    monkeypatch.setattr(spec_module, "reinitialize_", lambda *_: pytest.fail("parameters were drawn"))
    monkeypatch.setattr(nn.Module, "to_empty", lambda *_, **__: pytest.fail("parameters were made"))
    NetworkSpec("vgg11").require(ALL, (3, 64, 32), 1000)
