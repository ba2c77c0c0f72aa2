"""Training small models: steps against loops over images, and what is kept of them when something comes between."""

import copy
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from generative import pipelines
from torch import nn

from dsdistill.core.rng import Rng
from dsdistill.engine import Run, Shared
from dsdistill.engine.shared import Rehearsal
from dsdistill.errors import Stopped
from dsdistill.experts.progress import Progress
from dsdistill.generative import growing
from dsdistill.generative.autoencoder import KL
from dsdistill.generative.denoiser import small_transformer
from dsdistill.generative.growing import (
    SIZES,
    Budget,
    Noised,
    denoising_loss,
    grow_autoencoder,
    grow_denoiser,
    repeated,
)
from dsdistill.testing import toy_source

SIZE = replace(SIZES["nano"], batch=8, lr=0.01)


def run_of(source=None, **shared):
    source = source or toy_source(classes=2, per_class=8)
    return Run(source, torch.device("cpu"), Rng(0), (0, 1), 100, shared=Shared(**shared))


# Autoencoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror_safe", [True, False])
def test_an_autoencoder_takes_the_steps_of_its_formula(mirror_safe):
    """Three steps on eight images, mirrored in the second one where that is safe."""
    source = copy.copy(toy_source())
    source.mirror_safe = mirror_safe
    squares = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    model = KL(pipelines.autoencoder().double(), 8, 1.0)
    expected = copy.deepcopy(model.model)
    grow_autoencoder(run_of(source), model, lambda rows: squares[rows], 8, 3 * 128, Rng(0), None)
    optimizer = torch.optim.Adam(expected.parameters(), lr=5e-4)
    for number in range(3):
        generator = Rng(0).at("autoencoder", number)
        images = squares[torch.randint(8, (8,), generator=generator)]
        images = images.flip(3) if mirror_safe and number == 1 else images
        spread, loss = torch.randn(8, 4, 4, 4, generator=generator), 0
        for image, noise in zip(images, spread, strict=True):
            mean, logarithm = expected.quant_conv(expected.encoder(image[None]))[0].chunk(2)
            made = expected.decode((mean + (logarithm / 2).exp() * noise)[None]).sample[0]
            kl = (mean**2 + logarithm.exp() - 1 - logarithm).sum() / 2
            loss = loss + (image - made).abs().mean() + 0.1 * (image - made).square().mean() + 1e-6 * kl
        optimizer.zero_grad()
        (loss / 8).backward()
        optimizer.step()
    for one, other in zip(model.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    means = torch.cat([expected.encode(square[None]).latent_dist.mean for square in squares])
    assert model.scale == pytest.approx(1 / float(means.detach().std()))


# Denoisers ------------------------------------------------------------------------------------------------------


def grown(samples, latents, seconds=None, run=None, size=SIZE):
    """A denoiser with random weights, in float64, and the same one after it has grown."""
    denoiser = small_transformer((2, 4, 4), 2, 1, 2, 4, Rng(0))
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    before, classes = copy.deepcopy(denoiser.double()), torch.arange(2).repeat_interleave(4)
    seen = grow_denoiser(run or run_of(), denoiser, latents, classes, size, samples, seconds, Rng(0), None)
    return before, denoiser, seen


@pytest.mark.parametrize("flips", [1, 2])
def test_a_denoiser_is_the_moving_average_of_a_loop_over_latents(flips):
    """Twenty steps, the step size reaching its height with the second one."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(flips, 8, 2, 4, 4, generator=generator, dtype=torch.float64)
    model, found, seen = grown(20 * 8 + 7, latents)
    average = [one.detach().clone() for one in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    without, mirrored, clipped = 0, 0, 0
    for number in range(20):
        generator, loss = Rng(0).at("denoiser", number), 0
        rows, sides, times = (torch.randint(most, (8,), generator=generator) for most in (8, flips, 1000))
        drop, noise = torch.rand(8, generator=generator) < 0.1, torch.randn(8, 2, 4, 4, generator=generator)
        for place in range(8):
            clean, level = latents[sides[place], rows[place]], model.schedule.kept[times[place]]
            signal, rest = level.sqrt(), (1 - level).sqrt()
            label = 2 if drop[place] else int(rows[place]) // 4
            said = model((signal * clean + rest * noise[place])[None], times[place][None], torch.tensor([label]))[0]
            loss = loss + (said - (signal * noise[place] - rest * clean)).square().mean() / 8
        model.zero_grad()
        loss.backward()
        norm = sum(float(one.grad.square().sum()) for one in model.parameters()) ** 0.5
        for one in model.parameters():
            one.grad /= max(1.0, norm)
        optimizer.param_groups[0]["lr"] = 0.01 * (0.5 if number == 0 else 1)
        optimizer.step()
        decay = (1 + number) / (10 + number)
        weights = [one.detach() for one in model.parameters()]
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
        without, mirrored, clipped = without + int(drop.sum()), mirrored + int(sides.sum()), clipped + (norm > 1)
    assert without
    assert clipped
    assert bool(mirrored) is (flips == 2)
    assert seen == 160
    assert not any(one.requires_grad for one in found.parameters())
    for one, other in zip(found.parameters(), average, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_long_training_warms_up_for_500_steps(monkeypatch):
    sizes, latents = [], torch.randn(1, 8, 2, 4, 4, dtype=torch.float64)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: sizes.append(self.param_groups[0]["lr"]))
    monkeypatch.setattr(growing, "repeated", lambda run, what, budget, kept, step: [step(0), step(249), step(600)][0])
    grown(8 * 10**4, latents)
    assert sizes == pytest.approx([0.01 / 500, 0.005, 0.01])
    grown(8 * 1000, latents)
    assert sizes[3:] == pytest.approx([0.01 / 100, 0.01, 0.01])


def test_a_tenth_of_labels_is_left_out():
    """Of what the denoiser is asked, over many batches."""
    asked, latents = [], torch.zeros(1, 2, 1, 2, 2)

    class Asked(nn.Module):
        schedule = small_transformer((1, 2, 2), 2, 1, 1, 4, Rng(0)).schedule

        def predicted(self, noisy, times, classes, drop):
            asked.append(drop.float().mean())
            return torch.zeros_like(noisy)

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        denoising_loss(Asked(), Noised.drawn(latents, torch.arange(2), 500, 1000, generator))
    assert float(torch.stack(asked).mean()) == pytest.approx(0.1, abs=0.01)


# Interruptions --------------------------------------------------------------------------------------------------


class Training:
    """A small one, of 130 steps, that may fail at one of them or be stopped at the end of a block."""

    def __init__(self, folder, fails_at=None, stops=False):
        def give_way():
            if stops:
                raise Stopped(signal.SIGTERM, 0, folder)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Linear(3, 1)
        self.made, self.fails_at = [], fails_at
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.run = run_of(give_way=give_way)
        self.progress = Progress(folder, self.model, self.optimizer)

    def step(self, number):
        if number == self.fails_at:
            raise OSError("the disk is gone")
        self.made.append(number)
        loss = self.model(torch.randn(4, 3, generator=Rng(0).at("step", number))).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def __call__(self):
        loss = repeated(self.run, "it", Budget(130), self.progress, self.step)
        return torch.tensor(loss), *(one.detach() for one in self.model.parameters())


def kept_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_training_that_is_stopped_is_kept_and_one_that_fails_leaves_what_was_kept(tmp_path):
    whole, folder = Training(None)(), tmp_path / "kept"
    with pytest.raises(OSError, match="the disk is gone"):
        Training(folder, fails_at=70)()
    assert kept_in(folder) == {}
    with pytest.raises(Stopped):
        Training(folder, stops=True)()
    kept = kept_in(folder)
    assert kept.keys() == {"progress.json", "epoch-00050.safetensors"}
    failing = Training(folder, fails_at=120)
    with pytest.raises(OSError, match="the disk is gone"):
        failing()
    assert failing.made == list(range(50, 120))
    assert kept_in(folder) == kept
    last = Training(folder)
    assert all(torch.equal(one, other) for one, other in zip(last(), whole, strict=True))
    assert last.made == list(range(50, 130))


def test_what_is_written_from_time_to_time_is_of_the_last_block(tmp_path):
    """As often as may be; the failure then is in the middle of the third block."""
    whole, failing = Training(None)(), Training(tmp_path, fails_at=120)
    failing.progress.every = -1.0
    with pytest.raises(OSError, match="the disk is gone"):
        failing()
    assert kept_in(tmp_path).keys() == {"progress.json", "epoch-00100.safetensors"}
    last = Training(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(last(), whole, strict=True))
    assert last.made == list(range(100, 130))


def test_a_budget_ends_with_its_steps_or_its_seconds(monkeypatch):
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(growing, "time", SimpleNamespace(monotonic=lambda: clock.now))
    endless, short, timed = Budget(2), Budget(2, 10.0), Budget(10**6, 10.0)
    clock.now = 100.0
    assert not any(one.over for one in (endless, short, timed))  # something is done in any case
    endless.done = short.done = timed.done = 1
    assert [one.over for one in (endless, short, timed)] == [False, True, True]
    clock.now = 14.9
    assert [one.over for one in (endless, short, timed)] == [False, False, False]
    endless.done = short.done = 2
    assert [one.over for one in (endless, short, timed)] == [True, True, False]


def test_seconds_count_anew_and_end_a_training_between_blocks(tmp_path, monkeypatch):
    """Each step takes a second by this clock; the first call is stopped after a block."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(growing, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def budget_after(stops):
        training, budget = Training(tmp_path, stops=stops), Budget(400, 70.0)

        def step(number):
            clock.now += 1
            return training.step(number)

        try:
            repeated(training.run, "it", budget, training.progress, step)
        except Stopped:
            assert stops
        return budget.done

    assert budget_after(True) == 50
    assert budget_after(False) == 150


def test_a_rehearsal_makes_four_steps_and_counts_the_others(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(growing, "time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: clock.now))
    for seconds, expected in ((None, 2.0 * 126), (100.0, 100.0)):
        rehearsal, training = Rehearsal(), Training(tmp_path)

        def step(number, training=training):
            clock.now += 2
            return training.step(number)

        repeated(run_of(rehearsal=rehearsal), "it", Budget(130, seconds), training.progress, step)
        assert training.made == [0, 1, 2, 3]
        assert rehearsal.seconds == pytest.approx(expected)
    assert kept_in(tmp_path) == {}
