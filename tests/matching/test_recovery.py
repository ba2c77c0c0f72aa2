"""Recovery against the authors' loop written with hooks, one problem at a time."""

import math
from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained
from torch import nn
from torch.nn.functional import cross_entropy

from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared, synthesize
from dsdistill.engine.run import Execution
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import RECIPES, Committee, Teachers
from dsdistill.matching import recovery
from dsdistill.matching.fitting import usual_shift
from dsdistill.matching.patches import middling_mosaics
from dsdistill.matching.recovery import Problem, into_range, key_of, rng_of
from dsdistill.methods import CDA, CVDD, FYI, SRe2L
from dsdistill.objectives import total_variation
from dsdistill.parameterizations import Pixels
from dsdistill.testing import toy_source

CPU = torch.device("cpu")
SMALL = SRe2L(ipc=2, iterations=6, lr_images=0.1, statistics_weight=0.3, classes_together=3, shift=2)


@pytest.fixture(scope="module")
def source():
    return toy_source(classes=4)


@pytest.fixture
def committee(source, monkeypatch):
    """What every run finds, in place of trained teachers."""
    members = [untrained(source, spec, seed, performance=60.0 + 4 * seed) for seed, spec in enumerate(SPECS)]
    made = Committee(members)
    monkeypatch.setattr(
        Committee, "of", lambda run, teachers: made if len(teachers.networks) > 1 else Committee([made[0]])
    )
    return made


THREE = Teachers(networks=SPECS)


def run_of(source, seed=0):
    return Run(source.train_only(), CPU, Rng(seed), tuple(range(source.num_classes)), 1000, shared=Shared())


def made(method, source, seed=0):
    return Execution(method, run_of(source, seed))()


def distances(network, images):
    """Logits and r of each layer, by hooks."""
    found = []

    def hook(module, arguments, result):
        maps = arguments[0].transpose(0, 1).flatten(1)
        found.append(
            (maps.var(1, unbiased=False) - module.running_var).norm() + (maps.mean(1) - module.running_mean).norm()
        )

    handles = [part.register_forward_hook(hook) for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return logits, found


def by_hand(method, source, voters, problem, run):
    """The images of a problem after all steps, as the papers have it."""
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (source.normalization.mean, source.normalization.std))
    rng, classes = rng_of(run, problem), torch.tensor(problem.classes)
    images = torch.randn((len(classes), *source.shape), generator=rng.at("init")).requires_grad_()
    optimizer = torch.optim.Adam([images], betas=(0.5, 0.9))
    for step in range(method.iterations):
        optimizer.param_groups[0]["lr"] = 0.5 * method.lr_images * (1 + math.cos(math.pi * step / method.iterations))
        views = method.views(run, step)
        shown = views.apply(images, views.sample(1, source.shape, rng.at("views", step)))
        loss = method.total_variation * total_variation(images) + method.l2 * images.flatten(1).norm(dim=1).mean()
        for network, weight in voters:
            logits, found = distances(network, shown)
            statistics = sum((method.first_layer if n == 0 else 1) * one for n, one in enumerate(found))
            loss = loss + weight * (cross_entropy(logits, classes) + method.statistics_weight * statistics)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images.data = ((images.data * std + mean).clamp(0, 1) - mean) / std
    return images.detach()


@pytest.mark.parametrize(
    "changes",
    [{}, {"crop": False}, {"total_variation": 1e-3, "l2": 0.1}, {"problems_together": 3}, {"first_layer": 3.0}],
    ids=str,
)
def test_images_are_those_of_the_authors_loop(changes, source, committee):
    method, run = replace(SMALL, **changes), run_of(source)
    found = made(method, source)
    images, targets = found.tensors()
    voters = [(committee[0].network, 1.0)]
    for index in range(2):
        for classes in ((0, 1, 2), (3,)):
            expected = by_hand(method, source, voters, Problem(index, classes), run)
            for label, image in zip(classes, expected, strict=True):
                torch.testing.assert_close(images[targets == label][index], image, rtol=1e-3, atol=1e-3)


