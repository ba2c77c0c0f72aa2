"""What only a CUDA device can show. Run with: pytest -m gpu"""

import copy
from dataclasses import replace

import pytest
import torch
from methods.cases import CASES

from dsdistill import estimate, evaluate, synthesize
from dsdistill.augmentations import CutMix, ResizedCrop, Siamese
from dsdistill.core.device import default_chunk
from dsdistill.core.rng import Rng
from dsdistill.engine import Job, Run
from dsdistill.evaluation import EvaluationProtocol
from dsdistill.methods import DM, FYI, RandomReal
from dsdistill.networks import MeasuredNetwork, NetworkSpec, embed
from dsdistill.objectives.distribution import class_means, mean_distance
from dsdistill.parameterizations import Mirrored, Tiled, Tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def run_on(device, source):
    source = source.train_only().to(device)
    chunk = default_chunk(source.shape, device)
    job = Job("all", tuple(range(source.num_classes)))
    return Run(source, device, Rng(0, device=device), job.classes, chunk).scoped(job), job


def test_views_features_and_distance_are_those_of_the_cpu(source, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    generator = torch.Generator().manual_seed(0)
    network = NetworkSpec(width=8).build(source.shape, 3, generator=generator, device="cpu")
    views = Siamese().sample(3, source.shape, generator)
    found = {}
    for device in (CPU, CUDA):
        images = source.to(device).gather(torch.arange(36, device=device)).requires_grad_()
        shown = Siamese().apply(images, views, torch.arange(3).repeat_interleave(12))
        features = embed(copy.deepcopy(network).to(device), shown)
        means = class_means(features, source.targets.to(device), torch.full((3,), 12))
        loss = mean_distance(means, torch.zeros_like(means))
        (gradient,) = torch.autograd.grad(loss, images)
        found[device] = (loss.detach().cpu(), gradient.cpu())
    torch.testing.assert_close(found[CUDA], found[CPU], rtol=1e-3, atol=1e-4)


def test_a_run_can_be_interrupted_and_ends_close_to_the_uninterrupted(source, method, tmp_path):
    def interrupt(event):
        if event.iteration == 5:
            raise KeyboardInterrupt

    whole = synthesize(method, source, device=CUDA)
    with pytest.raises(KeyboardInterrupt):
        synthesize(method, source, device=CUDA, out=tmp_path, checkpoint_every=2, callback=interrupt)
    resumed = synthesize(method, source, device=CUDA, out=tmp_path, checkpoint_every=2)
    torch.testing.assert_close(resumed.tensors()[0], whole.tensors()[0], rtol=1e-3, atol=1e-3)
    assert resumed.tensors()[0].device == CPU


def test_a_step_never_waits_for_the_device(source, method):
    run, job = run_on(CUDA, source)
    state = method.start(run, job)
    method.step(run, state, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step(run, state, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_crops_of_single_images_are_those_of_the_cpu_to_the_last_bit(source):
    views = ResizedCrop(shift=2)
    images = source.gather(torch.arange(36))
    record = views.sample(36, source.shape, torch.Generator().manual_seed(0), per="image")
    assert torch.equal(views.apply(images.to(CUDA), record).cpu(), views.apply(images, record))


def test_statistics_of_batch_norms_and_their_gradient_are_those_of_the_cpu(source, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network = NetworkSpec(width=8, norm="batch").build(
        source.shape, 3, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    network(source.gather(torch.arange(36)))
    found = {}
    for device in (CPU, CUDA):
        teacher = MeasuredNetwork(copy.deepcopy(network).to(device))
        images = source.to(device).gather(torch.arange(0, 36, 3, device=device))
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        logits, distances = teacher(images, groups=2)
        (gradient,) = torch.autograd.grad(logits.square().mean() + distances.sum(), images)
        found[device] = (logits.detach().cpu(), distances.detach().cpu(), gradient.cpu())
    torch.testing.assert_close(found[CUDA], found[CPU], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_sets_are_scored_on_the_device(norm, source, method):
    network = NetworkSpec(width=8, norm=norm)
    made = synthesize(replace(method, network=network), source, device=CUDA)
    protocol = EvaluationProtocol(network=network, epochs=5)
    first, second = (evaluate(made, source, protocol=protocol, repeats=2, device=CUDA) for _ in range(2))
    assert first.scores["random"].n == 2
    assert first.peak_memory > 0
    assert abs(first.accuracy.mean - second.accuracy.mean) <= 0.5


@pytest.mark.parametrize("form", [Tiles(torch.randn(4, 3, 8, 8), torch.tensor([2, 1, 3, 2])), "mirrored"], ids=str)
def test_forms_decode_as_on_the_cpu(form):
    assert torch.get_float32_matmul_precision() == "highest"  # the default
    here = Mirrored(Tiles(torch.randn(3, 1, 6, 5), torch.tensor([2, 2, 1]))) if form == "mirrored" else form
    there = copy.deepcopy(here).to(CUDA)
    for index in (None, torch.tensor([2, 0])):
        one, other = here.decode(index), there.decode(index)
        torch.testing.assert_close(other.images.cpu(), one.images, rtol=1e-5, atol=1e-5)
        assert torch.equal(other.owner, one.owner)
    there.imitate(here.decode().images.to(CUDA))
    assert torch.isfinite(there.decode().images).all()


def test_tiled_images_are_distilled_and_scored(source):
    method = DM(ipc=2, iterations=4, real_batch=4, network=NetworkSpec(width=8), form=Tiled(factor=2))
    made = synthesize(method, source, device=CUDA)
    protocol = EvaluationProtocol(network=NetworkSpec(width=8), epochs=3, mix=CutMix(probability=1.0))
    assert evaluate(made, source, protocol=protocol, repeats=2, device=CUDA, progress=False).accuracy.n == 2


def test_networks_trained_together_predict_as_those_trained_alone(source):
    made = synthesize(RandomReal(ipc=4), source)
    protocol = EvaluationProtocol(network=NetworkSpec(width=8), epochs=5, augmentation=Siamese())
    options = {"protocol": protocol, "repeats": 4, "baselines": (), "device": CUDA, "progress": False}
    alone, together = (evaluate(made, source, together=count, **options) for count in (1, 4))
    assert together.accuracy.mean == pytest.approx(alone.accuracy.mean, abs=0.1)


@pytest.mark.parametrize("name", CASES)
def test_every_method_runs_and_continues_on_the_device(name, source, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(event):
        raise Interrupted

    case = CASES[name]
    whole = synthesize(case, source, device=CUDA)
    if case.steps:
        with pytest.raises(Interrupted):
            synthesize(case, source, device=CUDA, out=tmp_path, checkpoint_every=1, callback=interrupt)
    resumed = synthesize(case, source, device=CUDA, out=tmp_path)
    torch.testing.assert_close(resumed.tensors()[0], whole.tensors()[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("base", ["DataDAM", "DC", "DSA", "IDC", "MTT", "NCFM"])
def test_wrapped_methods_run_on_the_device(base, source):
    assert torch.isfinite(synthesize(FYI(base=CASES[base]), source, device=CUDA).tensors()[0]).all()


def test_an_estimate_is_of_what_the_device_allocates(source, method):
    cost = estimate(method, source, device=CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    synthesize(method, source, device=CUDA)
    assert cost.memory == pytest.approx(torch.cuda.max_memory_allocated(CUDA), rel=0.3)
