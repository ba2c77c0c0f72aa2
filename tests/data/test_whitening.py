import copy
import json
import subprocess
import sys
from dataclasses import replace

import kornia
import pytest
import torch
from safetensors.torch import load, save

from dsdistill.data import ImageSource, Normalization, whitening
from dsdistill.data.whitening import Whitening, whiten
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

PLAIN = Normalization((0.4, 0.6), (0.25, 0.125))
EPS = 0.1


def bytes_of(count=60, shape=(2, 3, 4), seed=0):
    """Correlated uint8 images: a common brightness and noise."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(0, 156, (count, 1, 1, 1), generator=generator)
    return (bright + torch.randint(0, 100, (count, *shape), generator=generator)).to(torch.uint8)


def standardized(images, plain=PLAIN):
    """In float64, (N, D)."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (plain.mean, plain.std))
    return ((images.double() / 255 - mean) / std).flatten(1)


@pytest.fixture(scope="module")
def images():
    return bytes_of()


@pytest.fixture(scope="module")
def whitened(images):
    return PLAIN.whitened([images])


def parts(content="zca_transform", change=None, **replaced):
    """JSON content and tensors of a small whitening, one of them changed."""
    made = PLAIN.whitened([bytes_of()])
    tensors = {name: tensor.clone() for name, tensor in made.tensors().items()}
    if change is not None:
        tensors[content] = change(tensors[content])
    return made.to_json() | replaced, tensors


# The fit -------------------------------------------------------------------------------------------------


