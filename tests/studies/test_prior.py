"""Priors are measured on held-out training images, written beside the teacher, and not measured again."""

from dataclasses import replace

import pytest
import torch
from experts.schools import SPECS, untrained

from dsdistill.errors import InvalidSetting
from dsdistill.evaluation import get_protocol
from dsdistill.experts import Committee
from dsdistill.methods import SRe2L
from dsdistill.studies import prior
from dsdistill.studies.prior import PLUS, measure_priors
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
