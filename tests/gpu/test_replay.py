"""Work that is recorded once and replayed: nothing of it differs from the work itself. Run with: pytest -m gpu"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsdistill import synthesize
from dsdistill.core import replay
from dsdistill.core.replay import WARM, Rate, Replayed, forget_gradients, replayable
from dsdistill.core.rng import Rng
from dsdistill.experts.progress import Progress
from dsdistill.generative import Models, Sampler, growing
from dsdistill.generative.denoiser import small_transformer
from dsdistill.generative.sampling import drawn
from dsdistill.methods import Diffusion, Minimax
from dsdistill.testing import toy_source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda", 0)


@pytest.fixture
def never(monkeypatch):
    """Nothing is recorded."""

    def plain():
        monkeypatch.setattr(Replayed, "__call__", lambda self, *inputs: self.function(*inputs))

    return plain


def test_inputs_and_what_the_function_reads_may_change():
    weight, results = torch.ones(3, device=CUDA), []
    replayed = Replayed(lambda one, other: weight * one + other, CUDA)
    for number in range(WARM + 4):
        one, other = torch.randn(3, device=CUDA), torch.randn(3, device=CUDA)
        weight.fill_(number)
        results.append((replayed(one, other), weight * one + other))
    assert all(torch.equal(found, right) for found, right in results)  # also those of earlier replays
    assert replayed._graph is not None


def test_other_shapes_are_refused():
    replayed = Replayed(lambda one: 2 * one, CUDA)
    replayed(torch.ones(3, device=CUDA))
    with pytest.raises(ValueError, match="recorded for"):
        replayed(torch.ones(4, device=CUDA))


def trained(steps, model, optimizer, begin=0):
    inputs = torch.randn(100, 8, 5, generator=torch.Generator().manual_seed(0)).to(CUDA)

    def update(images):
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    replayed, rate = Replayed(update, CUDA), Rate(optimizer, CUDA)
    for number in range(begin, steps):
        rate.set(0.01 * (1 + number % 3))
        replayed(inputs[number])


def fresh():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(CUDA)
    return model, torch.optim.AdamW(model.parameters(), **replayable(CUDA))


def test_trainings_take_the_steps_that_they_are_told(never):
    """By a step size that changes, also after what was kept was read again."""
    models = []
    for plain in (False, True):
        if plain:
            never()
        model, optimizer = fresh()
        trained(12, model, optimizer)
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_an_interrupted_training_goes_on(tmp_path):
    whole, _ = made = fresh()
    trained(12, *made)
    part, optimizer = fresh()
    trained(6, part, optimizer)
    kept = Progress(tmp_path, part, optimizer)
    kept.add(6)
    kept.write()
    other, optimizer = fresh()
    assert Progress(tmp_path, other, optimizer).read() == 6
    trained(12, other, optimizer, begin=6)
    for one, same in zip(other.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-7)


def test_what_began_on_the_host_goes_on_here(tmp_path):
    model, _ = fresh()
    there = copy.deepcopy(model).cpu()
    optimizer = torch.optim.AdamW(there.parameters(), lr=0.01)
    there(torch.ones(3, 5)).sum().backward()
    optimizer.step()
    kept = Progress(tmp_path, there, optimizer)
    kept.add(1)
    kept.write()
    here, optimizer = fresh()
    assert Progress(tmp_path, here, optimizer).read() == 1
    trained(8, here, optimizer, begin=1)
    assert all(int(state["step"]) == 8 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm"])
def test_latents_are_those_of_a_loop(kind, never):
    denoiser = small_transformer((4, 8, 8), 3, 2, 2, 16, Rng(0)).eval().to(CUDA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    noise = torch.randn(13, 6, 4, 8, 8, generator=generator).to(CUDA)
    classes, sampler = torch.arange(6, device=CUDA) % 3, Sampler(kind=kind, steps=12)
    found = drawn(denoiser, classes, noise, sampler)
    never()
    torch.testing.assert_close(found, drawn(denoiser, classes, noise, sampler), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", ["nano", "small"])
def test_models_are_those_of_a_loop(size, never, monkeypatch):
    """Trained and tuned with and without replays, to rounding: sums of attention have no fixed order."""
    tiny = replace(growing.SIZES[size], layers=2, heads=2, width=16, batch=32, images=5 * 128)
    monkeypatch.setitem(growing.SIZES, size, tiny)
    source, images = toy_source(classes=3), []
    methods = [
        method(ipc=2, models=Models(size=size, samples=320), sampler=Sampler(kind="ddim", steps=6), **settings)
        for method, settings in ((Diffusion, {}), (Minimax, {"iterations": 12, "decay": 0.5}))
    ]
    for plain in (False, True):
        if plain:
            never()
        images.append([synthesize(one, source, device=CUDA, progress=False).tensors()[0] for one in methods])
    for one, other in zip(*images, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_memory_of_a_recorded_step_is_given_back():
    model, optimizer = fresh()
    trained(6, model, optimizer)  # libraries keep memory of their own for a stream
    forget_gradients(model)
    before = torch.cuda.memory_allocated(CUDA)
    trained(6, model, optimizer)
    forget_gradients(model)
    assert torch.cuda.memory_allocated(CUDA) - before < 2**20


def test_a_compiled_training_is_that_of_a_loop(never, monkeypatch):
    monkeypatch.setattr(replay, "WORTH_COMPILING", 1)
    tiny = replace(growing.SIZES["nano"], layers=2, heads=2, width=16, batch=32)
    monkeypatch.setitem(growing.SIZES, "nano", tiny)
    method = Diffusion(ipc=2, models=Models(samples=320), sampler=Sampler(steps=6))
    source = toy_source(classes=3)
    found, _ = synthesize(method, source, device=CUDA, progress=False).tensors()
    monkeypatch.setattr(replay, "WORTH_COMPILING", 10**9)
    never()
    torch.testing.assert_close(
        found, synthesize(method, source, device=CUDA, progress=False).tensors()[0], rtol=0.05, atol=0.05
    )
