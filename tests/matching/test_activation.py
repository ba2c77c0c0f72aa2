"""Class activation maps against their formula, and shares of boxes pixel by pixel."""

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from dsdistill.errors import InvalidSetting
from dsdistill.matching.activation import activation_maps, in_unit, last_maps, share_inside
from dsdistill.networks import ConvNet, NetworkSpec, tapped


class Averaging(nn.Module):
    """Two convolutions, global average, one linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def maps(self, images):
        return self.act2(self.second(self.act1(self.first(images))))

    def forward(self, images):
        return self.head(self.maps(images).mean((2, 3)))


def fixed(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network.double().eval().requires_grad_(False)


def images(count=4, shape=(3, 9, 8), seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLASSES = torch.tensor([2, 0, 1, 2])


def slow(scores, size):
    """ReLU, the range to [0, 1], enlarged; image by image."""
    found = []
    for score in scores:
        score = score.clamp_min(0)
        score = (score - score.min()) / (score.max() - score.min())
        found.append(interpolate(score[None, None], size, mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(found)


def test_maps_are_weights_of_the_class_times_the_last_feature_map():
    network, shown = fixed(Averaging()), images()
    assert last_maps(Averaging(), (3, 9, 8)) == "act2"
    scores = torch.einsum("bc,bchw->bhw", network.head.weight[CLASSES], network.maps(shown))
    found = activation_maps(network, "act2", shown, CLASSES)
    torch.testing.assert_close(found, slow(scores, (9, 8)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, activation_maps(network, "act2", shown, (CLASSES + 1) % 3))


def test_maps_of_networks_that_flatten_say_what_a_place_adds_to_the_logit():
    network, shown = fixed(ConvNet((3, 8, 8), 3, width=4, depth=1, norm="none")), images(shape=(3, 8, 8))
    layer = last_maps(network, (3, 8, 8))
    maps = network.blocks[0].act(network.blocks[0].conv(shown))
    weight = network.classifier.weight[CLASSES].view(4, 4, 4, 4)  # of maps averaged over 2 x 2 pixels
    scores = (maps * weight.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4).sum(1)
    torch.testing.assert_close(
        activation_maps(network, layer, shown, CLASSES), slow(scores, (8, 8)), rtol=1e-9, atol=1e-9
    )
    logits = network(shown)[torch.arange(4), CLASSES] - network.classifier.bias[CLASSES]
    torch.testing.assert_close(scores.sum((1, 2)), logits)


def test_maps_are_made_under_no_grad_and_leave_no_gradient():
    network, shown = fixed(Averaging()), images().requires_grad_()
    with torch.no_grad():
        found = activation_maps(network, "act2", shown, CLASSES)
    assert not found.requires_grad
    assert shown.grad is None
    assert not network.act2._forward_hooks


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "classifier"), ("torchvision:resnet18", "fc"), ("torchvision:mobilenet_v2", "classifier.1")],
)
def test_the_last_map_of_known_networks_is_what_they_average(name, head):
    spec = NetworkSpec(name, norm="batch") if ":" not in name else NetworkSpec(name, stem="small")
    network = spec.build((3, 32, 32), 3, generator=torch.Generator().manual_seed(0), device="cpu").eval()
    shown, classes, layer = images(2, (3, 32, 32)).float(), torch.tensor([1, 2]), last_maps(network, (3, 32, 32))
    with torch.no_grad(), tapped(network, [layer]) as maps:
        network(shown)
    scores = torch.einsum("bc,bchw->bhw", network.get_submodule(head).weight[classes].detach(), maps[layer])
    expected = in_unit(scores.relu(), (32, 32))
    torch.testing.assert_close(activation_maps(network, layer, shown, classes), expected, rtol=1e-3, atol=1e-4)


def test_a_constant_map_tells_nothing():
    maps = torch.stack([torch.full((2, 2), 3.0), torch.tensor([[0.0, 1.0], [2.0, 4.0]])])
    assert in_unit(maps, (2, 2)).tolist() == [[[0, 0], [0, 0]], [[0, 0.25], [0.5, 1]]]


def test_a_network_without_maps_is_refused():
    with pytest.raises(InvalidSetting, match="network = 'mine' is not valid: one with feature maps"):
        last_maps(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2), "mine")


def test_shares_of_boxes_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 6, 7, generator=generator)
    maps[2] = 0
    boxes = torch.tensor([[0, 0, 6, 7], [1, 2, 3, 4], [5, 6, 1, 1], [0, 3, 2, 4]]).expand(3, 4, 4)
    found = share_inside(maps, boxes)
    for number in range(3):
        values = torch.ones(6, 7) if number == 2 else maps[number]
        for place, (top, left, height, width) in enumerate(boxes[number].tolist()):
            inside = sum(float(values[y, x]) for y in range(top, top + height) for x in range(left, left + width))
            assert float(found[number, place]) == pytest.approx(inside / float(values.sum()), rel=1e-5)
    assert float(found[0, 0]) == 1
