"""DataDAM against the formula of the paper, written as loops over classes, layers and images in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from methods.stepping import CPU, begin, real_images, run_of, shown
from torch.nn import functional as F

from dsdistill import synthesize
from dsdistill.augmentations import Siamese
from dsdistill.data import ImageSource
from dsdistill.errors import InvalidSetting
from dsdistill.methods import DM, DataDAM
from dsdistill.networks import NetworkSpec, activation_taps
from dsdistill.parameterizations import Tiled
from dsdistill.selection import Extractor

SMALL = NetworkSpec(width=4, depth=3)
PLAIN = DataDAM(ipc=2, iterations=3, real_batch=4, network=SMALL, augmentation=None)


def maps_and_feature(network, images):
    """The map after every ReLU, before pooling, and the flattened end: written out block by block."""
    maps = []
    for block in network.blocks:
        images = F.relu(block.norm(block.conv(images)))
        maps.append(images)
        images = F.avg_pool2d(images, 2)
    return maps, images.flatten(1)


def attention(maps, power):
    """The attention of one image's map."""
    raised = sum(channel.abs() ** power for channel in maps[0])
    return raised.flatten() / raised.norm()


def slow_loss(method, run, synthetic, iteration, *, together=False):
    """gamma (L_SAM + lambda L_MMD), image by image; with ``together`` a side passes whole, as batch statistics need."""
    spec, shape, classes = method.network, run.source.shape, run.source.num_classes
    network = spec.build(shape, classes, generator=run.rng.at("network", iteration), device=CPU)
    network = copy.deepcopy(network).double().train()
    sides = []
    for images in (real_images(method, run, iteration), synthetic):
        views = [shown(method, run, iteration, place, one) for place, one in enumerate(images)]
        sizes = [len(one) for one in views]
        if together:
            maps, features = maps_and_feature(network, torch.cat(views))
            layers = [torch.split(layer, sizes) for layer in maps]
            sides.append(([[layer[c] for layer in layers] for c in range(len(sizes))], torch.split(features, sizes)))
        else:
            alone = [[maps_and_feature(network, image[None]) for image in one] for one in views]
            sides.append(
                (
                    [[torch.cat([m[layer] for m, _ in one]) for layer in range(3)] for one in alone],
                    [torch.cat([feature for _, feature in one]) for one in alone],
                )
            )
    (real_maps, real_features), (made_maps, made_features) = sides
    total = torch.zeros((), dtype=torch.float64)
    for c in range(len(run.classes)):
        for layer in range(2):  # of 3: the last enters through the features
            means = [
                torch.stack([attention(m[None], method.power) for m in side[c][layer]]).mean(0)
                for side in (real_maps, made_maps)
            ]
            total = total + ((means[0] - means[1]) ** 2).sum()
        gap = real_features[c].mean(0) - made_features[c].mean(0)
        total = total + method.feature_weight * (gap**2).sum()
    return method.scale * total


