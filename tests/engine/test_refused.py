"""A run that ends in an error: whether its folder is free for another one afterwards."""

from dataclasses import dataclass, replace

import pytest
import torch

from dsdistill import synthesize
from dsdistill.errors import InvalidSetting, OutputConflict
from dsdistill.methods import DM


@dataclass(frozen=True, kw_only=True)
class Refusing(DM):
    """Refuses itself at a place: before or after it shared something, or at a step."""

    place: str = "prepare"

    def prepare(self, run):
        if self.place == "shared":
            run.shared.get("something", lambda: {"kept": torch.ones(1)})
        if self.place in ("prepare", "shared"):
            raise InvalidSetting("place", self.place, "nothing")
        if self.place == "interrupt":
            raise KeyboardInterrupt
        super().prepare(run)

    def step(self, run, state, iteration):
        if self.place == f"step {iteration}":
            raise InvalidSetting("place", self.place, "nothing")
        return super().step(run, state, iteration)


def settings(method, place):
    return Refusing(ipc=method.ipc, iterations=4, real_batch=4, network=method.network, place=place)


@pytest.mark.parametrize("place", ["prepare", "step 0"])
def test_where_nothing_was_kept_the_mended_run_may_have_the_folder(place, source, method, tmp_path):
    with pytest.raises(InvalidSetting):
        synthesize(settings(method, place), source, device="cpu", out=tmp_path)
    assert not (tmp_path / "run" / "run.json").exists()
    synthesize(replace(method, iterations=2), source, device="cpu", out=tmp_path)


@pytest.mark.parametrize("place", ["shared", "step 3", "interrupt"])
def test_what_was_kept_is_not_given_to_another_run(place, source, method, tmp_path):
    with pytest.raises((InvalidSetting, KeyboardInterrupt)):
        synthesize(settings(method, place), source, device="cpu", out=tmp_path, checkpoint_every=2)
    assert (tmp_path / "run" / "run.json").exists()
    with pytest.raises(OutputConflict):
        synthesize(replace(method, iterations=2), source, device="cpu", out=tmp_path)


def test_a_finished_set_stays_whatever_comes_later(source, method, tmp_path):
    images, _ = synthesize(replace(method, iterations=2), source, device="cpu", out=tmp_path).tensors()
    with pytest.raises(OutputConflict):
        synthesize(settings(method, "prepare"), source, device="cpu", out=tmp_path)
    assert (tmp_path / "run" / "run.json").exists()
    again = synthesize(replace(method, iterations=2), source, device="cpu", out=tmp_path)
    assert torch.equal(again.tensors()[0], images)