def test_the_fit_equals_kornias_on_the_whole_set(images, whitened):
    whole = kornia.enhance.ZCAWhitening(eps=EPS, compute_inv=True).fit(standardized(images))
    moments = whitening.moments(images.split(7))
    stds = torch.tensor(PLAIN.std, dtype=torch.float64).repeat_interleave(12)
    matrices = whitening.transforms(moments.covariance / stds / stds[:, None], EPS)
    torch.testing.assert_close(matrices[0], whole.transform_matrix, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(matrices[1], whole.transform_inv, rtol=1e-11, atol=1e-12)
    # The float32 results are the rounded float64 ones.
    torch.testing.assert_close(whitened.zca.mean.double(), whole.mean_vector[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(whitened.zca.transform.double(), whole.transform_matrix, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(whitened.zca.inverse.double(), whole.transform_inv, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("size", [1, 7, 59])
def test_neither_chunks_nor_order_change_a_bit(images, whitened, size):
    shuffled = images[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    assert PLAIN.whitened(iter(shuffled.split(size))).zca.digest == whitened.zca.digest
    assert PLAIN.whitened([bytes_of(seed=1)]) != whitened


def test_whitened_pixels_have_the_eigenvalues_of_the_formula(images, whitened):
    pixels = whitened.standardize(images).double().flatten(1)
    eigenvalues = torch.linalg.eigvalsh(standardized(images).T.cov())
    expected = eigenvalues / (eigenvalues + EPS)
    torch.testing.assert_close(torch.linalg.eigvalsh(pixels.T.cov()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pixels.mean(0), torch.zeros(24, dtype=torch.float64), rtol=0, atol=1e-6)


def test_constant_pixels_and_few_images_do_no_harm():
    images = bytes_of(count=3)
    images[:, :, 0] = 17
    made = PLAIN.whitened([images])
    assert torch.equal(made.to_uint8(made.standardize(images)), images)


# Applying it ---------------------------------------------------------------------------------------------


def test_standardize_is_kornias_transform_of_standardised_pixels(images, whitened):
    expected = kornia.enhance.linear_transform(
        PLAIN.standardize(images), whitened.zca.transform, whitened.zca.mean[None]
    )
    assert torch.equal(whitened.standardize(images), expected)


def test_round_trip(images, whitened):
    made = whitened.standardize(images)
    assert made.dtype == torch.float32
    assert made.shape == images.shape
    assert (whitened.to_unit(made) - images / 255).abs().max() < 5e-6
    assert torch.equal(whitened.to_uint8(made), images)
    double = torch.randn(5, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # The two matrices are each rounded to float32, whatever the precision of the images.
    torch.testing.assert_close(whitened.zca.whiten(whitened.zca.color(double)), double, rtol=0, atol=2e-6)


def test_any_leading_dimensions(images, whitened):
    made = whitened.standardize(images)
    torch.testing.assert_close(whitened.standardize(images.view(3, 20, 2, 3, 4)).view(60, 2, 3, 4), made)
    torch.testing.assert_close(whitened.standardize(images[7]), made[7])
    assert whitened.standardize(images[:0]).shape == (0, 2, 3, 4)


def test_gradients(whitened):
    generator = torch.Generator().manual_seed(3)
    double = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(whitened.zca.whiten, double)
    assert torch.autograd.gradcheck(whitened.to_unit, double)
    unit = torch.rand(1, 2, 3, 4, generator=generator, requires_grad=True)
    whitened.standardize(unit).sum().backward()
    assert unit.grad.abs().min() > 0


def test_matrices_made_in_inference_mode_still_serve_autograd(images):
    with torch.inference_mode():
        made = PLAIN.whitened([images.clone()])
        made.standardize(images)
    pixels = torch.zeros(1, 2, 3, 4, requires_grad=True)
    made.to_unit(pixels).sum().backward()
    assert pixels.grad.abs().max() > 0


def test_autocast_does_not_reach_the_matrices(images, whitened):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = whitened.standardize(images)
    assert torch.equal(inside, whitened.standardize(images))
    assert whitened.to_unit(inside.bfloat16()).dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu(images, whitened):
    assert PLAIN.whitened(images.cuda().split(7)) == whitened
    made = whitened.standardize(images.cuda())
    torch.testing.assert_close(made.cpu(), whitened.standardize(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(whitened.to_uint8(made).cpu(), images)
    assert "_placed" not in whitened.zca.__getstate__()


# Whole sources -------------------------------------------------------------------------------------------


def source_of(images, *, test=None):
    targets = torch.arange(len(images)) % 3
    opened = None if test is None else lambda: ImageSource("toy (test)", "abc", test, torch.arange(len(test)) % 3)
    return ImageSource("toy", "abc", images, targets, normalization=PLAIN, open_test=opened)


def test_a_source_is_whitened_by_its_training_images(images, whitened):
    test = bytes_of(count=9, seed=4)
    plain = source_of(images, test=test)
    made = whiten(plain, EPS)
    assert made.normalization == made.test.normalization == whitened
    assert plain.normalization == PLAIN
    drawn = made.test.gather(torch.arange(9))
    assert torch.equal(made.normalization.to_uint8(drawn), plain.test.images)
    assert whiten(made, EPS).normalization == whitened  # not whitened twice
    assert whiten(plain, 0.2).normalization != whitened


def test_pixels_in_unit_range_are_whitened_when_asked(images):
    made = whiten(source_of(images), standardized=False).normalization
    assert (made.mean, made.std) == ((0.0, 0.0), (1.0, 1.0))
    whole = kornia.enhance.ZCAWhitening(eps=EPS, compute_inv=True).fit(images.double() / 255)
    torch.testing.assert_close(made.standardize(images).double(), whole(images.double() / 255), rtol=0, atol=1e-5)


# Identity and storage ------------------------------------------------------------------------------------


def test_equal_when_all_numbers_are(images, whitened):
    same = PLAIN.whitened([images])
    assert same == whitened
    assert hash(same) == hash(whitened)
    assert whitened != PLAIN
    assert whitened != PLAIN.whitened([images], eps=0.2)
    # The same matrices of another frame are another whitening.
    turned = copy.copy(whitened.zca)
    assert Whitening(turned.mean, turned.transform, turned.inverse, (2, 4, 3), EPS) != whitened.zca
    assert "Whitening(2x3x4, eps=0.1, digest='" in repr(whitened)
    assert copy.deepcopy(whitened) == whitened


def test_json_and_tensors_round_trip(images, whitened):
    content = json.loads(json.dumps(whitened.to_json()))
    assert content == {
        "kind": "zca",
        "mean": [0.4, 0.6],
        "std": [0.25, 0.125],
        "shape": [2, 3, 4],
        "eps": 0.1,
        "digest": whitened.zca.digest,
    }
    tensors = load(save({**whitened.tensors(), "pixels": torch.zeros(2)}))
    made = Normalization.from_json(content, tensors)
    assert made == whitened
    assert torch.equal(made.standardize(images), whitened.standardize(images))


@pytest.mark.parametrize("name", ["zca_mean", "zca_transform", "zca_inverse"])
def test_changed_matrices_are_refused(name):
    def flip(tensor):
        tensor.view(-1)[3] += 1e-6
        return tensor

    with pytest.raises(BadData, match=r"do not match their digest \(sha256 .*; restore them"):
        Normalization.from_json(*parts(name, flip))
    with pytest.raises(BadData, match=f"{name} holds numbers that are not finite|{name[4:]} holds numbers"):
        Normalization.from_json(*parts(name, lambda tensor: tensor * float("nan")))
    with pytest.raises(BadData, match=rf"whitening {name[4:]} has shape .*expected \(24"):
        Normalization.from_json(*parts(name, lambda tensor: tensor[:-1]))
    with pytest.raises(BadData, match=f"whitening {name[4:]} has dtype torch.float64"):
        Normalization.from_json(*parts(name, torch.Tensor.double))
    content, tensors = parts()
    del tensors[name]
    with pytest.raises(BadData, match=rf"matrices are missing \({name}\)"):
        Normalization.from_json(content, tensors)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"eps": -0.1}, "eps = -0.1"),
        ({"eps": None}, "eps = None"),
        ({"eps": 0.2}, "do not match their digest"),
        ({"digest": 5}, "do not match their digest"),
        ({"shape": [2, 12]}, r"shape \[2, 12\] is not \(C, H, W\)"),
        ({"shape": "234"}, "shape '234' is not"),
        ({"shape": [True, 3, 4]}, "is not"),
        ({"shape": [2, 4, 3]}, "do not match their digest"),
        ({"shape": [1, 6, 4]}, r"as many as the mean|do not match"),
        ({"shape": [2, 3, 5]}, r"whitening mean has shape \(24,\), expected \(30,\)"),
        ({"mean": [0.4], "std": [0.25]}, "as many as the mean"),
    ],
)
def test_bad_content_is_refused(replaced, message):
    with pytest.raises(BadData, match=message):
        Normalization.from_json(*parts(**replaced))


# Refusals ------------------------------------------------------------------------------------------------


def test_unsuitable_images_are_refused(whitened):
    with pytest.raises(ShapeMismatch, match=r"\(2, 4, 3\), expected \(..., 2, 3, 4\), as the images"):
        whitened.standardize(torch.zeros(2, 4, 3))
    with pytest.raises(ShapeMismatch, match=r"expected \(..., 2, 3, 4\)"):
        whitened.to_unit(torch.zeros(5, 2, 4, 4))
    with pytest.raises(BadData, match="at least two images, got 1"):
        PLAIN.whitened([bytes_of(count=1)])
    with pytest.raises(BadData, match="at least two images, got 0"):
        PLAIN.whitened([])
    with pytest.raises(BadData, match=r"dtype torch.float32; give uint8"):
        PLAIN.whitened([torch.rand(3, 2, 3, 4)])
    with pytest.raises(ShapeMismatch, match=r"\(2, 2, 4, 4\), expected \(n, 2, 3, 4\)"):
        PLAIN.whitened([bytes_of(), bytes_of(count=2, shape=(2, 4, 4))])
    with pytest.raises(ShapeMismatch, match=r"expected \(n, 2, H, W\)"):
        PLAIN.whitened([bytes_of(shape=(3, 2, 2))])
    with pytest.raises(ShapeMismatch, match="at least one pixel"):
        PLAIN.whitened([torch.zeros(2, 3, 4, dtype=torch.uint8)])
    with pytest.raises(ShapeMismatch, match="as many as the mean"):
        Normalization((0.5,), (0.5,), whitened.zca)


@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf"), True, "0.1"])
def test_bad_eps_is_refused(images, eps):
    with pytest.raises(InvalidSetting, match=r"eps = .*positive number; published: 0.1"):
        PLAIN.whitened([images], eps=eps)


def test_an_eps_lost_in_rounding_is_refused():
    images = bytes_of(count=2, shape=(2, 9, 9))
    with pytest.raises(InvalidSetting, match=r"eps = 1e-300 .*too small for these images"):
        PLAIN.whitened([images], eps=1e-300)


def test_large_images_are_refused_with_the_memory_they_would_take():
    huge = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(2, 3, 128, 128)
    with pytest.raises(InvalidSetting, match=r"zca = '3x128x128' .* 49152 would need about 387 GB of memory"):
        Normalization((0.5,) * 3, (0.5,) * 3).whitened([huge])


def test_kornia_is_only_imported_to_fit(tmp_path, images, whitened):
    """A saved whitening is applied without it."""
    (tmp_path / "z.json").write_text(json.dumps(whitened.to_json()))
    (tmp_path / "z.safetensors").write_bytes(save(whitened.tensors()))
    program = f"""
import json, pathlib, sys, torch
from safetensors.torch import load
from dsdistill.data import Normalization
folder = pathlib.Path({str(tmp_path)!r})
tensors = load((folder / "z.safetensors").read_bytes())
made = Normalization.from_json(json.loads((folder / "z.json").read_text()), tensors)
made.to_uint8(made.standardize(torch.zeros(2, 3, 4)))
assert "kornia" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_it_was_fitted_on_does_not_depend_on_the_last_bits_of_its_matrices(images):
    fitted = Whitening.fit(iter([images]), PLAIN.mean, PLAIN.std)
    rounded = replace(fitted, transform=fitted.transform.nextafter(torch.tensor(9.0)))
    assert rounded.digest != fitted.digest
    assert rounded.fit_digest == fitted.fit_digest
    others = [
        Whitening.fit(iter([images]), PLAIN.mean, PLAIN.std, eps=0.2),
        Whitening.fit(iter([images[1:]]), PLAIN.mean, PLAIN.std),
    ]
    assert len({fitted.fit_digest, *(other.fit_digest for other in others)}) == 3