def check_step(method, run, **options):
    state = begin(method, run)
    labels = state.labels.classes
    leaves = [state.images.pixels.detach()[labels == c].double().requires_grad_() for c in run.classes]
    loss = slow_loss(method, run, leaves, 0, **options)
    gradient = torch.cat(torch.autograd.grad(loss, leaves))
    metrics = method.step(run, state, 0)
    assert float(loss.detach()) > 1e-3
    torch.testing.assert_close(metrics["loss"].double(), loss.detach(), rtol=2e-5, atol=0)
    scale = float(gradient.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(state.images.pixels.grad.double(), gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_the_step_is_that_of_the_formula(power, source):
    check_step(replace(PLAIN, power=power), run_of(source))


def test_classes_share_views_with_their_real_images(source):
    check_step(replace(PLAIN, augmentation=Siamese()), run_of(source, seed=3))


def test_batch_statistics_are_those_of_a_whole_side(source):
    batched = replace(PLAIN, network=replace(SMALL, norm="batch"), power=1.0)
    check_step(batched, run_of(source, chunk=2), together=True)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_change_nothing(chunk, source):
    method = replace(PLAIN, ipc=9, augmentation=Siamese(), form=Tiled(), on_small_class="duplicate")
    states = []
    for size in (1000, chunk):
        states.append(begin(method, run_of(source, chunk=size)))
        method.step(run_of(source, chunk=size), states[-1], 0)
    gradient = states[0].images.pixels.grad
    torch.testing.assert_close(
        states[1].images.pixels.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
    )


def test_the_real_batch_itself_has_no_loss_and_no_gradient(source):
    method, run = replace(PLAIN, ipc=4), run_of(source)
    state = begin(method, run)
    state.images.pixels.data.copy_(torch.cat(real_images(method, run, 5)))
    assert float(method.step(run, state, 5)["loss"]) == 0
    assert not state.images.pixels.grad.any()


def test_convnet_of_three_blocks_has_two_layers_of_attention(source):
    network = NetworkSpec().build((3, 32, 32), 10, generator=torch.Generator(), device=CPU)
    method = DataDAM(ipc=1)
    signal = method._signal(network, (3, 32, 32))(torch.randn(2, 3, 32, 32))
    assert len(activation_taps(network, (3, 32, 32))) == 3
    assert signal.shape == (2, 32 * 32 + 16 * 16 + 2048)


def test_without_attention_it_is_distribution_matching(source):
    """Attention of constant maps of one pixel is 1 everywhere, so what is left of the loss is that of DM."""
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiny = ImageSource("tiny", ["a", "b"], images, torch.arange(8) // 4)
    shared = {
        "ipc": 2,
        "iterations": 1,
        "real_batch": 3,
        "network": NetworkSpec(width=4, depth=2),
        "augmentation": None,
    }
    attentive, plain = DataDAM(**shared, scale=1.0, feature_weight=1.0), DM(**shared)
    run = run_of(tiny)
    loss = attentive.step(run, begin(attentive, run), 0)["loss"]
    without = replace(attentive, feature_weight=0.0)
    rest = without.step(run, begin(without, run), 0)["loss"]
    assert float(rest) > 0
    torch.testing.assert_close(loss - rest, plain.step(run, begin(plain, run), 0)["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["kcenter", "kmeans", "herding"])
def test_it_may_start_from_chosen_images(rule, source):
    method = replace(PLAIN, init=rule, extractor=Extractor(network=SMALL, training=None))
    run = run_of(source)
    state = begin(method, run)
    real = source.normalization.standardize(source.images)
    for image, label in zip(state.images.pixels.detach(), state.labels.classes.tolist(), strict=True):
        same = (real == image).flatten(1).all(1).nonzero().flatten()
        assert len(same) == 1
        assert int(source.targets[same]) == label
    assert synthesize(method, source).ipc == 2


def test_networks_without_two_maps_are_refused(source):
    for spec in (NetworkSpec("mlp"), NetworkSpec(width=4, depth=1)):
        with pytest.raises(InvalidSetting, match="maps"):
            replace(PLAIN, network=spec).check(source)


def test_the_extractor_of_chosen_images_is_checked_before_any_work(source):
    deep = Extractor(network=NetworkSpec(depth=9))
    replace(PLAIN, extractor=deep).check(source)  # it is not used
    with pytest.raises(InvalidSetting, match="depth = 9"):
        replace(PLAIN, extractor=deep, init="kcenter").check(source)


def test_presets_of_paper_and_code():
    paper, code = DataDAM.preset("cifar10/ipc10"), DataDAM.preset("cifar10/ipc10/repo")
    assert (paper.power, paper.network.norm, paper.iterations, paper.lr_images) == (4, None, 8000, 1)
    assert (code.power, code.network.norm, code.iterations, code.real_batch) == (1, "batch", 20_000, 64)
    assert DataDAM.preset("imagenet_nette/ipc1/repo").feature_weight == 0.01
    assert DataDAM.preset("imagenet_nette/ipc1/repo").network == NetworkSpec(norm="batch", depth=6)
    assert DataDAM.preset("imagenet_woof/ipc1").feature_weight == 0.02
    assert DataDAM.preset("paper", ipc=3) == DataDAM(ipc=3)
    assert DataDAM.preset("repo", ipc=10) == code
    assert DataDAM.preset("imagenet_woof/ipc10").feature_weight == 0.02
    assert "ipc" not in DataDAM.presets["repo"].settings
    assert all(preset.source for preset in DataDAM.presets.values())
