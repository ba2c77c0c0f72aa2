"""Pretrained models: loaded from tiny ones in the formats of real ones, as the libraries themselves would use them."""

import argparse
import json
import logging
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from generative import pipelines
from safetensors.torch import load_file, save_file

from dsdistill import synthesize
from dsdistill.core.config import from_dict, to_dict
from dsdistill.core.rng import Rng
from dsdistill.data.imagenet import wnids
from dsdistill.engine import Run, Shared
from dsdistill.errors import BadData, InvalidSetting, MissingWeights
from dsdistill.generative import Fusion, Models, Sampler, Weights
from dsdistill.generative.models import latents_of, model_of
from dsdistill.generative.pretrained import check_weights, class_ids, load_weights
from dsdistill.generative.sampling import drawn
from dsdistill.methods import D4M, EVLF, MGD3, Diffusion, Minimax
from dsdistill.testing import toy_source

KNOWN = (0, 1, 4)
SOURCE = toy_source(classes=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with dit/, sd/, vae/ and dit.pt."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pretrained")
    with warnings.catch_warnings():  # of the library about defaults of its own schedulers
        warnings.simplefilter("ignore")
        pipelines.dit(folder / "dit")
        pipelines.stable_diffusion(folder / "sd")
    pipelines.autoencoder(seed=5).save_pretrained(folder / "vae")
    torch.save({"model": state(1), "ema": state(0), "args": argparse.Namespace(model="DiT")}, folder / "dit.pt")
    return folder


