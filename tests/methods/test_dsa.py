"""DSA against plain loops in float64."""

from dataclasses import replace

import pytest
import torch
from methods.condensing import double_run, learned, settings_of, slow_condensation, start

from dsdistill.augmentations import Chain, Siamese, flip_first
from dsdistill.methods import DC, DSA, FYI
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Plain

SMOOTH = NetworkSpec(width=3, depth=2, activation="swish")
TINY = DSA(
    ipc=2, iterations=2, outer_loop=3, inner_epochs=2, real_batch=5, batch_size=4, lr_network=0.1, network=SMOOTH
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_run_is_that_of_plain_loops(chunk):
    run = double_run(chunk=chunk)
    found = learned(TINY, run)
    assert float((found - start(TINY, run).images.pixels.detach()).abs().max()) > 1e-3
    torch.testing.assert_close(found, slow_condensation(TINY, run), rtol=1e-7, atol=1e-9)
    assert not torch.equal(found, learned(replace(TINY, augmentation=None), run))


def test_pairs_are_made_before_the_views():
    run, wrapped = double_run(), FYI(base=replace(TINY, augmentation=flip_first(("flip", "crop"))))
    state = wrapped.start(run, wrapped.jobs(run)[0])
    for iteration in range(wrapped.steps):
        wrapped.step(run, state, iteration)
    expected = slow_condensation(wrapped.base, run, double_pairs=True)
    torch.testing.assert_close(state.images.base.pixels.detach(), expected, rtol=1e-7, atol=1e-9)


def test_views_are_drawn_anew_for_each_update_and_class(monkeypatch):
    seen = []
    sample = Siamese.sample

    def noted(self, count, shape, generator, *, per="class", device=None):
        record = sample(self, count, shape, generator, per=per, device=device)
        if per == "class":
            seen.append((record.ops, record.values))
        return record

    monkeypatch.setattr(Siamese, "sample", noted)
    learned(replace(TINY, augmentation=Siamese(("rotate",))), double_run())
    assert len(seen) == TINY.steps == 6
    values = torch.cat([values[:, 0] for _, values in seen])
    assert len(values.unique()) == 3 * 6


def test_flips_are_left_out_where_they_change_the_class():
    unsafe = double_run(mirror_safe=False)
    plain, flips = (replace(TINY, augmentation=one) for one in (None, Siamese(("flip",))))
    assert torch.equal(learned(flips, unsafe), learned(plain, unsafe))
    assert not torch.equal(learned(flips, double_run()), learned(plain, double_run()))


def test_it_is_dc_from_real_images_under_views():
    run = double_run()
    assert torch.equal(learned(DC(**settings_of(TINY)), run), learned(TINY, run))


SIX = ("color", "crop", "cutout", "flip", "scale", "rotate")
PUBLISHED = {
    "ipc": 10,
    "form": Plain(),
    "on_small_class": "error",
    "iterations": 1000,
    "outer_loop": None,
    "inner_epochs": None,
    "init": "real",
    "real_batch": 256,
    "lr_images": None,
    "momentum": 0.5,
    "lr_network": 0.01,
    "momentum_network": 0.0,
    "batch_size": 256,
    "distance": "layerwise",
    "labels": "hard",
    "lr_labels": 0.1,
    "network": NetworkSpec("convnet"),
    "augmentation": Siamese(SIX),
}
OTHERS = {
    "cifar10/ipc100": {"ipc": 100, "outer_loop": 100, "inner_epochs": 2},
    "cifar100/ipc50/fyi": {
        "ipc": 50,
        "outer_loop": 10,
        "inner_epochs": 10,
        "augmentation": Chain((Siamese(("flip",)), Siamese(("color", "crop", "cutout", "scale", "rotate")))),
    },
}


def test_presets_are_the_published_settings():
    datasets = ("mnist", "fashion_mnist", "svhn", "cifar10", "cifar100")
    expected = OTHERS | {f"{data}/ipc{ipc}": {"ipc": ipc} for data in datasets for ipc in (1, 10, 50)}
    assert set(DSA.presets) == set(expected)
    for name, changes in expected.items():
        assert settings_of(DSA.preset(name)) == PUBLISHED | changes, name
    assert DSA.preset("cifar100/ipc50").loops == (50, 10)
    assert all(preset.source for preset in DSA.presets.values())
