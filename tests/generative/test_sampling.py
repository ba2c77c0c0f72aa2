"""Samplers against diffusers' schedulers and closed forms, guidance, pulls and starts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsdistill.core.rng import Rng
from dsdistill.errors import InvalidSetting
from dsdistill.generative.bound import variance_bound
from dsdistill.generative.denoiser import COSINE, ByClass, Schedule, small_transformer
from dsdistill.generative.sampling import Pull, Sampler, Start, drawn, noise_numbers

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}


class Exact(nn.Module):
    """The denoiser of latents that are N(0, I): ε̂ = √(1 − ᾱ) x."""

    def __init__(self, schedule, learned=None):
        super().__init__()
        self.schedule, self.learned = schedule, learned
        self.config = SimpleNamespace(in_channels=4, num_embeds_ada_norm=2)

    def forward(self, noisy, timestep, class_labels):
        noise = (1 - self.schedule.at(timestep, noisy)).sqrt() * noisy
        noise = noise * (1 + 0.1 * class_labels.view(-1, 1, 1, 1))  # the null class, 2, says another thing
        if self.learned is not None:
            noise = torch.cat([noise, torch.full_like(noise, self.learned)], 1)
        return SimpleNamespace(sample=noise)


def exact(config=LINEAR, learned=None):
    schedule = Schedule(config)
    return ByClass(Exact(schedule, learned), schedule, null=2)


def noise_of(sampler, count=2, dtype=torch.float64, side=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(noise_numbers(sampler), count, 4, side, side, generator=generator, dtype=dtype)


def draw(denoiser, sampler, dtype=torch.float64, **more):
    return drawn(denoiser, torch.zeros(2, dtype=torch.int64), noise_of(sampler, dtype=dtype), sampler, **more)


@pytest.mark.parametrize("steps", [10, 25, 50, 100, 250])
def test_times_are_respaced_as_diffusers_does_in_linspace(steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert Schedule(LINEAR).respaced(steps).tolist() == scheduler.timesteps.tolist()
    if steps == 50:
        assert scheduler.timesteps.tolist()[:-4:-1] == [0, 20, 41]


@pytest.mark.parametrize(
    "config", [LINEAR, COSINE, {**LINEAR, "prediction_type": "sample"}], ids=lambda c: str(c)[-20:]
)
def test_predictions_of_each_kind_tell_the_same(config):
    schedule, generator = Schedule(config), torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    times = torch.tensor([5, 500, 990])
    noisy = schedule.noisy(clean, noise, times)
    found = schedule.clean(schedule.target(clean, noise, times), noisy, times)
    torch.testing.assert_close(found[0], clean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize("learned", [None, 0.3])
def test_steps_are_those_of_the_library(kind, learned, monkeypatch):
    """Every step from where ours is, with the noise that ours takes."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    if kind == "ddim" and learned is not None:
        pytest.skip("DDIM takes no variance")
    denoiser, sampler = exact(learned=learned), Sampler(kind=kind, steps=20, guidance=1.5)
    noise = noise_of(sampler, dtype=torch.float32)
    # DDIM of the library takes times at even distances for granted.
    spacing = "linspace" if kind == "ddpm" else "leading"
    common = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": spacing, "clip_sample": False}
    variance = {} if kind == "ddim" else {"variance_type": "fixed_small" if learned is None else "learned_range"}
    scheduler = (DDPMScheduler if kind == "ddpm" else DDIMScheduler)(**common, **variance)
    scheduler.set_timesteps(20)
    monkeypatch.setattr(denoiser.schedule, "respaced", lambda steps: scheduler.timesteps)
    latents, classes = noise[0], torch.zeros(2, dtype=torch.int64)
    place = 0
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *given, **more: noise[1 + place])
    for time in scheduler.timesteps:
        told = denoiser(latents, time.repeat(2), classes)
        plain = denoiser(latents, time.repeat(2), classes, torch.ones(2, dtype=torch.bool))
        guided = plain + 1.5 * (told - plain)
        if learned is not None:
            guided[:, 4:] = told[:, 4:]
        latents = scheduler.step(guided, time, latents).prev_sample
        place += 1
    torch.testing.assert_close(drawn(denoiser, classes, noise, sampler), latents, rtol=1e-4, atol=1e-4)


def test_the_solver_draws_from_the_same_distribution():
    """Of standard normal latents it makes standard normal ones; with the exact denoiser, nearly the noise itself."""
    sampler = Sampler(kind="dpm", steps=20, guidance=1)
    found = draw(exact(), sampler, torch.float32)
    assert float((found - noise_of(sampler, dtype=torch.float32)[0]).abs().mean()) < 0.3
    with pytest.raises(InvalidSetting, match=r"sampler\.kind = 'dpm'"):
        draw(exact(), sampler, pull=Pull(torch.zeros(2, 4, 4, 4), 0.1, 0))


