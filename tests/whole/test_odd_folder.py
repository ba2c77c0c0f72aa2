"""From a folder that nobody tidied up to scored, exported sets, through the command line; and on to another process."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dsdistill import SyntheticDataset
from dsdistill.cli.main import main
from dsdistill.data import Normalization
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.parameterizations import Mirrored, Tiles
from dsdistill.recipe import Recipe


def run(*arguments):
    return main([str(argument) for argument in arguments])


def picture(seed, height, width, base):
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return Image.fromarray((noise + base).clip(0, 255).astype(np.uint8))


def save_odd(folder, base, seed):
    """One file of every kind that cameras, scanners and web sites leave behind."""
    folder.mkdir(parents=True)
    plain = picture(seed, 40, 30, base)
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.save(folder / "camera, turned.jpg", exif=turned)
    plain.convert("CMYK").save(folder / "print.jpeg")
    plain.convert("P").save(folder / "palette.gif")
    plain.convert("L").save(folder / "grey.bmp")
    plain.convert("LA").save(folder / "grey with alpha.png")
    plain.convert("RGBA").save(folder / "alpha 🐾.PNG")
    Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257).save(folder / "scan 16 bit.png")
    frames = [picture(seed + k, 16, 24, base) for k in (1, 2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    plain.save(folder / "web.webp")
    plain.resize((200, 20)).save(folder / "wide.tiff")
    picture(seed, 1, 1, base).save(folder / "dot.png")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.txt").write_text("not an image")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "my images"
    for split, seed in (("train", 0), ("val", 50)):
        for base, name in ((20, "cats"), (170, "dögs 🐕"), (90, "CON")):
            save_odd(root / split / name, base, seed + base)
    (root / "train" / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (root / "val" / "CON" / "empty.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("storage", ["memory", "cache"])
@pytest.mark.parametrize("form", ["Plain", "Tiled"])
def test_an_untidy_folder_is_distilled_end_to_end(storage, form, folder, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    load = ["--data", folder, "--load.image_size", "[24,16]", "--load.resize", "crop", "--load.storage", storage]
    load += ["--load.on_bad_image", "skip", "--load.max_skipped", "0.1"]
    method = ["--method", "DM", "--method.ipc", 2, "--method.iterations", 12, "--method.real_batch", 6]
    method += ["--method.network.width", 16, "--method.form", form]
    assert run("synthesize", *load, *method, "--out", tmp_path / "out") == 0
    assert "broken.jpg" in caplog.text
    made = SyntheticDataset.load(tmp_path / "out")
    assert made.classes == ("CON", "cats", "dögs 🐕")
    assert made.shape == (3, 24, 16)
    assert made.recipe.source["skipped_files"] == 1
    assert made.recipe.source["counts"] == [11, 11, 11]
    options = ["--epochs", 30, "--repeats", 3, "--network.width", 16, "--out", tmp_path / "score.json"]
    assert run("evaluate", tmp_path / "out", *load, *options) == 0
    score = json.loads((tmp_path / "score.json").read_text())["scores"]["synthetic"]
    assert score["n"] == 3
    assert run("verify", tmp_path / "out") == 0
    for format in ("folder", "npz", "pt"):
        assert run("export", tmp_path / "out", "--format", format) == 0
    assert len(list((tmp_path / "out-images").rglob("*.png"))) == len(made)


def test_without_skipping_the_broken_file_is_named_before_any_work(folder, tmp_path, capsys):
    options = ["--load.image_size", 16, "--method", "RandomReal", "--method.ipc", 1, "--out", tmp_path / "out"]
    assert run("synthesize", "--data", folder, *options) == 3
    assert "broken.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("synthesize", "--data", folder, *options[2:]) == 3  # and mixed sizes need a size
    assert capsys.readouterr().err


_READER = """
import sys
for name in ("dsdistill.methods", "dsdistill.engine", "dsdistill.evaluation", "kornia"):
    sys.modules[name] = None  # importing it would fail
import json
import torch
from dsdistill import SyntheticDataset
made = SyntheticDataset.load(sys.argv[1])
images, targets = made.tensors()
expected = torch.load(sys.argv[2], weights_only=True)
print(json.dumps([torch.equal(images, expected[0]), torch.equal(targets, expected[1]), repr(made)]))
"""


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("form", ["tiles", "mirrored tiles"])
def test_another_process_reads_a_set_without_the_code_that_made_it(form, labels, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tiles = Tiles(torch.randn(4, 3, 8, 6, generator=generator), torch.tensor([2, 1, 2, 3]))
    hard = HardLabels(torch.tensor([0, 1, 2, 0]), 3)
    made = SyntheticDataset(
        tiles if form == "tiles" else Mirrored(tiles),
        hard if labels == "hard" else SoftLabels.from_hard(hard, 0.7),
        Normalization((0.5,) * 3, (0.25,) * 3),
        ("a", "b", "c"),
        Recipe({"type": "SomebodyElses"}, 0, {"name": "toy"}),
    )
    torch.save(list(made.tensors()), tmp_path / "expected.pt")
    made.save(tmp_path / "set")
    command = [sys.executable, "-c", _READER, str(tmp_path / "set"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, repr(made)]
