import json

import pytest
import torch
from scipy import stats

from dsdistill.augmentations import CutMix, Mix, Mixup, MixViews
from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import InvalidSetting, ShapeMismatch

SHAPE = (3, 12, 20)
MIXES = [CutMix(probability=1.0), Mixup()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count, dtype=torch.float32):
    return torch.randn(count, *SHAPE, generator=seeded(9), dtype=dtype)


def records(mix, number, count=3, shape=SHAPE):
    generator = seeded(1)
    return [mix.sample(count, shape, generator) for _ in range(number)]


def test_the_share_of_a_cut_is_that_of_the_pixels_kept():
    shares = set()
    for views in records(CutMix(probability=1.0), 200, count=1):
        views = MixViews(views.shape, 2, torch.tensor([1, 0]), views.share, views.box)
        images = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
        mixed = CutMix().apply(images, views)
        assert 1 - mixed[0].mean(dtype=torch.float64).item() == pytest.approx(views.share, abs=1e-12)
        assert mixed[1].mean(dtype=torch.float64).item() == pytest.approx(views.share, abs=1e-12)
        shares.add(views.share)
    assert len(shares) > 40


def test_cutmix_equals_a_loop_over_pixels():
    images = pictures(5)
    for views in records(CutMix(probability=1.0), 10, count=5):
        top, left, bottom, right = views.box
        expected = images.clone()
        for image in range(5):
            for row in range(SHAPE[1]):
                for column in range(SHAPE[2]):
                    if top <= row < bottom and left <= column < right:
                        expected[image, :, row, column] = images[views.partner[image], :, row, column]
        assert torch.equal(CutMix().apply(images, views), expected)


def test_mixup_equals_its_formula():
    images = pictures(5)
    for views in records(Mixup(), 10, count=5):
        expected = torch.stack(
            [
                views.share * image + (1 - views.share) * images[p]
                for image, p in zip(images, views.partner, strict=True)
            ]
        )
        torch.testing.assert_close(Mixup().apply(images, views), expected)


def test_boxes_are_clipped_and_reach_every_border_and_corner():
    tops, lefts, bottoms, rights, corners = 0, 0, 0, 0, 0
    for views in records(CutMix(probability=1.0), 3000, count=1):
        top, left, bottom, right = views.box
        assert 0 <= top <= bottom <= 12
        assert 0 <= left <= right <= 20
        assert views.share == 1 - (bottom - top) * (right - left) / 240
        tops, lefts = tops + (top == 0), lefts + (left == 0)
        bottoms, rights = bottoms + (bottom == 12), rights + (right == 20)
        corners += top == 0 and left == 0
    # A box of half the image's height, say, reaches the top from half of all centres.
    assert min(tops, lefts, bottoms, rights) > 800
    assert corners > 300


