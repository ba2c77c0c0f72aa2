"""Shared fixtures: small sources, a quick method."""

import logging
import os

import pytest
import torch

from dsdistill.data import ImageSource
from dsdistill.methods import DM
from dsdistill.networks import NetworkSpec

torch.set_num_threads(1)  # tensors here are tiny: threads would only wait for each other
LEVEL = logging.getLogger("dsdistill").level


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is read from the user's cache, and nothing written into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """No test can cut the power: what is written here is safe with the system."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def quiet_again():
    """The command line sets the level of our logger for its process: here, for one test, or for what tests share."""
    logging.getLogger("dsdistill").setLevel(LEVEL)
    yield
    logging.getLogger("dsdistill").setLevel(LEVEL)


def make_images(
    per_class: int, classes: int, shape: tuple[int, int, int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(0, 128, (len(targets), *shape), generator=generator)
    return (noise + 100 * targets[:, None, None, None] // max(1, classes - 1)).to(torch.uint8), targets


@pytest.fixture
def source() -> ImageSource:
    """3 classes, 12 + 5 images 3x8x8 each, separable by brightness."""
    names = ["red", "green", "blue"]
    test = ImageSource("toy", names, *make_images(5, 3, (3, 8, 8), seed=1))
    return ImageSource("toy", names, *make_images(12, 3, (3, 8, 8), seed=0), open_test=lambda: test)


@pytest.fixture
def method() -> DM:
    """DM that takes a few milliseconds per step."""
    return DM(ipc=2, iterations=8, real_batch=4, network=NetworkSpec(width=8))
