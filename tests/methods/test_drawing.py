"""Methods that draw: what an image depends on, modes, fusion, and models that are found again."""

import copy
import hashlib
import logging
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from generative import pipelines
from methods.cases import BLURRED, CASES
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from dsdistill import estimate, synthesize
from dsdistill.core.rng import Rng
from dsdistill.data import ImageSource
from dsdistill.engine import Run, Shared
from dsdistill.errors import BadArtifact, BadData, Diverged, InvalidSetting, Stopped
from dsdistill.generative import Fusion, Weights, fused, fusing, growing
from dsdistill.generative.denoiser import COSINE, Said, Schedule
from dsdistill.generative.method import Drawing
from dsdistill.generative.models import Models, frame_of, latents_of, model_of, patch_of
from dsdistill.generative.sampling import Sampler, _Step, furthest
from dsdistill.generative.text import TextStates
from dsdistill.methods import D4M, EVLF, MGD3, Diffusion, Minimax
from dsdistill.testing import toy_source

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def smaller_models(monkeypatch):
    monkeypatch.setitem(growing.SIZES, "nano", replace(growing.SIZES["nano"], layers=1, heads=2, width=16))


@pytest.fixture(scope="module")
def source():
    return toy_source(classes=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A DiT of five classes, as its pipeline is saved; the scale of its autoencoder is 0.5."""
    pytest.importorskip("transformers")
    return pipelines.dit(tmp_path_factory.mktemp("pretrained") / "dit", num_layers=1)


def weights_in(folder, classes=(0, 1, 4)):
    return Models(weights=Weights(path=str(folder), class_ids=classes))


def made(method, source, store, **options):
    return synthesize(method, source, device="cpu", store=store, progress=False, **options).tensors()


def run_of(source, store=None, seed=0):
    return Run(source.train_only(), CPU, Rng(seed), (0, 1, 2), 100, shared=Shared(), store=store)


@pytest.mark.parametrize("name", ["Diffusion", "Minimax"])
def test_the_first_images_of_a_larger_set_are_those_of_a_smaller_one(name, source, store):
    method = CASES[name]
    few, of_few = made(method, source, store)
    many, of_many = made(replace(method, ipc=4), source, store)
    for label in range(3):
        torch.testing.assert_close(many[of_many == label][:2], few[of_few == label], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Diffusion", "D4M", "MGD3", "EVLF"])
def test_an_image_depends_on_neither_job_nor_chunk(name, source, store):
    method = CASES[name]
    images, _ = made(method, source, store)
    apart, _ = made(replace(method, classes_together=1), source, store, chunk=1)
    torch.testing.assert_close(apart, images, rtol=1e-4, atol=1e-4)
    other, _ = made(method, source, store, seed=1)
    assert not torch.allclose(other, images, atol=1e-2)


def test_pixels_are_within_their_range(source, store):
    images, _ = made(Diffusion(**BLURRED), source, store)
    unit = source.normalization.to_unit(images)
    assert float(unit.min()) > -1e-5
    assert float(unit.max()) < 1 + 1e-5


def test_modes_are_the_points_where_there_are_as_many(source, store):
    run = run_of(source, store)
    method = MGD3(ipc=12, models=BLURRED["models"])
    modes, latents = method.modes(run, 1), method.latents(run, 1)
    assert len(latents) == 12
    order = torch.cdist(modes.flatten(1), latents.flatten(1)).argmin(1)
    torch.testing.assert_close(modes, latents[order])
    one = replace(method, ipc=1).modes(run, 1)
    torch.testing.assert_close(one[0], latents.mean(0), rtol=1e-4, atol=1e-4)


def test_a_pull_and_a_start_are_towards_and_from_modes(source, store):
    run, classes, places = run_of(source, store), torch.tensor([0, 2]), torch.tensor([1, 0])
    method = replace(CASES["MGD3"], until=7, strength=0.3)
    pull = method.pull(run, classes, places)
    assert torch.equal(pull.modes, torch.stack([method.modes(run, 0)[1], method.modes(run, 2)[0]]))
    assert (pull.strength, pull.until) == (0.3, 7)
    assert torch.equal(D4M(**BLURRED).begin(run, classes, places).latents, pull.modes)


def test_unfused_evlf_is_mgd3_and_a_fusion_that_learned_nothing_is_the_identity(source, store):
    fused = CASES["EVLF"]
    settings = {name: getattr(fused, name) for name in ("ipc", "models", "sampler", "until", "classes_together")}
    plain, _ = made(MGD3(**settings), source, store)
    assert torch.equal(made(EVLF(**settings, fusion=None), source, store)[0], plain)
    run = run_of(source, store)
    still = replace(fused, fusion=replace(fused.fusion, lr=1e-30, lr_text=1e-30, weight_decay=0.0))
    torch.testing.assert_close(still.latents(run, 0), MGD3(**settings).latents(run, 0), rtol=0, atol=1e-6)
    assert not torch.equal(fused.latents(run, 0), MGD3(**settings).latents(run, 0))


def test_a_fusion_is_shared_by_runs_on_the_same_images_and_names(source, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(fused, "train_fusion", lambda *a, **k: trained.append(1) or fusing.train_fusion(*a, **k))
    method = CASES["EVLF"]
    first = made(method, source, tmp_path)
    assert len(trained) == 1
    made(method, source, tmp_path, seed=1)
    made(replace(method, ipc=1), source, tmp_path)
    again = made(method, source, tmp_path)
    assert len(trained) == 1
    assert torch.equal(again[0], first[0])
    made(replace(method, fusion=replace(method.fusion, steps=method.fusion.steps + 1)), source, tmp_path)
    named = copy.copy(source)
    named.classes = ("one", "two", "three")
    made(method, named, tmp_path)
    assert len(trained) == 3
    for folder in (tmp_path / "fusion").iterdir():  # damaged ones are made again
        for file in folder.glob("fusion/*.safetensors"):
            file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(made(method, source, tmp_path)[0], first[0])
    assert len(trained) == 4


def test_a_fusion_learns_from_mirrored_latents_too_where_that_is_safe(source, monkeypatch):
    fetches, rows = [], torch.arange(36).flip(0)

    def train(fetch, *given, **options):
        fetches.append(fetch)
        return fusing.train_fusion(fetch, *given, **options)

    monkeypatch.setattr(fused, "train_fusion", train)
    unsafe = copy.copy(source)
    unsafe.mirror_safe = False
    for of, most in ((source, 2), (unsafe, 1)):
        run = run_of(of)
        CASES["EVLF"].fused(run)
        both = latents_of(run, CASES["EVLF"].models)
        found = fetches.pop()(rows, torch.Generator().manual_seed(0))
        sides = [
            [torch.equal(one, side[row]) for side in both].index(True) for row, one in zip(rows, found, strict=True)
        ]
        assert len(both) == len(set(sides)) == most


def test_a_set_says_which_text_encoder_its_latents_were_fused_by(source, store, monkeypatch):
    states = TextStates(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 4, 3]))
    monkeypatch.setattr(fused, "clip_states", lambda *given, **options: states)
    monkeypatch.setattr("dsdistill.generative.method.clip_place", lambda *given, **options: None)
    plain = CASES["EVLF"]
    told = synthesize(plain, source, device="cpu", store=store).recipe.notes
    read = replace(plain, fusion=replace(plain.fusion, text="some/clip", text_width=128))
    more = synthesize(read, source, device="cpu", store=store).recipe.notes
    digest = hashlib.sha256(states.states.numpy().tobytes()).hexdigest()[:12]
    assert more == (*told, f"fused with names by the text encoder 'some/clip' (states sha256 {digest})")


def test_modes_are_means_of_clusters_the_largest_first(source, store):
    run, method, uneven = run_of(source, store), MGD3(ipc=4, models=BLURRED["models"]), 0
    for label in range(3):
        modes, latents = method.modes(run, label).flatten(1), method.latents(run, label).flatten(1)
        nearest = torch.cdist(latents, modes).argmin(1)
        sizes = nearest.bincount(minlength=4).tolist()
        assert sizes == sorted(sizes, reverse=True)
        uneven += sizes[0] > sizes[3]
        means = torch.stack([latents[nearest == number].mean(0) for number in range(4)])
        torch.testing.assert_close(modes, means, rtol=1e-4, atol=1e-4)
    assert uneven == 3


def test_an_image_of_a_class_is_the_same_whatever_other_classes_there_are(pretrained, source):
    """Of the third and the first class alone, in that order: noise, modes, and what is drawn of them."""
    settings = {"ipc": 3, "sampler": Sampler(kind="ddpm", steps=3), "until": 0, "strength": 1.0}
    order = [2, 0]
    images = torch.cat([source.images[12 * label : 12 * label + 12] for label in order])
    names, targets = [source.classes[label] for label in order], torch.arange(2).repeat_interleave(12)
    fewer = ImageSource("fewer", names, images, targets, normalization=source.normalization)
    every, some = (MGD3(**settings, models=weights_in(pretrained, ids)) for ids in ((0, 1, 4), (4, 0)))
    run, own = run_of(source), replace(run_of(fewer), classes=(0, 1))
    model, classes, places = every.model(run), torch.tensor([2, 0, 2]), torch.tensor([0, 0, 1])
    noise = every.noise(run, model, classes, places, 1)
    assert torch.equal(some.noise(own, model, torch.tensor([0, 1, 0]), places, 1), noise)
    assert len(set(noise[0, :, 0, 0, 0].tolist())) == 3
    for place, label in enumerate(order):
        torch.testing.assert_close(some.modes(own, place), every.modes(run, label))
    whole, labels = synthesize(every, source, device="cpu").tensors()
    part, others = synthesize(some, fewer, device="cpu").tensors()
    for place, label in enumerate(order):
        torch.testing.assert_close(part[others == place], whole[labels == label], rtol=1e-4, atol=1e-4)


def test_what_a_ddim_step_may_be_pulled_by():
    """By the steps themselves, of a latent that is its own clean one."""
    for config in (COSINE, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}):
        schedule, sampler = Schedule(config), Sampler(kind="ddim")
        kept, times = schedule.kept, schedule.respaced(50)
        said, moved = Said(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), None), []
        for place in range(50 - 26):
            step = _Step(float(kept[times[place]]), float(kept[times[place + 1]]), None)
            moved.append(float(step.ddim(said, torch.ones(1, dtype=torch.float64)) - step.ddim(said, None)))
        assert furthest(schedule, sampler, 25) == pytest.approx(max(moved))
    assert furthest(Schedule(COSINE), Sampler(kind="ddim"), 25) > 100
    linear = Schedule({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"})
    assert 0.2 < furthest(linear, Sampler(kind="ddim"), 25) < 0.25
    assert furthest(linear, Sampler(kind="ddim"), 50) == 0


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (MGD3(**{**BLURRED, "sampler": Sampler(kind="dpm")}), InvalidSetting, "where latents are pulled"),
        (MGD3(**{**BLURRED, "sampler": Sampler(kind="ddim"), "until": 0}), InvalidSetting, "pulls .* times too far"),
        (
            MGD3(**{**BLURRED, "sampler": Sampler(kind="ddpm"), "until": 49}),
            InvalidSetting,
            "below 49: of the 50 steps of the sampler none",
        ),
        (Diffusion(**{**BLURRED, "fusion": Fusion()}), InvalidSetting, "nothing is made of real latents"),
        (Diffusion(**{**BLURRED, "sampler": Sampler(guided=99)}), InvalidSetting, "the channels of these latents"),
        (MGD3(**{**BLURRED, "ipc": 13}), BadData, "fewer than the 13 images that as many modes take: 'class 0' .12."),
    ],
)
def test_what_cannot_be_drawn_is_refused(method, error, message, source, store):
    with pytest.raises(error, match=message):
        made(method, source, store)


# Models --------------------------------------------------------------------------------------------------------


def test_fewer_are_drawn_together_where_memory_runs_out(source, store, monkeypatch, caplog):
    images, _ = made(CASES["Diffusion"], source, store)
    tried, plain = [], type(CASES["Diffusion"]).images

    def short(self, run, classes, *others):
        tried.append(len(classes))
        if len(classes) > 2:
            raise RuntimeError("CUDA out of memory")
        return plain(self, run, classes, *others)

    monkeypatch.setattr(type(CASES["Diffusion"]), "images", short)
    torch.testing.assert_close(made(CASES["Diffusion"], source, store)[0], images, rtol=0, atol=1e-5)
    assert tried == [4, 2, 2, 2]  # two classes are a job, and the next one need not find out again
    assert "memory ran out while 4 images were drawn together; now 2 are" in caplog.text
    monkeypatch.setattr(type(CASES["Diffusion"]), "images", lambda *arguments: torch.empty(0)[3])
    with pytest.raises(IndexError):
        made(CASES["Diffusion"], source, store)


@pytest.mark.parametrize("name", ["weights.safetensors", "generative.json"])
def test_damaged_models_are_told_with_their_folder(name, source, tmp_path):
    method = Diffusion(ipc=1, models=Models(samples=64))
    images, _ = made(method, source, tmp_path)
    (folder,) = (tmp_path / "generative").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:-9] + b"123456789")
    with pytest.raises(BadArtifact, match=rf"damaged models .*: remove {folder}, and they are trained again"):
        made(method, source, tmp_path)
    shutil.rmtree(folder)
    assert torch.equal(made(method, source, tmp_path)[0], images)


def test_models_and_latents_are_found_again_and_tell_where_they_are_from(source, store, monkeypatch):
    models = Models(samples=50)
    first = model_of(run_of(source, store), models)
    latents = latents_of(run_of(source, store), models)
    monkeypatch.setattr(growing, "repeated", None)
    again = model_of(run_of(source, store, seed=5), models)
    assert again.digest == first.digest
    assert all(torch.equal(a, b) for a, b in zip(again.denoiser.parameters(), first.denoiser.parameters(), strict=True))
    monkeypatch.setattr(type(again), "encoded", None)
    assert torch.equal(latents_of(run_of(source, store), models), latents)
    assert latents.shape[:2] == (2, 36)  # mirrored ones too
    assert first.told[0].endswith("the denoiser on 64 latents")


def test_denoisers_see_scaled_latents_and_autoencoders_unscaled_ones(pretrained, source):
    """Against the autoencoder of the library, whose scale is 0.5; small images are drawn with 16 pixels."""
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(pretrained / "vae", local_files_only=True).requires_grad_(False)
    run, models = run_of(source), weights_in(pretrained)
    plain, model = Diffusion(models=models), model_of(run, models)
    pixels = source.images[12:24] / 127.5 - 1
    squares = interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    both = torch.cat([theirs.encode(one).latent_dist.mean for one in (squares, squares.flip(3))])
    for mirrored, means in ((False, both[:12]), (True, both)):
        torch.testing.assert_close(plain.latents(run, 1, mirrored=mirrored), 0.5 * means, rtol=1e-4, atol=1e-4)
        mixing = replace(plain, fusion=Fusion(steps=2, width=8, heads=2, text_width=8, residual=False))
        expected = 0.5 * mixing.fused(run).fuse(means, torch.ones(len(means), dtype=torch.int64))
        torch.testing.assert_close(mixing.latents(run, 1, mirrored=mirrored), expected, rtol=1e-4, atol=1e-4)
    decoded = theirs.decode(both / 0.5).sample.clamp(-1, 1)
    restored = interpolate(decoded, (8, 8), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(source.normalization.to_unit(model.decoded(both)), restored, rtol=1e-4, atol=1e-4)


def test_latents_by_an_autoencoder_that_changed_are_made_again(pretrained, source, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "dit")
    before = latents_of(run_of(source, tmp_path / "store"), weights_in(folder))
    pipelines.autoencoder(seed=5).save_pretrained(folder / "vae")
    after = latents_of(run_of(source, tmp_path / "store"), weights_in(folder))
    assert torch.equal(after, latents_of(run_of(source), weights_in(folder)))
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_run_does_not_go_on_with_other_weights_under_the_same_path(part, pretrained, source, tmp_path, monkeypatch):
    folder, images = shutil.copytree(pretrained, tmp_path / "dit"), Diffusion.images
    method = Diffusion(ipc=1, models=weights_in(folder), sampler=Sampler(steps=2), classes_together=1)
    whole, _ = made(method, source, tmp_path)

    def stopping(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return images(*given)

    monkeypatch.setattr(Diffusion, "images", stopping)
    with pytest.raises(Stopped):
        made(method, source, tmp_path, out=tmp_path / "out")
    monkeypatch.setattr(Diffusion, "images", images)
    tensors = load_file(folder / part / "diffusion_pytorch_model.safetensors")
    changed = {name: tensor + 0.1 for name, tensor in tensors.items()}
    save_file(changed, folder / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadData, match=r"this run began with other weights: .*; now .*; choose another output folder"):
        made(method, source, tmp_path, out=tmp_path / "out")
    assert not torch.equal(made(method, source, tmp_path, out=tmp_path / "other")[0], whole)
    shutil.copytree(pretrained, folder, dirs_exist_ok=True)
    assert torch.equal(made(method, source, tmp_path, out=tmp_path / "out")[0], whole)


def test_few_latents_are_warned_of(source, caplog):
    with caplog.at_level(logging.INFO, "dsdistill"):
        model_of(run_of(source), Models(samples=50))
    assert "below 1,000,000 images may show little more than the colours of their class" in caplog.text


def test_an_interrupted_training_goes_on_to_the_same_bits(source, tmp_path, monkeypatch):
    models = Models(samples=64 * 60)
    whole = model_of(run_of(source, tmp_path / "whole"), models)
    loss, done = growing.denoising_loss, []

    def stopping(*given):
        done.append(1)
        if len(done) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*given)

    monkeypatch.setattr(growing, "denoising_loss", stopping)
    method = Diffusion(ipc=1, models=models, sampler=Sampler(steps=2))
    with pytest.raises(Stopped, match="part of the training of the models"):
        synthesize(method, source, device="cpu", out=tmp_path / "out", store=tmp_path / "store")
    assert len(done) < 60
    synthesize(method, source, device="cpu", out=tmp_path / "out", store=tmp_path / "store")
    assert len(done) == 60
    found = model_of(run_of(source, tmp_path / "store"), models).denoiser
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), whole.denoiser.parameters(), strict=True))


def test_time_may_end_it_and_the_set_says_so(source):
    made = model_of(run_of(source), Models(samples=10**7, max_seconds=0.01))
    assert made.told[0].endswith(f"the denoiser on {64 * 50:,} latents")


def test_a_loss_that_is_not_finite_is_an_error(source, monkeypatch):
    loss = growing.denoising_loss
    monkeypatch.setattr(growing, "denoising_loss", lambda *given: math.nan * loss(*given))
    with pytest.raises((InvalidSetting, Diverged), match="diverged"):
        model_of(run_of(source), Models(samples=50))


def test_training_lowers_the_loss(source):
    losses = []
    for samples in (64, 64 * 150):
        model = model_of(run_of(source), Models(samples=samples))
        latents = latents_of(run_of(source), Models(samples=samples)) * model.autoencoder.scale
        generator = torch.Generator().manual_seed(0)
        seen = growing.Noised.drawn(latents, source.targets, 400, 1000, generator)
        losses.append(float(growing.denoising_loss(model.denoiser, seen)))
    assert losses[1] < 0.96 * losses[0]  # of noise, in which there is little to learn


def test_a_kl_autoencoder_has_unit_latents(monkeypatch):
    source = toy_source(classes=2, per_class=16, shape=(3, 16, 16))
    brief = replace(growing.SIZES["small"], images=3 * 128, samples=16, layers=1, heads=2, width=8, batch=8)
    monkeypatch.setitem(growing.SIZES, "small", brief)
    model = model_of(run_of(source), Models(size="small"))
    latents = latents_of(run_of(source), Models(size="small")) * model.autoencoder.scale
    assert latents.shape[2:] == (4, 8, 8)
    assert float(latents[0].std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("shape", "patch", "side"),
    [
        ((1, 8, 8), 2, 8),
        ((3, 32, 32), 4, 32),
        ((1, 28, 28), 4, 28),
        ((3, 30, 40), 4, 40),
        ((1, 10, 6), 2, 10),
        ((1, 5, 5), 1, 5),
    ],
)
def test_squares_suit_autoencoder_and_denoiser(shape, patch, side):
    source = toy_source(classes=2, per_class=2, shape=shape)
    assert patch_of(shape) == patch
    assert frame_of(source, Models()).side == side
    assert frame_of(source, Models(size="small")).side % 4 == 0


def test_a_dry_run_trains_nothing_in_full(source, tmp_path):
    cost = estimate(Diffusion(ipc=1, models=Models(samples=10**6), sampler=Sampler(steps=2)), source, store=tmp_path)
    assert cost.seconds > 60
    assert cost.store > 10**4
    assert not list(tmp_path.iterdir())


def test_constants_are_those_of_the_papers():
    guided, minimax = MGD3(), Minimax()
    assert (guided.strength, guided.until, guided.sampler.kind, guided.sampler.steps) == (0.1, 25, "ddpm", 50)
    assert (MGD3.preset("dit").sampler.guidance, D4M.preset("stable_diffusion").sampler.guidance) == (4.0, 8.0)
    assert D4M().strength == 0.7
    assert (minimax.representative, minimax.diverse, minimax.memory, minimax.decay) == (0.002, 0.008, 64, 0.9999)
    assert (minimax.iterations, minimax.batch_size, minimax.lr, minimax.classes_at_once) == (12_000, 8, 1e-3, 20)
    fusion = EVLF().fusion
    assert (fusion.alignment, fusion.closeness, fusion.temperature, fusion.drop_text) == (0.1, (0.05, 1.0), 0.07, 0.2)
    assert (fusion.width, fusion.heads, fusion.layers, fusion.lr, fusion.lr_projector) == (256, 4, 2, 3e-4, 1e-4)


def test_presets_are_those_of_the_authors_code():
    transformer = Sampler(kind="ddpm", steps=50, guidance=4.0, guided=3)
    for kind in (EVLF, MGD3, Minimax):
        assert kind.preset("dit").sampler == transformer
    assert EVLF.preset("dit") == EVLF(sampler=transformer, fusion=Fusion(residual=False, steps=1600))
    assert MGD3.preset("dit") == MGD3(sampler=transformer)
    assert Minimax.preset("dit") == Minimax(sampler=transformer)
    prompted = D4M.preset("stable_diffusion")
    assert prompted == D4M(sampler=Sampler(kind="ddim", steps=50, guidance=8.0, guided=None), strength=0.7)


def test_a_dry_run_leaves_a_fine_tuning_alone_that_was_interrupted(source, tmp_path, monkeypatch):
    method = replace(CASES["Minimax"], iterations=120)
    loss, done = Minimax._loss, []

    def stopping(*given):
        done.append(1)
        if len(done) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*given)

    monkeypatch.setattr(Minimax, "_loss", stopping)
    with pytest.raises(Stopped):
        synthesize(method, source, device="cpu", out=tmp_path / "out", store=tmp_path / "store")
    kept = sorted(path.name for path in (tmp_path / "store" / "minimax").rglob("*"))
    assert "progress.json" in kept
    estimate(method, source, device="cpu", store=tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store" / "minimax").rglob("*")) == kept


@pytest.mark.parametrize(
    ("calls", "message"), [(1, "its 3 classes are drawn anew"), (0, "the fusion, which begins anew")]
)
def test_a_stop_says_what_is_lost(source, tmp_path, monkeypatch, calls, message):
    """While images are drawn, or while the fusion is trained."""
    method = replace(CASES["EVLF"], classes_together=3)
    named = (Drawing, "images") if calls else (fused, "train_fusion")
    own = getattr(*named)

    def stopping(*given, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return own(*given, **more)

    monkeypatch.setattr(*named, stopping)
    with pytest.raises(Stopped, match=message):
        synthesize(replace(method, ipc=12), source, device="cpu", out=tmp_path / "out", store=tmp_path, chunk=4)
