import json
from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained
from torch import nn

from dsdistill.data import ImageSource
from dsdistill.errors import BadArtifact, BadData, InvalidSetting
from dsdistill.experts import Teacher, filled, recognised
from dsdistill.networks import NetworkSpec
from dsdistill.testing import toy_source


@pytest.fixture(scope="module")
def source():
    return toy_source()


def test_what_is_saved_is_loaded_with_its_running_statistics(source, tmp_path):
    teacher = untrained(source, performance=61.5, history={"source": "toy"})
    loaded = Teacher.load(teacher.save(tmp_path / "one"))
    images = source.gather(torch.arange(6))
    assert loaded.digest == teacher.digest
    assert torch.equal(loaded.network(images), teacher.network(images))
    told = ("name", "spec", "classes", "shape", "normalization", "accuracy", "performance", "history")
    assert [getattr(loaded, name) for name in told] == [getattr(teacher, name) for name in told]
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_whitened_pixels_come_along(source, tmp_path):
    white = source.normalized_by(source.normalization.whitened([source.images]))
    loaded = Teacher.load(untrained(white).save(tmp_path / "one"))
    assert loaded.normalization == white.normalization


def test_saving_again_replaces(source, tmp_path):
    teacher = untrained(source)
    teacher.save(tmp_path)
    replace(teacher, performance=70.0).save(tmp_path)
    assert Teacher.load(tmp_path).performance == 70.0


@pytest.mark.parametrize("name", ["weights.safetensors", "teacher.json"])
def test_a_damaged_file_is_named(name, source, tmp_path):
    untrained(source).save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(BadArtifact, match=name):
        Teacher.load(tmp_path)


def test_a_folder_does_not_decide_which_code_is_run(source, tmp_path):
    replace(untrained(source), spec=NetworkSpec("experts.schools:untrained")).save(tmp_path)
    with pytest.raises(BadArtifact, match="whose code would be run"):
        Teacher.load(tmp_path)
    with pytest.raises(BadArtifact, match="is a NetworkSpec"):
        Teacher.load(tmp_path, network=SPECS[0])


def test_another_version_is_refused(source, tmp_path):
    from dsdistill.core import storage

    untrained(source).save(tmp_path)
    told = json.loads((tmp_path / "teacher.json").read_text())
    storage.write_json(tmp_path / "teacher.json", storage.sealed({**told, "schema_version": 9}))
    with pytest.raises(BadArtifact, match="no teacher of version 1"):
        Teacher.load(tmp_path)


class ByBrightness(nn.Module):
    """Tells the classes of `toy_source`, which differ in mean colour."""

    def __init__(self, order=(0, 1, 2)):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.order = order

    def forward(self, images):
        level = images.mean((1, 2, 3))
        return torch.stack([-((level - (target - 1)) ** 2) for target in self.order], 1)


def test_accuracy_is_that_on_training_images(source):
    assert recognised(ByBrightness(), source) == 1.0
    assert recognised(ByBrightness((2, 1, 0)), source) == pytest.approx(1 / 3)
    assert recognised(ByBrightness((1, 0, 2)), source, most=6) == pytest.approx(1 / 3)


def test_permuted_images_are_refused_and_relabelled_teachers_are_not(source):
    teacher = untrained(source, network=ByBrightness(), accuracy=1.0)
    teacher.check(source)
    mixed = ImageSource(
        source.name, source.classes, source.images, (source.targets + 1) % 3, normalization=source.normalization
    )
    with pytest.raises(BadData, match=r"recognises 0.0 % of the training images.*100.0 %.*order of the classes"):
        teacher.check(mixed)
    untrained(source, network=ByBrightness((2, 0, 1)), accuracy=1.0).check(mixed)


@pytest.mark.parametrize(("wrong", "refused"), [(3, False), (5, True)])
def test_half_of_what_it_knew_beyond_chance_must_be_left(wrong, refused, source):
    """12 images of 3 classes: chance is 4 of 12, so a teacher that knew all has to get 8 right."""
    few = source.subset([*range(4), *range(12, 16), *range(24, 28)])

    class Says(ByBrightness):
        def forward(self, images):
            logits = super().forward(images)
            logits[:wrong] = logits[:wrong].roll(1, 1)
            return logits

    teacher = untrained(source, network=Says(), accuracy=1.0)
    assert recognised(teacher.network, few) == pytest.approx(1 - wrong / 12)
    if refused:
        with pytest.raises(BadData, match="recognises"):
            teacher.check(few)
    else:
        teacher.check(few)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("class 1", "class 0", "class 2")}, "the same classes in another order"),
        ({"classes": ("a", "b", "c")}, "other classes"),
        ({"shape": (3, 9, 9)}, r"takes images of shape \(3, 9, 9\)"),
    ],
)
def test_other_data_is_refused(changes, message, source):
    with pytest.raises(BadData, match=message):
        untrained(source, **changes).check(source)


def test_another_standardisation_is_refused(source):
    other = replace(source.normalization, mean=(0.1, 0.1, 0.1))
    with pytest.raises(BadData, match="load the data as it was loaded for the teacher"):
        untrained(source, normalization=other).check(source)


def test_weights_of_another_network_are_refused(source):
    weights = dict(untrained(source, SPECS[1]).network.state_dict())
    with pytest.raises(InvalidSetting, match="of another shape"):
        filled(SPECS[0], source.shape, 3, weights, "cpu")
    weights.pop("classifier.bias")
    weights["more"] = torch.zeros(1)
    with pytest.raises(InvalidSetting, match=r"missing classifier.bias; unknown more"):
        filled(SPECS[1], source.shape, 3, weights, "cpu")
