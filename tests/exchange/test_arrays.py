from dataclasses import replace

import numpy as np
import pytest
import torch

from dsdistill import SyntheticDataset, data
from dsdistill.data import Normalization
from dsdistill.errors import BadData, DistillError, InvalidSetting, MissingExtra
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.parameterizations import Tiles
from dsdistill.recipe import Recipe

NAMES = ("heron", "egret", "owl \U0001f989")
STATISTICS = Normalization((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


def made(labels="hard"):
    hard = HardLabels(torch.tensor([0, 1, 2]), 3)
    images = torch.randn(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    return SyntheticDataset(
        Tiles(images, torch.tensor([2, 1, 2])),
        hard if labels == "hard" else SoftLabels.from_hard(hard, 0.8),
        STATISTICS,
        NAMES,
        Recipe({"type": "Made"}, 0, {"name": "toy"}),
    )


def test_the_decoded_form_is_what_others_get(tmp_path):
    synthetic = made()
    report = synthetic.export(tmp_path / "pt", "pt")
    assert report.images == 9
    images = torch.load(tmp_path / "pt" / "images.pt", weights_only=True)
    assert torch.equal(images, synthetic.tensors()[0])
    assert torch.load(tmp_path / "pt" / "labels.pt", weights_only=True).tolist() == [0, 2, 0, 2, 0, 2, 0, 2, 1]
    assert sorted(path.name for path in tmp_path.joinpath("pt").iterdir()) == ["images.pt", "labels.pt"]
    synthetic.export(tmp_path / "x.npz", "npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["classes"].tolist() == list(NAMES)
        assert np.array_equal(arrays["images"], images.numpy())


def test_soft_labels_are_exported_as_probabilities(tmp_path):
    synthetic = made("soft")
    synthetic.export(tmp_path / "pt", "pt")
    assert torch.equal(torch.load(tmp_path / "pt" / "labels.pt", weights_only=True), synthetic.tensors()[1])


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_parquet_is_a_data_set_of_hugging_face(labels, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    synthetic = made(labels)
    report = synthetic.export(tmp_path / "set.parquet", "parquet")
    table = datasets.Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table.features["label"].names == list(NAMES)
    assert table["label"] == synthetic.targets
    pixels = synthetic.normalization.to_uint8(synthetic.tensors()[0])
    for row, image in zip(table, pixels, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.permute(1, 2, 0).numpy())
    assert (report.images, report.rounding > 0) == (9, True)
    if labels == "soft":
        assert table[0]["probabilities"] == pytest.approx(synthetic.tensors()[1][0].tolist())


def test_parquet_labels_are_the_classes_that_images_were_made_for(tmp_path, caplog):
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    hard = made()
    swayed = SoftLabels(torch.tensor([[0.0, 5.0, 0.0], [0.0, 5.0, 0.0], [5.0, 0.0, 0.0]]), hard.labels.classes)
    synthetic = replace(hard, labels=swayed, learned={"lr": torch.tensor(0.5)})
    synthetic.export(tmp_path / "set.parquet", "parquet")
    table = datasets.Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table["label"] == hard.targets == [0, 2, 0, 2, 0, 2, 0, 2, 1]
    assert np.argmax(table["probabilities"], 1).tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert "no place for the learned lr = 0.5" in caplog.text


def test_arrays_carry_the_learned_step_size_and_say_what_else_they_lose(tmp_path, caplog):
    synthetic = replace(made(), learned={"lr": torch.tensor(0.0185)})
    synthetic.export(tmp_path / "x.npz", "npz")
    synthetic.export(tmp_path / "pt", "pt")
    with np.load(tmp_path / "x.npz") as arrays:
        assert (arrays["lr"].shape, arrays["lr"].dtype) == ((), np.float32)
        assert float(arrays["lr"]) == pytest.approx(0.0185)
    assert torch.load(tmp_path / "pt" / "lr.pt", weights_only=True) == torch.tensor(0.0185)
    assert not caplog.records
    for format in ("npz", "pt"):
        replace(made(), learned={"lr": torch.tensor(0.5), "m": torch.zeros(2)}).export(tmp_path / f"m-{format}", format)
    assert caplog.text.count("no place for the learned m of shape (2,)") == 2


def test_parquet_without_its_library_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"'datasets': pip install 'dsdistill\[hub\]'"):
        made().export(tmp_path / "set.parquet", "parquet")
    assert not list(tmp_path.iterdir())


def test_formats_that_are_not_there(tmp_path):
    with pytest.raises(InvalidSetting, match="one of folder, npz, pt, parquet"):
        made().export(tmp_path / "x", "hdf5")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise DistillError("no")

    monkeypatch.setattr("dsdistill.core.storage.write_bytes", broken)
    for format in ("pt", "npz", "folder"):
        with pytest.raises(DistillError):
            made().export(tmp_path / format, format)
    assert not list(tmp_path.iterdir())


def test_sets_made_elsewhere():
    images = torch.zeros(2, 3, 4, 4)
    hard = SyntheticDataset.from_tensors(images, torch.tensor([1, 0]), normalization=STATISTICS, classes=("a", "b"))
    assert (hard.targets, hard.ipc, hard.recipe.source) == ([1, 0], 1, {"name": "unknown"})
    soft = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    probabilities = SyntheticDataset.from_tensors(images, soft, normalization=STATISTICS, classes=("a", "b"))
    torch.testing.assert_close(probabilities.tensors()[1], soft)
    for wrong in (soft * 2, soft - 0.5):
        with pytest.raises(BadData, match="1 in sum"):
            SyntheticDataset.from_tensors(images, wrong, normalization=STATISTICS, classes=("a", "b"))
    with pytest.raises(BadData, match="2 class names"):
        SyntheticDataset.from_tensors(images, torch.full((2, 3), 1 / 3), normalization=STATISTICS, classes=("a", "b"))


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (torch.full((2, 3, 4, 4), torch.nan), ("a", "b"), "NaN"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ("a", "b"), "uint8; give standardised floats"),
        (torch.zeros(2, 3, 4, 4), ("a", "a"), "class names repeat"),
    ],
    ids=["nan", "bytes", "names"],
)
def test_sets_that_could_not_be_read_again_are_refused(images, classes, message):
    with pytest.raises(BadData, match=message):
        SyntheticDataset.from_tensors(images, torch.tensor([0, 1]), normalization=STATISTICS, classes=classes)


def test_arrays_are_taken_like_tensors():
    images, targets = np.zeros((2, 3, 4, 4), np.float32), np.array([1, 0])
    set_ = SyntheticDataset.from_tensors(images, targets, normalization=STATISTICS, classes=("a", "b"))
    assert set_.targets == [1, 0]
    for ipc in ("a", 1.5, None):
        with pytest.raises(InvalidSetting, match="ipc"):
            set_.subset(ipc)
    with pytest.raises(InvalidSetting, match="path = 3"):
        SyntheticDataset.load(3)


def test_whitened_sets_say_so_wherever_they_go(tmp_path):
    images = torch.randint(0, 256, (9, 1, 3, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    source = data.whiten(data.ImageSource("toy", ("a", "b", "c"), images, torch.arange(9) % 3))
    standardised, targets = next(source.batches(9))
    options = {"normalization": source.normalization, "classes": source.classes}
    synthetic = SyntheticDataset.from_tensors(standardised, targets, **options)
    synthetic.export(tmp_path / "x.npz", "npz")
    with np.load(tmp_path / "x.npz") as arrays:
        flat = arrays["images"].reshape(9, -1) @ arrays["zca_inverse"] + arrays["zca_mean"]
        unit = flat.reshape(9, 1, 3, 2) * arrays["std"][:, None, None] + arrays["mean"][:, None, None]
    assert np.abs(unit * 255 - source.images.numpy()).max() < 1e-2
    folder = synthetic.save(tmp_path / "set")
    assert "then whitened (ZCA, eps 0.1" in (folder / "README.md").read_text()
    assert torch.equal(SyntheticDataset.load(folder).tensors()[0], standardised)
