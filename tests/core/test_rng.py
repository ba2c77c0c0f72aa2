import random

import numpy as np
import torch

from dsdistill.core.rng import Rng, isolated_global_rng, seed_global


def draw(generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=generator).tolist()


def test_a_stream_is_a_function_of_seed_job_name_and_iteration():
    rng = Rng(0, job="a")
    reference = draw(rng.at("real", 3))
    draw(rng.at("other", 3))
    assert draw(rng.at("real", 3)) == reference
    others = [Rng(1, job="a").at("real", 3), Rng(0, job="b").at("real", 3), rng.at("views", 3), rng.at("real", 4)]
    drawn = [tuple(draw(generator)) for generator in others] + [tuple(reference)]
    assert len(set(drawn)) == len(drawn)


def test_streams_do_not_run_together_when_names_hold_separators():
    assert Rng(0, job="a/b").integer("c") != Rng(0, job="a").integer("b/c")
    assert Rng(0).integer("x", 12) != Rng(0).integer("x1", 2)


def test_stream_integers_are_stable_across_versions():
    # A change here silently breaks every resume and every published seed.
    assert Rng(0).integer("network", 0) == 3741037874796732672
    assert Rng(7, job="all").integer("real", 700) == 3983442664954256450


def test_the_callers_global_state_comes_back():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with isolated_global_rng(torch.device("cpu")):
        seed_global(1, torch.device("cpu"))
        first = torch.rand(3)
        seed_global(1, torch.device("cpu"))
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())


def test_python_and_numpy_generators_are_never_touched():
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 (the global one is meant)
    with isolated_global_rng(torch.device("cpu")):
        seed_global(1, torch.device("cpu"))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
