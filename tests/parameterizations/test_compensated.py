"""Compensators against image by image sums, and what is stored of them."""

import pytest
import torch

from dsdistill.data import Normalization
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch
from dsdistill.labels import HardLabels
from dsdistill.parameterizations import FORMS, Compensated, Mirrored
from dsdistill.recipe import Recipe
from dsdistill.synthetic import SyntheticDataset

LOW, HIGH = (-1.0, -0.5), (1.0, 0.5)


def made(groups=(1, 0, 1, 1), each=2, seed=0, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor(groups)
    low, high = (torch.tensor(values).view(2, 1, 1) for values in (LOW, HIGH))
    anchors = (scale * torch.randn(len(groups), 2, 4, 3, generator=generator)).clamp(low, high)
    added = scale * torch.randn(int(groups.max()) + 1, each, 2, 4, 3, generator=generator)
    return Compensated(anchors, added, groups, LOW, HIGH)


def slow(form, index):
    """Image by image, and pixel values by Python's min and max."""
    images, owner = [], []
    for place in range(1 + form.each):
        for item in index:
            image = form.anchors[item].clone()
            if place:
                added = form.compensators.detach()[form.groups[item], place - 1]
                for channel in range(2):
                    values = (image[channel] + added[channel]).flatten().tolist()
                    clipped = [min(max(value, LOW[channel]), HIGH[channel]) for value in values]
                    image[channel] = torch.tensor(clipped).view(4, 3)
            images.append(image)
            owner.append(item)
    return torch.stack(images), owner


@pytest.mark.parametrize("groups", [(1, 0, 1, 1), (0, 0, 1, 1)], ids=["any", "even"])
@pytest.mark.parametrize("index", [None, [3, 1]], ids=["all", "some"])
def test_an_item_decodes_to_its_anchor_and_its_clipped_sums(groups, index):
    form = made(groups)
    found = form.decode(None if index is None else torch.tensor(index))
    images, owner = slow(form, range(4) if index is None else index)
    assert torch.equal(found.images.detach(), images)
    assert found.owner.tolist() == owner
    assert bool((images[len(images) // 3 :] == 1.0).any())  # something was clipped
    assert (form.blocks, form.multiplicity.tolist(), form.count) == (3, [3] * 4, 4)


@pytest.mark.parametrize("groups", [(1, 0, 1, 1), (0, 0, 1, 1)], ids=["any", "even"])
def test_a_compensator_learns_from_all_its_anchors_where_they_are_not_clipped(groups):
    form = made(groups)
    weights = torch.randn(12, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    (form.decode().images * weights).sum().backward()
    low, high = (torch.tensor(values).view(2, 1, 1) for values in (LOW, HIGH))
    for place in range(2):
        expected = torch.zeros_like(form.compensators[:, place])
        for item, group in enumerate(groups):
            total = form.anchors[item] + form.compensators.detach()[group, place]
            expected[group] += weights[4 * (1 + place) + item] * ((total > low) & (total < high))
        torch.testing.assert_close(form.compensators.grad[:, place], expected)
    assert [name for name, _ in form.named_parameters()] == ["compensators"]


def test_a_pixel_at_its_bound_may_leave_it():
    form = Compensated(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3), torch.zeros(1, 1, 1, 1, 3), ZERO, [-1.0], [1.0])
    form.decode().images.sum().backward()
    assert form.compensators.grad.flatten().tolist() == [1, 1, 1]


ZERO = torch.zeros(1, dtype=torch.int64)


def test_what_is_stored_is_anchors_compensators_and_a_number_each():
    form = Compensated(torch.zeros(70, 3, 8, 8), torch.zeros(7, 4, 3, 8, 8), torch.arange(7).repeat(10), *BOUNDS)
    image = 3 * 8 * 8 * 4
    assert form.nbytes == (70 + 28) * image + 70 * 4
    assert len(form.decode().images) == 70 * 5
    assert FORMS["compensated"] is Compensated


BOUNDS = ((-1.0,) * 3, (1.0,) * 3)


def test_a_restored_form_is_the_same_to_the_last_bit():
    form = made()
    again = Compensated.restore(form.tensors(), form.settings())
    assert torch.equal(again.decode().images, form.decode().images)
    assert again.groups.tolist() == form.groups.tolist()
    mirrored = Mirrored(form)
    again = Mirrored.restore(mirrored.tensors(), mirrored.settings())
    assert torch.equal(again.decode().images, mirrored.decode().images)
    assert (mirrored.blocks, mirrored.multiplicity.tolist()) == (6, [6] * 4)


def test_a_set_survives_its_files(tmp_path):
    synthetic = SyntheticDataset(
        images=made(),
        labels=HardLabels(torch.tensor([0, 0, 1, 1]), 2),
        normalization=Normalization((0.5, 0.5), (0.5, 1.0)),
        classes=("a", "b"),
        recipe=Recipe({"type": "INFER"}, 0, {"name": "toy"}),
    )
    loaded = SyntheticDataset.load(synthetic.save(tmp_path / "set"))
    assert torch.equal(loaded.tensors()[0], synthetic.tensors()[0])
    assert loaded.targets == [0, 0, 1, 1] * 3
    assert (loaded.ipc, len(loaded), loaded.nbytes.images) == (2, 12, (4 + 4) * 2 * 4 * 3 * 4 + 16)
    one = loaded.subset(1)  # items 0 and 2, both of group 1
    assert one.images.nbytes == (2 + 2) * 2 * 4 * 3 * 4 + 8
    assert torch.equal(one.tensors()[0], synthetic.tensors()[0][[0, 2, 4, 6, 8, 10]])


def test_a_subset_keeps_the_compensators_that_it_needs():
    form = made(groups=(2, 0, 1, 2))
    part = form.subset(torch.tensor([3, 1]))
    assert part.groups.tolist() == [1, 0]
    assert torch.equal(part.compensators, form.compensators[[0, 2]])
    assert torch.equal(part.decode().images, form.decode(torch.tensor([3, 1])).images)
    part.compensators.data.zero_()
    assert bool(form.compensators.any())


def test_joined_parts_keep_their_own_compensators():
    parts = [made(seed=0), made(groups=(0, 0), seed=1), made(groups=(0, 1), seed=2)]
    joined = Compensated.join(parts)
    assert joined.groups.tolist() == [1, 0, 1, 1, 2, 2, 3, 4]
    assert len(joined.compensators) == 5
    blocks = [torch.cat(block) for block in zip(*(part.decode().images.chunk(3) for part in parts), strict=True)]
    assert torch.equal(joined.decode().images, torch.cat(blocks))
    assert joined.nbytes == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("change", [{"each": 1}, {"high": (1.0, 0.6)}], ids=str)
def test_parts_of_another_make_are_not_joined(change):
    form = made()
    other = made(each=change.get("each", 2))
    other.high = change.get("high", HIGH)
    with pytest.raises(BadData, match="cannot join sets whose numbers of compensators, or bounds"):
        Compensated.join([form, other])


def test_without_compensators_there_are_anchors_alone():
    form = made(each=0)
    assert torch.equal(form.decode().images, form.anchors)
    assert (form.multiplicity.tolist(), form.blocks) == ([1] * 4, 1)
    again = Compensated.restore(form.tensors(), form.settings())
    assert again.compensators.shape == (2, 0, 2, 4, 3)
    joined = Compensated.join([form, form]).subset(torch.tensor([5]))
    assert torch.equal(joined.decode().images, form.anchors[1:2])


def test_a_form_imitates_what_it_can_decode_to():
    form, wanted = made(seed=3, scale=0.2), made(seed=0, scale=0.2)
    images = wanted.decode().images.detach()
    assert float(images.abs().max()) < 1  # nothing is clipped in the first channel
    form.imitate(images)
    torch.testing.assert_close(form.decode().images[..., 0, :, :], images[..., 0, :, :])
    with pytest.raises(ShapeMismatch, match=r"imitate.*\(12, 2, 4, 3\)"):
        form.imitate(images[:4])


def test_noise_fills_anchors_and_compensators():
    form = made()
    form.fill_noise(torch.Generator().manual_seed(0))
    again = made(seed=1)
    again.fill_noise(torch.Generator().manual_seed(0))
    assert torch.equal(form.anchors, again.anchors)
    assert torch.equal(form.compensators, again.compensators)
    assert float(form.anchors.std()) == pytest.approx(1, abs=0.3)


def tensors(**changes):
    return {
        "anchors": torch.zeros(2, 2, 4, 3),
        "compensators": torch.zeros(1, 3, 2, 4, 3),
        "groups": torch.tensor([0, 0]),
    } | changes


@pytest.mark.parametrize(
    ("stored", "error", "message"),
    [
        ({"anchors": torch.zeros(2, 2, 4, 3)}, BadData, "anchors, compensators, groups"),
        (tensors(anchors=torch.zeros(2, 2, 4)), ShapeMismatch, "N, C, H, W"),
        (tensors(anchors=torch.zeros(2, 2, 4, 3).long()), BadData, "are floats"),
        (tensors(anchors=torch.full((2, 2, 4, 3), float("nan"))), BadData, "NaN or infinity"),
        (tensors(compensators=torch.zeros(1, 3, 2, 4, 4)), ShapeMismatch, "compensators"),
        (tensors(compensators=torch.zeros(3, 2, 4, 3)), ShapeMismatch, "compensators"),
        (tensors(groups=torch.tensor([0])), ShapeMismatch, "groups"),
        (tensors(groups=torch.tensor([0.0, 0.0])), ShapeMismatch, "integers"),
        (tensors(groups=torch.tensor([0, 1])), BadData, r"groups span \[0, 1\], and there are 1"),
        (tensors(groups=torch.tensor([0, -1])), BadData, r"groups span \[-1, 0\]"),
    ],
    ids=["none", "shape", "integers", "nan", "size", "flat", "few", "float", "unknown", "negative"],
)
def test_content_of_another_make_is_refused(stored, error, message):
    with pytest.raises(error, match=message):
        Compensated.restore(stored, {"low": list(LOW), "high": list(HIGH)})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, InvalidSetting),
        ({"low": [0.0], "high": [1.0]}, BadData),
        ({"low": [0.0, 2.0], "high": [1.0, 1.0]}, BadData),
        ({"low": [float("nan"), 0.0], "high": [1.0, 1.0]}, BadData),
        ({"low": [0.0, 0.0], "high": [1.0, float("inf")]}, BadData),
    ],
    ids=str,
)
def test_bounds_are_two_ascending_numbers_for_each_channel(settings, error):
    with pytest.raises(error, match=r"low|bounds"):
        Compensated.restore(tensors(), settings)
