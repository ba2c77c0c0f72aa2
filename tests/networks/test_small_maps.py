"""Convolutions as matrix products are the convolutions."""

import pytest
import torch
from torch import nn

from dsdistill.networks.small_maps import SMALL_MAP, SmallMapConv, _ConvByProduct


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((4, 4), {"kernel_size": 3, "padding": 1}),
        ((7, 8), {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}),
        ((8, 8), {"kernel_size": 1, "stride": 2}),
        ((6, 5), {"kernel_size": (2, 3), "padding": (0, 1), "stride": (3, 2)}),
        ((5, 5), {"kernel_size": 5}),
    ],
)
def test_small_maps_are_those_of_the_convolution(size, shape, memory_format):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(3, 5, **shape).double().requires_grad_(False).to(memory_format=memory_format)
    maps = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    maps.requires_grad_()
    expected, found = layer(maps), SmallMapConv(layer)(maps)
    assert expected[0, 0].numel() <= SMALL_MAP
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)
    mix = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (slope,), (reference,) = (torch.autograd.grad((made * mix).sum(), maps) for made in (found, expected))
    torch.testing.assert_close(slope, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "half", "products"), [(4, False, 1), (5, False, 0), (4, True, 0)])
def test_only_convolutions_to_small_maps_in_full_precision_are_products(size, half, products, monkeypatch):
    calls, apply = [], _ConvByProduct.apply
    monkeypatch.setattr(_ConvByProduct, "apply", lambda *given: calls.append(given) or apply(*given))
    layer = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        SmallMapConv(layer)(torch.zeros(2, 3, size, size))
    assert len(calls) == products


def test_what_networks_read_of_it_is_there_and_odd_maps_go_to_the_library():
    layer = nn.Conv2d(3, 5, 3).requires_grad_(False)
    made = SmallMapConv(layer)
    assert made.weight is layer.weight
    assert made.stride == (1, 1)
    torch.testing.assert_close(made(torch.ones(3, 4, 4)), layer(torch.ones(3, 4, 4)))
    with pytest.raises(RuntimeError, match="Kernel size"):
        made(torch.ones(1, 3, 2, 2))
    assert not SmallMapConv.suits(nn.Conv2d(3, 5, 3))  # whose weights are to be learned
