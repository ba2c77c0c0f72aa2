import copy
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save as encode
from torch.utils.data import DataLoader

from dsdistill import SyntheticDataset
from dsdistill.core import storage
from dsdistill.data import Normalization
from dsdistill.errors import BadArtifact, BadData, DistillError, InvalidSetting, OutputConflict, ShapeMismatch
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.parameterizations import Pixels
from dsdistill.recipe import Recipe

FILES = ("images.safetensors", "labels.safetensors", "dataset.json", "README.md", "grid.png")
STATISTICS = Normalization((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
BIRDS = ("heron", "egret", "owl")


def recipe(name="toy", **options):
    return Recipe({"type": "Made", "ipc": 2, "by": "hand"}, 7, {"name": name, "counts": [5, 6, 7]}, **options)


def make(targets=(0, 0, 1, 1, 2, 2), classes=BIRDS, shape=(3, 4, 6), seed=0, name="toy", **options):
    """Random standardised images; the targets may come in any order."""
    pixels = torch.randn(len(targets), *shape, generator=torch.Generator().manual_seed(seed))
    labels = HardLabels(torch.tensor(targets), len(classes))
    channels = slice(shape[0])
    statistics = Normalization(STATISTICS.mean[channels], STATISTICS.std[channels])
    return SyntheticDataset(Pixels(pixels), labels, statistics, tuple(classes), recipe(name), **options)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is tested here


@pytest.fixture
def made():
    return make()


@pytest.fixture
def saved(made, tmp_path):
    return made.save(tmp_path / "set")


# As a dataset ------------------------------------------------------------------------------------------------


def test_items_are_standardised_images_and_ints(made):
    image, target = made[3]
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (3, 4, 6))
    assert torch.equal(image, made.images.pixels[3])
    assert type(target) is int
    assert [target for _, target in made] == made.targets == [0, 0, 1, 1, 2, 2]
    assert torch.equal(made[-1][0], made.images.pixels[5])
    with pytest.raises(IndexError):
        made[6]
    assert not image.requires_grad


def test_a_data_loader_takes_it_at_once(made):
    batches = list(DataLoader(made, batch_size=4))
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 4, 6), (2, 3, 4, 6)]
    assert torch.equal(torch.cat([images for images, _ in batches]), made.tensors()[0])
    assert torch.cat([targets for _, targets in batches]).tolist() == made.targets
    assert batches[0][1].dtype == torch.int64


def test_what_it_says_about_itself(made):
    assert made.classes == ("heron", "egret", "owl")
    assert made.class_to_idx == {"heron": 0, "egret": 1, "owl": 2}
    assert (made.ipc, made.counts, made.shape, len(made)) == (2, (2, 2, 2), (3, 4, 6), 6)
    assert made.nbytes == (6 * 3 * 4 * 6 * 4, 6 * 4, 0)
    assert made.nbytes.total == 1752
    assert made.nbytes.images == 1728
    assert repr(made) == (
        "SyntheticDataset(Made, 3 classes, ipc=2, 6 images 3x4x6, pixels form, hard labels, "
        "1,728 + 24 bytes, source='toy')"
    )


def test_ipc_is_that_of_the_largest_class():
    made = make((2, 0, 2, 1, 2))
    assert (made.counts, made.ipc) == ((1, 1, 3), 3)
    assert make((0, 2), BIRDS).counts == (1, 0, 1)


def test_the_transform_sees_the_image_and_not_the_target(made):
    doubled = replace(made, transform=lambda image: 2 * image)
    assert torch.equal(doubled[1][0], 2 * made[1][0])
    assert doubled[1][1] == 0
    assert torch.equal(doubled.tensors()[0], made.tensors()[0])


