"""Teachers are trained once, continue where they were interrupted, and are the plain training loop's."""

from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS

from dsdistill.augmentations import PadCrop, ResizedCrop
from dsdistill.core.rng import Rng
from dsdistill.engine import Rehearsal, Run, Shared
from dsdistill.errors import BadArtifact, BadData, InvalidSetting, OutputConflict, Stopped
from dsdistill.experts import (
    RECIPES,
    Committee,
    Teachers,
    import_teacher,
    schooled,
    teacher_name,
    teacher_spec,
    train_teachers,
)
from dsdistill.experts import schooling as module
from dsdistill.networks import NetworkSpec
from dsdistill.testing import toy_source
from dsdistill.training import TrainingRecipe, TrainingSet, train

RECIPE = TrainingRecipe(epochs=3, batch_size=12, lr=0.1, schedule="cosine")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return toy_source()


def run_of(source, store=None, seed=0, **shared):
    return Run(source.train_only(), CPU, Rng(seed), (0, 1, 2), 1000, shared=Shared(**shared), store=store)


def test_a_teacher_is_what_the_training_loop_makes(source):
    teacher = schooled(run_of(source), SPECS[0], RECIPE, seed=5)
    rng = Rng(5).within("teacher")
    network = SPECS[0].build(source.shape, 3, generator=rng.at("network"), device="cpu")
    data = TrainingSet(
        lambda rows: (source.gather(rows), source.targets[rows]), len(source), source.shape, source.device
    )
    train(network, data, RECIPE, rng, num_classes=3, mirror_safe=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, teacher.network.state_dict()[name]), name
    assert teacher.accuracy > 0.6
    assert (teacher.name, teacher.classes, teacher.history["source"]) == (
        "convnet-width4-depth1",
        source.classes,
        "toy",
    )


def test_runs_of_any_seed_find_it(source, tmp_path, monkeypatch):
    made = schooled(run_of(source, tmp_path), SPECS[0], RECIPE)
    monkeypatch.setattr(module, "train_on_real", None)
    assert schooled(run_of(source, tmp_path, seed=1), SPECS[0], RECIPE).digest == made.digest
    with pytest.raises(TypeError):
        schooled(run_of(source, tmp_path), SPECS[0], replace(RECIPE, lr=0.2))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_training_continues_to_the_same_bits(optimizer, source, tmp_path):
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.01)
    whole = schooled(run_of(source), SPECS[0], recipe)
    calls = []

    def give_way():
        calls.append(0)
        if len(calls) == 3:  # the lock, the first epoch, the second
            raise Stopped(15, 0, tmp_path)

    with pytest.raises(Stopped, match=f"after whole epochs of the teacher convnet-width4-depth1, kept in {tmp_path}"):
        schooled(run_of(source, tmp_path, give_way=give_way), SPECS[0], recipe)
    kept = list(tmp_path.glob("teachers/*/progress/epoch-*.safetensors"))
    assert [file.name for file in kept] == ["epoch-00002.safetensors"]
    assert schooled(run_of(source, tmp_path), SPECS[0], recipe).digest == whole.digest
    assert not list(tmp_path.glob("teachers/*/progress"))


def test_damaged_progress_begins_anew(source, tmp_path, caplog):
    folder = tmp_path / "one"
    (folder / "progress").mkdir(parents=True)
    (folder / "progress" / "progress.json").write_text("{}")
    made = schooled(run_of(source), SPECS[0], RECIPE, 0, folder)
    assert "begins anew" in caplog.text
    assert made.digest == schooled(run_of(source), SPECS[0], RECIPE).digest


def test_a_folder_with_another_teacher_is_left_alone(source, tmp_path):
    schooled(run_of(source), SPECS[0], RECIPE, 0, tmp_path)
    with pytest.raises(OutputConflict, match="of other images or another training"):
        schooled(run_of(source), SPECS[0], RECIPE, 1, tmp_path)


def test_a_rehearsal_writes_nothing_and_counts(source, tmp_path):
    rehearsal = Rehearsal()
    schooled(run_of(source, tmp_path, rehearsal=rehearsal), SPECS[0], replace(RECIPE, epochs=50))
    assert rehearsal.seconds > 0
    assert rehearsal.stored > 0
    assert not list(tmp_path.iterdir())


def test_a_network_without_batch_normalisation_is_refused(source):
    with pytest.raises(InvalidSetting, match="a teacher needs batch normalisation"):
        schooled(run_of(source), NetworkSpec(width=4, depth=1), RECIPE)


