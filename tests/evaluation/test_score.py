import importlib.metadata
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsdistill import SyntheticDataset, evaluate, synthesize
from dsdistill.augmentations import Siamese
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource, Normalization
from dsdistill.errors import (
    BadData,
    DeviceUnavailable,
    Diverged,
    InvalidSetting,
    OutOfMemory,
    OutOfSpace,
    OutputConflict,
    ShapeMismatch,
    UnknownName,
)
from dsdistill.evaluation import EvaluationProtocol, EvaluationResult, Score, evaluate_across, paired_difference
from dsdistill.evaluation import scorer as scorer_module
from dsdistill.labels import HardLabels
from dsdistill.methods import RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.networks import spec as spec_module
from dsdistill.parameterizations import Pixels
from dsdistill.recipe import Recipe

QUICK = EvaluationProtocol(
    name="quick", network=NetworkSpec("mlp", width=8), epochs=3, lr=0.05, batch_size=4, augmentation=Siamese()
)


def stored(images, targets, source, **changes):
    """A set of the given standardised images."""
    options = {"normalization": source.normalization, "classes": source.classes, "recipe": Recipe({}, 0, {})}
    labels = HardLabels(torch.as_tensor(targets), len(source.classes))
    return SyntheticDataset(Pixels(images), labels, **{**options, **changes})


@pytest.fixture
def synthetic(source):
    return synthesize(RandomReal(ipc=2), source, seed=3)


@pytest.fixture
def trained(monkeypatch):
    """Every training set that a network saw: row images, targets, flip safety, protocol, initial parameters, stream."""
    seen = []

    def spy(network, data, protocol, rng, *, mirror_safe, **_):
        initial = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        images, targets = data.fetch(torch.arange(data.size))
        seen.append((images, targets, mirror_safe, protocol, initial, rng))

    monkeypatch.setattr(scorer_module, "train", spy)
    return seen


def run(synthetic, source, **options):
    options = {"protocol": QUICK, "repeats": 2, "device": "cpu", "progress": False, **options}
    return evaluate(synthetic, source, **options)


def values(result):
    return {row: score.values for row, score in result.scores.items()}


# What is trained ---------------------------------------------------------------------------------------------