def reference(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = pipelines.ReferenceDiT(classes=5, grid=8)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
    return network


def state(seed):
    return reference(seed).state_dict()


@pytest.fixture
def copy(saved, tmp_path):
    def made(name):
        if (saved / name).is_dir():
            return shutil.copytree(saved / name, tmp_path / name)
        return shutil.copy(saved / name, tmp_path / name)

    return made


def dit(folder, **options):
    return Weights(path=str(folder), **{"class_ids": KNOWN, **options})


def edited(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def noisy(count=3):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_transformer_is_asked_by_its_own_numbers(saved):
    from diffusers import DiTTransformer2DModel

    denoiser = load_weights(dit(saved / "dit"), SOURCE).denoiser
    plain = DiTTransformer2DModel.from_pretrained(saved / "dit", subfolder="transformer", local_files_only=True).eval()
    times, classes = torch.tensor([5, 500, 999]), torch.tensor([2, 0, 1])
    expected = plain(noisy(), timestep=times, class_labels=torch.tensor([4, 0, 1])).sample
    torch.testing.assert_close(denoiser(noisy(), times, classes), expected)
    none = plain(noisy(), timestep=times, class_labels=torch.tensor([5, 5, 5])).sample
    dropped = denoiser.train()(noisy(), times, classes, torch.tensor([True, True, False]))
    torch.testing.assert_close(dropped[:2], none[:2])
    torch.testing.assert_close(dropped[2], expected[2])
    assert denoiser.schedule.kept[0] == pytest.approx(1 - 1e-4)
    assert denoiser.schedule.prediction == "epsilon"


@torch.no_grad()
def test_a_published_checkpoint_says_what_its_authors_network_says(saved):
    weights = dit(saved / "dit.pt", autoencoder=str(saved / "vae"))
    denoiser, network = load_weights(weights, SOURCE).denoiser, reference(0)
    times, classes = torch.tensor([0, 321, 999]), torch.tensor([2, 0, 1])
    expected = network(noisy(), times, torch.tensor([4, 0, 1]))
    torch.testing.assert_close(denoiser(noisy(), times, classes), expected, rtol=1e-4, atol=1e-4)
    none = network(noisy(), times, torch.full((3,), 5))
    torch.testing.assert_close(denoiser(noisy(), times, classes, torch.ones(3).bool()), none, rtol=1e-4, atol=1e-4)
    # The library's own frequencies of times are others.
    for part in denoiser.modules():
        if hasattr(part, "downscale_freq_shift"):
            part.downscale_freq_shift = 1
    assert (denoiser(noisy(), times, classes) - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stable_diffusion_draws_what_its_pipeline_draws(saved, guidance, caplog):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    sampler = Sampler(kind="ddpm", steps=10, guidance=guidance)
    weights = Weights(path=str(saved / "sd"), template="a {}", negative="cartoon")
    denoiser = load_weights(weights, SOURCE).denoiser
    caplog.set_level(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(saved / "sd", local_files_only=True, safety_checker=None)
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            ["a class 2", "a class 0", "a class 1"],
            negative_prompt=["cartoon"] * 3,
            latents=noisy(),
            timesteps=denoiser.schedule.respaced(10).tolist(),
            guidance_scale=guidance,
            output_type="latent",
            generator=torch.Generator().manual_seed(9),
        ).images
    generator = torch.Generator().manual_seed(9)
    noise = torch.stack([noisy(), *(torch.randn(3, 4, 8, 8, generator=generator) for _ in range(10))])
    found = drawn(denoiser, torch.tensor([2, 0, 1]), noise, sampler)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def methods(weights):
    models = Models(weights=weights)
    sampler = Sampler(kind="ddpm", steps=4)
    yield Diffusion(ipc=2, models=models, sampler=sampler)
    yield MGD3(ipc=2, models=models, sampler=sampler, until=1)
    yield D4M(ipc=2, models=models, sampler=sampler)
    yield Minimax(ipc=2, models=models, sampler=sampler, iterations=2)
    yield EVLF(ipc=2, models=models, sampler=sampler, until=1, fusion=Fusion(steps=2, width=8))


@pytest.mark.parametrize("name", ["dit", "sd", "dit.pt"])
def test_every_method_draws_with_them(saved, name, tmp_path, caplog):
    apart = {"autoencoder": str(saved / "vae")} if name == "dit.pt" else {}
    ids = {} if name == "sd" else {"class_ids": KNOWN}
    sets = []
    with caplog.at_level(logging.INFO, logger="dsdistill"):
        for method in methods(Weights(path=str(saved / name), **apart, **ids)):
            made = synthesize(method, SOURCE, device="cpu", store=tmp_path, progress=False)
            images, _ = made.tensors()
            unit = SOURCE.normalization.to_unit(images)
            assert images.shape == (6, 3, 8, 8)  # drawn with 16 pixels, and made as small as the real ones
            assert -1e-5 < float(unit.min()) < float(unit.max()) < 1 + 1e-5
            (told,) = made.recipe.notes
            assert str(saved / name) in told
            assert "trained on other images" in told
            sets.append(images)
    assert not torch.equal(sets[0], sets[1])
    assert "trained on other images" in caplog.text


def test_they_are_whole_and_as_they_were(saved):
    from diffusers import AutoencoderKL

    found = load_weights(dit(saved / "dit.pt", autoencoder=str(saved / "vae")), SOURCE)
    plain = AutoencoderKL.from_pretrained(saved / "vae", local_files_only=True)
    squares = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = plain.encode(squares).latent_dist.mean
        torch.testing.assert_close(found.autoencoder.encode(squares), expected)
        torch.testing.assert_close(found.autoencoder.decode(expected), plain.decode(expected).sample)
    assert found.autoencoder.scale == 0.5
    assert found.side == 16
    assert not any(parameter.requires_grad for parameter in found.denoiser.parameters())


@pytest.mark.parametrize("changes", [{"beta_end": 0.03}, {"prediction_type": "v_prediction"}], ids=str)
def test_other_noise_levels_are_other_models(copy, changes):
    folder = copy("dit")
    before = load_weights(dit(folder), SOURCE)
    rewritten(folder / "scheduler/scheduler_config.json", **changes)
    after = load_weights(dit(folder), SOURCE)
    assert after.denoiser.digest != before.denoiser.digest
    assert after.told != before.told
    assert load_weights(dit(folder, class_ids=(1, 0, 4)), SOURCE).told != after.told


def test_latents_of_another_side_are_others(saved, tmp_path):
    def shapes(side):
        run = Run(SOURCE.train_only(), torch.device("cpu"), Rng(0), (0, 1, 2), 100, shared=Shared(), store=tmp_path)
        models = Models(weights=Weights(path=str(saved / "sd"), side=side))
        return tuple(latents_of(run, models).shape), model_of(run, models).frame.side

    assert shapes(None) == ((2, 36, 4, 8, 8), 16)
    assert shapes(32) == ((2, 36, 4, 16, 16), 32)
    assert shapes(None) == ((2, 36, 4, 8, 8), 16)
    assert len(list((tmp_path / "latents").iterdir())) == 2


@pytest.mark.parametrize(("name", "side", "message"), [("dit", 32, "16, as the model"), ("sd", 18, "a multiple of 4")])
def test_a_side_that_cannot_be_drawn(saved, name, side, message):
    with pytest.raises(InvalidSetting, match=message):
        load_weights(dit(saved / name, side=side), SOURCE)


# -- what is missing ---------------------------------------------------------------------------------------------


def refused(weights, message, early=False):
    with pytest.raises(MissingWeights, match=message) as caught:
        load_weights(weights, SOURCE)
    assert "without weights small models are trained" in str(caught.value)
    if early:
        with pytest.raises(MissingWeights, match=message):
            check_weights(weights, SOURCE)


def test_nothing_is_there(tmp_path):
    refused(dit(tmp_path / "nothing"), "no such folder", early=True)
    refused(dit(tmp_path), "model_index.json", early=True)
    refused(dit(tmp_path / "DiT.pt", autoencoder="x"), "no such file", early=True)


def test_it_is_refused_before_any_work(tmp_path):
    method = MGD3(ipc=2, models=Models(weights=dit(tmp_path / "nothing")))
    with pytest.raises(MissingWeights, match="no such folder"):
        synthesize(method, SOURCE, out=tmp_path / "out", device="cpu")
    fused = EVLF(ipc=2, fusion=Fusion(text=str(tmp_path / "no/clip")))
    with pytest.raises(MissingWeights, match="a CLIP text encoder"):
        synthesize(fused, SOURCE, out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", [{"path": "nobody/no-such-model"}, {"autoencoder": "nobody/no-such-model"}])
def test_an_id_is_looked_up_in_the_cache_alone(saved, monkeypatch, which):
    import socket

    def no_network(*arguments):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    weights = Weights(**{"path": str(saved / "dit"), "class_ids": KNOWN, **which})
    refused(weights, "nothing was downloaded: that needs the setting download", early=True)


def test_an_id_in_the_cache_is_found_and_its_commit_told(saved, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = tmp_path / "models--me--dit"
    shutil.copytree(saved / "dit", base / "snapshots" / commit)
    (base / "refs").mkdir()
    (base / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load_weights(dit("me/dit"), SOURCE)
    assert f"'me/dit' at {commit}" in found.told
    refused(dit("me/dit", revision="89abcdef" * 5), "at 89abcdef")


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler"])
def test_a_part_is_missing(copy, part):
    folder = copy("dit")
    shutil.rmtree(folder / part)
    refused(dit(folder), part)


def test_no_weights_and_pickled_weights(copy):
    file = copy("dit") / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    refused(dit(file.parents[1]), "transformer: OSError")
    torch.save(tensors, file.with_suffix(".bin"))
    refused(dit(file.parents[1]), r"pickles alone .diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("proj_out_2.bias"), "1 missing keys, proj_out_2.bias first"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), "1 unexpected keys, more first"),
        (lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(3)}), "ValueError|RuntimeError"),
        (lambda tensors: tensors["proj_out_2.bias"].fill_(torch.inf), "not finite, in proj_out_2.bias"),
    ],
    ids=["missing", "unknown", "shape", "infinite"],
)
def test_tensors_that_are_not_as_they_should_be(copy, change, message):
    folder = copy("dit")
    edited(folder / "transformer/diffusion_pytorch_model.safetensors", change)
    refused(dit(folder), message)


def test_a_truncated_file(copy):
    folder = copy("dit")
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    refused(dit(folder), "vae: ")


def rewritten(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "StableDiffusionXLPipeline, which is none of",
        ),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "not those of a diffusion by betas"),
        ("vae/config.json", {"shift_factor": 0.1}, "latents are shifted"),
    ],
)
def test_models_of_another_make(copy, file, changes, message):
    folder = copy("dit")
    rewritten(folder / file, **changes)
    refused(dit(folder), message)


