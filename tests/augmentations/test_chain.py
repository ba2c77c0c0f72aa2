import json
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from dsdistill.augmentations import (
    Augmentation,
    Chain,
    ChainViews,
    Siamese,
    SiameseViews,
    always_flip_color_cutout,
    flip_first,
    transforms,
)
from dsdistill.core.config import describe, from_dict, to_dict
from dsdistill.errors import InvalidSetting, ShapeMismatch, UnknownName

SHAPE = (3, 32, 32)
OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count, shape=SHAPE, dtype=torch.float32):
    return torch.randn(count, *shape, generator=seeded(9), dtype=dtype)


@pytest.mark.parametrize(
    ("chain", "stages"),
    [
        (flip_first(), [("flip",), ("color", "crop", "cutout", "scale", "rotate")]),
        (flip_first(("rotate", "flip", "crop")), [("flip",), ("rotate", "crop")]),
        (flip_first(("rotate", "crop")), [("rotate", "crop")]),
        (flip_first(("flip",)), [("flip",)]),
        (always_flip_color_cutout(), [("color",), ("crop",), ("cutout",)]),
        (always_flip_color_cutout(OPS), [("flip",), ("color",), ("crop", "scale", "rotate"), ("cutout",)]),
        (always_flip_color_cutout(("cutout", "flip")), [("flip",), ("cutout",)]),
        (always_flip_color_cutout(("color", "crop", "flip", "scale")), [("flip",), ("color",), ("crop", "scale")]),
    ],
)
def test_strategies_become_stages(chain, stages):
    assert [stage.ops for stage in chain.stages] == stages


def test_strengths_reach_every_stage():
    for chain in (flip_first(OPS, rotate=3.0), always_flip_color_cutout(OPS, rotate=3.0)):
        assert all(stage == Siamese(ops=stage.ops, rotate=3.0) for stage in chain.stages)


@pytest.mark.parametrize("constructor", [flip_first, always_flip_color_cutout])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ops": ("blur", "crop")}, UnknownName),
        ({"ops": ()}, InvalidSetting),
        ({"ops": ("crop", "crop")}, InvalidSetting),
        ({"rotate": 200.0}, InvalidSetting),
    ],
)
def test_bad_strategies_are_refused(constructor, arguments, error):
    with pytest.raises(error):
        constructor(**arguments)


def test_frequencies_of_flip_first():
    views = flip_first().sample(60_000, SHAPE, seeded(4))
    flips, rest = views.parts
    assert set(flips.ops) == {"flip"}
    assert flips.values[:, 0].mean().item() == pytest.approx(1 / 2, abs=0.01)
    counts = Counter(rest.ops)
    assert set(counts) == set(OPS) - {"flip"}
    for op in counts:
        assert counts[op] / 60_000 == pytest.approx(1 / 5, abs=0.01)


def test_frequencies_of_always_flip_color_cutout():
    views = always_flip_color_cutout(OPS).sample(60_000, SHAPE, seeded(4))
    flip, color, drawn, cutout = views.parts
    assert (set(flip.ops), set(color.ops), set(cutout.ops)) == ({"flip"}, {"color"}, {"cutout"})
    assert flip.values[:, 0].mean().item() == pytest.approx(1 / 2, abs=0.01)
    counts = Counter(drawn.ops)
    assert set(counts) == {"crop", "scale", "rotate"}
    for op in counts:
        assert counts[op] / 60_000 == pytest.approx(1 / 3, abs=0.01)


def slowly(op, image, u, v, w):
    if op == "color":
        return transforms.color(image, u, v, w)
    if op == "crop":
        return transforms.crop(image, u, v)
    if op == "cutout":
        return transforms.cutout(image, u, v, (16, 16))
    if op == "scale":
        return transforms.scale(image, u, v)
    return transforms.flip(image, u) if op == "flip" else transforms.rotate(image, u)


@pytest.mark.parametrize("stages", [None, 3, "flip", (), (Siamese(), "flip")], ids=repr)
def test_stages_of_another_kind_are_refused(stages):
    with pytest.raises(InvalidSetting, match=r"Chain\.stages"):
        Chain(stages=stages)


