import pytest
import torch

from dsdistill.errors import BadData, ShapeMismatch
from dsdistill.parameterizations import FORMS, Mirrored, Pixels, Tiles


def pixels(count=3, seed=0):
    return Pixels(torch.randn(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed)))


def tiles():
    return Tiles(pixels().pixels, torch.tensor([1, 2, 1]))


@pytest.mark.parametrize("base", [pixels(), tiles()], ids=["pixels", "tiles"])
@pytest.mark.parametrize("index", [None, torch.tensor([2, 0])], ids=["all", "some"])
def test_images_come_with_their_mirrors(base, index):
    plain, made = base.decode(index), Mirrored(base).decode(index)
    half = len(plain.images)
    assert torch.equal(made.images[:half], plain.images)
    assert torch.equal(made.images[half:, ..., 0], plain.images[..., -1])
    assert torch.equal(made.images[half:].flip(3), plain.images)
    assert made.owner.tolist() == plain.owner.tolist() * 2


@pytest.mark.parametrize("base", [pixels(), tiles()], ids=["pixels", "tiles"])
def test_an_image_and_its_mirror_are_at_the_same_place_of_two_blocks(base):
    made = Mirrored(base)
    assert (base.blocks, made.blocks) == (1, 2)
    images, mirrors = made.decode().images.chunk(made.blocks)
    assert torch.equal(mirrors, images.flip(3))


def test_a_pair_shares_one_stored_image():
    base = pixels()
    made = Mirrored(base)
    assert (made.count, made.nbytes, made.multiplicity.tolist()) == (3, base.nbytes, [2, 2, 2])
    assert Mirrored(tiles()).multiplicity.tolist() == [2, 8, 2]
    made.decode().images.sum().backward()
    assert torch.equal(base.pixels.grad, torch.full_like(base.pixels, 2))


def test_mirroring_what_is_stored_changes_nothing_but_the_order():
    base = pixels()
    other = Mirrored(Pixels(base.pixels.flip(3)))
    assert torch.equal(other.decode().images, Mirrored(base).decode().images[[3, 4, 5, 0, 1, 2]])


@pytest.mark.parametrize("base", [pixels(), tiles()], ids=["pixels", "tiles"])
def test_restored_subset_and_joined(base):
    made = Mirrored(base)
    again = Mirrored.restore(made.tensors(), made.settings())
    assert torch.equal(again.decode().images, made.decode().images)
    part = made.subset(torch.tensor([1]))
    assert torch.equal(part.decode().images, made.decode(torch.tensor([1])).images)
    assert Mirrored.join([part, made]).count == 4
    assert FORMS["mirrored"] is Mirrored


def test_imitation_takes_the_first_of_each_pair():
    made = Mirrored(pixels())
    wanted = pixels(6, seed=1).pixels.detach()
    made.imitate(wanted)
    assert torch.equal(made.base.pixels, wanted[:3])
    with pytest.raises(ShapeMismatch, match="even number"):
        made.imitate(wanted[:5])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(BadData, match="mirrored again"):
        Mirrored(Mirrored(pixels()))
    made = Mirrored(pixels())
    for base in ("mirrored", "other"):
        with pytest.raises(BadData, match=base):
            Mirrored.restore(made.tensors(), {"base": base, "base_settings": {}})
    with pytest.raises(BadData, match="different form"):
        Mirrored.join([Mirrored(pixels()), Mirrored(tiles())])
