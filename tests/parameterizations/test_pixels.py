import pytest
import torch

from dsdistill.errors import BadData, ShapeMismatch
from dsdistill.parameterizations import FORMS, Pixels


def images(count=4, seed=0):
    return torch.randn(count, 3, 2, 5, generator=torch.Generator().manual_seed(seed))


def test_decoding_gives_the_parameter_itself_and_each_image_owns_itself():
    form = Pixels(images())
    decoded = form.decode()
    assert decoded.images is form.pixels
    assert decoded.owner.tolist() == [0, 1, 2, 3]
    assert decoded.owner.dtype == torch.int64
    assert [name for name, _ in form.named_parameters()] == ["pixels"]
    assert form.count == 4


def test_decoding_some_is_differentiable_and_names_their_owners():
    form = Pixels(images())
    decoded = form.decode(torch.tensor([3, 1, 3]))
    assert decoded.owner.tolist() == [3, 1, 3]
    assert torch.equal(decoded.images, images()[[3, 1, 3]])
    decoded.images.sum().backward()
    assert form.pixels.grad.amax((1, 2, 3)).tolist() == [0, 1, 0, 2]


def test_images_are_copied_and_neither_clamped_nor_quantised():
    given = images() * 100
    form = Pixels(given)
    assert torch.equal(form.pixels, given)
    form.constrain()
    assert torch.equal(form.pixels, given)
    given.zero_()
    assert form.pixels.abs().max() > 100
    assert form.pixels.is_leaf
    assert form.pixels.requires_grad
    assert Pixels(images().to(memory_format=torch.channels_last)).pixels.is_contiguous()


def test_restoring_what_was_stored():
    form = Pixels(images())
    again = Pixels.restore(form.tensors(), form.settings())
    assert torch.equal(again.pixels, form.pixels)
    assert form.settings() == {}
    assert not form.tensors()["pixels"].requires_grad
    assert form.nbytes == 4 * 3 * 2 * 5 * 4
    assert Pixels.restore({"pixels": images().half()}, {}).pixels.dtype == torch.float32
    assert FORMS["pixels"] is Pixels


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({}, BadData),
        ({"pixel": images()}, BadData),
        ({"pixels": images(), "more": images()}, BadData),
        ({"pixels": images().to(torch.uint8)}, BadData),
        ({"pixels": images()[0]}, ShapeMismatch),
    ],
    ids=["none", "other name", "one too many", "integers", "one image"],
)
def test_content_of_another_make_is_refused(tensors, error):
    with pytest.raises(error, match=r"pixel|images"):
        Pixels.restore(tensors, {})


def test_subsets_and_joins_copy_in_the_order_given():
    form = Pixels(images())
    part = form.subset(torch.tensor([2, 0]))
    assert torch.equal(part.pixels, images()[[2, 0]])
    joined = Pixels.join([part, form])
    assert torch.equal(joined.pixels, images()[[2, 0, 0, 1, 2, 3]])
    part.pixels.data.zero_()
    assert torch.equal(form.pixels, images())
    assert torch.equal(joined.pixels[0], images()[2])
    assert joined.pixels.is_leaf