@pytest.mark.parametrize("per", ["class", "image"])
@pytest.mark.parametrize("chain", [flip_first(), always_flip_color_cutout(OPS)], ids=["flip_first", "always"])
def test_stages_are_shown_in_order_each_as_recorded(chain, per):
    views = chain.sample(20, SHAPE, seeded(1), per=per)
    owner = torch.randint(20, (30,), generator=seeded(2))
    images = pictures(30)
    shown = chain.apply(images, views, owner)
    for image, group, result in zip(images, owner.tolist(), shown, strict=True):
        expected = image[None]
        for part in views.parts:
            expected = slowly(part.ops[group], expected, *part.values[group][:, None])
        torch.testing.assert_close(result, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(chain.apply(images, views, owner.tolist()), shown)
    assert torch.equal(chain.apply(images[:20], views), chain.apply(images[:20], views, range(20)))


def test_one_record_shows_one_image_and_256_copies_alike():
    chain, image = always_flip_color_cutout(OPS), pictures(1)
    views = chain.sample(1, SHAPE, seeded(2))
    alone = chain.apply(image, views, [0])
    together = chain.apply(image.expand(256, -1, -1, -1), views, [0] * 256)
    assert torch.equal(together, alone.expand_as(together))


def test_per_image_shares_operations_and_nothing_else():
    chain, seen = flip_first(), set()
    for seed in range(40):
        flips, drawn = chain.sample(64, SHAPE, seeded(seed), per="image").parts
        assert len(set(drawn.ops)) == 1
        seen.add(drawn.ops[0])
        assert 10 < flips.values[:, 0].sum() < 54, "flips are drawn for each image"
        if drawn.ops[0] in ("color", "scale", "rotate"):
            assert len(drawn.values[:, 0].unique()) == 64
    assert seen == set(OPS) - {"flip"}


def test_stages_do_not_share_draws():
    twice = Chain((Siamese(ops=("rotate",)), Siamese(ops=("rotate",))))
    first, second = twice.sample(50, SHAPE, seeded()).parts
    assert not torch.isclose(first.values[:, 0], second.values[:, 0]).any()


def test_sampling_is_determined_by_its_generator_and_disturbs_no_other():
    state = torch.get_rng_state()
    one, two = (flip_first().sample(50, SHAPE, seeded(6)) for _ in range(2))
    flip_first().apply(pictures(50), one)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parts, two.parts, strict=True):
        assert a.ops == b.ops
        assert torch.equal(a.values, b.values)


def test_gradients_pass_through_all_stages():
    chain = always_flip_color_cutout(OPS)
    views = chain.sample(6, (2, 4, 4), seeded(3))
    assert torch.autograd.gradcheck(
        lambda x: chain.apply(x, views), pictures(6, (2, 4, 4), torch.float64).requires_grad_()
    )


def test_flips_are_dropped_from_every_stage_where_mirrors_change_the_class():
    assert flip_first().suited(mirror_safe=True) == flip_first()
    without = Chain((Siamese(ops=("color", "crop", "cutout", "scale", "rotate"), rotate=3.0),))
    assert flip_first(OPS, rotate=3.0).suited(mirror_safe=False) == without
    chain = Chain((Siamese(ops=("flip", "crop")), Siamese(ops=("flip",)), Siamese(ops=("color",))))
    assert chain.suited(mirror_safe=False) == Chain((Siamese(ops=("crop",)), Siamese(ops=("color",))))
    assert flip_first(("flip",)).suited(mirror_safe=False) is None


def test_a_record_without_flips_may_be_applied_by_the_whole_chain():
    chain, images = always_flip_color_cutout(OPS, cutout_ratio=0.25), pictures(8)
    suited = chain.suited(mirror_safe=False)
    views = suited.sample(8, SHAPE, seeded())
    assert len(views.parts) == 3
    assert torch.equal(chain.apply(images, views), suited.apply(images, views))


def test_foreign_records_are_refused():
    chain, images = flip_first(), pictures(2)
    with pytest.raises(InvalidSetting, match=r"Chain\.sample drew"):
        chain.apply(images, Siamese().sample(2, SHAPE, seeded()))
    views = chain.sample(2, SHAPE, seeded())
    assert isinstance(views, ChainViews)
    assert all(isinstance(part, SiameseViews) for part in views.parts)
    with pytest.raises(ShapeMismatch, match="one group per image"):
        chain.apply(images, views, [0])


def test_a_chain_needs_a_stage():
    with pytest.raises(InvalidSetting, match="at least one stage"):
        Chain(())
    with pytest.raises(InvalidSetting, match=r"Chain\.stages"):
        Chain((3,))


@dataclass(frozen=True)
class Holder:
    """Settings with an augmentation, as methods and protocols have them."""

    augmentation: Augmentation | None = None


def test_settings_are_plain_on_disk_and_documented():
    for chain in (flip_first(OPS, rotate=3.0), always_flip_color_cutout()):
        assert from_dict(Holder, json.loads(json.dumps(to_dict(Holder(chain))))) == Holder(chain)
        assert hash(from_dict(Chain, to_dict(chain))) == hash(chain)
    assert all(field.doc for field in describe(Chain))


def test_a_chain_can_be_given_on_a_command_line():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--augmentation", type=Augmentation | None)
    given = ["--augmentation", "Chain", "--augmentation.stages", '[{"ops": ["flip"]}, {"ops": ["crop", "color"]}]']
    parsed = parser.instantiate(parser.parse_args(given))
    assert parsed.augmentation == flip_first(("flip", "crop", "color"))