def test_levels_of_flow_matching(copy):
    folder = copy("dit")
    told = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(told))
    refused(dit(folder), "FlowMatchEulerDiscreteScheduler")


def test_an_autoencoder_that_does_not_fit(saved, tmp_path):
    pipelines.autoencoder(latent_channels=8).save_pretrained(tmp_path / "vae")
    refused(dit(saved / "dit", autoencoder=str(tmp_path / "vae")), "8 channels, the denoiser takes 4")
    (tmp_path / "inner").mkdir()
    pipelines.autoencoder().save_pretrained(tmp_path / "inner/vae")
    assert load_weights(dit(saved / "dit", autoencoder=str(tmp_path / "inner")), SOURCE).side == 16


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": Harmful()}, "UnpicklingError"),
        ({"ema": [1, 2]}, "no mapping of names"),
        ({"ema": {**state(0), "blocks.0.attn.gamma": torch.ones(3)}}, "not a checkpoint of a DiT .KeyError"),
        (
            {key: value for key, value in state(0).items() if "fc1" not in key},
            "not a checkpoint of a DiT .RuntimeError",
        ),
        ({**state(0), "pos_embed": torch.zeros(1, 16, 128)}, "positions are not"),
        ({**state(0), "final_layer.linear.bias": torch.full((32,), torch.nan)}, "not finite"),
    ],
    ids=["harmful", "list", "unknown", "missing", "positions", "infinite"],
)
def test_checkpoints_that_are_none(saved, tmp_path, content, message, capsys):
    torch.save(content, tmp_path / "dit.pt")
    refused(dit(tmp_path / "dit.pt", autoencoder=str(saved / "vae")), message)
    assert "unpickled" not in capsys.readouterr().out


