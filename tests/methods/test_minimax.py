"""Minimax: its two terms by hand and against a slow loop, memories, what is trained, phases, and going on."""

import copy
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from methods.cases import CASES

from dsdistill import synthesize
from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared
from dsdistill.errors import InvalidSetting, Stopped
from dsdistill.generative import Redraw, Sampler, growing, sampling
from dsdistill.generative.bound import variance_bound
from dsdistill.generative.denoiser import ByClass, Schedule, small_transformer, without_dropped_labels
from dsdistill.generative.method import Drawing
from dsdistill.generative.models import latents_of
from dsdistill.methods import Minimax
from dsdistill.methods.minimax import Memories, restored, tunable
from dsdistill.testing import toy_source

CPU = torch.device("cpu")
TOLD = replace(CASES["Minimax"], lr=0.02, decay=0.5)
"""What it learns in a few steps can be seen."""


@pytest.fixture(autouse=True)
def smaller_models(monkeypatch):
    monkeypatch.setitem(growing.SIZES, "nano", replace(growing.SIZES["nano"], layers=1, heads=2, width=8))


def run_of(source, store=None, seed=0, shared=None):
    classes = tuple(range(source.num_classes))
    return Run(source.train_only(), CPU, Rng(seed), classes, 100, shared=shared or Shared(), store=store)


def test_the_toy_of_one_class():
    """x̂0 = (1, 0) beside memories (1, 0), (0, 1), (-1, 0): the least cosine is -1, the greatest 1."""
    memories = Memories(range(1), 64, 2, CPU)
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    memories.add(known, known, torch.zeros(3, dtype=torch.int64))
    real, drawn = memories.terms(torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    assert 0.002 * float(real) == pytest.approx(0.004)
    assert 0.008 * float(drawn) == pytest.approx(0.008)


def test_the_terms_are_those_of_loops_over_classes():
    generator = torch.Generator().manual_seed(0)
    memories, classes = Memories(range(4), 5, 6, CPU), torch.tensor([0, 2, 2, 1, 0, 2])
    stored, lists = torch.randn(9, 6, generator=generator), {label: [] for label in range(4)}
    earlier = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 3])  # class 1 has nothing yet, class 2 more than it holds
    others = torch.randn(9, 6, generator=generator)
    for number in range(0, 9, 3):
        part = slice(number, number + 3)
        memories.add(stored[part], others[part], earlier[part])
    for real, drawn, label in zip(stored, others, earlier.tolist(), strict=True):
        lists[label] = [*lists[label], (real, drawn)][-5:]
    predicted, weight = torch.randn(6, 6, generator=generator, requires_grad=True), torch.rand(6, generator=generator)

    def cosine(a, b):
        return torch.dot(a, b) / (a.norm() * b.norm())

    far, near = [], []
    for label in classes.unique().tolist():
        mine = [place for place in range(6) if classes[place] == label]
        pairs = [(place, pair) for place in mine for pair in lists[label]]
        far.append(max((weight[p] * (1 - cosine(predicted[p], one[0])) for p, one in pairs), default=torch.zeros(())))
        near.append(max((weight[p] * cosine(predicted[p], one[1]) for p, one in pairs), default=torch.zeros(())))
    real, drawn = memories.terms(predicted, classes, weight)
    torch.testing.assert_close(real, torch.stack(far).mean())
    torch.testing.assert_close(drawn, torch.stack(near).mean())
    (slope,) = torch.autograd.grad(real + drawn, predicted)
    assert torch.isfinite(slope).all()
    assert float(slope[3].abs().max()) == 0  # of the class without a memory


def test_what_is_trained_are_biases_and_class_tables():
    model = small_transformer((4, 4, 4), 3, 2, 2, 8, Rng(0))
    names = tunable(model)
    assert all(name.endswith(".bias") or "embedding_table" in name for name in names)
    assert sum("embedding_table" in name for name in names) == 2
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert biases == {name for name in names if "table" not in name}


