"""Labels as an artefact: what is replayed is what the teachers saw."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from relabelling.makers import CUT, make_committee, make_set, make_teacher
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dsdistill import SyntheticDataset
from dsdistill.augmentations import Mixup, PadCrop
from dsdistill.core.rng import Rng
from dsdistill.data import Normalization
from dsdistill.errors import BadArtifact, BadData, InvalidSetting, OutputConflict
from dsdistill.experts import Committee
from dsdistill.relabelling import FerKD, LabelSet, TopK, relabel
from dsdistill.relabelling.heading import file_bytes
from dsdistill.training import Distillation, TrainingRecipe, TrainingSet, train

BLEND = TrainingRecipe(batch_size=4, augmentation=PadCrop(pad=2), mix=Mixup(), distillation=Distillation())
PLAIN = replace(CUT, mix=None)


@pytest.fixture
def made(source):
    """A set of 9 images, which 4 do not divide."""
    return make_set(source)


@pytest.fixture
def committee(source):
    return make_committee(source)


def label(made, committee, recipe=CUT, **options):
    return relabel(made, committee, recipe, **{"device": "cpu", "progress": False, **options})


def hashes(images):
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]


class Witness(Committee):
    """Remembers what it was shown."""

    def __init__(self, members):
        super().__init__(members)
        self.seen = []

    def logits(self, images, *arguments, **options):
        self.seen.append(images.clone())
        return super().logits(images, *arguments, **options)


@pytest.mark.parametrize("recipe", [CUT, replace(BLEND, epochs=3)], ids=["cut", "blend"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_replayed_is_what_the_teachers_saw_to_the_last_bit(recipe, workers, made, source, tmp_path):
    witness = Witness([make_teacher(source)])
    label(made, witness, recipe, codec="float32", chunk=4, out=tmp_path / "labels")
    shown = witness.seen[-3 * 3 :]  # the last passes; those before measured what they take
    labels, loaded = LabelSet.load(tmp_path / "labels"), make_set(source)
    lessons = labels.lessons(loaded)
    for epoch in range(3 if workers == 0 else 1):
        taught = list(lessons(epoch))
        seen = shown[3 * epoch : 3 * epoch + 3]
        assert [len(lesson.images) for lesson in taught] == [4, 4, 1]
        loader = DataLoader(labels.replay(loaded, epoch), batch_size=labels.batch_size, num_workers=workers)
        for teachers, lesson, (images, logits) in zip(seen, taught, loader, strict=True):
            assert hashes(teachers) == hashes(lesson.images) == hashes(images)
            assert torch.equal(lesson.targets, logits)
            assert torch.allclose(witness.logits(images), logits, atol=1e-6)


@pytest.mark.gpu
def test_what_a_teacher_saw_on_the_gpu_is_replayed_on_the_cpu(made, source):
    for recipe in (CUT, BLEND):
        witness = Witness([make_teacher(source)])
        labels = label(made, witness, recipe, device="cuda", chunk=4, epochs=1)
        lessons = list(labels.lessons(made)(0))
        there = list(labels.lessons(made, "cuda")(0))
        for seen, lesson, on_gpu in zip(witness.seen[-3:], lessons, there, strict=True):
            assert seen.device.type == on_gpu.images.device.type == "cuda"
            assert hashes(seen.cpu()) == hashes(lesson.images) == hashes(on_gpu.images.cpu())
            assert torch.equal(lesson.targets, on_gpu.targets.cpu())


def test_logits_are_a_weighted_mean_of_logits(made, source):
    committee = make_committee(source)
    labels = label(made, committee, codec="float32", temperature=10.0)
    weights = torch.softmax(torch.tensor([60.0, 70.0]) / 10, 0)
    assert labels.heading.weights == pytest.approx(weights.tolist())
    for lesson in labels.lessons(made)(1):
        told = [member.network(lesson.images) for member in committee]
        assert torch.allclose(lesson.targets, weights[0] * told[0] + weights[1] * told[1], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_batch_statistics_are_those_of_each_part_of_a_mini_batch(chunk, made, source):
    teacher = make_teacher(source)
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    labels = label(made, Committee([teacher]), codec="float32", teacher_mode="batch", chunk=chunk, epochs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.network.state_dict().items())
    student = make_teacher(source).network.train()
    for lesson in labels.lessons(made)(1):
        parts = [part for part in torch.tensor_split(lesson.images, 2) if len(part)]
        expected = torch.cat([student(part) for part in parts])
        assert torch.allclose(lesson.targets, expected, atol=1e-5)


def test_a_batch_that_does_not_halve_is_parted_as_the_students(made, source):
    recipe = replace(CUT, batch_size=3)
    labels = label(made, make_committee(source, 1), recipe, codec="float32", teacher_mode="batch", chunk=100)
    student = make_teacher(source).network.train()
    for lesson in labels.lessons(made)(0):
        expected = torch.cat([student(lesson.images[:2]), student(lesson.images[2:])])
        assert torch.allclose(lesson.targets, expected, atol=1e-5)


def test_classes_are_mixed_by_the_share_of_pixels(made, committee):
    labels = label(made, committee)
    record = labels.epoch(0).record
    mixed = 0
    for number, lesson in enumerate(labels.lessons(made)(0)):
        show = record.batch(number)
        own = torch.tensor(made.targets)[show.rows]
        if show.mix.share == 1:
            assert torch.equal(lesson.classes, own)
            continue
        mixed += 1
        top, left, bottom, right = show.mix.box
        kept = 1 - (bottom - top) * (right - left) / 64
        expected = torch.nn.functional.one_hot(own, 3) * kept
        expected = expected + torch.nn.functional.one_hot(own[show.mix.partner], 3) * (1 - kept)
        assert torch.allclose(lesson.classes, expected)
    assert mixed


def test_static_labels_are_of_the_clean_images_and_mix_as_logits(made, committee, tmp_path):
    labels = label(made, committee, None, kind="static", codec="float32", out=tmp_path / "labels")
    images, _ = made.tensors()
    clean = committee.logits(images)
    assert torch.allclose(labels.static(), clean, atol=1e-6)
    assert [path.name for path in sorted((tmp_path / "labels").glob("*.safetensors"))] == ["static.safetensors"]
    assert (labels.epochs, labels.batch_size, labels.recipe) == (None, None, None)
    rng = Rng(5)
    lessons = labels.lessons(made, recipe=BLEND, rng=rng)
    for epoch in (0, 7):
        order = torch.randperm(9, generator=rng.at("order", epoch))
        generator = rng.at("mix", epoch)
        for lesson, rows in zip(lessons(epoch), order.split(4), strict=True):
            mix = BLEND.mix.sample(len(rows), made.shape, generator)
            own = labels.static()[rows]
            assert torch.allclose(lesson.targets, mix.share * own + (1 - mix.share) * own[mix.partner], atol=1e-6)
    with pytest.raises(InvalidSetting, match="need a recipe and an rng"):
        labels.lessons(made)
    with pytest.raises(InvalidSetting, match="static labels have no epochs"):
        labels.epoch(0)


def test_distances_are_to_the_classes_of_the_image_and_of_its_partner(made, source, tmp_path):
    teacher = make_teacher(source)
    labels = label(made, Committee([teacher]), kind="distances", codec="float32", out=tmp_path / "labels")
    labels = LabelSet.load(tmp_path / "labels")
    targets = torch.tensor(made.targets)
    record = labels.epoch(1).record
    for number, lesson in enumerate(labels.lessons(made)(1)):
        show = record.batch(number)
        own = targets[show.rows]
        partner = own[show.mix.partner]
        logits = teacher.network(lesson.images)
        for column, classes in enumerate((own, partner)):
            assert torch.allclose(
                lesson.targets[:, column], cross_entropy(logits, classes, reduction="none"), atol=1e-5
            )
            assert torch.equal(lesson.targets[:, 2 + column].long(), classes)
    assert file_bytes(labels.heading.layout()) < 9 * 8 + 300  # views are drawn anew, not stored


def test_drawn_records_that_would_differ_are_refused(made, committee, monkeypatch):
    labels = label(made, committee, records="drawn")
    stored = label(made, committee, records="stored")
    assert labels.nbytes < stored.nbytes
    assert torch.equal(labels.epoch(1).record.order, stored.epoch(1).record.order)
    monkeypatch.setattr("dsdistill.relabelling.labelset.stream", lambda seed: Rng(seed, job="another torch"))
    with pytest.raises(BadArtifact, match=r"epoch-00001.safetensors: its views cannot be drawn again"):
        labels.epoch(1)


def test_views_that_a_calibration_leaves_out_are_not_in_their_batch(made, source):
    calibration = FerKD(low=0.2, middle=0.4, top=0.8)
    labels = label(made, make_committee(source, 1), PLAIN, codec="float32", calibration=calibration)
    plain = label(made, make_committee(source, 1), PLAIN, codec="float32")
    left_out = 0
    for epoch in range(3):
        kept = labels.epoch(epoch).kept
        assert kept.any()
        left_out += int((~kept).sum())
        whole = torch.cat([lesson.images for lesson in plain.lessons(made)(epoch)])
        logits = torch.cat([lesson.targets for lesson in plain.lessons(made)(epoch)])
        classes = torch.cat([lesson.classes for lesson in plain.lessons(made)(epoch)])
        expected, keeps = calibration.calibrated(logits, classes)
        assert torch.equal(kept, keeps)
        taught = list(labels.lessons(made)(epoch))
        assert torch.equal(torch.cat([lesson.images for lesson in taught]), whole[kept])
        assert torch.equal(torch.cat([lesson.targets for lesson in taught]), expected[kept])
        assert all(len(lesson.images) for lesson in taught)
        replay = labels.replay(made, epoch)
        batches = list(DataLoader(replay, batch_sampler=replay.batches))
        assert len(batches) == len(taught)
        assert all(torch.equal(images, lesson.images) for (images, _), lesson in zip(batches, taught, strict=True))
    assert left_out


def test_a_network_learns_from_the_lessons(made, source):
    teacher = make_teacher(source)
    labels = label(made, Committee([teacher]), replace(CUT, epochs=8), codec="float32")
    student = make_teacher(source, seed=1).network.requires_grad_(True)
    recipe = replace(labels.recipe, lr=0.1, distillation=Distillation(temperature=1.0))

    def divergence():
        student.eval()
        with torch.no_grad():
            return sum(
                float(recipe.distillation.loss(student(lesson.images), lesson.targets))
                for lesson in labels.lessons(made)(0)
            )

    before = divergence()
    data = TrainingSet.of(*made.tensors(), lessons=labels.lessons(made))
    train(student, data, recipe, Rng(0), num_classes=3, mirror_safe=True)
    assert divergence() < 0.7 * before


def test_mirroring_follows_the_sets_real_data(made, committee):
    safe = replace(made, recipe=replace(made.recipe, source={**made.recipe.source, "mirror_safe": False}))
    assert label(safe, committee).recipe.augmentation.flip == 0
    assert label(safe, committee, mirror_safe=True).recipe.augmentation.flip == 0.5
    assert label(made, committee).recipe.augmentation.flip == 0.5


# Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "recipe"), [("float16", CUT), ("uint8", BLEND), (TopK(k=2), PLAIN), ("float32", TrainingRecipe())]
)
def test_bytes_are_known_before(codec, recipe, made, committee, tmp_path):
    labels = label(made, committee, replace(recipe, epochs=2), codec=codec, out=tmp_path / "labels")
    files = [path for path in (tmp_path / "labels").iterdir() if path.name != "lock"]
    assert labels.nbytes == sum(path.stat().st_size for path in files) == labels.heading.predicted_bytes()
    assert sorted(path.name for path in files) == ["epoch-00000.safetensors", "epoch-00001.safetensors", "labels.json"]


def test_a_full_batch_of_imagenet_takes_less_than_the_official_payload(made, committee):
    heading = replace(
        label(made, committee).heading,
        count=1024,
        shape=(3, 224, 224),
        classes=tuple(map(str, range(1000))),
        recipe=replace(CUT, batch_size=1024),
    )
    payload = 1024 * (1000 * 2 + 7 * 2 + 4 + 2) + 8 + 8  # logits; view, order and partner; share and box
    size = file_bytes(heading.layout())
    assert payload < size < payload + 1000
    assert size < 2_073_600  # 1024 * (1000 * 2 + 16 + 1 + 8), without its container


def test_labels_survive_a_folder(made, committee, tmp_path):
    held = label(made, committee, calibration=FerKD(low=0.0, middle=0.1), recipe=PLAIN)
    held.save(tmp_path / "labels")
    read = LabelSet.load(tmp_path / "labels")
    assert read.heading == held.heading
    assert read.nbytes == held.nbytes
    read.verify()
    for mine, theirs in zip(held.lessons(made)(2), read.lessons(made)(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    with pytest.raises(OutputConflict, match="holds labels already"):
        held.save(tmp_path / "labels")
    assert repr(read).startswith("LabelSet(replayed, 9 images, 3 epochs, ")


def test_a_damaged_file_is_named(made, committee, tmp_path):
    labels = label(made, committee, out=tmp_path / "labels")
    path = tmp_path / "labels" / "epoch-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(list(labels.lessons(made)(0))) == 3
    for reading in (lambda: labels.epoch(1), labels.verify, lambda: labels.replay(made, 1)):
        with pytest.raises(BadArtifact, match=r"epoch-00001.safetensors: its sha256 differs"):
            reading()
    path.unlink()
    with pytest.raises(BadArtifact, match=r"epoch-00001.safetensors.*not readable"):
        labels.epoch(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "of version 2"),
        ({"format": "dsdistill.synthetic"}, "no labels"),
        ({"kind": "guessed"}, "does not describe labels"),
        ({"codec": {"type": "Zip"}}, "does not describe labels"),
        ({"epochs": 2}, "lists other files"),
        ({"recipe": None}, "does not describe labels"),
    ],
)
def test_manifests_of_something_else_are_refused(change, message, made, committee, tmp_path):
    from dsdistill.core import storage

    label(made, committee, out=tmp_path / "labels")
    path = tmp_path / "labels" / "labels.json"
    storage.write_json(path, storage.sealed({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadArtifact, match=message):
        LabelSet.load(tmp_path / "labels")


def test_labels_are_of_one_set_only(made, committee, source):
    labels = label(made, committee)
    labels.require(make_set(source))
    images, targets = made.tensors()
    options = {"normalization": made.normalization, "classes": made.classes}
    moved = images.clone()
    moved[3, 0, 0, 0] += 1e-6
    order = torch.tensor([1, 0, *range(2, 9)])
    for other, problem in [
        (SyntheticDataset.from_tensors(moved, targets, **options), "other images"),
        (SyntheticDataset.from_tensors(images[order], targets, **options), "another order"),
        (made.subset(2), "of 9 images of shape"),
        (replace(made, classes=("green", "red", "blue")), "same classes in another order"),
        (replace(made, classes=("a", "b", "c")), "other classes"),
    ]:
        for use in (labels.require, labels.lessons, lambda one: labels.replay(one, 0)):
            with pytest.raises(BadData, match=problem):
                use(other)
    with pytest.raises(InvalidSetting, match="from 0 to 2"):
        labels.epoch(3)


def test_teachers_of_something_else_are_refused(made, source):
    for changes, message in [
        ({"classes": ("green", "red", "blue")}, "same classes in another order"),
        ({"classes": ("a", "b", "c")}, "other classes"),
        ({"shape": (3, 4, 4)}, r"takes images of shape \(3, 4, 4\)"),
        ({"normalization": Normalization((0.1,) * 3, (0.5,) * 3)}, "pixels standardised by"),
    ]:
        with pytest.raises(BadData, match=f"teacher 'one' .*{message}"):
            label(made, Committee([make_teacher(source, **changes)]))