def test_a_committee_votes_by_what_its_members_were_worth(source, committee):
    method = CVDD(ipc=3, iterations=4, lr_images=0.1, statistics_weight=0.3, init="noise", shift=0, teachers=THREE)
    run, found = run_of(source), made(method, source)
    images, targets = found.tensors()
    worth = torch.tensor([60.0, 64.0, 68.0])
    for index, pair in enumerate([(0, 1), (0, 2), (1, 2)]):
        weights = torch.softmax(worth[list(pair)] / 5, 0).tolist()
        voters = [(committee[member].network, weight) for member, weight in zip(pair, weights, strict=True)]
        expected = by_hand(method, source, voters, Problem(index, (0, 1, 2, 3)), run)
        for label in range(4):
            torch.testing.assert_close(images[targets == label][index], expected[label], rtol=1e-3, atol=1e-3)


def test_pairs_and_weights_of_each_index(source, committee):
    run, vote = run_of(source), CVDD(ipc=3, teachers=THREE)
    assert [tuple(voter.member for voter in vote.voters(run, index)) for index in range(3)] == [(0, 1), (0, 2), (1, 2)]
    for seed in range(5):  # whatever would be drawn
        assert [voter.member for voter in replace(vote, ipc=1).voters(run_of(source, seed), 0)] == [1, 2]
    many = replace(vote, ipc=50, voting="equal")
    drawn = [tuple(many.voters(run, index)) for index in range(50)]
    assert {tuple(voter.member for voter in voters) for voters in drawn} == {(0, 1), (0, 2), (1, 2)}
    assert {voter.weight for voters in drawn for voter in voters} == {0.5}
    random = replace(many, voting="random").voters(run, 0)
    assert sum(voter.weight for voter in random) == pytest.approx(1)
    assert random == replace(many, voting="random").voters(run_of(source), 0)
    alone = replace(vote, drawn=1, ipc=3)
    assert [alone.voters(run, index) for index in range(3)] == [((n, 1.0),) for n in range(3)]


def test_teachers_may_be_named_instead_of_drawn(source, committee):
    run, names = run_of(source), [one.name for one in committee]
    fixed = CVDD(ipc=3, teachers=THREE, fixed=(names[2], names[0]))
    fixed.prepare(run)
    assert [tuple(voter.member for voter in fixed.voters(run, index)) for index in range(3)] == [(0, 2)] * 3
    for wrong in ((names[0], names[0]), ("resnet",), ("convnet",)):
        with pytest.raises(InvalidSetting, match=r"CVDD\.fixed"):
            replace(fixed, fixed=wrong).prepare(run)
    with pytest.raises(InvalidSetting, match=r"CVDD\.fixed"):  # before any teacher is trained
        replace(fixed, voting="equal", fixed=("resnet",)).check(source)


def test_a_committee_of_one_recovers_as_sre2l_does(source, committee):
    settings = {"ipc": 1, "iterations": 3, "init": "noise", "shift": 1}
    one = made(SRe2L(**settings), source).tensors()[0]
    voted = made(CVDD(**settings, drawn=1, voting="equal", teachers=SMALL.teachers), source).tensors()[0]
    assert torch.equal(one, voted)


@pytest.mark.parametrize("together", [2, 4])
def test_problems_that_pass_together_stay_their_own(together, source, committee):
    method = replace(SMALL, classes_together=2, problems_together=1)
    alone, grouped = (made(replace(method, problems_together=size), source).tensors()[0] for size in (1, together))
    torch.testing.assert_close(grouped, alone, rtol=1e-3, atol=1e-3)
    jobs = replace(method, problems_together=together).jobs(run_of(source))
    assert len(jobs) == 4 // together


def test_indices_of_other_pairs_do_not_pass_together(source, committee):
    method = CVDD(ipc=3, teachers=THREE, problems_together=3)
    assert [job.key for job in method.jobs(run_of(source))] == ["0000-00000", "0001-00000", "0002-00000"]


def test_problems_are_known_by_the_key_of_their_job(source, committee):
    method, run = replace(SMALL, classes_together=3, problems_together=1), run_of(source)
    keys = [job.key for job in method.jobs(run)]
    assert keys == ["0000-00000", "0000-00003", "0001-00000", "0001-00003"]
    assert [method.problems(run, key) for key in keys] == [
        [Problem(index, classes)] for index in (0, 1) for classes in ((0, 1, 2), (3,))
    ]
    assert key_of(Problem(1, (3,))) == keys[3]