@pytest.mark.parametrize(
    ("quantile", "place", "box"),
    [
        # sides sqrt(1 - 0.75) = 1/2 of 12 x 20: 6 x 10, halves 3 and 5
        (0.75, (0.5, 0.5), (3, 5, 9, 15)),
        (0.75, (0.0, 0.0), (0, 0, 3, 5)),
        (0.75, (0.999, 0.999), (8, 14, 12, 20)),
        (0.75, (0.5, 0.0), (3, 0, 9, 5)),
        (0.0, (0.5, 0.5), (0, 0, 12, 20)),
        # sides 1/5: 2 x 4; sides 1/10: 1 x 2, an odd one rounded down to nothing
        (0.96, (0.5, 0.5), (5, 8, 7, 12)),
        (0.9901, (0.5, 0.5), (6, 10, 6, 10)),
    ],
)
def test_boxes_by_hand(monkeypatch, quantile, place, box):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, quantile, *place], dtype=torch.float64))
    views = CutMix().sample(4, SHAPE, seeded())
    assert views.box == box
    assert views.share == 1 - (box[2] - box[0]) * (box[3] - box[1]) / 240


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    shares = [views.share for views in records(Mixup(alpha=alpha), 4000, count=1)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.kstest(shares, stats.beta(2 * alpha, alpha).cdf).pvalue < 1e-6


@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_the_probability_is_that_of_a_batch_being_mixed(kind):
    mixed = sum(views.share < 1 for views in records(kind(probability=0.3, alpha=8.0), 4000, count=1))
    assert mixed / 4000 == pytest.approx(0.3, abs=0.03)
    images, targets = pictures(3), torch.tensor([2, 0, 1])
    for views in records(kind(probability=0.0), 20):
        assert views.share == 1
        assert kind().apply(images, views) is images
        assert torch.equal(kind().targets(targets, views, 4), torch.eye(4)[targets])


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: type(mix).__name__)
def test_targets_are_mixed_as_the_images_are(mix):
    hard = torch.tensor([2, 0, 1, 1, 3])
    soft = torch.rand(5, 4, generator=seeded(3), dtype=torch.float64)
    soft /= soft.sum(1, keepdim=True)
    for views in records(mix, 20, count=5):
        assert sorted(views.partner.tolist()) == list(range(5))
        for targets, rows in ((hard, torch.eye(4)[hard]), (soft, soft)):
            mixed = mix.targets(targets, views, 4)
            assert mixed.dtype == rows.dtype
            torch.testing.assert_close(mixed, rows * views.share + rows[views.partner] * (1 - views.share))
            torch.testing.assert_close(mixed.sum(1), torch.ones(5, dtype=mixed.dtype))
    assert any(views.share < 1 for views in records(mix, 20, count=5))


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: type(mix).__name__)
def test_gradients_reach_both_partners(mix):
    views = next(views for views in records(mix, 50) if 0.2 < views.share < 0.8)
    images = pictures(3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mix.apply(x, views), images)


@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_sampling_is_determined_by_its_generator_alone(kind):
    state = torch.get_rng_state()
    one, two = (kind(probability=1.0).sample(9, SHAPE, seeded(6)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (one.share, one.box) == (two.share, two.box)
    assert torch.equal(one.partner, two.partner)
    other = kind(probability=1.0).sample(9, SHAPE, seeded(7))
    assert other.share != one.share
    assert not torch.equal(other.partner, one.partner)
    generators = [seeded(6), seeded(6)]
    for probability, generator in zip((0.0, 1.0), generators, strict=True):
        kind(probability=probability).sample(9, SHAPE, generator)
    assert torch.equal(*(generator.get_state() for generator in generators)), "a skipped batch shifts the next draws"


def test_bad_arguments_are_refused():
    mix = CutMix(probability=1.0)
    views = mix.sample(3, SHAPE, seeded())
    with pytest.raises(InvalidSetting, match="at least one image"):
        mix.sample(0, SHAPE, seeded())
    with pytest.raises(ShapeMismatch, match=r"expected \(3, 3, 12, 20\)"):
        mix.apply(pictures(4), views)
    for targets in (torch.zeros(4, dtype=torch.int64), torch.zeros(3, 5)):
        with pytest.raises(ShapeMismatch, match=r"expected \(3,\) or \(3, 4\)"):
            mix.targets(targets, views, 4)
    with pytest.raises(InvalidSetting, match=r"Mixup.sample drew"):
        Mixup().apply(pictures(3), MixViews(SHAPE, 3, views.partner, 0.5, (0, 0, 6, 20)))
    with pytest.raises(InvalidSetting, match=r"CutMix.sample drew"):
        mix.apply(pictures(3), Mixup().sample(3, SHAPE, seeded()))

    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(InvalidSetting, match="generator on the CPU"):
        mix.sample(2, SHAPE, Elsewhere())


@pytest.mark.parametrize(
    "arguments", [{"probability": -0.1}, {"probability": 1.1}, {"alpha": 0.0}, {"alpha": float("inf")}]
)
@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_bad_settings_are_refused(kind, arguments):
    with pytest.raises(InvalidSetting, match=next(iter(arguments))):
        kind(**arguments)


def test_settings_are_plain_on_disk_and_documented():
    for mix in (CutMix(alpha=2.0), Mixup(probability=0.3)):
        assert from_dict(Mix, json.loads(json.dumps(to_dict(mix)))) == mix
        assert all(field.doc for field in describe(type(mix)))
    assert CutMix().probability == 0.5