def test_a_truncated_checkpoint(saved, copy):
    file = copy("dit.pt")
    with open(file, "r+b") as stream:
        stream.truncate(1000)
    refused(dit(file, autoencoder=str(saved / "vae")), "RuntimeError|UnpicklingError|EOFError")


# -- classes -----------------------------------------------------------------------------------------------------


def ids(classes, known=5, index=None, **options):
    return class_ids(
        Weights(path="x", **options), classes, known, {"id2label": pipelines.NAMES} if index is None else index
    )


def test_numbers_of_classes():
    assert ids(["a", "b"], class_ids=(4, 0)) == (4, 0)
    assert ids(["Tinca_tinca", "chain saw", "class 1", "tench, Tinca tinca"]) == (0, 1, 4, 0)
    assert ids([wnids()[217], wnids()[0]], known=1000, index={}) == (217, 0)
    assert ids(["English_springer", "tench", wnids()[999]], known=1000, index={}) == (217, 0, 999)


@pytest.mark.parametrize(
    ("classes", "options", "error", "message"),
    [
        (["cat", "chain saw"], {}, BadData, r"which of them are 'cat'; give Weights.class_ids"),
        (["crane"], {}, BadData, r"'crane' .several."),
        ([wnids()[0]], {}, BadData, wnids()[0]),
        (["a"], {"class_ids": (5,)}, InvalidSetting, "below 5 for each of the 1 classes, not 1 up to 5"),
        (list("abcdef"), {}, BadData, "knows 5 classes, the images have 6; take another model"),
        (list("abcdef"), {"class_ids": (0, 1, 2)}, BadData, "knows 5 classes, the images have 6"),
        (["a", "b"], {"class_ids": (1,)}, InvalidSetting, "for each of the 2 classes"),
    ],
)
def test_classes_that_are_unknown(classes, options, error, message):
    with pytest.raises(error, match=message):
        ids(classes, **options)


