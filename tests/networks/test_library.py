import sys

import pytest
import torch
from torch import nn

from dsdistill.errors import InvalidSetting, MissingExtra, UnknownName
from dsdistill.networks import NetworkSpec, embed, parameter_digest
from dsdistill.networks.library import library_factory


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name, shape, seed=0, num_classes=4):
    return NetworkSpec(name).build(shape, num_classes, generator=seeded(seed), device="cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize(
    ("name", "shape", "features"),
    [
        ("torchvision:shufflenet_v2_x0_5", (3, 32, 48), 1024),
        ("torchvision:shufflenet_v2_x0_5", (1, 28, 28), 1024),
        ("timm:resnet10t", (2, 32, 48), 512),
        ("timm:vit_tiny_patch16_224", (1, 32, 48), 192),
    ],
)
def test_models_are_determined_by_the_generator(name, shape, features):
    state = torch.get_rng_state()
    network = build(name, shape, 3)
    digest = parameter_digest(network)
    assert parameter_digest(build(name, shape, 3)) == digest
    assert parameter_digest(build(name, shape, 4)) != digest
    again = NetworkSpec(name).refresh(network, shape, 4, generator=seeded(3), device="cpu")
    assert parameter_digest(again) == digest
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was disturbed"
    images = torch.randn(2, *shape, generator=seeded())
    assert network(images).shape == (2, 4)
    assert embed(network, images).shape == (2, features)
    assert all(part.training for part in network.modules())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_the_first_convolution_of_torchvision_takes_any_number_of_channels(channels):
    ours, theirs = (build("torchvision:resnet18", (count, 32, 32)).conv1 for count in (channels, 3))
    assert ours.in_channels == channels
    assert ours.weight.shape == (64, channels, 7, 7)
    assert (ours.kernel_size, ours.stride, ours.padding, ours.bias) == ((7, 7), (2, 2), (3, 3), None)
    # The variance of a sum over inputs stays: std^2 * channels.
    result, expected = (conv.weight.var().item() * conv.in_channels for conv in (ours, theirs))
    assert result == pytest.approx(expected, rel=0.1)
    assert ours.weight[:, 0].std() > 0.8 * ours.weight.std()


def test_transformers_of_torchvision_get_the_image_size():
    network = build("torchvision:vit_b_32", (3, 64, 64))
    assert network.image_size == 64
    with pytest.raises(InvalidSetting, match="square images only"):
        build("torchvision:vit_b_32", (3, 64, 32))
    with pytest.raises(InvalidSetting, match=r"vit_b_32.*\(3, 40, 40\).*patch size"):
        build("torchvision:vit_b_32", (3, 40, 40))


def test_models_with_auxiliary_classifiers_return_logits_when_training():
    network = build("torchvision:googlenet", (3, 64, 64))
    assert network.training
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("torchvision:alexnet", (3, 32, 32), "Output size is too small"),
        ("torchvision:maxvit_t", (3, 64, 64), "not divisible by partition size"),
    ],
)
def test_models_that_do_not_fit_the_images_say_why(name, shape, message):
    with pytest.raises(InvalidSetting, match=message) as error:
        NetworkSpec(name).require([], shape, 4)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("torchvision:resnt50", "resnet50"), ("timm:ResNet10", "resnet10t"), ("timm:resnt50", "resnet50")],
)
def test_unknown_models_suggest_the_nearest(name, nearest):
    spec = NetworkSpec(name)
    for attempt in (lambda: spec.check((3, 32, 32), 4), lambda: build(name, (3, 32, 32))):
        with pytest.raises(UnknownName, match=f"did you mean '{nearest}'") as error:
            attempt()
        assert len(error.value.known) == 5


@pytest.mark.parametrize(
    "name",
    [
        "timm:hf-hub:timm/resnet18.a1_in1k",
        "timm:hf_hub:timm/resnet18.a1_in1k",
        "timm:resnet18.a1_in1k",
        "timm:local-dir:x",
    ],
)
def test_names_that_timm_would_look_up_elsewhere_are_unknown(name):
    with pytest.raises(UnknownName):
        build(name, (3, 32, 32))


def test_no_weights_are_asked_for(monkeypatch):
    import timm
    from torchvision import models

    asked = []
    for module, name in ((timm, "create_model"), (models, "get_model")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, make=make, **k: asked.append(k) or make(*a, **k))
    build("timm:resnet10t", (3, 32, 32))
    build("torchvision:shufflenet_v2_x0_5", (3, 32, 32))
    assert asked[0]["pretrained"] is False
    assert asked[1]["weights"] is None


def test_without_timm_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    spec = NetworkSpec("timm:resnet10t")
    with pytest.raises(MissingExtra, match=r"pip install 'dsdistill\[timm\]'"):
        spec.check((3, 32, 32), 4)


def test_settings_of_our_networks_are_not_those_of_libraries():
    with pytest.raises(InvalidSetting, match="no such setting"):
        NetworkSpec("timm:resnet10t", norm="instance")


def test_networks_without_a_convolution_of_3_channels_cannot_be_adapted(monkeypatch):
    from torchvision import models

    monkeypatch.setattr(models, "get_model", lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(InvalidSetting, match="no convolution of 3 channels to be made one of 1"):
        build("torchvision:resnet18", (1, 8, 8))


def test_other_names_belong_to_no_library():
    assert library_factory("package.module:function") is None
    assert library_factory("convnet") is None


@pytest.mark.parametrize(
    "model", ["resnet18", "resnet50", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0"]
)
def test_a_small_stem_halves_small_images_less_often(model):
    shape, sizes = (3, 32, 32), {}
    for stem in (None, "small"):
        network = NetworkSpec(f"torchvision:{model}", stem=stem).build(shape, 4, generator=seeded(), device="cpu")
        first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
        kept = []
        first.register_forward_hook(lambda _, arguments, result, kept=kept: kept.append(result.shape[-1]))
        assert network.eval()(torch.zeros(1, *shape)).shape == (1, 4)
        sizes[stem] = kept[0]
        assert stem is None or (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
        assert (
            stem is None or "maxpool" not in dict(network.named_modules()) or isinstance(network.maxpool, nn.Identity)
        )
    assert sizes == {None: 16, "small": 32}


def test_a_small_stem_makes_resnet18_of_the_size_that_papers_state():
    network = NetworkSpec("torchvision:resnet18", stem="small").build(
        (3, 32, 32), 100, generator=seeded(), device="cpu"
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_220_132


def test_a_stem_is_a_setting_of_torchvision_alone():
    with pytest.raises(InvalidSetting, match="only models of torchvision"):
        NetworkSpec("convnet", stem="small")
    with pytest.raises(InvalidSetting, match="of stride 1: leave stem out"):
        NetworkSpec("torchvision:vgg11_bn", stem="small").build((3, 32, 32), 4, generator=seeded(), device="cpu")