def test_worker_processes_can_receive_it(made):
    again = pickle.loads(pickle.dumps(made))  # noqa: S301 (what a DataLoader with workers does)
    assert torch.equal(again.tensors()[0], made.tensors()[0])
    assert torch.equal(copy.deepcopy(made)[2][0], made[2][0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": HardLabels(torch.tensor([0, 1]), 3)}, BadData, "6 stored images but 2 labels"),
        ({"classes": ("a", "b")}, BadData, "labels over 3 classes but 2 class names"),
        ({"normalization": Normalization((0.5,), (0.5,))}, ShapeMismatch, r"expected \(M, 1, H, W\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, error, message, made):
    with pytest.raises(error, match=message):
        replace(made, **change)


# Parts of it -------------------------------------------------------------------------------------------------


def test_a_subset_holds_the_first_images_of_each_class():
    made = make((2, 0, 1, 0, 2, 1, 1), learned={"lr": torch.tensor(0.5)})
    one = made.subset(1)
    assert one.targets == [0, 1, 2]
    assert torch.equal(one.tensors()[0], made.tensors()[0][[1, 2, 0]])
    two = made.subset(2)
    assert two.targets == [0, 0, 1, 1, 2, 2]
    assert torch.equal(two.tensors()[0], made.tensors()[0][[1, 3, 2, 5, 0, 4]])
    assert two.recipe.notes == ("first 2 of 3 images per class",)
    assert two.subset(1).recipe.notes == ("first 2 of 3 images per class", "first 1 of 2 images per class")
    assert made.recipe.notes == ()
    assert two.learned["lr"] == 0.5


def test_a_subset_does_not_share_memory(made):
    one = made.subset(1)
    one.images.pixels.data.fill_(9)
    assert made.images.pixels.max() < 9


@pytest.mark.parametrize("ipc", [0, -1, 3])
def test_a_subset_out_of_range_is_refused(ipc):
    with pytest.raises(InvalidSetting, match=f"ipc = {ipc} .*between 1 and 2"):
        make((0, 0, 0, 1, 1, 2, 2)).subset(ipc)


def test_joined_parts_are_ordered_by_class_and_by_part():
    first, second = make((2, 0), seed=1), make((1, 0, 1), seed=2)
    joined = SyntheticDataset.join([first, second])
    assert joined.targets == [0, 0, 1, 1, 2]
    (a, b), (c, d, e) = first.tensors()[0], second.tensors()[0]
    assert torch.equal(joined.tensors()[0], torch.stack([b, d, c, e, a]))
    assert SyntheticDataset.join([first]) is first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(classes=("a", "b", "c")), "whose classes differ"),
        (replace(make(), normalization=Normalization((0.5,) * 3, (0.5,) * 3)), "whose normalization differ"),
        (make(learned={"lr": torch.tensor(1.0)}), "learned tensors"),
    ],
)
def test_parts_of_different_tasks_are_not_joined(other, message, made):
    for parts in ([made, other], [other, made]):
        with pytest.raises(BadData, match=message):
            SyntheticDataset.join(parts)


def test_parts_of_different_image_sizes_are_not_joined(made):
    with pytest.raises(BadData):
        SyntheticDataset.join([made, make(shape=(3, 4, 4))])


def test_joining_nothing_is_refused():
    with pytest.raises(DistillError):
        SyntheticDataset.join([])


# Files -------------------------------------------------------------------------------------------------------


def equal(one, other):
    return (
        torch.equal(one.tensors()[0].view(torch.int32), other.tensors()[0].view(torch.int32))
        and one.targets == other.targets
        and one.classes == other.classes
        and one.normalization == other.normalization
        and one.recipe == other.recipe
        and repr(one) == repr(other)
    )


def test_a_loaded_set_is_the_saved_one_to_the_last_bit(tmp_path):
    made = make((1, 0, 2), learned={"step/size": torch.tensor(0.1), "table": torch.arange(4)})
    with torch.no_grad():  # minus zero, a denormal, the largest float: bits that arithmetic would lose
        made.images.pixels[0, 0, 0, :3] = torch.tensor([-0.0, 1e-42, 3.4e38])
    notes = recipe(notes=("one", "two"), parents=({"type": "other"},), execution={"device": "cpu"})
    made = replace(made, recipe=notes)
    loaded = SyntheticDataset.load(made.save(tmp_path / "set"))
    assert equal(made, loaded)
    assert loaded.images.pixels.dtype == torch.float32
    assert loaded.recipe.notes == ("one", "two")
    assert set(loaded.learned) == {"step/size", "table"}
    assert torch.equal(loaded.learned["step/size"], torch.tensor(0.1))
    assert torch.equal(loaded.learned["table"], torch.arange(4))