@pytest.mark.parametrize("together", [2, 3, 40])
def test_problems_of_a_group_are_known_by_the_first_and_their_number(together, source, committee):
    """Also where a group goes from one index to the next; the key names a folder, so it is short."""
    method, run = replace(SMALL, ipc=50, classes_together=2, problems_together=together), run_of(source)
    jobs = method.jobs(run)
    every = [Problem(index, classes) for index in range(50) for classes in ((0, 1), (2, 3))]
    assert [problem for job in jobs for problem in method.problems(run, job.key)] == every
    assert max(len(job.key) for job in jobs) < 20


def test_many_problems_together_are_kept_in_folders(source, committee, tmp_path):
    method = replace(SMALL, ipc=60, iterations=1, classes_together=4, problems_together=30)
    made = synthesize(method, source, device="cpu", out=tmp_path / "run", store=tmp_path / "store", progress=False)
    assert made.counts == (60, 60, 60, 60)


def test_pixels_come_back_to_their_range(source):
    images = Pixels(torch.tensor([-9.0, 0.1, 9.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8).clone())
    into_range(images, source)
    unit = source.normalization.to_unit(images.pixels.detach())
    assert [round(float(value), 6) for value in (unit.min(), unit.max())] == [0.0, 1.0]
    torch.testing.assert_close(images.pixels[1].detach(), torch.full((3, 8, 8), 0.1))


def test_the_curriculum_of_cda_starts_with_the_whole_image(source):
    method = CDA(iterations=4000)
    expected = {0: 1.0, 1000: 0.86527, 2000: 0.54, 3000: 0.21473, 3999: 0.08}
    for step, share in expected.items():
        assert method.views(run_of(source), step).scale == (pytest.approx(share, abs=1e-5), 1.0)
    assert replace(method, curriculum="step", milestone=0.5).least_share(1999) == 1.0
    assert replace(method, curriculum="step", milestone=0.5).least_share(2000) == 0.08
    assert SRe2L().least_share(0) == 0.08


def test_views_without_crops_are_shifts_alone(source):
    views = replace(SMALL, crop=False).views(run_of(source), 0)
    record = views.sample(50, source.shape, torch.Generator().manual_seed(0))
    assert record.boxes.tolist() == [[0, 0, 8, 8]] * 50
    assert not record.flips.any()
    assert sorted({*record.shifts.flatten().tolist()}) == [0, 1, 2]


def test_flips_are_left_out_where_they_change_the_class(source):
    assert SMALL.views(run_of(source.with_mirror_safe(False)), 0).flip == 0
    assert SMALL.views(run_of(source), 0).flip == 0.5


def test_the_normalised_loss_is_a_mean_over_layers_of_distances_by_root_of_channels(source, committee, monkeypatch):
    teacher = recovery.measured(run_of(source), SMALL.teachers)[0]
    images = source.gather(torch.arange(4)).contiguous(memory_format=torch.channels_last)
    classes = torch.tensor([0, 1, 2, 3])
    _, plain = SMALL._fit(teacher, images, classes, 1)
    _, normal = replace(SMALL, normalised=True)._fit(teacher, images, classes, 1)
    assert teacher.channels == (4,)
    torch.testing.assert_close(normal, plain / 2)


def test_mirrored_pairs_pass_together(source, committee):
    method = replace(SMALL, classes_together=2, problems_together=2)
    found = made(FYI(base=method), source)
    assert found.counts == (2, 2, 2, 2)
    alone = made(FYI(base=replace(method, problems_together=1)), source)
    torch.testing.assert_close(found.tensors()[0], alone.tensors()[0], rtol=1e-3, atol=1e-3)


def test_more_than_one_teacher_needs_a_method_that_votes(source, committee):
    with pytest.raises(InvalidSetting, match="SRe2L takes one teacher; CVDD takes a committee"):
        SRe2L(teachers=THREE).prepare(run_of(source))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (SRe2L(teachers=Teachers(networks=SPECS[:1])), BadData, "whitened: load it without zca"),
        (CVDD(teachers=Teachers(networks=SPECS[:1]), voting="equal"), InvalidSetting, "the committee has 1"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(method, error, message, source):
    white = source.normalized_by(source.normalization.whitened([source.images]))
    with pytest.raises(error, match=message):
        method.check(white if error is BadData else source)


def test_starts_from_patches_are_middling_mosaics_of_the_first_teacher(source, committee):
    for method in (SRe2L(ipc=2, init="patches"), CVDD(ipc=2, teachers=THREE)):
        run = run_of(source)
        for index in range(2):
            found = method.first_images(run, Problem(index, (0, 2)))
            assert torch.equal(found, middling_mosaics(run_of(source), committee[0], [0, 2], index))


def test_the_usual_shift_is_that_of_the_authors_code():
    assert [usual_shift(side) for side in (8, 16, 32, 64, 128, 224, 256)] == [1, 2, 4, 4, 16, 32, 32]
    both = SRe2L.preset("tiny_imagenet").views(run_of(toy_source(shape=(3, 64, 64))), 0)
    assert (both.shift, both.shift_both) == (4, True)


def test_published_settings():
    """Of the authors' code; the specification of the field has them in one table."""
    shared = {"lr_images": 0.25, "iterations": 4000, "statistics_weight": 0.01, "first_layer": 10.0, "crop": True}
    shared |= {"classes_together": 100, "problems_together": 1, "normalised": False, "total_variation": 0.0, "l2": 0.0}
    differing = {
        (SRe2L, "cifar100"): {"iterations": 1000, "shift": 4, "crop": False, "init": "noise"},
        (SRe2L, "tiny_imagenet"): {"lr_images": 0.1, "statistics_weight": 1.0, "shift": 4, "shift_both": True},
        (SRe2L, "imagenet"): {"shift": 32, "init": "noise"},
        (SRe2L, "small"): {"shift": 4, "init": "patches"},
        (SRe2L, "large"): {"shift": 32, "init": "patches"},
        (CDA, "tiny_imagenet"): {"lr_images": 0.4, "statistics_weight": 0.05, "shift": 4, "shift_both": False},
        (CDA, "imagenet"): {"shift": 32, "curriculum": "cosine", "milestone": 1.0},
        (CDA, "imagenet_21k"): {"lr_images": 0.05, "iterations": 2000, "statistics_weight": 0.25, "shift": 32},
        (CVDD, "small"): {"shift": 4, "init": "patches", "drawn": 2, "temperature": 5.0, "voting": "prior"},
        (CVDD, "large"): {"shift": 32, "init": "patches", "drawn": 2, "temperature": 5.0, "voting": "prior"},
        **{
            (CVDD, f"{data}/ipc1"): {"ipc": 1, "shift": shift, "fixed": pair, "init": "patches"}
            for data, shift, pair in (
                ("cifar10", 4, ("mobilenet_v2", "densenet121")),
                ("cifar100", 4, ("shufflenet_v2", "mobilenet_v2")),
                ("imagenette", 32, ("mobilenet_v2", "densenet121")),
            )
        },
    }
    assert {(cls, name) for cls in (SRe2L, CDA, CVDD) for name in cls.presets} == set(differing)
    for (cls, name), changes in differing.items():
        made = cls.preset(name)
        assert {field: getattr(made, field) for field in shared | changes} == shared | changes, name
    assert (
        SRe2L.preset("tiny_imagenet").teachers.training.epochs == CDA.preset("tiny_imagenet").teachers.training.epochs
    )
    assert SRe2L.preset("tiny_imagenet").teachers.training == RECIPES["sre2l_tiny"]
    names = ["resnet18", "resnet50", "shufflenet_v2_x0_5", "mobilenet_v2", "densenet121"]
    small, large = (CVDD.preset(name).teachers.networks for name in ("small", "large"))
    assert [(spec.name, spec.stem) for spec in small] == [(f"torchvision:{name}", "small") for name in names]
    names[2] = "shufflenet_v2_x1_0"
    assert [(spec.name, spec.stem) for spec in large] == [(f"torchvision:{name}", None) for name in names]
    assert SMALL.views(run_of(toy_source()), 0).ratio == (3 / 4, 4 / 3)


def test_a_vote_without_priors_is_refused_before_a_teacher_is_trained(source):
    with pytest.raises(InvalidSetting, match="dsdistill prior"):
        CVDD(teachers=THREE).check(source)


def test_unknown_priors_are_refused_before_any_work(source, monkeypatch):
    unknown = Committee([untrained(source, spec) for spec in SPECS])
    monkeypatch.setattr(Committee, "of", lambda run, teachers: unknown)
    with pytest.raises(InvalidSetting, match="dsdistill prior"):
        CVDD(teachers=THREE).prepare(run_of(source))


def test_half_precision_teachers_change_little(source, committee):
    full, half = (made(replace(SMALL, precision=one), source).tensors()[0] for one in ("float32", "bfloat16"))
    assert not torch.equal(full, half)
    assert float((full - half).abs().mean()) < 0.1 * float(full.abs().mean())
