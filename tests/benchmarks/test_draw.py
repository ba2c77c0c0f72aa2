"""The benchmark of drawing images: both programs draw the same, and both run."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--classes=2", "--ipc=2", "--chunk=3", "--steps=4"]


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.speed.draw")


@pytest.mark.parametrize("size", ["nano", "small"])
def test_images_equal_those_of_the_plain_loop(draw, size):
    (found,) = draw.check(draw.parse([*SIZES, "--size", size]), torch.float64)
    assert found.quantity == "images"
    assert found.relative < 1e-10


def test_images_depend_on_class_and_noise(draw):
    """Else equality would say little."""
    options = draw.parse(SIZES)
    models = draw.make_models(options, torch.float64)
    images = draw.batched(options, models, torch.float64)
    assert images.shape == (4, 3, 32, 32)
    assert (images[0] - images[1]).abs().max() > 0.1
    models.denoiser.null = 0
    assert (draw.batched(options, models, torch.float64)[:2] - images[:2]).abs().max() > 1e-4


def test_images_that_are_others_are_refused(draw, monkeypatch):
    monkeypatch.setattr(draw.Denoiser, "said", _unguided(draw.Denoiser.said))
    with pytest.raises(ValidationError, match="images"):
        draw.check(draw.parse(SIZES), torch.float64)


def _unguided(said):
    return lambda self, noisy, time, classes, *rest: said(self, noisy, time, classes, 1.0)


@pytest.mark.parametrize("program", ["loops", "dsdistill"])
def test_a_worker_times_a_program(draw, program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["draw.py", *SIZES, "--worker", program])
    draw.main()
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
