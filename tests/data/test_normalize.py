import json

import numpy as np
import pytest
import torch
from torchvision import transforms

from dsdistill.data import Normalization
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def every_value() -> torch.Tensor:
    """All 256 pixel values in each of three channels: uint8 (3, 16, 16)."""
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_standardising_bytes_is_bit_identical_to_totensor_and_normalize(device):
    pixels = every_value()
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)])
    expected = pipeline(pixels.permute(1, 2, 0).numpy())
    assert torch.equal(CIFAR.standardize(pixels.to(device)).cpu(), expected)
    assert torch.equal(CIFAR.standardize(pixels.expand(2, 4, 3, 16, 16).to(device))[1, 3].cpu(), expected)


def test_standardising_unit_floats_equals_standardising_bytes():
    pixels = every_value()
    assert torch.equal(CIFAR.standardize(transforms.functional.to_tensor(pixels.permute(1, 2, 0).numpy())),
                       CIFAR.standardize(pixels))  # fmt: skip
    assert CIFAR.standardize(torch.zeros(3, 1, 1, dtype=torch.float64)).dtype == torch.float32


def test_inverse_is_not_clipped_but_bytes_are_clipped_and_rounded():
    half = Normalization((0.5,), (0.25,))
    images = torch.tensor([-4.0, 0.0, 1.0, 4.0]).view(1, 1, 4)
    assert half.to_unit(images).flatten().tolist() == [-0.5, 0.5, 0.75, 1.5]
    assert half.to_uint8(images).flatten().tolist() == [0, 128, 191, 255]  # 127.5 rounds to even, 191.25 down


def test_bytes_survive_the_round_trip():
    assert torch.equal(CIFAR.to_uint8(CIFAR.standardize(every_value())), every_value())


def test_constants_made_in_inference_mode_still_serve_autograd():
    fresh = Normalization((0.125,), (0.375,))
    with torch.inference_mode():
        fresh.standardize(torch.zeros(1, 1, 1, dtype=torch.uint8))
    images = torch.zeros(1, 1, 2, requires_grad=True)
    fresh.to_unit(images).sum().backward()
    assert images.grad.tolist() == [[[0.375, 0.375]]]


def test_measured_statistics_equal_float64_numpy():
    images = torch.randint(0, 256, (9000, 3, 3, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] = images[:, 1] // 3
    measured = Normalization.measure(images)
    unit = images.numpy().astype(np.float64) / 255
    assert measured.mean == pytest.approx(unit.mean(axis=(0, 2, 3)), rel=1e-12)
    assert measured.std == pytest.approx(unit.std(axis=(0, 2, 3)), rel=1e-12)


def test_constant_channel_gets_deviation_one():
    images = torch.zeros(4, 2, 2, 2, dtype=torch.uint8)
    images[:, 0] = 51
    images[0, 1] = 255
    measured = Normalization.measure(images)
    assert measured.mean[0] == 0.2
    assert measured.std == (1.0, pytest.approx(np.sqrt(3) / 4))


def test_json_round_trip():
    written = json.loads(json.dumps(CIFAR.to_json()))
    assert written == {"kind": "standardize", "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
    assert Normalization.from_json(written) == CIFAR
    assert CIFAR.tensors() == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "pca", "mean": [0], "std": [1]}, "kind 'pca' is not known"),
        ([1], r"kind \[1\] is not known"),
        ({"kind": "zca", "mean": [0], "std": [1]}, "whitening matrices are missing"),
        ({"kind": "standardize", "mean": [0.0]}, "no 'std'"),
        ({"kind": "standardize", "mean": [0.0], "std": [0.0]}, "positive"),
        ({"kind": "standardize", "mean": ["a"], "std": [1.0]}, "every value must be a number"),
        ({"kind": "standardize", "mean": "a", "std": [1.0]}, "sequence of numbers"),
    ],
)
def test_bad_json_is_refused(content, message):
    with pytest.raises(BadData, match=message):
        Normalization.from_json(content)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.5, 0.5), "std = .* needs 1 values"),
        ((), (), "mean = .* non-empty"),
        ((float("nan"),), (1.0,), "mean = .* finite"),
        ((0.0,), (float("inf"),), "std = .* finite"),
        ((0.0,), (0.0,), "std = .* positive"),
        ((0.0,), (-1.0,), "std = .* positive"),
        ((0.0,), (1e-60,), "std = .* positive"),
        ((True,), (1.0,), "mean = .* number"),
    ],
)
def test_bad_statistics_are_refused(mean, std, message):
    with pytest.raises(InvalidSetting, match=message):
        Normalization(mean, std)


def test_unsuitable_images_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\(4, 1, 8, 8\), expected \(..., 3, H, W\)"):
        CIFAR.standardize(torch.zeros(4, 1, 8, 8))
    with pytest.raises(BadData, match=r"dtype torch.int64; give uint8 \(0..255\) or float"):
        CIFAR.standardize(torch.zeros(3, 8, 8, dtype=torch.int64))
    with pytest.raises(BadData, match=r"dtype torch.uint8; give a floating point"):
        CIFAR.to_unit(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(BadData, match=r"dtype torch.float32; give uint8"):
        Normalization.measure(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ShapeMismatch, match="at least one pixel"):
        Normalization.measure(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
