"""Scores under protocols that learn from teachers: which labels reach which row, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from relabelling.makers import CUT, SPEC, make_committee, make_set, make_teacher

from dsdistill import evaluate
from dsdistill.augmentations import CutMix, Mixup, PadCrop, ResizedCrop, Siamese
from dsdistill.core.rng import Rng
from dsdistill.errors import BadArtifact, BadData, InvalidSetting
from dsdistill.evaluation import EvaluationProtocol, evaluate_across
from dsdistill.evaluation import scorer as scorer_module
from dsdistill.experts import Committee
from dsdistill.relabelling import Distances, relabel
from dsdistill.relabelling.distances import class_distances
from dsdistill.relabelling.record import EpochRecord
from dsdistill.training import Distillation
from dsdistill.training.batches import epochs_of

QUICK = EvaluationProtocol(
    name="quick",
    network=SPEC,
    epochs=3,
    batch_size=4,
    lr=0.05,
    augmentation=ResizedCrop(),
    mix=CutMix(probability=0.8),
    sub_batches=2,
    distillation=Distillation(temperature=4.0),
)
CLEAN = replace(QUICK, augmentation=PadCrop(pad=2), mix=Mixup(), epochs=50, targets="images")
ROWS = ["synthetic", "synthetic, hard", "random", "random, hard"]


@pytest.fixture
def synthetic(source):
    return make_set(source)


@pytest.fixture
def committee(source):
    return make_committee(source)


@pytest.fixture
def trained(monkeypatch):
    """For every network: data, recipe, streams, teacher, and its first epoch of mini-batches."""
    seen = []

    def spy(network, data, recipe, rng, *, num_classes, mirror_safe, teacher, **_):
        epochs = epochs_of(data, recipe, rng, num_classes=num_classes, mirror_safe=mirror_safe, teacher=teacher)
        seen.append((data, recipe, rng, teacher, list(next(epochs))))

    monkeypatch.setattr(scorer_module, "train", spy)
    return seen


def run(synthetic, source, **options):
    return evaluate(
        synthetic, source, **{"protocol": QUICK, "repeats": 1, "device": "cpu", "progress": False, **options}
    )


def label(synthetic, committee, recipe=QUICK, **options):
    return relabel(synthetic, committee, recipe, device="cpu", progress=False, **options)


def same(lessons, others):
    return all(
        all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(lessons, others, strict=True)
    )


# Rows --------------------------------------------------------------------------------------------------------


def test_labels_teach_the_set_and_teachers_the_real_images(synthetic, source, committee, trained):
    labels = label(synthetic, committee)
    result = run(synthetic, source, labels=labels, teachers=committee, baselines=("random", "whole"))
    assert list(result.scores) == [*ROWS, "whole"]
    stored, hard, random, random_hard, whole = trained
    assert same(stored[4], labels.lessons(synthetic)(0))
    assert stored[3] is None
    for record, count in ((random, 9), (whole, 36)):
        assert record[0].lessons is None
        assert sum(len(lesson.images) for lesson in record[4]) == count
        for lesson in record[4]:
            assert torch.allclose(lesson.targets, committee.logits(lesson.images), atol=1e-6)
    for record in (hard, random_hard):
        assert record[1] == replace(QUICK, distillation=None)
        assert (record[0].lessons, record[3]) == (None, None)
        assert all(lesson.targets.max() < 3 for lesson in record[4])
    assert hard[0].fetch(torch.arange(9))[1].tolist() == synthetic.targets
    # the real images are the same ones, with the same order and views
    assert all(torch.equal(mine.images, theirs.images) for mine, theirs in zip(random[4], random_hard[4], strict=True))


def test_without_labels_teachers_are_asked_about_the_set_too(synthetic, source, committee, trained):
    run(synthetic, source, teachers=committee)
    for record in (trained[0], trained[2]):
        assert record[1].distillation == QUICK.distillation
        for lesson in record[4]:
            assert torch.allclose(lesson.targets, committee.logits(lesson.images), atol=1e-6)
    assert trained[0][0].fetch(torch.arange(9))[1].tolist() == synthetic.targets


def test_labels_alone_score_a_set_without_real_images(synthetic, source, committee, trained):
    result = run(synthetic, source, labels=label(synthetic, committee), baselines=())
    assert list(result.scores) == ROWS[:2]
    assert result.gain is None
    assert result.hard_gain is None


def test_batch_statistics_are_those_of_the_students_parts(synthetic, source, trained):
    committee = make_committee(source, 1)
    run(synthetic, source, teachers=committee, protocol=replace(QUICK, teacher_mode="batch"))
    student = make_teacher(source).network.train()
    for lesson in trained[0][4]:
        parts = [part for part in torch.tensor_split(lesson.images, 2) if len(part)]
        assert torch.allclose(lesson.targets, torch.cat([student(part) for part in parts]), atol=1e-5)


def test_teachers_vote_on_real_images_as_they_did_on_the_set(synthetic, source, committee, trained):
    labels = label(synthetic, committee, temperature=10.0)
    run(synthetic, source, labels=labels, teachers=committee)
    for lesson in trained[2][4]:
        assert torch.allclose(lesson.targets, committee.logits(lesson.images, committee.weights(10.0)), atol=1e-6)


def test_static_labels_are_mixed_under_the_protocols_views(synthetic, source, committee, trained):
    labels = label(synthetic, committee, None, kind="static", codec="float32")
    run(synthetic, source, protocol=CLEAN, labels=labels, teachers=committee, repeats=2)
    first, second = trained[0], trained[4]
    rng = Rng(0, job="repeat/0")
    assert same(first[4], labels.lessons(synthetic, recipe=CLEAN, rng=rng)(0))
    assert not torch.equal(first[4][0].images, second[4][0].images)
    assert labels.static().min() <= first[4][0].targets.min()


def test_real_images_have_static_labels_where_the_set_has_them(synthetic, source, committee, trained):
    labels = label(synthetic, committee, None, kind="static", codec="float32", temperature=10.0)
    options = {"protocol": CLEAN, "labels": labels, "teachers": committee, "baselines": ("random", "whole")}
    run(synthetic, source, **options)
    for data, _, _, teacher, lessons in (trained[2], trained[4]):
        assert teacher is None
        images, classes = data.fetch(torch.arange(data.size))
        told = committee.logits(images, committee.weights(10.0))
        record = EpochRecord.draw(CLEAN, data.size, source.shape, Rng(0, job="repeat/0"), 0)
        assert len(lessons) == len(record)
        for number, lesson in enumerate(lessons):
            assert torch.equal(lesson.images, record.shown(images, number))
            assert torch.allclose(lesson.targets, record.labels(number, told, 3), atol=1e-5)
            assert torch.equal(lesson.classes, record.labels(number, classes, 3))
    assert not torch.allclose(trained[2][4][0].targets, committee.logits(trained[2][4][0].images), atol=0.1)


def test_teachers_alone_are_asked_about_clean_images_once(synthetic, source, trained, monkeypatch):
    committee, asked, logits = make_committee(source), [], Committee.logits

    def counted(self, images, *arguments, **options):
        asked.append(len(images))
        return logits(self, images, *arguments, **options)

    labels = label(synthetic, committee, None, kind="static", codec="float32")
    monkeypatch.setattr(Committee, "logits", counted)
    run(synthetic, source, protocol=CLEAN, teachers=committee, repeats=2, baselines=("random", "whole"))
    assert sorted(asked) == [9, 9, 9, 36]  # the set, the random images of each network, the whole data
    expected = labels.lessons(synthetic, recipe=CLEAN, rng=Rng(0, job="repeat/0"))(0)
    for lesson, other in zip(trained[0][4], expected, strict=True):
        assert torch.equal(lesson.images, other.images)
        assert torch.allclose(lesson.targets, other.targets, atol=1e-5)


@pytest.mark.parametrize("temperature", [10.0, None])
def test_teachers_vote_as_the_protocol_says(temperature, synthetic, source, committee, trained):
    protocol = replace(QUICK, vote_temperature=temperature)
    result = run(synthetic, source, teachers=committee, protocol=protocol)
    weights = torch.tensor([0.5, 0.5]) if temperature is None else committee.weights(temperature)
    for record in (trained[0], trained[2]):
        for lesson in record[4]:
            assert torch.allclose(lesson.targets, committee.logits(lesson.images, weights), atol=1e-6)
    assert result.to_json()["teaching"]["weights"] == pytest.approx(weights.tolist())


def test_a_vote_needs_the_priors_of_several(synthetic, source, committee, trained):
    unknown = [replace(one, performance=None) for one in committee]
    voting = replace(QUICK, vote_temperature=10.0)
    with pytest.raises(InvalidSetting, match=r"of teacher0, teacher1 is unknown.*dsdistill prior.*vote_temperature=No"):
        run(synthetic, source, teachers=Committee(unknown), protocol=voting)
    assert not trained
    run(synthetic, source, teachers=Committee(unknown[:1]), protocol=voting)
    equal = label(synthetic, Committee(unknown))
    result = run(synthetic, source, labels=equal, teachers=Committee(unknown), protocol=voting)
    assert result.protocol == QUICK  # what the score says it was made with
    alone = Committee(unknown[:1])
    assert run(synthetic, source, labels=label(synthetic, alone), teachers=alone, protocol=voting).protocol == voting


def test_distances_are_learned_with_their_own_loss(synthetic, source, committee, trained):
    labels = label(synthetic, committee, kind="distances", codec="float32")
    result = run(synthetic, source, labels=labels, teachers=committee)
    assert result.protocol == replace(QUICK, distillation=Distances())
    assert result.protocol.distillation.weight == 1
    stored, _, random, _ = trained
    assert same(stored[4], labels.lessons(synthetic)(0))
    classes = random[0].fetch(torch.arange(9))[1]
    assert classes.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for lesson in random[4]:
        own, partner = lesson.targets[:, 2].long(), lesson.targets[:, 3].long()
        told = class_distances(committee.logits(lesson.images), own, partner)
        assert torch.allclose(lesson.targets[:, :2], told, atol=1e-5)
    with pytest.raises(InvalidSetting, match="not the whole training set"):
        run(synthetic, source, labels=labels, teachers=committee, baselines=("whole",))


def test_the_hard_rows_of_a_set_with_soft_labels_learn_the_likeliest_class(source, committee, trained):
    from dsdistill import SyntheticDataset

    hard = make_set(source)
    soft = torch.nn.functional.one_hot(torch.tensor(hard.targets), 3) * 0.6 + 0.4 / 3
    options = {"normalization": hard.normalization, "classes": hard.classes}
    run(SyntheticDataset.from_tensors(hard.tensors()[0], soft, **options), source, teachers=committee)
    assert trained[1][0].fetch(torch.arange(9))[1].tolist() == hard.targets


def test_a_set_of_the_random_images_gains_nothing(source, committee):
    """What is labelled online is labelled alike, whether a set or real images hold it."""
    from dsdistill import SyntheticDataset

    index = source.per_class_indices(range(3), 3, Rng(0, job="repeat/0").at("random real"))
    options = {"normalization": source.normalization, "classes": source.classes}
    copied = SyntheticDataset.from_tensors(source.gather(index), source.targets[index], **options)
    result = run(copied, source, teachers=committee)
    assert result.gain.values == result.hard_gain.values == (0.0,)


def test_the_same_seed_gives_the_same_scores(synthetic, source, committee):
    labels = label(synthetic, committee)
    options = {"labels": labels, "teachers": committee, "repeats": 2}
    first, second = (run(synthetic, source, **options) for _ in range(2))
    assert {row: score.values for row, score in first.scores.items()} == {
        row: score.values for row, score in second.scores.items()
    }


# What comes out ----------------------------------------------------------------------------------------------


def test_the_result_tells_who_taught_and_what_it_costs(synthetic, source, committee):
    labels = label(synthetic, committee, temperature=10.0)
    result = run(synthetic, source, labels=labels, teachers=committee, repeats=2)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    told = content["teaching"]
    assert [one["name"] for one in told["teachers"]] == ["teacher0", "teacher1"]
    assert [one["digest"] for one in told["teachers"]] == [one.digest for one in committee]
    assert told["labels"]["bytes"] == labels.nbytes
    assert (told["labels"]["kind"], told["labels"]["epochs"]) == ("replayed", 3)
    assert told["labels"]["codec"] == {"type": "Float", "bits": 16}
    assert content["hard_gain_over_random"] == result.hard_gain.to_json()
    assert set(content["lr"]) == set(ROWS)
    text = str(result)
    assert "synthetic set, hard labels" in text
    assert "synthetic - random with hard labels, paired by seed: " in text
    ratio = labels.nbytes / synthetic.nbytes.images
    assert f"replayed labels by teacher0 (0.0 %), teacher1 (0.0 %): 0.0 MiB, {ratio:.1f} x the images" in text
    online = run(synthetic, source, teachers=committee)
    assert "taught by teacher0 (0.0 %), teacher1 (0.0 %), asked while networks are trained" in str(online)
    assert online.to_json()["teaching"]["labels"] is None


def test_a_table_across_networks_has_the_hard_columns(synthetic, source, committee):
    options = {"protocol": QUICK, "repeats": 1, "device": "cpu", "progress": False}
    across = evaluate_across(
        synthetic, source, ["mlp", SPEC], labels=label(synthetic, committee), baselines=(), **options
    )
    assert "synthetic set, hard labels %" in str(across).splitlines()[0]


def test_a_learned_step_size_is_that_of_the_sets_hard_row_too(synthetic, source, committee, trained):
    carrying = replace(synthetic, learned={"lr": torch.tensor(0.03125)})
    result = run(carrying, source, teachers=committee, protocol=replace(QUICK, learned_lr=True))
    assert result.lr == {"synthetic": 0.03125, "synthetic, hard": 0.03125, "random": 0.05, "random, hard": 0.05}


# What is refused ---------------------------------------------------------------------------------------------


def test_a_protocol_without_distillation_has_no_teachers(synthetic, source, committee, trained):
    plain = replace(QUICK, distillation=None)
    for name, given in (("labels", label(synthetic, committee)), ("teachers", committee)):
        with pytest.raises(InvalidSetting, match=f"{name} = .*protocol quick has no distillation"):
            run(synthetic, source, protocol=plain, **{name: given})
    assert not trained


def test_a_protocol_with_distillation_needs_labels_or_teachers(synthetic, source, committee, trained):
    with pytest.raises(InvalidSetting, match=r"teachers = None .*protocol quick learns from teachers"):
        run(synthetic, source)
    with pytest.raises(InvalidSetting, match=r"real images of random are learned; or none of these \(baselines=\(\)"):
        run(synthetic, source, labels=label(synthetic, committee))
    assert not trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, r"epochs = 4 .*at most 3"),
        ({"batch_size": 5}, r"batch_size = 5 .*4, as in the training"),
        ({"augmentation": PadCrop()}, "augmentation = PadCrop"),
        ({"augmentation": Siamese()}, "augmentation = Siamese"),
        ({"mix": None}, "mix = None"),
        ({"mix": CutMix(probability=1.0)}, "mix = CutMix"),
        ({"teacher_mode": "batch"}, r"teacher_mode = 'batch' .*'eval', as in the training"),
        ({"distillation": Distances()}, "labels of logits or distances"),
    ],
)
def test_labels_of_another_training_are_refused(change, message, synthetic, source, committee, trained):
    with pytest.raises(InvalidSetting, match=message):
        run(
            synthetic,
            source,
            labels=label(synthetic, committee),
            teachers=committee,
            protocol=replace(QUICK, **change),
        )
    assert not trained


def test_labels_of_the_other_kind_are_refused(synthetic, source, committee, trained):
    static = label(synthetic, committee, None, kind="static")
    for labels, protocol, message in (
        (static, QUICK, r"labels of views.* targets='views'; these are of kind 'static'"),
        (label(synthetic, committee), CLEAN, r"static labels.* targets='images'; these are of kind 'replayed'"),
    ):
        with pytest.raises(InvalidSetting, match=message):
            run(synthetic, source, labels=labels, teachers=committee, protocol=protocol)
    assert not trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_mode": "batch"}, r"teacher_mode = 'batch' .*clean images are in no mini-batch"),
        ({"distillation": Distances()}, "targets = 'images' .*of a mixed view"),
        ({"augmentation": Siamese()}, "ResizedCrop and PadCrop"),
    ],
)
def test_what_clean_images_do_not_go_with_is_refused(change, message, synthetic, source, committee, trained):
    with pytest.raises(InvalidSetting, match=message):
        run(synthetic, source, teachers=committee, protocol=replace(CLEAN, **change))
    assert not trained


def test_labels_of_batch_statistics_are_of_the_students_parts(synthetic, source, committee, trained):
    protocol = replace(QUICK, teacher_mode="batch")
    labels = label(synthetic, committee, protocol)
    run(synthetic, source, labels=labels, teachers=committee, protocol=protocol)
    trained.clear()
    with pytest.raises(InvalidSetting, match=r"sub_batches = 1 .*2, as in the training"):
        run(synthetic, source, labels=labels, teachers=committee, protocol=replace(protocol, sub_batches=1))
    assert not trained


def test_fewer_epochs_and_another_loss_use_the_same_labels(synthetic, source, committee, trained):
    labels = label(synthetic, committee)
    run(synthetic, source, labels=labels, teachers=committee, epochs=2, protocol=replace(QUICK, lr=0.1, sub_batches=1))
    assert same(trained[0][4], labels.lessons(synthetic)(0))


def test_labels_with_mirrored_views_are_not_for_data_that_have_none(synthetic, source, committee, trained):
    digits = source.with_mirror_safe(False)
    with pytest.raises(InvalidSetting, match=r"augmentation = ResizedCrop.*flip=0.0"):
        run(synthetic, digits, labels=label(synthetic, committee), teachers=committee)
    run(synthetic, digits, labels=label(synthetic, committee, mirror_safe=False), teachers=committee)


def test_labels_and_teachers_of_something_else_are_refused(synthetic, source, committee, trained):
    labels = label(synthetic, committee)
    with pytest.raises(BadData, match="of 9 images"):
        run(make_set(source, 2), source, labels=labels, teachers=committee)
    with pytest.raises(BadData, match=r"made by other teachers \(teacher0, teacher1\) than those given \(one\)"):
        run(synthetic, source, labels=labels, teachers=Committee([make_teacher(source)]))
    with pytest.raises(BadData, match="teacher 'one' knows the same classes in another order"):
        run(synthetic, source, teachers=Committee([make_teacher(source, classes=("blue", "green", "red"))]))
    with pytest.raises(BadData, match=r"recognises .* % of the training images"):
        run(synthetic, source, teachers=Committee([make_teacher(source, accuracy=1.0)]))
    for name in ("labels", "teachers"):
        with pytest.raises(InvalidSetting, match=f"{name} = 'here'"):
            run(synthetic, source, **{name: "here"})
    assert not trained


def test_networks_that_learn_from_teachers_are_trained_one_by_one(synthetic, source, committee, trained):
    with pytest.raises(InvalidSetting, match=r"together = 2 .*learn from teachers"):
        run(synthetic, source, teachers=committee, together=2)
    assert not trained


def test_the_recipe_of_the_labels_is_that_of_the_protocol(synthetic, committee):
    labels = label(synthetic, committee)
    assert labels.recipe == replace(CUT, lr=0.05, distillation=QUICK.distillation)


def test_a_damaged_file_of_labels_ends_it_before_any_training(synthetic, source, committee, trained, tmp_path):
    labels = label(synthetic, committee, out=tmp_path / "labels")
    last = tmp_path / "labels" / "epoch-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(BadArtifact, match=r"epoch-00002\.safetensors"):
        run(synthetic, source, labels=labels, teachers=committee)
    assert trained == []
    run(synthetic, source, labels=labels, teachers=committee, epochs=2)  # which asks for the others alone
    assert trained
