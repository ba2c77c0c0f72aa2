"""What KMeans, KCenter and Herding promise beyond the contract: the images that their rules choose, in any form."""

from dataclasses import replace

import pytest
import torch
from methods.cases import CASES

from dsdistill import estimate, synthesize
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.methods import KCenter
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Tiled
from dsdistill.selection import choose

RULE = {"KMeans": "kmeans", "KCenter": "kcenter", "Herding": "herding"}
NAMES = pytest.mark.parametrize("name", RULE)


def chosen_of(name, source, count, seed=0):
    run = Run(source.train_only(), torch.device("cpu"), Rng(seed), tuple(range(source.num_classes)), 100)
    return choose(run, RULE[name], CASES[name].extractor, count)


@NAMES
def test_images_are_those_of_the_source_in_order_of_choice(name, source):
    made = synthesize(replace(CASES[name], ipc=4), source, seed=1)
    index = torch.cat(chosen_of(name, source, 4, seed=1))
    assert torch.equal(made.tensors()[0], source.normalization.standardize(source.images[index]))
    assert made.targets == source.targets[index].tolist()


@NAMES
def test_tiles_show_more_of_them(name):
    shades = (7 * torch.arange(36, dtype=torch.uint8)).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)  # each image of one shade
    source = ImageSource("shades", ["dark", "grey", "light"], shades, torch.arange(3).repeat_interleave(12))
    made = synthesize(replace(CASES[name], ipc=1, form=Tiled(factor=2)), source)
    shown, targets = made.tensors()
    for index, chosen in enumerate(chosen_of(name, source, 4)):
        numbers = source.normalization.to_uint8(shown[targets == index])[:, 0, 0, 0] // 7
        assert numbers.tolist() == chosen.tolist()


@NAMES
def test_small_classes(name, source):
    with pytest.raises(BadData, match="on_small_class"):
        synthesize(replace(CASES[name], ipc=13), source)
    capped = synthesize(replace(CASES[name], ipc=13, on_small_class="cap"), source)
    assert capped.counts == (12, 12, 12)
    repeated = synthesize(replace(CASES[name], ipc=13, on_small_class="duplicate"), source).tensors()[0]
    assert torch.equal(repeated[12], repeated[0])


@NAMES
def test_a_network_that_does_not_fit_is_refused_before_it_is_trained(name, source, tmp_path):
    deep = replace(CASES[name].extractor, network=NetworkSpec(depth=9))
    with pytest.raises(InvalidSetting, match="depth"):
        synthesize(replace(CASES[name], extractor=deep), source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@NAMES
def test_an_estimate_trains_a_few_steps_only(name, source):
    extractor = CASES[name].extractor
    long = replace(CASES[name], extractor=replace(extractor, training=replace(extractor.training, epochs=100_000)))
    cost = estimate(long, source, device="cpu")
    assert cost.steps == 0
    assert cost.seconds > 10


def test_k_center_may_begin_at_random(source):
    mean, random = (
        synthesize(KCenter(ipc=2, extractor=CASES["KCenter"].extractor, first=first), source).tensors()[0]
        for first in ("mean", "random")
    )
    assert not torch.equal(mean, random)
    with pytest.raises(InvalidSetting, match=r"KCenter\.first"):
        KCenter(first="median")