# Fine-tuning ----------------------------------------------------------------------------------------------------


@contextmanager
def doubled():
    """Numbers are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def disturbed(denoiser):
    """The same denoiser with random weights, none of which is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def of_learned_variance(latent, classes):
    """A denoiser of noise, that says a variance too."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    channels, grid, _ = latent
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 1}
    options |= {"in_channels": channels, "out_channels": 2 * channels, "sample_size": grid}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(**options, num_embeds_ada_norm=classes)
    without_dropped_labels(network)
    return ByClass(network, Schedule({"beta_schedule": "linear", "prediction_type": "epsilon"}), null=classes)


def cosine_of(one, other):
    return (one * other).sum() / (one.square().sum() * other.square().sum()).sqrt()


def learned_slowly(method, model, latents, classes, rng):
    """The moving average of biases and class tables by the formulas of the method, image by image."""
    kept, channels = model.schedule.kept, latents.shape[1]
    trained = {name: one for name, one in model.named_parameters() if "table" in name or name.endswith("bias")}
    average = {name: one.detach().clone() for name, one in trained.items()}
    optimizer = torch.optim.AdamW([one.requires_grad_() for one in trained.values()], lr=method.lr, weight_decay=0)
    real, drawn, without = {}, {}, 0
    for number in range(method.iterations):
        generator = rng.at("step", number)
        rows = torch.randint(len(latents), (method.batch_size,), generator=generator)
        torch.randint(1, (method.batch_size,), generator=generator)  # mirrored latents stand among the others
        times = torch.randint(1000, (method.batch_size,), generator=generator)
        drop = torch.rand(method.batch_size, generator=generator) < 0.1
        noise = torch.randn(method.batch_size, *latents.shape[1:], generator=generator)
        loss, batch, far, near = 0, [], {}, {}
        for row, time, dropped, some in zip(rows, times, drop, noise, strict=True):
            clean, label, level = latents[row], int(classes[row]), kept[time]
            signal, rest = level.sqrt(), (1 - level).sqrt()
            noisy = signal * clean + rest * some
            asked = torch.tensor([model.null if dropped else label])
            raw = model(noisy[None], time[None], asked)
            said = raw[0, :channels]
            if model.schedule.prediction == "epsilon":
                bound = variance_bound(model.schedule, raw, clean[None], noisy[None], time[None])
                loss = loss + (said - some).square().mean() + bound
                predicted = (noisy - rest * said) / signal
            else:
                loss = loss + (said - (signal * some - rest * clean)).square().mean()
                predicted = signal * noisy - rest * said
            weight = level if method.weighted else 1
            far.setdefault(label, []).extend(weight * (1 - cosine_of(predicted, one)) for one in real.get(label, []))
            near.setdefault(label, []).extend(weight * cosine_of(predicted, one) for one in drawn.get(label, []))
            batch.append((label, clean, predicted.detach()))
            without += bool(dropped)
        loss = loss / method.batch_size
        for label in far:
            if far[label]:
                loss = loss + method.representative / len(far) * max(far[label])
                loss = loss + method.diverse / len(far) * max(near[label])
        for label, clean, predicted in batch:
            real[label] = [*real.get(label, []), clean][-method.memory :]
            drawn[label] = [*drawn.get(label, []), predicted][-method.memory :]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, one in trained.items():
            average[name] = method.decay * average[name] + (1 - method.decay) * one.detach()
    assert without > 1
    assert all(len(one) == method.memory for one in real.values())
    return average


@pytest.mark.parametrize(("variance", "weighted"), [(False, False), (False, True), (True, False)])
def test_some_steps_are_those_of_a_loop_over_images(variance, weighted, monkeypatch):
    """Of the second two classes of five, with their mirrored latents; the null class is the last row of the table."""
    settings = {"iterations": 4, "batch_size": 8, "memory": 8, "representative": 0.3, "diverse": 0.7}
    method, run = replace(TOLD, weighted=weighted, **settings), run_of(toy_source(classes=5))
    model, both = method.model(run), latents_of(run, method.models)
    parts = [both[side, 12 * label : 12 * label + 12] for label in (2, 3) for side in (0, 1)]
    denoiser = of_learned_variance(model.autoencoder.latent, 5) if variance else model.denoiser
    denoiser = disturbed(denoiser.requires_grad_(False)).double()
    monkeypatch.setattr(Minimax, "model", lambda self, run: replace(model, denoiser=denoiser))
    monkeypatch.setattr(Minimax, "latents", lambda *given, **options: Drawing.latents(*given, **options).double())
    with doubled():
        network = copy.deepcopy(denoiser)
        restored(network, {name: one + 1 for name, one in tunable(network).items()})  # by the phase before
        found = method._learned(run, 1, network)
        classes = torch.tensor([2] * 24 + [3] * 24)
        rng = Rng(0).within("minimax", 1)
        expected = learned_slowly(method, copy.deepcopy(denoiser), torch.cat(parts).double(), classes, rng)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-4 * method.lr)
        assert (one - tunable(denoiser)[name]).abs().max() > 0.1 * method.lr or "to_k" in name  # softmax ignores it


def drawn_by(method, run, network, label):
    """The images of a class, one by one."""
    classes, model, made = torch.tensor([label]), method.model(run), []
    for place in range(method.ipc):
        noise = method.noise(run, model, classes, torch.tensor([place]))
        made.append(model.decoded(sampling.drawn(network.eval(), classes, noise, method.sampler))[0])
    return torch.stack(made)


def test_each_phase_begins_from_the_weights_as_they_were_and_draws_its_own_classes():
    """Two classes at once, of three, beside networks that have learned a phase each, from copies of the first one."""
    source, method = toy_source(classes=3), replace(TOLD, classes_together=10)
    run, networks = run_of(source), []
    for phase in range(2):
        networks.append(copy.deepcopy(method.model(run).denoiser))
        restored(networks[phase], method._learned(run, phase, networks[phase]))
    expected = torch.stack([drawn_by(method, run, networks[label // 2], label) for label in range(3)])
    for label, other in ((0, 1), (1, 1), (2, 0)):
        assert (drawn_by(method, run, networks[other], label) - expected[label]).abs().max() > 0.01
    classes, places = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([1, 1, 0, 0, 0])
    for order in ([0, 1, 2, 3, 4], [4, 1], [3], [2]):
        images = method.images(run, classes[order], places[order])
        torch.testing.assert_close(images, expected[classes[order], places[order]], rtol=1e-4, atol=1e-4)
    images, targets = synthesize(method, source, device="cpu").tensors()
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(images, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)


# Going on -------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """Counts steps, in ``done``, and calls ``then`` at each; blocks are of five."""
    counted, loss = SimpleNamespace(done=0, then=lambda done: None), Minimax._loss

    def counting(*given):
        counted.done += 1
        counted.then(counted.done)
        return loss(*given)

    monkeypatch.setattr(Minimax, "_loss", counting)
    monkeypatch.setattr(growing, "_BLOCK", 5)
    return counted


def test_an_interrupted_fine_tuning_goes_on_to_the_same_bits(tmp_path, steps):
    """In the second of two phases, of 7 steps each: after a block of 5 it stops."""
    source, method = toy_source(classes=3), replace(TOLD, iterations=7)
    whole, _ = synthesize(method, source, device="cpu", out=tmp_path / "whole", store=tmp_path / "whole").tensors()
    assert steps.done == 14
    steps.done, steps.then = 0, lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 8 else None
    with pytest.raises(Stopped):
        synthesize(method, source, device="cpu", out=tmp_path / "out", store=tmp_path / "store")
    assert steps.done == 7 + 5
    images, _ = synthesize(method, source, device="cpu", out=tmp_path / "out", store=tmp_path / "store").tensors()
    assert steps.done == 14
    assert torch.equal(images, whole)
    assert not list((tmp_path / "store" / "minimax").rglob("progress.json"))


@pytest.mark.parametrize("part", ["denoiser", "autoencoder", None])
def test_what_models_learned_that_have_changed_since_is_not_mixed_with_them(part, tmp_path, steps):
    """Neither steps of an interrupted fine-tuning nor a phase that is finished; where none changed, both are used."""
    source, method = toy_source(classes=2), replace(TOLD, iterations=6)

    def learned(folder, change, give_way=lambda: None):
        run = run_of(source, tmp_path / folder, shared=Shared(tmp_path / folder / "shared", give_way))
        model = method.model(run)
        if change is not None:
            for tensor in (*getattr(model, change).parameters(), *getattr(model, change).buffers()):
                tensor.mul_(1.01)
        begun = steps.done
        return method._phase(run, 0).state_dict(), steps.done - begun

    def stop():
        if steps.done:
            raise Stopped(signal.SIGTERM, 0, tmp_path)

    expected, done = learned("clean", part)
    assert done == 6
    steps.done = 0
    with pytest.raises(Stopped):
        learned("store", None, stop)
    assert steps.done == 5
    for change, number in ((part, 6), (None, 1), (None, 0), (part, 0)) if part else ((None, 1), (None, 0)):
        found, done = learned("store", change)
        assert done == number
        same = [torch.equal(one, expected[name]) for name, one in found.items()]
        assert all(same) is (change == part)


def test_what_a_phase_learns_is_known_by_all_that_decides_it(tmp_path):
    """The digests of a phase, of the same settings again, and of others."""
    source, fusion = toy_source(classes=3), CASES["EVLF"].fusion

    def identity(method=TOLD, phase=0, seed=0, moved=None, of=source):
        run = run_of(of, tmp_path, seed)
        if moved is not None:
            next(moved(method, run).parameters()).view(-1)[0] += 1e-3
        return method._identity(run, phase)

    fused, darker = replace(TOLD, fusion=fusion), toy_source(classes=3, seed=1)
    assert identity() == identity()
    assert identity(fused) == identity(fused)
    digests = [
        identity(),
        identity(phase=1),
        identity(seed=1),
        identity(of=darker),
        identity(replace(TOLD, lr=0.03)),
        identity(moved=lambda method, run: method.model(run).denoiser),
        identity(fused),
        identity(fused, moved=lambda method, run: method.fused(run).fusion),
    ]
    assert len(set(digests)) == len(digests)


def test_a_memory_holds_a_mini_batch_of_one_class():
    with pytest.raises(InvalidSetting, match="at least batch_size, 8"):
        Minimax(memory=7)


# What a phase is kept under --------------------------------------------------------------------------------------


def test_what_is_tuned_depends_on_no_setting_of_the_drawing(source):
    run = run_of(source)
    digest = TOLD._identity(run, 0)
    for same in ({"ipc": 7}, {"sampler": Sampler(steps=3)}, {"classes_together": 1}, {"redraw": Redraw()}):
        assert replace(TOLD, **same)._identity(run, 0) == digest
    for other in ({"lr": 0.5}, {"iterations": 9}, {"weighted": True}, {"models": replace(TOLD.models, seed=1)}):
        assert replace(TOLD, **other)._identity(run, 0) != digest
    assert TOLD._identity(run, 1) != digest
    assert TOLD._identity(run_of(source, seed=1), 0) != digest


def test_settings_that_do_not_fit_are_refused_before_anything_is_tuned(source, monkeypatch):
    monkeypatch.setattr(Minimax, "_learned", None)
    with pytest.raises(InvalidSetting, match="the channels of these latents"):
        synthesize(replace(TOLD, sampler=Sampler(steps=3, guided=99)), source, device="cpu")