def test_a_diverging_teacher_is_refused_and_not_kept(source, tmp_path):
    with pytest.raises(InvalidSetting, match="diverged: lower it"):
        schooled(run_of(source, tmp_path), SPECS[0], replace(RECIPE, lr=1e30))
    assert not list(tmp_path.glob("teachers/*/teacher.json"))


def test_a_committee_of_a_run_is_made_once(source, tmp_path):
    run = run_of(source, tmp_path)
    teachers = Teachers(networks=SPECS[:2], training=RECIPE)
    made = Committee.of(run, teachers)
    assert Committee.of(run, teachers) is made
    assert [one.spec for one in made] == list(SPECS[:2])
    folder = tmp_path / "teachers"
    loaded = Committee.of(run, Teachers(folder=str(folder)))
    assert {one.digest for one in loaded} == {one.digest for one in made}


def test_recipes_are_those_of_the_authors():
    told = {
        "sre2l_cifar": ("sgd", 200, 128, 0.1, 5e-4, 0, PadCrop()),
        "sre2l_tiny": ("sgd", 50, 256, 0.2, 1e-4, 5, ResizedCrop()),
        "cvdd_cifar": ("adam", 200, 512, 1e-3, 1e-4, 0, PadCrop()),
        "cvdd_tiny": ("sgd", 50, 128, 0.01, 1e-4, 0, PadCrop()),
        "cvdd_imagenette": ("sgd", 300, 64, 0.01, 1e-4, 0, ResizedCrop()),
    }
    fields = ("optimizer", "epochs", "batch_size", "lr", "weight_decay", "warmup", "augmentation")
    assert {name: tuple(getattr(one, field) for field in fields) for name, one in RECIPES.items()} == told
    assert all((one.schedule, one.momentum, one.slowdown) == ("cosine", 0.9, 1.0) for one in RECIPES.values())
    assert RECIPES["sre2l_tiny"].warmup_start == 0.01
    assert Teachers().training == RECIPES["sre2l_cifar"]


def test_teachers_ahead_are_in_folders_by_name_and_found_again(source, tmp_path, monkeypatch):
    made = train_teachers(source, SPECS[:2], tmp_path, RECIPE, device="cpu")
    names = ["convnet-width4-depth1", "convnet-width6-depth1"]
    assert sorted(place.name for place in tmp_path.iterdir()) == ["committee.json", *names]
    monkeypatch.setattr(module, "train_on_real", None)
    assert [one.digest for one in train_teachers(source, SPECS[:2], tmp_path, RECIPE, device="cpu")] == [
        one.digest for one in made
    ]


def test_networks_are_looked_at_before_any_is_trained(source, tmp_path):
    with pytest.raises(InvalidSetting, match="'convnet' is not valid: a teacher needs batch normalisation"):
        train_teachers(source, [SPECS[0], NetworkSpec(width=5, depth=1)], tmp_path, RECIPE, device="cpu")
    assert not list(tmp_path.iterdir())


def test_imported_weights_are_tried_on_the_images(source, tmp_path):
    made = schooled(run_of(source), SPECS[0], RECIPE)
    made.save(tmp_path / "made")
    taken = import_teacher(SPECS[0], tmp_path / "made" / "weights.safetensors", source, device="cpu")
    assert (taken.digest, taken.accuracy) == (made.digest, made.accuracy)
    weights = dict(made.network.state_dict())
    order = torch.tensor([1, 2, 0])
    shuffled = weights | {name: weights[name][order] for name in ("classifier.weight", "classifier.bias")}
    with pytest.raises(BadData, match="the classes in another order"):
        import_teacher(SPECS[0], shuffled, source, device="cpu")
    (tmp_path / "pickled.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(BadArtifact, match="pickled files are never read"):
        import_teacher(SPECS[0], tmp_path / "pickled.pt", source, device="cpu")


def test_names_and_networks_of_teachers():
    assert teacher_spec("convnet", (3, 32, 32)) == NetworkSpec("convnet", norm="batch")
    small = teacher_spec("torchvision:resnet50", (3, 64, 64))
    assert small == NetworkSpec("torchvision:resnet50", stem="small")
    assert teacher_spec("torchvision:resnet50", (3, 224, 224)).stem is None
    assert teacher_name(small) == "torchvision-resnet50"
    assert teacher_name(NetworkSpec("convnet", norm="batch", width=32)) == "convnet-width32"