def test_every_row_trains_on_what_it_says(synthetic, source, trained):
    result = run(synthetic, source, baselines=("random", "whole"), whole_epochs=2)
    rows = [trained[0::3], trained[1::3], trained[2::3]]
    for images, targets, *_ in rows[0]:
        assert torch.equal(images, synthetic.tensors()[0])
        assert targets.tolist() == synthetic.targets
    for images, targets, *_ in rows[1]:
        assert targets.tolist() == [0, 0, 1, 1, 2, 2]
        real = source.normalization.standardize(source.images)
        for image, target in zip(images, targets, strict=True):
            (place,) = (real == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert int(source.targets[place]) == int(target)
        assert len(torch.unique(images, dim=0)) == 6
    for images, targets, *_ in rows[2]:
        assert torch.equal(images, source.normalization.standardize(source.images))
        assert torch.equal(targets, source.targets)
    assert [record[3].epochs for record in trained] == [3, 3, 2] * 2
    assert result.images == {"synthetic": 6, "random": 6, "whole": 36}
    assert result.epochs == {"synthetic": 3, "random": 3, "whole": 2}
    assert not torch.equal(rows[1][0][0], rows[1][1][0])  # the random row draws anew in each repeat


def test_rows_of_a_repeat_share_network_and_streams_and_repeats_do_not(synthetic, source, trained):
    run(synthetic, source, baselines=("random", "whole"))
    initial = [record[4] for record in trained]
    streams = [record[5] for record in trained]
    for repeat in (0, 3):
        assert all(torch.equal(initial[repeat], other) for other in initial[repeat : repeat + 3])
        assert len({*streams[repeat : repeat + 3]}) == 1
    assert not torch.equal(initial[0], initial[3])
    assert streams[0] != streams[3]


def test_the_random_row_has_the_counts_of_the_set(source, trained):
    source = source.subset([*range(4), *range(12, 36)])  # 4, 12 and 12 images
    images = torch.zeros(9, 3, 8, 8)
    result = run(stored(images, [0, 0, 0, 0, 1, 2, 2, 2, 2], source), source, repeats=1)
    assert trained[1][1].tolist() == [0] * 4 + [1] + [2] * 4
    assert result.images["random"] == 9


def test_whether_flips_are_safe_comes_from_the_source(synthetic, source, trained):
    run(synthetic, source, repeats=1, baselines=())
    run(synthetic, source.with_mirror_safe(False), repeats=1, baselines=())
    assert [record[2] for record in trained] == [True, False]


def test_test_images_are_standardised_by_the_sets_statistics(source, monkeypatch):
    seen = []
    table = torch.eye(3, dtype=torch.int64)
    monkeypatch.setattr(scorer_module, "confusion", lambda network, test, *, chunk: seen.append(test) or table)
    other = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    made = synthesize(RandomReal(ipc=1), source.normalized_by(other))
    run(made, source, repeats=1, baselines=())
    (test,) = seen
    assert test.normalization == other != source.normalization
    assert torch.equal(test.images, source.test.images)
    # so a set scores the same, whatever statistics the source at hand was measured or loaded with
    monkeypatch.undo()
    assert values(run(made, source)) == values(run(made, source.normalized_by(other)))


# What comes out ----------------------------------------------------------------------------------------------


def test_the_random_images_themselves_gain_exactly_nothing(source):
    rng = Rng(9, job="repeat/0")
    index = source.per_class_indices(range(3), 2, rng.at("random real"))
    result = run(stored(source.gather(index), source.targets[index], source), source, repeats=1, seed=9)
    assert result.gain.values == (0.0,)


def test_pairing_holds_in_every_repeat(source):
    # all images of a class are alike, so the random row equals the set whatever it draws
    images = source.images[[0, 12, 24]].repeat_interleave(5, 0)
    alike = ImageSource(
        "alike", source.classes, images, torch.arange(3).repeat_interleave(5), open_test=lambda: source.test
    )
    result = run(synthesize(RandomReal(ipc=3), alike), alike, repeats=3)
    assert result.gain.values == (0.0, 0.0, 0.0)
    assert len(set(result.accuracy.values)) > 1  # networks differ between repeats


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(synthetic, source):
    first = values(run(synthetic, source, repeats=3))
    torch.rand(3)
    assert values(run(synthetic, source, repeats=3)) == first
    assert values(run(synthetic, source, repeats=3, seed=1)) != first
    shorter = values(run(synthetic, source, repeats=2, baselines=()))
    assert shorter["synthetic"] == first["synthetic"][:2]  # a repeat does not depend on the others, nor on rows


class Dropping(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_networks_that_draw_from_the_global_generator_are_seeded_too(synthetic, source, monkeypatch):
    monkeypatch.setattr(spec_module, "_registered", {"dropping": lambda shape, classes: Dropping()})
    protocol = replace(QUICK, network=NetworkSpec("dropping"))
    state = torch.get_rng_state()
    first = values(run(synthetic, source, protocol=protocol))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert values(run(synthetic, source, protocol=protocol)) == first


def test_learning_shows(source):
    """Three brightness levels are told apart after some epochs: the labels reach the loss the right way round."""
    protocol = replace(QUICK, epochs=40, augmentation=None)
    result = run(synthesize(RandomReal(ipc=10), source), source, protocol=protocol, baselines=("whole",))
    assert result.accuracy.mean > 0.9
    assert result.scores["whole"].mean > 0.9
    assert result.gain is None


def test_an_absurd_step_size_is_divergence_and_not_a_score(synthetic, source):
    with pytest.raises(
        Diverged, match="training of mlp, job 'repeat 0', iteration 3: a parameter is not finite"
    ) as caught:
        run(synthetic, source, protocol=replace(QUICK, lr=1e30))
    assert caught.value.exit_code == 4


# What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"repeats": 0}, InvalidSetting, "repeats = 0"),
        ({"repeats": 1.5}, InvalidSetting, "repeats = 1.5"),
        ({"repeats": None}, InvalidSetting, "repeats = None"),
        ({"whole_epochs": 0}, InvalidSetting, "whole_epochs = 0"),
        ({"whole_epochs": "3"}, InvalidSetting, "whole_epochs = '3'"),
        ({"baselines": ("randon",)}, UnknownName, "unknown baseline 'randon'; did you mean 'random'"),
        ({"protocol": "dsaa"}, UnknownName, "did you mean 'dsa'"),
        ({"device": "cuda:99"}, DeviceUnavailable, "cuda:99"),
        ({"seed": "0"}, InvalidSetting, "seed = '0'"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(options, error, message, synthetic, source, trained):
    with pytest.raises(error, match=message):
        run(synthetic, source, **options)
    assert not trained


def test_sets_of_other_tasks_are_refused(synthetic, source, trained):
    with pytest.raises(BadData, match=r"has classes 3 \(a, b, c\) but 'toy' has 3 \(red, green, blue\)"):
        run(replace(synthetic, classes=("a", "b", "c")), source)
    with pytest.raises(BadData, match="classes"):
        run(replace(synthetic, classes=("green", "red", "blue")), source)  # an order of its own
    with pytest.raises(BadData, match=r"images are \(3, 4, 4\), those of 'toy' are \(3, 8, 8\)"):
        run(stored(torch.zeros(3, 3, 4, 4), [0, 1, 2], source), source)
    grey = stored(torch.zeros(3, 1, 8, 8), [0, 1, 2], source, normalization=Normalization((0.5,), (0.5,)))
    with pytest.raises((BadData, ShapeMismatch)):
        run(grey, source)
    assert not trained


def test_a_set_made_from_other_images_is_scored_with_a_warning(synthetic, source, trained, caplog):
    run(synthetic, source)
    assert "fingerprints differ" not in caplog.text
    run(synthetic, source.subset(range(1, 36)))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "fingerprints differ" in record.getMessage()


def test_test_images_that_were_trained_on_are_noticed(synthetic, source, caplog):
    run(synthetic, source, repeats=1)
    assert not caplog.records
    leaky = ImageSource(
        "leaky",
        source.classes,
        source.images,
        source.targets,
        open_test=lambda: source.train_only().subset([0, 1, 12, 24]),
    )
    run(synthetic, leaky, repeats=1)
    assert "4 of the 4 test images of 'leaky' are also training images" in caplog.text


def test_a_source_without_test_split_is_refused(synthetic, source, trained):
    alone = ImageSource("alone", source.classes, source.images, source.targets)
    for closed in (alone, source.train_only()):
        with pytest.raises(BadData, match=r"no test split|closed"):
            run(synthetic, closed)
    assert not trained


def test_baselines_may_repeat_or_be_absent(synthetic, source):
    assert list(run(synthetic, source, repeats=1, baselines=["random", "random"]).scores) == ["synthetic", "random"]
    assert list(run(synthetic, source, repeats=1, baselines=[]).scores) == ["synthetic"]


# The result --------------------------------------------------------------------------------------------------


def made_by_hand(n=2, baselines=("random", "whole")):
    rows = ("synthetic", *baselines)
    scores = {"synthetic": (0.5, 0.6)[:n], "random": (0.4, 0.55)[:n], "whole": (0.9, 0.9)[:n]}
    return EvaluationResult(
        protocol=QUICK,
        scores={row: Score(scores[row]) for row in rows},
        seconds=dict.fromkeys(rows, 1.23456),
        images={row: {"whole": 36}.get(row, 6) for row in rows},
        epochs={row: {"whole": 2}.get(row, 3) for row in rows},
        lr={row: {"synthetic": 0.0312}.get(row, 0.05) for row in rows},
        confusion={row: torch.tensor([[3, 1], [0, 0]]) for row in rows},
        classes=("a", "b"),
        peak_memory=1000,
        seed=4,
        context={"versions": {"torch": "2"}},
    )


def test_the_table_reads_like_this():
    assert str(made_by_hand()) == (
        "training images     images  epochs  test accuracy %  95 % interval  n\n"
        "---------------------------------------------------------------------\n"
        "synthetic set            6       3            55.00        ± 63.53  2\n"
        "random real images       6       3            47.50        ± 95.30  2\n"
        "whole training set      36       2            90.00         ± 0.00  2\n"
        "synthetic - random, paired by seed: +7.50 ± 31.77 points\n"
        "protocol quick, mlp, fresh network and last epoch each time"
    )


def test_step_sizes_are_shown_where_rows_may_differ_in_them():
    result = made_by_hand()
    lines = str(replace(result, protocol=replace(QUICK, learned_lr=True))).splitlines()
    assert lines[0] == "training images     images  epochs  step size  test accuracy %  95 % interval  n"
    assert lines[2] == "synthetic set            6       3     0.0312            55.00        ± 63.53  2"
    assert lines[3] == "random real images       6       3       0.05            47.50        ± 95.30  2"
    assert "step size" not in str(result)


def test_one_repeat_claims_no_interval():
    text = str(made_by_hand(n=1))
    assert "±" not in text
    assert "nan" not in text
    assert "paired by seed: +10.00 points" in text
    assert "paired" not in str(made_by_hand(baselines=()))
    assert made_by_hand(baselines=()).gain is None


def test_the_json_has_every_field(synthetic, source):
    result = run(synthetic, source, baselines=("random", "whole"), whole_epochs=1, seed=6)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(content) == {
        "format", "schema_version", "protocol", "selection", "seed", "scores", "gain_over_random",
        "hard_gain_over_random", "images", "epochs", "lr", "classes", "per_class", "confusion", "seconds",
        "peak_memory_bytes", "synthetic", "source", "device", "teaching", "versions",
    }  # fmt: skip
    assert (content["format"], content["schema_version"], content["seed"]) == ("dsdistill.evaluation", 1, 6)
    assert content["protocol"]["type"] == "EvaluationProtocol"
    assert (content["protocol"]["name"], content["protocol"]["network"]["name"]) == ("quick", "mlp")
    assert content["scores"]["synthetic"] == result.accuracy.to_json()
    gain = paired_difference(result.scores["synthetic"].values, result.scores["random"].values)
    assert content["gain_over_random"] == gain.to_json() == result.gain.to_json()
    assert content["images"] == {"synthetic": 6, "random": 6, "whole": 36}
    assert content["epochs"] == {"synthetic": 3, "random": 3, "whole": 1}
    assert content["lr"] == {"synthetic": 0.05, "random": 0.05, "whole": 0.05}
    assert set(content["seconds"]) == {"synthetic", "random", "whole"}
    assert all(seconds > 0 for seconds in content["seconds"].values())
    assert content["peak_memory_bytes"] > 2**20
    assert content["classes"] == list(source.classes)
    assert content["confusion"]["whole"] == result.confusion["whole"].tolist()
    assert content["per_class"]["random"] == list(result.per_class("random").values())
    assert content["synthetic"]["method"]["type"] == "RandomReal"
    assert (content["synthetic"]["seed"], content["synthetic"]["ipc"]) == (3, 2)
    assert content["synthetic"]["bytes"] == {"images": 6 * 192 * 4, "labels": 24, "learned": 0}
    assert content["source"] == {"name": "toy", "fingerprint": source.fingerprint, "mirror_safe": True}
    assert (content["device"]["type"], content["device"]["threads"]) == ("cpu", torch.get_num_threads())
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    assert run(synthetic, source, repeats=1).to_json()["scores"]["random"]["std"] is None


def test_saving_is_atomic(tmp_path, monkeypatch):
    result = made_by_hand()
    path = result.save(str(tmp_path / "below" / "score.json"))
    assert json.loads(path.read_text()) == result.to_json()
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputConflict, match="exists already"):
        replace(result, seed=5).save(path)
    with pytest.raises(OutOfSpace, match="bytes are needed"):
        replace(result, seed=5).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["score.json"]


def test_a_bad_number_is_never_saved(tmp_path):
    result = replace(made_by_hand(), context={"versions": {"x": float("nan")}})
    with pytest.raises(ValueError, match="Out of range float"):
        result.save(tmp_path / "score.json")
    assert not list(tmp_path.iterdir())


# Classes -----------------------------------------------------------------------------------------------------


def test_confusion_counts_every_test_image_of_every_repeat(synthetic, source):
    result = run(synthetic, source, repeats=3)
    for row, table in result.confusion.items():
        assert table.sum(1).tolist() == [15, 15, 15]  # 5 test images of each class, 3 networks
        assert int(table.diagonal().sum()) / 45 == pytest.approx(result.scores[row].mean)
        shares = result.per_class(row)
        assert list(shares) == ["red", "green", "blue"]
        assert shares["green"] == int(table[1, 1]) / 15


def test_a_class_without_test_images_has_no_accuracy():
    result = made_by_hand()
    assert result.per_class()["a"] == 0.75
    assert math.isnan(result.per_class()["b"])
    assert result.to_json()["per_class"]["synthetic"] == [0.75, None]
    many = replace(
        result, classes=tuple(map(str, range(201))), confusion={row: torch.eye(201) for row in result.scores}
    )
    assert many.to_json()["confusion"] is None


# Selection ---------------------------------------------------------------------------------------------------


def test_selection_holds_real_images_out_and_takes_the_best_of_its_checks(synthetic, source, monkeypatch):
    protocol = replace(QUICK, selection="validation", validation_fraction=0.25, validation_checks=3, epochs=7)
    seen, real_confusion = [], scorer_module.confusion

    def spy(network, images, *, chunk):
        seen.append((images, {name: tensor.clone() for name, tensor in network.state_dict().items()}))
        return real_confusion(network, images, chunk=chunk)

    monkeypatch.setattr(scorer_module, "confusion", spy)
    result = run(synthetic, source, protocol=protocol, repeats=1, baselines=("random", "whole"))
    assert result.images == {"synthetic": 6, "random": 6, "whole": 27}
    assert len(seen) == 3 * (3 + 1)
    for row in range(3):
        *checks, (test, tested) = seen[4 * row : 4 * row + 4]
        assert [len(images) for images, _ in checks] == [9, 9, 9]
        assert len(test) == 15
        reached = []
        for held, state in checks:
            network = QUICK.network.build((3, 8, 8), 3, generator=torch.Generator(), device="cpu")
            network.load_state_dict(state)
            reached.append(scorer_module.accuracy(real_confusion(network, held, chunk=100)))
        best = max(position for position in range(3) if reached[position] == max(reached))
        assert all(torch.equal(tested[name], checks[best][1][name]) for name in tested)
    assert "held out" in result.to_json()["selection"]
    assert "held-out training images" in str(result)


def test_held_out_images_are_never_trained_on(synthetic, source, trained):
    protocol = replace(QUICK, selection="validation", validation_fraction=0.25)
    with pytest.raises(RuntimeError):  # the spy trains nothing, so no state was kept
        run(synthetic, source, protocol=protocol, repeats=1, baselines=("random", "whole"))
    scorer = scorer_module.Scorer(protocol, synthetic, source, 0, torch.device("cpu"))
    kept, held = ({image.numpy().tobytes() for image in part.images} for part in (scorer.real, scorer.held))
    assert (len(kept), len(held)) == (27, 9)
    assert not kept & held


# Several at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [2, 3, 5])
def test_networks_trained_together_score_as_one_by_one(together, synthetic, source):
    alone = run(synthetic, source, repeats=5, baselines=("random", "whole"), whole_epochs=2)
    stacked = run(synthetic, source, repeats=5, baselines=("random", "whole"), whole_epochs=2, together=together)
    assert values(stacked) == values(alone)
    assert stacked.images == alone.images
    assert all(torch.equal(stacked.confusion[row], alone.confusion[row]) for row in alone.scores)
    assert stacked.to_json()["device"]["together"] == together


def test_what_cannot_be_trained_together_is_refused(synthetic, source, monkeypatch):
    monkeypatch.setattr(spec_module, "_registered", {"dropping": lambda shape, classes: Dropping()})
    with pytest.raises(InvalidSetting, match=r"together = 2.*dropout"):
        run(synthetic, source, protocol=replace(QUICK, network=NetworkSpec("dropping")), together=2)
    batch = replace(QUICK, network=NetworkSpec(width=4, depth=1, norm="batch"))
    with pytest.raises(InvalidSetting, match="batch normalisation are trained one by one"):
        run(synthetic, source, protocol=batch, together=2)
    with pytest.raises(InvalidSetting, match=r"together = 2.*validation"):
        run(synthetic, source, protocol=replace(QUICK, selection="validation"), together=2)
    with pytest.raises(InvalidSetting, match="together = 0"):
        run(synthetic, source, together=0)


# Learned step sizes ------------------------------------------------------------------------------------------

LEARNED = replace(QUICK, learned_lr=True)


@pytest.mark.parametrize("stored_as", [torch.tensor(0.03125), torch.tensor([[0.03125]], dtype=torch.float64)])
def test_a_learned_step_size_is_that_of_the_set_alone(stored_as, synthetic, source, trained, caplog):
    carrying = replace(synthetic, learned={"lr": stored_as})
    result = run(carrying, source, protocol=LEARNED, baselines=("random", "whole"))
    assert [record[3].lr for record in trained] == [0.03125, 0.05, 0.05] * 2
    assert result.lr == result.to_json()["lr"] == {"synthetic": 0.03125, "random": 0.05, "whole": 0.05}
    assert result.protocol.lr == 0.05
    assert not caplog.records


@pytest.mark.parametrize("together", [1, 2])
def test_a_learned_step_size_trains_as_a_given_one_does(together, synthetic, source):
    carrying = replace(synthetic, learned={"lr": torch.tensor(0.5)})
    learned = run(carrying, source, protocol=LEARNED, together=together)
    given = run(synthetic, source, protocol=replace(QUICK, lr=0.5), together=together)
    kept = run(synthetic, source, together=together)
    assert torch.equal(learned.confusion["synthetic"], given.confusion["synthetic"])
    assert not torch.equal(learned.confusion["synthetic"], kept.confusion["synthetic"])
    assert torch.equal(learned.confusion["random"], kept.confusion["random"])


def test_a_set_without_a_step_size_is_trained_with_that_of_the_protocol(synthetic, source, caplog):
    result = run(synthetic, source, protocol=LEARNED)
    assert values(result) == values(run(synthetic, source))
    assert set(result.lr.values()) == {0.05}
    assert not caplog.records


def test_a_learned_step_size_that_is_not_used_is_said_to_be(synthetic, source, caplog):
    result = run(replace(synthetic, learned={"lr": torch.tensor(0.03)}), source, repeats=1)
    assert "learned step size (0.03), which protocol quick does not use" in caplog.text
    assert result.lr["synthetic"] == 0.05
    run(replace(synthetic, learned={"lr": torch.tensor([-0.5, 0.25])}), source, repeats=1)
    assert "learned step size (-0.5, 0.25), which" in caplog.text


@pytest.mark.parametrize("bad", [0.0, -0.5, torch.inf, torch.nan, [0.25, 0.5], []])
def test_a_learned_step_size_that_no_network_can_use_is_refused(bad, synthetic, source, trained):
    carrying = replace(synthetic, learned={"lr": torch.tensor(bad)})
    with pytest.raises(BadData, match=r"learned step size .*positive, finite.*learned_lr=False") as caught:
        run(carrying, source, protocol=LEARNED)
    assert str(bad) in str(caught.value)
    assert not trained


# Memory ------------------------------------------------------------------------------------------------------


def test_training_that_runs_out_of_memory_starts_again_with_smaller_chunks(synthetic, source, monkeypatch, caplog):
    plain, real_train, chunks = run(synthetic, source), scorer_module.train, []

    def hungry(*arguments, chunk, **options):
        chunks.append(chunk)
        if chunk > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real_train(*arguments, chunk=chunk, **options)

    monkeypatch.setattr(scorer_module, "train", hungry)
    result = run(synthetic, source)
    assert values(result) == values(plain)
    assert chunks == [512, 256, 128, 64, 64, 64, 64]
    assert "128 images pass" in caplog.text
    assert result.to_json()["device"]["chunk"] == 64


def test_smaller_chunks_are_not_tried_where_a_batch_passes_whole(synthetic, source, monkeypatch):
    calls = []

    def hungry(*_, **__):
        calls.append(1)
        raise MemoryError("it is too much")

    monkeypatch.setattr(scorer_module, "train", hungry)
    batch = replace(QUICK, network=NetworkSpec(width=4, depth=1, norm="batch"))
    with pytest.raises(OutOfMemory, match="with 4 images at a time"):
        run(synthetic, source, protocol=batch)
    assert len(calls) == 1


def test_no_chunk_is_small_enough(synthetic, source, monkeypatch):
    def hungry(*_, **__):
        raise MemoryError("it is too much")

    monkeypatch.setattr(scorer_module, "train", hungry)
    with pytest.raises(OutOfMemory, match=r"with 1 images at a time \(it is too much\).*batch_size or network"):
        run(synthetic, source)
    monkeypatch.setattr(scorer_module, "train_together", hungry)
    with pytest.raises(OutOfMemory, match="Lower together"):
        run(synthetic, source, together=2)


# Across networks ---------------------------------------------------------------------------------------------


def test_a_table_across_networks(synthetic, source):
    wide = NetworkSpec(width=4, depth=1)
    across = evaluate_across(synthetic, source, ["mlp", wide], protocol=QUICK, repeats=2, device="cpu", progress=False)
    assert [spec.name for spec in across.results] == ["mlp", "convnet"]
    direct = run(synthetic, source, protocol=replace(QUICK, network=wide))
    assert values(across.results[wide]) == values(direct)
    lines = str(across).splitlines()
    assert lines[0].split("  ")[0] == "network"
    assert [line.split("  ")[0] for line in lines[2:4]] == ["mlp", "convnet width=4 depth=1"]
    assert f"{100 * direct.accuracy.mean:.2f}" in lines[3]
    assert json.loads(json.dumps(across.to_json()))["results"][1]["protocol"]["network"]["width"] == 4


@pytest.mark.parametrize(
    "networks", [[], ["mlp", "mlp"], ["mlp", NetworkSpec(depth=7)]], ids=["none", "twice", "unfit"]
)
def test_networks_that_do_not_fit_are_refused_before_any_training(networks, synthetic, source, trained):
    with pytest.raises(InvalidSetting):
        evaluate_across(synthetic, source, networks, protocol=QUICK, progress=False)
    assert not trained


def test_every_network_is_tried_before_any_is_trained(synthetic, source, trained, monkeypatch):
    def failing(shape, classes):
        raise RuntimeError("my own bug")

    monkeypatch.setattr(spec_module, "_registered", {"failing": failing})
    with pytest.raises(InvalidSetting, match=r"failing.*RuntimeError: my own bug"):
        evaluate_across(synthetic, source, ["mlp", "failing"], protocol=QUICK, progress=False)
    assert not trained


@pytest.mark.parametrize(("name", "arguments"), [("synthetic", ("runs/dm", None)), ("source", (None, "digits"))])
def test_arguments_of_another_type_are_told_what_to_be(name, arguments, synthetic, source):
    given = [
        value if value is not None else default for value, default in zip(arguments, (synthetic, source), strict=True)
    ]
    with pytest.raises(InvalidSetting, match=rf"{name} = .*(load)"):
        evaluate(*given)


def test_random_images_take_the_pixels_that_the_set_stores(source):
    from dsdistill.evaluation.scorer import affordable
    from dsdistill.methods import IDC, INFER
    from dsdistill.parameterizations import Tiled

    made = synthesize(INFER(ipc=4, compensators=0), source)
    assert affordable(made) == made.counts == (4, 4, 4)
    tiled = synthesize(IDC(ipc=2, form=Tiled(factor=2), iterations=1, inner_steps=1, trained_on=8), source)
    assert affordable(tiled) == (2, 2, 2)


def test_pixels_that_classes_share_are_paid_for_by_random_images_too():
    from dsdistill.evaluation.scorer import affordable
    from dsdistill.parameterizations import Compensated

    anchors, shared = torch.randn(6, 1, 4, 4), torch.zeros(2, 4, 1, 4, 4)
    form = Compensated(anchors, shared, torch.tensor([0, 0, 0, 1, 1, 1]), low=(-9.0,), high=(9.0,))
    made = SyntheticDataset.from_tensors(
        anchors, torch.tensor([0, 1, 2] * 2), normalization=Normalization((0.0,), (1.0,)), classes="abc"
    )
    # 6 anchors and 8 compensators: 14 images for 3 classes.
    assert affordable(replace(made, images=form)) == (5, 5, 5)
