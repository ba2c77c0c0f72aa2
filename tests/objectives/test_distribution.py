import pytest
import torch

from dsdistill.errors import ShapeMismatch
from dsdistill.networks import ConvNet, reinitialize_
from dsdistill.objectives import class_means, class_sums, mean_distance

K = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def network():
    network = ConvNet((3, 8, 8), K, width=8, depth=2).double().requires_grad_(False)
    reinitialize_(network, seeded(1))
    return network


def batch(counts, seed):
    owner = torch.arange(K).repeat_interleave(torch.tensor(counts))
    return torch.randn(sum(counts), 3, 8, 8, generator=seeded(seed), dtype=torch.float64), owner


def loss_of(network, real, synthetic):
    means = [class_means(network.embed(x), owner, torch.bincount(owner, minlength=K)) for x, owner in (real, synthetic)]
    return mean_distance(*means)


def slow_loss(network, real, synthetic):
    total = torch.zeros((), dtype=torch.float64)
    for label in range(K):
        real_mean = network.embed(real[0][real[1] == label]).mean(0)
        synthetic_mean = network.embed(synthetic[0][synthetic[1] == label]).mean(0)
        total = total + ((real_mean - synthetic_mean) ** 2).sum()
    return total


def test_equal_batches_have_no_loss_and_no_gradient(network):
    images, owner = batch([3, 2, 4, 1], 2)
    synthetic = images.clone().requires_grad_()
    loss = loss_of(network, (images, owner), (synthetic, owner))
    (gradient,) = torch.autograd.grad(loss, synthetic)
    assert loss.item() == 0
    assert gradient.abs().max() == 0


def test_toy_value():
    assert mean_distance(torch.tensor([[1.0, 2.0]] * 2), torch.zeros(2, 2)).item() == 10


def test_batched_equals_a_loop_over_classes(network):
    real, (images, owner) = batch([5, 3, 6, 4], 2), batch([2, 2, 1, 3], 3)
    fast_images, slow_images = images.clone().requires_grad_(), images.clone().requires_grad_()
    fast, slow = loss_of(network, real, (fast_images, owner)), slow_loss(network, real, (slow_images, owner))
    assert slow.item() > 0.1
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(fast_images.grad, slow_images.grad, rtol=1e-9, atol=1e-12)


def test_order_of_images_does_not_matter(network):
    real, (images, owner) = batch([5, 3, 6, 4], 2), batch([2, 2, 1, 3], 3)
    shuffled = torch.randperm(len(images), generator=seeded(4))
    torch.testing.assert_close(
        loss_of(network, real, (images[shuffled], owner[shuffled])),
        loss_of(network, real, (images, owner)),
        rtol=1e-12,
        atol=0,
    )


def test_gradient_equals_finite_differences():
    network = ConvNet((2, 4, 4), 2, width=4, depth=1, activation="swish").double().requires_grad_(False)
    reinitialize_(network, seeded(1))
    real = torch.randn(2, network.classifier.in_features, generator=seeded(2), dtype=torch.float64)
    images = torch.randn(3, 2, 4, 4, generator=seeded(3), dtype=torch.float64, requires_grad=True)
    owner, counts = torch.tensor([0, 1, 1]), torch.tensor([1, 2])
    assert torch.autograd.gradcheck(lambda x: mean_distance(real, class_means(network.embed(x), owner, counts)), images)


def test_sums_of_chunks_add_up_and_absent_classes_are_zero():
    features = torch.arange(10.0).reshape(5, 2)
    owner = torch.tensor([2, 0, 2, 0, 0])
    expected = torch.tensor([[16.0, 19.0], [0.0, 0.0], [4.0, 6.0]])
    assert torch.equal(class_sums(features, owner, 3), expected)
    assert torch.equal(class_sums(features[:2], owner[:2], 3) + class_sums(features[2:], owner[2:], 3), expected)


def test_half_precision_is_summed_in_float32():
    features = torch.ones(1000, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = class_sums(features, torch.zeros(1000, dtype=torch.int64), 1)
        precise = class_sums(torch.full((3, 1), 1 + 2**-12), torch.zeros(3, dtype=torch.int64), 1)
    assert sums.dtype == torch.float32
    assert sums.item() == 1000
    assert precise.item() == 3 + 3 * 2**-12


@pytest.mark.parametrize(
    "call",
    [
        lambda: class_sums(torch.zeros(3), torch.zeros(3), 2),
        lambda: class_sums(torch.zeros(3, 2), torch.zeros(2), 2),
        lambda: class_means(torch.zeros(3, 2), torch.zeros(3), torch.tensor(3)),
        lambda: mean_distance(torch.zeros(3, 2), torch.zeros(1, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ShapeMismatch):
        call()
