"""Methods that draw, on a CUDA device. Run with: pytest -m gpu"""

import warnings
from dataclasses import replace

import pytest
import torch
from generative import pipelines

from dsdistill import synthesize
from dsdistill.core.rng import Rng
from dsdistill.generative import Fusion, Models, Sampler, Weights, growing
from dsdistill.generative.denoiser import small_transformer
from dsdistill.generative.sampling import Pull, drawn, noise_numbers
from dsdistill.methods import D4M, EVLF, Diffusion, Minimax
from dsdistill.testing import toy_source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm"])
def test_latents_are_like_those_of_the_cpu(kind):
    """Not closer: the denoiser works in bfloat16 here."""
    denoiser = small_transformer((4, 8, 8), 3, 2, 2, 16, Rng(0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    sampler = Sampler(kind=kind, steps=10)
    noise = torch.randn(noise_numbers(sampler), 3, 4, 8, 8, generator=generator)
    modes, classes = torch.randn(3, 4, 8, 8, generator=generator), torch.arange(3)
    found = []
    for device in ("cpu", CUDA):
        pull = Pull(modes.to(device), 0.1, 5) if kind == "ddpm" else None
        found.append(drawn(denoiser.to(device), classes.to(device), noise.to(device), sampler, pull=pull).cpu())
    difference = (found[1] - found[0]).norm() / found[0].norm()
    assert float(difference) < 0.05


@pytest.mark.parametrize("size", ["nano", "small"])
def test_models_are_trained_and_draw_within_range(size, monkeypatch, tmp_path):
    tiny = replace(growing.SIZES[size], layers=2, heads=2, width=16, batch=32, images=128)
    monkeypatch.setitem(growing.SIZES, size, tiny)
    source = toy_source(classes=3)
    models, sampler = Models(size=size, samples=320), Sampler(kind="ddpm", steps=10)
    for method in (
        Diffusion(ipc=2, models=models, sampler=sampler),
        D4M(ipc=2, models=models, sampler=sampler),
        Minimax(ipc=2, models=models, sampler=sampler, iterations=3),
        EVLF(ipc=2, models=models, sampler=sampler, until=5, fusion=Fusion(steps=3, width=16)),
    ):
        images, _ = synthesize(method, source, device=CUDA, store=tmp_path, progress=False).tensors()
        assert images.device.type == "cpu"
        unit = source.normalization.to_unit(images)
        assert -1e-4 < float(unit.min()) < float(unit.max()) < 1 + 1e-4
        again, _ = synthesize(method, source, device=CUDA, store=tmp_path, progress=False).tensors()
        torch.testing.assert_close(again, images, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["dit", "stable_diffusion"])
def test_pretrained_models_draw(name, tmp_path):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(pipelines, name)(tmp_path / name)
    ids = {"class_ids": (0, 1, 4)} if name == "dit" else {}
    models = Models(weights=Weights(path=str(tmp_path / name), **ids))
    method = EVLF(
        ipc=2, models=models, sampler=Sampler(kind="ddpm", steps=4), until=1, fusion=Fusion(steps=2, width=16)
    )
    images, _ = synthesize(method, toy_source(classes=3), device=CUDA, progress=False).tensors()
    assert images.shape == (6, 3, 8, 8)
    assert torch.isfinite(images).all()