def test_guidance_of_one_is_the_class_and_of_zero_none():
    denoiser, classes = exact(), torch.zeros(2, dtype=torch.int64)
    noisy = noise_of(Sampler())[0]
    times = torch.full((2,), 300)
    told, plain = denoiser(noisy, times, classes), denoiser(noisy, times, classes, torch.ones(2, dtype=torch.bool))
    assert not torch.allclose(told, plain)
    torch.testing.assert_close(denoiser.said(noisy, 300, classes, 1).noise, told, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoiser.said(noisy, 300, classes, 0).noise, plain, rtol=1e-6, atol=1e-6)
    some = denoiser.said(noisy, 300, classes, 3, guided=3).noise
    torch.testing.assert_close(some[:, 3:], told[:, 3:])
    torch.testing.assert_close(some[:, :3], (plain + 3 * (told - plain))[:, :3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_pull_of_nothing_is_none_and_more_of_it_comes_nearer(kind):
    modes = torch.full((2, 4, 4, 4), 0.7, dtype=torch.float64)
    sampler = Sampler(kind=kind, steps=50, guidance=1)
    plain = draw(exact(), sampler)
    assert torch.equal(draw(exact(), sampler, pull=Pull(modes, 0.0, 25)), plain)
    assert torch.equal(draw(exact(), sampler, pull=Pull(modes, 0.1, 50)), plain)
    strengths = [draw(exact(), sampler, pull=Pull(modes, strength, 25)) for strength in (0.0, 0.05, 0.1, 0.2)]
    distances = [float((made - modes).norm()) for made in strengths]
    assert distances == sorted(distances, reverse=True)
    stops = [
        float((draw(exact(), sampler, pull=Pull(modes, 0.1, until)) - modes).norm()) for until in (50, 40, 25, 10, 0)
    ]
    assert stops[0] > stops[-1] + 0.1
    assert kind == "ddim" or stops == sorted(stops, reverse=True)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize("learned", [None, 0.3])
def test_a_pulled_step_by_hand(kind, learned):
    """Of two steps the first is pulled; the denoiser is the exact one of N(0, I)."""
    denoiser, sampler = exact(learned=learned), Sampler(kind=kind, steps=2, guidance=1)
    modes, strength, noise = torch.full((2, 4, 4, 4), 0.7, dtype=torch.float64), 0.3, noise_of(sampler)
    found = draw(denoiser, sampler, pull=Pull(modes, strength, 0))
    (now, then), x = denoiser.schedule.kept[denoiser.schedule.respaced(2)], noise[0]
    guess = (1 - now).sqrt() * x
    clean = (x - (1 - now).sqrt() * guess) / now.sqrt()
    gap = strength * (modes - clean)
    if kind == "ddim":
        moved = guess - (1 - now).sqrt() * gap
        x = then.sqrt() * (x - (1 - now).sqrt() * moved) / now.sqrt() + (1 - then).sqrt() * moved
    else:
        beta = 1 - now / then
        least = beta * (1 - then) / (1 - now)
        share = 0.0 if learned is None else (learned + 1) / 2
        deviation = (0.5 * (share * beta.log() + (1 - share) * least.log())).exp()
        mean = then.sqrt() * beta / (1 - now) * clean + (now / then).sqrt() * (1 - then) / (1 - now) * x
        x = mean + deviation * gap + deviation * noise[1]
    last = (x - (1 - then).sqrt() * (1 - then).sqrt() * x) / then.sqrt()
    torch.testing.assert_close(found, last, rtol=1e-5, atol=1e-6)


def test_guidance_leaves_variances_alone_and_steps_have_bounds():
    denoiser = exact(learned=0.3)
    said = denoiser.said(noise_of(Sampler())[0], 500, torch.zeros(2, dtype=torch.int64), 3.0, guided=7)
    torch.testing.assert_close(said.variance, torch.full_like(said.variance, 0.65))
    torch.testing.assert_close(said.noise, denoiser.said(noise_of(Sampler())[0], 500, torch.zeros(2).long(), 3.0).noise)
    with pytest.raises(InvalidSetting, match="at most 1000"):
        draw(exact(), Sampler(steps=1001))
    with pytest.raises(InvalidSetting):
        Sampler(steps=1)


def test_the_last_step_adds_no_noise():
    sampler = Sampler(kind="ddpm", steps=5, guidance=1)
    noise = noise_of(sampler)
    other = noise.clone()
    other[-1] += 1
    classes = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(drawn(exact(), classes, noise, sampler), drawn(exact(), classes, other, sampler))
    other[-2] += 1
    assert not torch.equal(drawn(exact(), classes, noise, sampler), drawn(exact(), classes, other, sampler))


def test_a_start_skips_the_first_part_of_the_way():
    sampler, asked = Sampler(kind="ddim", steps=50, guidance=1), []
    denoiser = exact()
    forward = denoiser.network.forward

    def spy(noisy, timestep, class_labels):
        asked.append(int(timestep[0]))
        return forward(noisy, timestep, class_labels)

    denoiser.network.forward = spy
    latents = torch.full((2, 4, 4, 4), 0.5, dtype=torch.float64)
    found = draw(denoiser, sampler, start=Start(latents, 0.7))
    assert len(asked) == 35
    assert asked[0] == int(denoiser.schedule.respaced(50)[15])
    near = draw(exact(), sampler, start=Start(latents, 0.02))
    assert float((near - latents).norm()) < 0.2 * float((found - latents).norm())


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm"])
def test_an_image_does_not_depend_on_those_beside_it(kind):
    denoiser = trained_like(small_transformer((4, 4, 4), 3, 2, 2, 16, Rng(0)))
    sampler = Sampler(kind=kind, steps=6, guidance=2)
    classes, noise = torch.tensor([0, 1, 2, 1]), noise_of(sampler, 4, torch.float32)
    whole = drawn(denoiser, classes, noise, sampler)
    parts = [drawn(denoiser, classes[i : i + 1], noise[:, i : i + 1], sampler) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[1], whole[3])


def trained_like(denoiser):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return denoiser.eval().requires_grad_(False)


# The transformer -----------------------------------------------------------------------------------------------


def test_a_new_transformer_says_zero_and_knows_its_classes():
    denoiser = small_transformer((4, 8, 8), 3, 2, 2, 16, Rng(0))
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    assert float(denoiser(noisy, times, torch.tensor([0, 2])).detach().abs().max()) == 0
    assert denoiser.null == 3
    same = small_transformer((4, 8, 8), 3, 2, 2, 16, Rng(0)).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in denoiser.state_dict().items())


def test_labels_are_dropped_from_outside_alone():
    denoiser = trained_like(small_transformer((4, 4, 4), 3, 3, 2, 16, Rng(0)))
    noisy, times = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500)
    classes = torch.tensor([0, 1, 2, 0])
    plain = denoiser(noisy, times, classes)
    denoiser.train()
    for _ in range(5):
        torch.testing.assert_close(denoiser(noisy, times, classes), plain)
    every = denoiser(noisy, times, classes, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(every, denoiser(noisy, times, torch.full((4,), 3)))
    assert not torch.allclose(every, plain)


EPSILON = Schedule({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"})


def said_of(seed=0):
    """Latents, noisy ones at a few levels, and a raw output whose noise is right and whose variances are random."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.tensor([0, 1, 40, 999])
    latents = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    shares = torch.rand(latents.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return latents, EPSILON.noisy(latents, noise, times), torch.cat([noise, shares], 1), times


def test_the_bound_of_a_variance_is_that_of_distributions():
    latents, noisy, raw, times = said_of()
    raw[:, :2] += 0.1
    kept = EPSILON.kept
    expected = []
    for row, time in enumerate(times.tolist()):
        before = kept[time - 1] if time else torch.ones((), dtype=torch.float64)
        beta = 1 - kept[time] / before
        least = beta * (1 - before) / (1 - kept[time])
        first = (1 - kept[1] / kept[0]) * (1 - kept[0]) / (1 - kept[1])
        lowest = least if time else first
        share = (raw[row, 2:] + 1) / 2
        deviation = (0.5 * (share * beta.log() + (1 - share) * lowest.log())).exp()
        clean = (noisy[row] - (1 - kept[time]).sqrt() * raw[row, :2]) / kept[time].sqrt()
        means = [
            before.sqrt() * beta / (1 - kept[time]) * one
            + (kept[time] / before).sqrt() * (1 - before) / (1 - kept[time]) * noisy[row]
            for one in (clean, latents[row])
        ]
        found = torch.distributions.Normal(means[0], deviation)
        if time:
            true = torch.distributions.Normal(means[1], lowest.sqrt())
            expected.append(torch.distributions.kl_divergence(true, found).mean() / math.log(2))
        else:
            bins = found.cdf(latents[row] + 1 / 255) - found.cdf(latents[row] - 1 / 255)
            expected.append(-bins.clamp_min(1e-12).log2().mean())
    together = variance_bound(EPSILON, raw, latents, noisy, times)
    torch.testing.assert_close(together, torch.stack(expected).mean())


def test_the_bound_is_zero_for_the_true_variance_and_moves_no_mean():
    latents, noisy, raw, times = said_of()
    raw[:, 2:] = -1  # the least variance, which is that of x_{t-1} given both ends
    part = slice(1, None)
    value = variance_bound(EPSILON, raw[part], latents[part], noisy[part], times[part])
    assert float(value) == pytest.approx(0, abs=1e-9)
    raw[:, 2:] = 0.3
    raw.requires_grad_()
    variance_bound(EPSILON, raw, latents, noisy, times).backward()
    assert not raw.grad[:, :2].any()
    assert raw.grad[:, 2:].all()
