"""Updates in [0, 1] of pixels that are kept standardised, against the same optimiser on pixels in [0, 1]."""

import pytest
import torch

from dsdistill.data import whiten
from dsdistill.errors import BadData
from dsdistill.matching import refuse_whitened, unit_step
from dsdistill.parameterizations import Mirrored, Pixels, Tiles

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.3, weight_decay=0.1),
}


def start(source):
    """Stored images in float64, and the same pixels in [0, 1]."""
    images = Pixels(source.gather(torch.arange(4))).double()
    mean, std = (
        torch.tensor(v).double().view(1, -1, 1, 1) for v in (source.normalization.mean, source.normalization.std)
    )
    unit = (images.pixels.detach() * std + mean).requires_grad_()
    return images, unit, mean, std


def loss(pixels):
    weights = torch.linspace(-9, 9, pixels.numel(), dtype=pixels.dtype).view_as(pixels)
    return (weights * pixels).sum() + pixels.square().sum()


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_optimiser_on_pixels_in_unit_range(name, clamp, source):
    images, unit, mean, std = start(source)
    ours, other = OPTIMIZERS[name](images.parameters()), OPTIMIZERS[name]([unit])
    for _ in range(4):
        ours.zero_grad()
        other.zero_grad()
        loss(images.decode().images).backward()
        loss((unit - mean) / std).backward()
        unit_step(ours, images, source, clamp=clamp)
        other.step()
        if clamp:
            unit.data.clamp_(0, 1)
        torch.testing.assert_close(images.pixels.detach(), (unit.detach() - mean) / std, rtol=1e-9, atol=1e-9)
    left = bool(((unit < 0) | (unit > 1)).any())
    assert left != clamp  # else the clamp was not put to the test


def test_every_form_is_kept_in_range(source):
    for images in (
        Tiles(source.gather(torch.arange(2)), torch.tensor([2, 1])),
        Mirrored(Pixels(source.gather(torch.arange(2)))),
    ):
        optimizer = torch.optim.SGD(images.parameters(), lr=10.0)
        images.decode().images.sum().backward()
        unit_step(optimizer, images, source, clamp=True)
        (pixels,) = images.parameters()
        unit = source.normalization.to_unit(pixels.detach())
        assert float(unit.min()) >= -1e-6
        assert float(unit.max()) <= 1 + 1e-6


def test_a_step_without_gradients_moves_nothing_but_rounding(source):
    images, _, _, _ = start(source)
    before = images.pixels.detach().clone()
    unit_step(torch.optim.SGD(images.parameters(), lr=1.0), images, source, clamp=False)
    torch.testing.assert_close(images.pixels.detach(), before, rtol=1e-12, atol=1e-12)


def test_whitened_images_have_no_range(source):
    refuse_whitened("IDC", source)
    with pytest.raises(BadData, match=r"IDC keeps pixels in .* load it without zca"):
        refuse_whitened("IDC", whiten(source))