def test_unknown_classes_are_refused_early(saved):
    with pytest.raises(BadData, match="'class 0', 'class 2'"):
        check_weights(Weights(path=str(saved / "dit")), SOURCE)


@pytest.mark.parametrize(
    "options",
    [
        {"path": "a.pt"},
        {"path": "a.pt", "autoencoder": "b", "revision": "main"},
        {"path": "a", "template": "photo"},
        {"path": "a", "autoencoder_revision": "main"},
        {"path": "a", "class_ids": (-1,)},
        {"path": "a", "class_ids": (3, 1, 3)},
        {"path": "a", "side": 0},
    ],
    ids=str,
)
def test_settings_that_say_nothing(options):
    with pytest.raises(InvalidSetting):
        Weights(**options)


@pytest.mark.parametrize(
    ("name", "options", "setting"),
    [
        ("sd", {"class_ids": (0, 1, 2)}, "class_ids"),
        ("dit", {"class_ids": KNOWN, "template": "a {}"}, "template"),
        ("dit", {"class_ids": KNOWN, "negative": "cartoon"}, "negative"),
        ("dit.pt", {"class_ids": KNOWN, "negative": "cartoon"}, "negative"),
    ],
)
def test_settings_that_say_nothing_to_a_model(saved, name, options, setting):
    apart = {"autoencoder": str(saved / "dit")} if name == "dit.pt" else {}
    with pytest.raises(InvalidSetting, match=f"Weights.{setting} .* left out for a model"):
        check_weights(Weights(path=str(saved / name), **apart, **options), SOURCE)


def test_a_list_of_class_ids_will_do():
    assert Weights(path="a", class_ids=[2, 0]) == Weights(path="a", class_ids=(2, 0))


def test_a_refused_run_leaves_its_folder_to_the_mended_one(saved, tmp_path):
    method = EVLF(
        ipc=1, models=Models(weights=dit(saved / "dit", side=48)), sampler=Sampler(kind="ddpm", steps=2), until=0
    )
    with pytest.raises(InvalidSetting, match=r"Weights.side"):
        synthesize(method, SOURCE, out=tmp_path, device="cpu")
    mended = replace(method, models=Models(weights=dit(saved / "dit")), fusion=None)
    assert len(synthesize(mended, SOURCE, out=tmp_path, device="cpu").tensors()[0]) == 3


def test_whether_files_may_be_fetched_makes_no_other_run(saved, tmp_path):
    method = Diffusion(ipc=1, models=Models(weights=dit(saved / "dit", download=True)), sampler=Sampler(steps=2))
    images, _ = synthesize(method, SOURCE, out=tmp_path, device="cpu").tensors()
    again = replace(method, models=Models(weights=dit(saved / "dit")))
    assert torch.equal(synthesize(again, SOURCE, out=tmp_path, device="cpu").tensors()[0], images)


@pytest.mark.parametrize("options", [{"size": "small"}, {"samples": 3}, {"max_seconds": 1.0}], ids=str)
def test_pretrained_models_are_not_trained(options):
    with pytest.raises(InvalidSetting, match="not trained"):
        Models(weights=Weights(path="a"), **options)


def test_settings_come_back():
    method = EVLF(models=Models(weights=Weights(path="a", class_ids=(1, 2))))
    assert from_dict(EVLF, json.loads(json.dumps(to_dict(method)))) == method