def test_equal_sets_give_equal_files(made, saved, tmp_path):
    channels_last = replace(made, images=Pixels(made.images.pixels.to(memory_format=torch.channels_last)))
    again = channels_last.save(tmp_path / "again")
    onward = SyntheticDataset.load(saved).save(str(tmp_path / "on" / "ward"))
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (saved / name).read_bytes() == (again / name).read_bytes() == (onward / name).read_bytes()


def test_a_set_is_never_overwritten(made, saved, tmp_path):
    before = {name: (saved / name).read_bytes() for name in FILES}
    with pytest.raises(OutputConflict, match="holds a synthetic set already"):
        make(seed=1).save(saved)
    assert before == {name: (saved / name).read_bytes() for name in FILES}
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputConflict, match="is a file"):
        made.save(tmp_path / "file")


def test_files_of_the_user_are_never_overwritten(made, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(OutputConflict, match=r"README\.md"):
        made.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_fresh_process_loads_without_the_code_of_any_method(saved):
    code = f"""
import sys
from dsdistill import SyntheticDataset
loaded = SyntheticDataset.load({str(saved)!r})
print(loaded.targets, float(loaded.tensors()[0].sum()))
print([name for name in sys.modules if name.startswith(("dsdistill.methods", "dsdistill.engine", "sklearn"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"[0, 0, 1, 1, 2, 2] {float(SyntheticDataset.load(saved).tensors()[0].sum())}",
        "[]",
    ]


def test_the_manifest_tells_what_the_set_is(made, saved):
    manifest = json.loads((saved / "dataset.json").read_bytes())
    assert manifest["format"] == "dsdistill.synthetic"
    assert (manifest["schema_version"], manifest["count"], manifest["ipc"]) == (2, 6, 2)
    assert (manifest["shape"], manifest["classes"]) == ([3, 4, 6], list(BIRDS))
    assert manifest["bytes"] == {"images": 1728, "labels": 24, "learned": 0}
    assert manifest["normalization"] == {"kind": "standardize", "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.1]}
    assert manifest["recipe"]["method"] == {"type": "Made", "ipc": 2, "by": "hand"}
    assert set(manifest["recipe"]["versions"]) == {"python", "dsdistill", "torch", "torchvision", "numpy"}
    assert set(manifest["files"]) == set(FILES) - {"dataset.json"}
    for name, entry in manifest["files"].items():
        data = (saved / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": storage.sha256(data)}


# The card and the picture ------------------------------------------------------------------------------------


def front_matter(folder):
    text = (folder / "README.md").read_bytes().decode("utf-8")
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_card_describes_the_set_and_its_code_loads_it(made, saved):
    matter, body = front_matter(saved)
    assert matter["source_datasets"] == ["toy"]
    assert matter["tags"] == ["dataset-distillation"]
    assert "# Made: 2 per class of toy" in body
    assert "6 synthetic images 3x4x6" in body
    assert "3 classes (heron, egret, owl), distilled from 18 real images" in body
    assert "1,728 bytes" in body
    assert "| `by` | `hand` |" in body
    assert "Seed 7;" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    names = {}
    exec(code.replace("path/to/this/folder", str(saved)), names)
    assert torch.equal(names["image"], made[0][0])
    assert names["target"] == 0


def test_the_card_shows_learned_numbers(tmp_path):
    learned = {"lr": torch.tensor(0.018543), "table": torch.arange(4)}
    _, body = front_matter(make(learned=learned).save(tmp_path / "set"))
    assert "36 of other learned tensors (lr = 0.01854, table of shape (4,))" in body


@pytest.mark.parametrize(
    "name",
    ['a "quoted" one', "back\\slash", "line\nbreak", "caf\u00e9 \U0001f408", "it's: {x} #5", "tab\t", "\udcff"],
    ids=ascii,
)
def test_the_card_is_valid_for_any_source_name(name, tmp_path):
    matter, body = front_matter(make(name=name).save(tmp_path / "set"))
    assert len(matter["source_datasets"]) == 1
    assert isinstance(matter["source_datasets"][0], str)
    assert matter["tags"] == ["dataset-distillation"]
    assert "dd.SyntheticDataset.load" in body


def shown(made, index):
    """The colour in which the picture shows the first pixel of an image."""
    mean, std = torch.tensor(made.normalization.mean), torch.tensor(made.normalization.std)
    unit = made.tensors()[0][index][:, 0, 0] * std + mean
    return tuple((unit.clamp(0, 1) * 255).round().int().tolist())


def test_the_picture_has_a_row_per_class_and_a_frame(made, saved):
    with Image.open(saved / "grid.png") as image:
        image.load()
        # 6 pixels wide tiles are shown 10 times as large: 2 columns of 60 and 3 rows of 40, 2 pixels between
        assert (image.size, image.mode) == ((2 + 2 * (60 + 2), 2 + 3 * (40 + 2)), "RGB")
        for row in range(3):
            for column in range(2):
                assert image.getpixel((2 + column * 62, 2 + row * 42)) == shown(made, 2 * row + column)
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_learned_labels_leave_images_in_the_class_they_were_made_for(made):
    swayed = replace(made, labels=SoftLabels(torch.eye(3)[[1, 0, 1, 2, 2, 0]], made.labels.classes))
    assert swayed.targets == made.targets
    assert swayed.counts == made.counts
    assert torch.equal(swayed.grid(), made.grid())
    assert swayed.tensors()[1].argmax(1).tolist() == [1, 0, 1, 2, 2, 0]
    assert swayed.subset(1).targets == [0, 1, 2]


def test_pictures_of_grey_oblong_and_uneven_sets():
    grey = make((0, 0, 2), shape=(1, 40, 3)).grid()
    assert grey.shape == (3, 2 + 3 * 842, 2 + 2 * 65)  # 3 pixels become 63, and 40 become 840
    assert torch.equal(grey[0], grey[2])
    assert bool((grey[:, 844 : 844 + 842] == 255).all())  # the class without images
    assert not bool((grey[:, 2:842] == 255).all())
    assert make((0, 0, 0), shape=(3, 32, 32)).grid(per_class=2).shape == (3, 2 + 3 * 66, 2 + 2 * 66)
    assert make(shape=(3, 2, 100)).grid().shape == (3, 2 + 3 * 4, 2 + 2 * 102)


def test_one_image_per_class_is_laid_out_ten_in_a_row_up_to_twenty():
    many = make(range(25), [str(index) for index in range(25)], shape=(3, 32, 32))
    picture = many.grid()
    assert picture.shape == (3, 2 + 2 * 66, 2 + 10 * 66)
    for index in (0, 9, 10, 19):
        row, column = divmod(index, 10)
        assert tuple(picture[:, 2 + 66 * row, 2 + 66 * column].tolist()) == shown(many, index)


@pytest.mark.parametrize(
    "name", ["\udcff\udce9t\udce9", "\U0001f408 \u732b", "\u202eright-to-left", "a\x00b", " \n", ""]
)
def test_any_class_name_survives(name, tmp_path):
    made = make(classes=("heron", name, "owl"))
    loaded = SyntheticDataset.load(made.save(tmp_path / "set"))
    assert loaded.classes == ("heron", name, "owl")
    assert equal(made, loaded)
    (tmp_path / "set" / "README.md").read_bytes().decode("utf-8")


def test_half_of_a_surrogate_pair_is_kept_or_refused_by_name(tmp_path):
    made = make(classes=("heron", "\ud83d", "owl"))  # what broken JSON escapes leave behind
    try:
        folder = made.save(tmp_path / "set")
    except DistillError:
        assert not (tmp_path / "set" / "dataset.json").exists()
    else:
        assert SyntheticDataset.load(folder).classes == made.classes


# Bad artefacts -----------------------------------------------------------------------------------------------


def refused(folder, message="."):
    with pytest.raises(BadArtifact, match=message) as caught:
        SyntheticDataset.load(folder)
    assert caught.value.exit_code == 6
    return caught.value


def reseal(folder, contents=None, **changes):
    """Replace files and manifest entries of a saved set so that all hashes match."""
    manifest = json.loads((folder / "dataset.json").read_bytes())
    for name, data in (contents or {}).items():
        (folder / name).write_bytes(data)
        manifest["files"][name] = {"bytes": len(data), "sha256": storage.sha256(data)}
    manifest |= changes
    storage.write_json(folder / "dataset.json", storage.sealed(manifest))


def test_resealing_itself_does_no_harm(made, saved):
    reseal(saved, {"images.safetensors": encode({"pixels": made.images.pixels.detach().clone()})})
    assert equal(made, SyntheticDataset.load(saved))


@pytest.mark.parametrize("name", ["images.safetensors", "labels.safetensors", "dataset.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "folder", "link"])
def test_damage_is_noticed_and_named(name, damage, saved, tmp_path):
    path = saved / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        data[-8] ^= 1
    elif damage == "truncate":
        data = data[:-9]
    elif damage == "empty":
        data = b""
    if damage in ("flip", "truncate", "empty"):
        path.write_bytes(data)
    elif damage == "folder":
        path.mkdir()
    elif damage == "link" and name != "dataset.json":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    error = refused(saved)
    assert name in str(error)


def test_every_byte_of_the_manifest_counts(saved):
    data = (saved / "dataset.json").read_bytes()
    for position in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (saved / "dataset.json").write_bytes(flipped)
        if flipped.split() != data.split():  # white space between entries says nothing
            refused(saved)


def test_missing_and_foreign_folders(tmp_path):
    refused(tmp_path / "nowhere", "no such file")
    refused(tmp_path, "not a finished dsdistill folder")
    storage.write_json(tmp_path / "dataset.json", storage.sealed({"format": "something else"}))
    refused(tmp_path, "does not describe a synthetic set")
    storage.write_json(tmp_path / "dataset.json", [1, 2])
    refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema version 3, newer than 2: upgrade dsdistill"),
        ({"schema_version": "1"}, "schema version 1"),
        ({"form": "wavelets"}, "'wavelets'.* is unknown here: install a newer dsdistill"),
        ({"label_kind": "smooth"}, "'smooth' labels is unknown here"),
        ({"form": ["pixels"]}, "."),
        ({"classes": ["heron", "egret"]}, "3 classes but 2 class names"),
        ({"classes": 3}, "."),
        ({"label_settings": {"num_classes": 4}}, "4 classes but 3 class names"),
        ({"label_settings": {"num_classes": 2}, "classes": ["heron", "egret"]}, r"\[0, 2\], but there are 2 classes"),
        ({"label_settings": {"num_classes": "3"}}, "num_classes"),
        ({"label_settings": []}, "."),
        ({"normalization": {"kind": "whiten"}}, "whiten"),
        ({"normalization": {"kind": "standardize", "mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}}, "std"),
        ({"normalization": {"kind": "standardize", "mean": [0.5], "std": [0.5]}}, "shape"),
        ({"recipe": {"seed": 0}}, "."),
        ({"recipe": None}, "."),
        ({"files": {}}, r"lists no file 'images\.safetensors'"),
        ({"files": None}, "."),
    ],
)
def test_manifests_that_do_not_fit_are_refused(changes, message, saved):
    reseal(saved, **changes)
    refused(saved, message)


@pytest.mark.parametrize("changes", [{"count": 7}, {"ipc": 3}, {"shape": [3, 6, 4]}, {"bytes": {"images": 1}}], ids=str)
def test_a_manifest_that_contradicts_its_tensors_is_refused(changes, saved):
    reseal(saved, **changes)
    refused(saved)


@pytest.mark.parametrize("missing", ["form", "form_settings", "label_settings", "normalization", "classes", "recipe"])
def test_a_manifest_without_an_entry_is_refused(missing, saved):
    manifest = json.loads((saved / "dataset.json").read_bytes())
    del manifest[missing]
    storage.write_json(saved / "dataset.json", storage.sealed(manifest))
    refused(saved, missing)


def pixels(value=0.0, shape=(6, 3, 4, 6), dtype=torch.float32):
    return torch.full(shape, value).to(dtype)


def described(value):
    if isinstance(value, str):
        return ""
    return "+".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in value.items()) or "nothing"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"pixels": pixels(torch.nan)}, "tensor 'pixels' holds NaN or infinity"),
        ({"pixels": pixels(-torch.inf)}, "tensor 'pixels' holds NaN or infinity"),
        ({"pixels": torch.full((6, 3, 4, 6), 1e300, dtype=torch.float64)}, "."),
        ({"pixels": pixels(), "learned.lr": torch.tensor(torch.nan)}, r"tensor 'learned\.lr'"),
        ({"pixels": pixels(shape=(5, 3, 4, 6))}, "5 stored images but 6 labels"),
        ({"pixels": pixels(shape=(0, 3, 4, 6))}, "0 stored images but 6 labels"),
        ({"pixels": pixels(shape=(6, 1, 4, 6))}, "shape"),
        ({"pixels": pixels(shape=(6, 72))}, "shape"),
        ({"pixels": pixels(dtype=torch.uint8)}, "floating-point"),
        ({"pixels": pixels(dtype=torch.complex64)}, "floating-point"),
        ({"pixel": pixels()}, "pixels"),
        ({"pixels": pixels(), "more": pixels()}, "more"),
        ({}, "."),
    ],
    ids=described,
)
def test_image_tensors_that_do_not_fit_are_refused_though_the_hashes_match(tensors, message, saved):
    reseal(saved, {"images.safetensors": encode(tensors)})
    refused(saved, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"classes": torch.tensor([0, 0, 1, 1, 2, 3])}, r"span \[0, 3\], but there are 3 classes"),
        ({"classes": torch.tensor([0, 0, 1, 1, 2, -1])}, r"span \[-1, 2\]"),
        ({"classes": torch.tensor([2**40] * 6)}, "span"),
        ({"classes": torch.tensor([0, 0, 1, 1, 2])}, "6 stored images but 5 labels"),
        ({"classes": torch.zeros(6, 3, dtype=torch.int32)}, "integers"),
        ({"classes": torch.zeros(6)}, "integers"),
        ({"classes": torch.zeros(6, dtype=torch.bool)}, "integers"),
        ({"classes": torch.zeros(6, dtype=torch.complex64)}, "."),
        ({"classes": torch.zeros(6, dtype=torch.uint64)}, "."),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "one tensor 'classes'"),
    ],
    ids=described,
)
def test_label_tensors_that_do_not_fit_are_refused_though_the_hashes_match(tensors, message, saved):
    reseal(saved, {"labels.safetensors": encode(tensors)})
    refused(saved, message)


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickles(path, tmp_path):
    """Every dress in which a pickle may come, written at ``path``."""
    yield lambda: path.write_bytes(pickle.dumps({"pixels": Canary(tmp_path / "canary")}))
    yield lambda: torch.save({"pixels": Canary(tmp_path / "canary")}, path)
    yield lambda: torch.save({"pixels": Canary(tmp_path / "canary")}, path, _use_new_zipfile_serialization=False)


def test_the_canary_sings_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary"))).close()  # noqa: S301 (the bait must work)
    assert (tmp_path / "canary").exists()


def test_a_pickle_in_place_of_the_folder_is_refused_unread(tmp_path):
    for write in pickles(tmp_path / "set.pt", tmp_path):
        write()
        refused(tmp_path / "set.pt", r"is a file; a synthetic set is a folder \(pickled \.pt files are never read\)")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["images.safetensors", "labels.safetensors"])
def test_a_pickle_in_place_of_tensors_is_refused_unread_though_the_hashes_match(name, saved, tmp_path):
    for write in pickles(saved / name, tmp_path):
        write()
        reseal(saved, {name: (saved / name).read_bytes()})
        refused(saved, "pickles are never read")
    assert not (tmp_path / "canary").exists()


def test_a_pickle_in_place_of_the_manifest_is_refused_unread(saved, tmp_path):
    for write in pickles(saved / "dataset.json", tmp_path):
        write()
        refused(saved, "not readable as JSON")
    assert not (tmp_path / "canary").exists()


def test_an_edited_card_does_not_spoil_a_set(made, saved):
    (saved / "README.md").write_text("my notes")
    (saved / "grid.png").unlink()
    assert equal(made, SyntheticDataset.load(saved))
