"""Priors are measured on held-out training images, written beside the teacher, and not measured again."""

from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained

from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.evaluation import get_protocol
from dsdistill.experts import Committee
from dsdistill.methods import SRe2L
from dsdistill.networks import NetworkSpec
from dsdistill.studies import prior
from dsdistill.studies.prior import PLUS, estimate_priors, measure_priors, write_published
from dsdistill.testing import toy_source

METHOD = SRe2L(ipc=1, iterations=1)
PROTOCOL = replace(get_protocol("cvdd"), epochs=1, network=SPECS[0])


@pytest.fixture
def folder(tmp_path):
    source = toy_source()
    for spec in SPECS[:2]:
        teacher = untrained(source, spec)
        teacher.save(tmp_path / teacher.name)
    return tmp_path


def test_each_teacher_gets_its_own_and_keeps_it(folder, monkeypatch):
    source = toy_source()  # its test split refuses to be opened
    found = measure_priors(folder, source, METHOD, protocol=PROTOCOL, device="cpu")
    committee = Committee.load(folder)
    assert found == {one.name: one.performance for one in committee}
    assert all(0 <= value <= 100 for value in found.values())
    torch.testing.assert_close(committee.weights(10.0).sum(), torch.tensor(1.0))
    monkeypatch.setattr(prior, "synthesize", None)
    assert measure_priors(folder, source, METHOD, protocol=PROTOCOL, device="cpu") == found


def test_again_measures_with_other_settings(folder):
    source = toy_source()
    measure_priors(folder, source, METHOD, protocol=PROTOCOL, device="cpu")
    measure_priors(folder, source, replace(METHOD, iterations=2), protocol=PROTOCOL, device="cpu", again=True)


def test_what_scores_is_a_tenth_that_the_sets_are_not_made_of():
    known = prior._held_out(toy_source(classes=2, per_class=20), seed=0)
    assert known.counts == (18, 18)
    assert known.test.counts == (2, 2)
    assert not {image.numpy().tobytes() for image in known.images} & {
        image.numpy().tobytes() for image in known.test.images
    }


def test_a_protocol_without_teachers_is_refused(folder):
    with pytest.raises(InvalidSetting, match="learns from teachers"):
        measure_priors(folder, toy_source(), METHOD, protocol="dsa", device="cpu")


def test_it_is_sre2l_plus_plus_unless_told():
    assert (PLUS.ipc, PLUS.init, PLUS.iterations, PLUS.lr_images) == (10, "patches", 4000, 0.25)


def test_a_dry_run_times_those_that_are_open_and_writes_nothing(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cost = estimate_priors(folder, toy_source(), METHOD, protocol=PROTOCOL, device="cpu")
    assert cost.teachers == tuple(one.name for one in Committee.load(folder))
    assert cost.seconds > 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    known = Committee.load(folder)[0]
    replace(known, performance=50.0).save(folder / known.name)
    assert len(estimate_priors(folder, toy_source(), METHOD, protocol=PROTOCOL, device="cpu").teachers) == 1
    again = estimate_priors(folder, toy_source(), METHOD, protocol=PROTOCOL, device="cpu", again=True)
    assert len(again.teachers) == 2


@pytest.mark.slow  # two networks of full size are made, saved and read
def test_published_priors_go_to_the_networks_that_they_are_of(tmp_path):
    source = toy_source(classes=10, shape=(3, 32, 32))
    names = ("torchvision:shufflenet_v2_x0_5", "resnet18")
    specs = [NetworkSpec(names[0], stem="small"), NetworkSpec(names[1], norm="batch")]
    for spec in specs:
        teacher = untrained(source, spec, name=spec.name.rpartition(":")[2])
        teacher.save(tmp_path / teacher.name)
    assert write_published(tmp_path, "cifar10") == {"shufflenet_v2_x0_5": 68.5, "resnet18": 63.0}
    assert {one.name: one.performance for one in Committee.load(tmp_path)} == {
        "shufflenet_v2_x0_5": 68.5,
        "resnet18": 63.0,
    }
    assert "published for cifar10" in Committee.load(tmp_path)[0].history["prior"]
    with pytest.raises(UnknownName, match="cifar10"):
        write_published(tmp_path, "cifar11")
    with pytest.raises(InvalidSetting, match="100 classes, as cifar100 has"):
        write_published(tmp_path, "cifar100")


def test_networks_without_a_published_prior_are_named_and_nothing_is_written(folder):
    with pytest.raises(InvalidSetting, match="networks of the published committee"):
        write_published(folder, "cifar10")
    assert [one.performance for one in Committee.load(folder)] == [None, None]
