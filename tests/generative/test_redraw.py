"""Images that are drawn again: against an obvious loop, one image and one try at a time."""

import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained
from methods.cases import CASES
from torch import nn

from dsdistill import SyntheticDataset, estimate, synthesize
from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared
from dsdistill.errors import BadArtifact, BadData, InvalidSetting, Stopped
from dsdistill.experts import Committee, Teachers
from dsdistill.generative import Redraw, growing
from dsdistill.generative.sampling import drawn, noise_numbers
from dsdistill.methods import Diffusion, Minimax
from dsdistill.testing import check_synthesizer, toy_source

CPU = torch.device("cpu")
DRAWING = ("Diffusion", "D4M", "MGD3", "EVLF", "Minimax")
LEAST = 1e-30
"""A probability that every image reaches."""


@pytest.fixture(autouse=True)
def smaller_models(monkeypatch):
    monkeypatch.setitem(growing.SIZES, "nano", replace(growing.SIZES["nano"], layers=1, heads=2, width=16))


@pytest.fixture(scope="module")
def source():
    return toy_source(classes=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def teachers(source, tmp_path_factory):
    """Two in a folder."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate("ab"):
        untrained(source, SPECS[2], seed, name=name).save(folder / name)
    return Teachers(folder=str(folder))


def made(method, source, store, **options):
    return synthesize(method, source, device="cpu", store=store, progress=False, **options)


def run_of(source, store=None, chunk=100):
    return Run(source.train_only(), CPU, Rng(0), (0, 1, 2), chunk, shared=Shared(), store=store)


def every_draw(method, run, tries):
    """Images (N, tries, C, H, W) of a set, each drawn by itself, and their probabilities (N, tries)."""
    committee, images, said = Committee.load(method.redraw.teachers.folder), [], []
    for label in range(run.source.num_classes):
        for place in range(method.ipc):
            for turn in range(tries):
                image = method.images(run, torch.tensor([label]), torch.tensor([place]), turn)
                images.append(image[0])
                own = [float(teacher.network(image).softmax(1)[0, label]) for teacher in committee]
                said.append(sum(own) / len(own))
    return torch.stack(images).unflatten(0, (-1, tries)), torch.tensor(said).view(-1, tries)


def between(said):
    """A probability that some reach at once, some later and some never, so far from all that rounding does not decide.

    Args:
        said: (N, tries).
    """
    values = said.flatten().sort().values
    for level, gap in zip((values[1:] + values[:-1]) / 2, values.diff(), strict=True):
        reached = said >= level
        never, later = ~reached.any(1), reached.any(1) & ~reached[:, 0]
        if gap > 1e-4 and reached[:, 0].any() and later.any() and never.any():
            return float(level)
    raise AssertionError("no such probability: take another seed")


# What is drawn -------------------------------------------------------------------------------------------------------


def test_without_it_each_image_is_what_its_noise_makes(source, store):
    method, run = CASES["Diffusion"], run_of(source, store)
    model, rng = method.model(run), Rng(0).within("draw")
    shape = (noise_numbers(method.sampler), *model.autoencoder.latent)
    classes, places = (0, 0, 1, 1), (0, 1, 0, 1)  # of the first job
    streams = [
        rng.within(f"class {source.classes[label]}").at("image", place)
        for label, place in zip(classes, places, strict=True)
    ]
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams], 1)
    expected = model.decoded(drawn(model.denoiser, torch.tensor(classes), noise, method.sampler))
    assert torch.equal(made(method, source, store).tensors()[0][:4], expected)


@pytest.mark.parametrize("name", DRAWING)
def test_images_that_are_good_enough_are_not_drawn_again(name, source, store, teachers):
    plain = made(CASES[name], source, store)
    found = made(replace(CASES[name], redraw=Redraw(teachers=teachers, confidence=LEAST)), source, store)
    assert torch.equal(found.tensors()[0], plain.tensors()[0])
    assert "2 of 2 images of class 2 reach" in found.recipe.notes[-1]


@pytest.mark.parametrize("name", DRAWING)
def test_of_draws_that_are_all_too_bad_the_best_one_is_kept(name, source, store, teachers):
    method = replace(CASES[name], redraw=Redraw(teachers=teachers, confidence=1.0, tries=3))
    draws, said = every_draw(method, run_of(source, store), 3)
    best = said.argmax(1)
    assert len(set(best.tolist())) > 1
    images = made(method, source, store).tensors()[0]
    torch.testing.assert_close(images, draws[torch.arange(len(best)), best], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Diffusion", "Minimax"])
def test_the_first_draw_that_is_good_enough_is_kept_whatever_passes_with_it(name, source, store, teachers):
    method = replace(CASES[name], ipc=4, redraw=Redraw(teachers=teachers, tries=3))
    draws, said = every_draw(method, run_of(source, store), 3)
    least = between(said)
    method = replace(method, redraw=replace(method.redraw, confidence=least))
    reached = said >= least
    place = torch.where(reached.any(1), reached.int().argmax(1), said.argmax(1))
    assert not torch.equal(place, said.argmax(1))
    expected = draws[torch.arange(len(place)), place]
    images, classes = made(method, source, store).tensors()
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    for other in (
        made(replace(method, classes_together=1), source, store, chunk=1),
        made(replace(method, classes_together=3), source, store, chunk=5),
    ):
        torch.testing.assert_close(other.tensors()[0], expected, rtol=1e-4, atol=1e-4)
    few, of_few = made(replace(method, ipc=2), source, store).tensors()
    for label in range(3):
        torch.testing.assert_close(few[of_few == label], images[classes == label][:2], rtol=1e-4, atol=1e-4)


class Says(nn.Module):
    """Of an image of one pixel p the logits p · slope, 0: of its class, and of the other."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, images):
        return torch.stack([images.flatten() * self.slope, torch.zeros(len(images))], 1)


def test_by_hand(monkeypatch):
    """Of the teachers one doubts more: 2 gives softmax 0.881 and 0.731, on average 0.806; their mean logits 0.818."""
    source = toy_source(classes=2, shape=(1, 1, 1))
    members = [untrained(source, network=Says(slope), name=str(slope)) for slope in (1.0, 0.5)]
    monkeypatch.setattr(Committee, "of", lambda run, teachers: Committee(members))
    run = replace(run_of(source, chunk=2), classes=(0,))
    pixels = torch.tensor([[2.0, 9.0, 9.0], [1.0, 2.0, 9.0], [1.5, 0.0, 1.6], [1.9, 1.8, -9.0], [2.1, 0.0, 0.0]])
    drawn = []

    def draw(rows, turn):
        drawn.append((turn, rows.tolist()))
        return pixels[rows, turn].view(-1, 1, 1, 1)

    redraw, classes = Redraw(confidence=0.805, tries=3), torch.zeros(5, dtype=torch.int64)
    images = redraw.chosen(run, classes, draw)
    assert images.flatten().tolist() == pytest.approx([2.0, 2.0, 1.6, 1.9, 2.1])
    assert drawn == [(0, [0, 1, 2, 3, 4]), (1, [1, 2, 3]), (2, [2, 3])]
    said = redraw.probabilities(run, pixels[:1, 0].view(1, 1, 1, 1), classes[:1])
    assert float(said) == pytest.approx((0.880797 + 0.731059) / 2, abs=1e-6)
    other = redraw.probabilities(run, pixels[:1, 0].view(1, 1, 1, 1), classes[:1] + 1)
    assert float(other) == pytest.approx(1 - float(said), abs=1e-6)
    drawn.clear()
    replace(redraw, confidence=0.81).chosen(run, classes, draw)
    assert drawn[1] == (1, [0, 1, 2, 3])  # more than the mean probability of the first, less than of its mean logits


# What is said --------------------------------------------------------------------------------------------------------


def test_notes_count_the_images_that_are_in_the_set(source, store, teachers):
    method = replace(CASES["Diffusion"], ipc=4, redraw=Redraw(teachers=teachers, tries=3))
    least = between(every_draw(method, run_of(source, store), 3)[1])
    found = made(replace(method, redraw=replace(method.redraw, confidence=least)), source, store)
    images, classes = found.tensors()
    committee = Committee.load(teachers.folder)
    said = torch.stack([teacher.network(images).softmax(1) for teacher in committee]).mean(0)
    reached = said[torch.arange(len(images)), classes] >= least
    rule, *counts = found.recipe.notes[-3:]
    assert f"drawn up to 3 times, until its class had a mean probability of {least} for a (" in rule
    assert f"and b ({committee[1].digest[:16]})" in rule
    told = [re.match(r"(\d+) of (\d+) images of (class(?:es)? [0-2](?: to [0-2])?) reach", note) for note in counts]
    assert [one[3] for one in told] == ["classes 0 to 1", "class 2"]
    assert [int(one[2]) for one in told] == [8, 4]
    assert [int(one[1]) for one in told] == [int(reached[:8].sum()), int(reached[8:].sum())]
    assert 0 < int(reached.sum()) < 12


def test_the_log_says_it_too(source, store, teachers, caplog):
    method = replace(CASES["Diffusion"], redraw=Redraw(teachers=teachers, confidence=LEAST))
    with caplog.at_level("INFO", "dsdistill"):
        estimate(method, source, device="cpu", store=store)
        assert "drawn up to" not in caplog.text  # of a rehearsal
        notes = made(method, source, store).recipe.notes
    assert all(note in caplog.text for note in notes[-2:])


# What is refused, interrupted and estimated --------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*given):
        raise AssertionError("a model is trained")

    monkeypatch.setattr(growing, "repeated", refuse)


def test_teachers_that_are_not_there_are_missed_at_once(source, tmp_path, no_training):
    method = replace(CASES["Diffusion"], redraw=Redraw(teachers=Teachers(folder=str(tmp_path / "nothing"))))
    with pytest.raises(BadArtifact, match="holds no teacher"):
        made(method, source, tmp_path / "store", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", DRAWING)
def test_teachers_of_other_classes_are_refused_before_a_model_is_trained(name, tmp_path, no_training):
    untrained(toy_source(classes=4)).save(tmp_path / "teacher")
    method = replace(CASES[name], redraw=Redraw(teachers=Teachers(folder=str(tmp_path / "teacher"))))
    with pytest.raises(BadData, match="was trained on other classes"):
        made(method, toy_source(classes=3), tmp_path / "store")


def test_a_single_class_is_refused(tmp_path, no_training):
    with pytest.raises(BadData, match="teachers tell classes apart"):
        made(replace(CASES["Diffusion"], redraw=Redraw()), toy_source(classes=1), tmp_path)


@pytest.mark.parametrize("wrong", [{"confidence": 0.0}, {"confidence": 1.1}, {"tries": 1}, {"teachers": None}])
def test_settings_out_of_range(wrong):
    with pytest.raises(InvalidSetting):
        Redraw(**wrong)


def test_it_keeps_the_contract():
    trained = CASES["SRe2L"].teachers
    method = replace(CASES["Diffusion"], redraw=Redraw(teachers=trained, confidence=0.6, tries=2))
    assert len(check_synthesizer(method)) == 9


@pytest.mark.parametrize("stopped", [2, 5])  # between tries of the first job, and in the second one
def test_an_interrupted_run_makes_the_same_set(stopped, source, store, teachers, tmp_path, monkeypatch):
    method = replace(CASES["Diffusion"], redraw=Redraw(teachers=teachers, confidence=1.0, tries=3))
    whole = made(method, source, store)
    images, calls = Diffusion.images, []

    def stopping(*given):
        calls.append(given[-1])
        if len(calls) == stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return images(*given)

    monkeypatch.setattr(Diffusion, "images", stopping)
    with pytest.raises(Stopped):
        made(method, source, store, out=tmp_path / "out")
    made(method, source, store, out=tmp_path / "out")
    assert calls == {2: [0, 1, 0, 1, 2, 0, 1, 2], 5: [0, 1, 2, 0, 1, 0, 1, 2]}[stopped]
    found = SyntheticDataset.load(tmp_path / "out")
    assert torch.equal(found.tensors()[0], whole.tensors()[0])
    assert found.recipe.notes == whole.recipe.notes


def test_an_estimate_is_of_the_worst_case(source, tmp_path, monkeypatch):
    images, turns = Minimax.images, []

    def counted(*given):
        turns.append((given[-1], len(given[2])))
        return images(*given)

    monkeypatch.setattr(Minimax, "images", counted)
    redraw = Redraw(teachers=CASES["SRe2L"].teachers, confidence=LEAST, tries=2)
    few = estimate(replace(CASES["Minimax"], redraw=redraw), source, device="cpu", store=tmp_path)
    assert turns == 2 * [(0, 4), (1, 4)]  # rehearsed twice, the first job alone
    many = estimate(
        replace(CASES["Minimax"], redraw=replace(redraw, tries=10**6)), source, device="cpu", store=tmp_path
    )
    assert many.seconds > few.seconds + 10**6 * 0.001
    assert not list(tmp_path.iterdir())
