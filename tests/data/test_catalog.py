import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as published

from dsdistill.data import ImageSource, LoadRequest, Normalization, catalog, list_datasets, load, register_dataset
from dsdistill.errors import BadData, DeviceUnavailable, InvalidSetting, UnknownName

NAMES = [
    "cifar10", "cifar100", "digits", "fashion_mnist", "imagenet_fruit", "imagenet_meow", "imagenet_nette",
    "imagenet_squawk", "imagenet_woof", "imagenet_yellow", "imagenette", "imagewoof", "mnist", "stl10", "svhn",
    "tiny_imagenet",
]  # fmt: skip


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(catalog, "_LOADERS", dict(catalog._LOADERS))


def write_idx(path, values):
    values = np.asarray(values, np.uint8)
    header = struct.pack(">I", 0x0800 + values.ndim) + b"".join(struct.pack(">I", side) for side in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + values.tobytes())


def write_mnist(root, name="MNIST"):
    """Ten train images filled with 0, 10, ... and labelled 9 to 0, and ten test images."""
    for split, base, labels in (("train", 0, range(10)[::-1]), ("t10k", 100, range(10))):
        images = np.arange(10)[:, None, None] * 10 + base + np.zeros((10, 28, 28))
        write_idx(root / name / "raw" / f"{split}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{split}-labels-idx1-ubyte", list(labels))
    return root


def write_cifar(root, monkeypatch, classes=10):
    """CIFAR as pickles whose md5 torchvision is told to expect; image i of a split is red + i."""
    reader = published.CIFAR10 if classes == 10 else published.CIFAR100
    folder = root / reader.base_folder
    folder.mkdir()
    label_key = "labels" if classes == 10 else "fine_labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    data = np.zeros((classes, 3, 32, 32), np.uint8)
    data[:, 0] = 100 + np.arange(classes)[:, None, None]
    data[:, 1, 3, 5] = 7
    batch = {"data": data.reshape(classes, -1), label_key: list(range(classes))}
    names = {reader.meta["key"]: [f"name {index}" for index in range(classes)]}
    monkeypatch.setattr(reader, "train_list", [["train_part", write("train_part", batch)]])
    monkeypatch.setattr(reader, "test_list", [["test_part", write("test_part", batch | {"data": 255 - batch["data"]})]])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": write(reader.meta["filename"], names)})
    return folder


def write_stl10(root, monkeypatch):
    """Ten images of each split; columns before rows and labels from 1, as published. No unlabelled images."""
    folder = root / "stl10_binary"
    folder.mkdir()

    def write(name, values):
        (folder / name).write_bytes(values.astype(np.uint8).tobytes())
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def split(title, red):
        pixels = np.zeros((10, 3, 96, 96))
        pixels[:, 0] = red + np.arange(10)[:, None, None]
        pixels[:, 1, 5, 3] = 7  # column 5, row 3
        return [write(f"{title}_X.bin", pixels), write(f"{title}_y.bin", 1 + np.arange(10)[::-1])]

    unlabelled = published.STL10.train_list[2]
    assert unlabelled[0] == "unlabeled_X.bin"
    monkeypatch.setattr(published.STL10, "train_list", [*split("train", 100), unlabelled])
    monkeypatch.setattr(published.STL10, "test_list", split("test", 200))
    return folder


def test_names():
    assert list_datasets() == NAMES


# Digits --------------------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    source = load("digits")
    raw = load_digits()
    assert (source.name, source.shape, source.classes) == ("digits", (1, 8, 8), tuple("0123456789"))
    assert source.mirror_safe is source.test.mirror_safe is False
    assert len(source) + len(source.test) == 1797
    for digit in range(10):
        total = int((raw.target == digit).sum())
        assert source.test.counts[digit] == round(0.2 * total)
        rows = torch.cat([part.images[part.targets == digit] for part in (source, source.test)]).flatten(1)
        expected = [[round(value * 255 / 16) for value in row] for row in raw.data[raw.target == digit]]
        assert sorted(rows.tolist()) == sorted(expected)
    unit = source.images.numpy().astype(np.float64) / 255
    assert source.normalization.mean == pytest.approx((unit.mean(),), rel=1e-12)
    assert source.normalization.std == pytest.approx((unit.std(),), rel=1e-12)
    assert source.test.normalization == source.normalization


def test_the_split_of_digits_is_a_function_of_holdout_and_seed():
    first = load("digits")
    assert load("digits").fingerprint == first.fingerprint
    assert load("digits", holdout_seed=1).fingerprint != first.fingerprint
    assert len(load("digits", holdout=0.5).test) == pytest.approx(898, abs=5)
    with pytest.raises(InvalidSetting, match=r"holdout = 1.5"):
        load("digits", holdout=1.5)


def test_zca_whitens_what_was_loaded():
    plain, source = load("digits"), load("digits", zca=True)
    assert source.normalization == source.test.normalization == plain.normalization.whitened([plain.images])
    pixels = torch.cat([batch.images for batch in source.batches(500)]).double().flatten(1)
    assert torch.linalg.eigvalsh(pixels.T.cov()).max() == pytest.approx(1, abs=0.05)
    assert torch.equal(source.normalization.to_uint8(source.gather(torch.arange(9))), plain.images[:9])
    assert load(plain, zca=True).normalization == source.normalization


# Published data sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "MNIST", "fashion_mnist", "FashionMNIST", "Fashion-MNIST"])
def test_mnist_files(tmp_path, name):
    fashion = "ashion" in name
    write_mnist(tmp_path, "FashionMNIST" if fashion else "MNIST")
    source = load(name, root=tmp_path)
    assert source.shape == (1, 28, 28)
    assert source.images[:, 0, 3, 4].tolist() == list(range(90, -1, -10))
    assert source.test.images[:, 0, 3, 4].tolist() == list(range(100, 200, 10))
    assert source.test.targets.tolist() == list(range(10))
    assert source.mirror_safe is fashion
    assert source.classes[0] == ("T-shirt/top" if fashion else "0")
    expected = Normalization((0.2861,), (0.3530,)) if fashion else Normalization((0.1307,), (0.3081,))
    assert source.normalization == source.test.normalization == expected


def test_mnist_never_reads_the_pickles_of_old_versions(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10)), tmp_path / "MNIST/processed" / name)
    monkeypatch.setattr(torch, "load", None)
    assert load("mnist", root=tmp_path).images.max() == 90


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_files(tmp_path, monkeypatch, classes):
    write_cifar(tmp_path, monkeypatch, classes)
    source = load(f"CIFAR-{classes}", root=tmp_path)
    assert source.classes == tuple(f"name {index}" for index in range(classes))
    assert source.shape == (3, 32, 32)
    assert source.images[:, 0].flatten(1).unique(dim=1).flatten().tolist() == list(range(100, 100 + classes))
    assert (source.images[:, 1] > 0).nonzero().tolist() == [[index, 3, 5] for index in range(classes)]
    assert source.test.images[0, :, 0, 0].tolist() == [155, 255, 255]
    expected = {
        10: Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        100: Normalization((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    assert source.normalization == expected[classes]
    assert source.mirror_safe is True


def test_stl10_files(tmp_path, monkeypatch):
    folder = write_stl10(tmp_path, monkeypatch)
    source = load("STL-10", root=tmp_path)
    assert source.shape == source.test.shape == (3, 96, 96)
    assert source.classes == ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    assert source.images[:, 0, 0, 0].tolist() == list(range(109, 99, -1))
    assert source.test.images[:, 0, 0, 0].tolist() == list(range(209, 199, -1))
    assert (source.images[:, 1] > 0).nonzero().tolist() == [[index, 3, 5] for index in range(10)]
    assert source.mirror_safe is True
    expected = Normalization((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))
    assert source.normalization == source.test.normalization == expected
    content = (folder / "test_X.bin").read_bytes()
    (folder / "test_X.bin").write_bytes(content[:-1] + b"!")
    with pytest.raises(BadData, match=r"stl10: the files in .* are damaged or incomplete \(.*corrupted"):
        load("stl10", root=tmp_path)


def test_an_altered_cifar_pickle_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    folder = write_cifar(tmp_path, monkeypatch)
    (folder / "train_part").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        BadData, match=r"cifar10: the files in .* are damaged .*corrupted.*; delete them and load again"
    ):
        load("cifar10", root=tmp_path)
    assert not (tmp_path / "opened").exists()


class FakeSVHN:
    """Writes its file on download, as torchvision does, one split at a time."""

    opened: list[tuple[str, bool]]

    def __init__(self, root, split, download):
        self.opened.append((split, download))
        if download:
            (Path(root) / f"{split}_32x32.mat").touch()
        self.data = np.zeros((10, 3, 32, 32), np.uint8)
        self.data[:, 2, 1, 0] = range(10)
        self.labels = np.arange(10)[::-1].copy()


def test_svhn_and_download(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "SVHN", FakeSVHN)
    FakeSVHN.opened = []
    with pytest.raises(BadData, match=r"svhn: train_32x32.mat, test_32x32.mat not found in .*; fetch the files with "
                                      r"download=True \(--load.download true\)"):  # fmt: skip
        load("svhn", root=tmp_path)
    assert FakeSVHN.opened == []
    source = load("svhn", root=tmp_path, download=True)
    assert FakeSVHN.opened == [("train", True), ("test", True)]  # both while there is a network
    assert source.images[:, 2, 1, 0].tolist() == list(range(10))[::-1]
    assert source.classes == tuple("0123456789")
    assert source.mirror_safe is False
    assert source.normalization == Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    assert source.test.targets.tolist() == list(range(10))
    assert FakeSVHN.opened[2:] == [("test", False)]
    FakeSVHN.opened = []
    load("svhn", root=tmp_path)
    assert FakeSVHN.opened == [("train", False)]  # the test split stays closed
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(BadData, match=r"svhn: test_32x32.mat not found in"):
        load("svhn", root=tmp_path)


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    class Offline:
        def __init__(self, root, train, download):
            raise OSError("no route to host")

    monkeypatch.setattr(published, "CIFAR10", Offline)
    with pytest.raises(BadData, match=r"could not be fetched or read \(no route to host\); check the network"):
        load("cifar10", root=tmp_path, download=True)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "svhn", "cifar10", "cifar100", "stl10"])
def test_missing_files_are_named_with_the_mend(tmp_path, monkeypatch, name):
    with pytest.raises(BadData, match=rf"{name}: .* not found in {tmp_path}/none; .*download=True"):
        load(name, root=tmp_path / "none")
    monkeypatch.setenv("DSDISTILL_DATA", str(tmp_path / "env"))
    with pytest.raises(BadData, match=f"not found in {tmp_path}/env"):
        load(name)
    monkeypatch.delenv("DSDISTILL_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match=f"not found in {tmp_path}/data"):
        load(name)
    assert list(tmp_path.iterdir()) == []


def test_damaged_mnist_files(tmp_path):
    write_mnist(tmp_path)
    images = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(BadData, match=r"mnist: the files in .* are damaged or incomplete"):
        load("mnist", root=tmp_path)


# What load takes -----------------------------------------------------------------------------------------


def toy(name="toy"):
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    return ImageSource(name, "ab", images, torch.tensor([0, 1]), open_test=lambda: toy("toy (test)"))


def test_a_source_is_returned_as_it_is():
    source = toy()
    assert load(source) is source
    changed = load(source, mirror_safe=False)
    assert (changed.mirror_safe, changed.test.mirror_safe, source.mirror_safe) == (False, False, True)
    assert load(source, mirror_safe=True) is source


def test_image_size_is_refused_where_nothing_is_resized():
    assert load(toy(), image_size=2).shape == (1, 2, 2)
    with pytest.raises(InvalidSetting, match=r"image_size = 32 .* only folders are resized; digits has 8x8 pixels"):
        load("digits", image_size=32)


def test_unknown_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName) as caught:
        load("cifar11")
    assert str(caught.value) == (
        f"unknown dataset 'cifar11'; did you mean 'cifar10'? Known: {', '.join(NAMES)}. "
        "The path of an existing image folder works too."
    )
    for path in ("some/where", "./digits", ".hidden", "~/gone-from-here", Path("digits")):
        with pytest.raises(BadData, match="no such folder; check the path"):
            load(path)
    (tmp_path / "plain").write_text("")
    with pytest.raises(BadData, match="plain: is a file"):
        load("plain")
    for value in (None, 3, ""):
        with pytest.raises(InvalidSetting, match=r"data = .* give a data set name, the path"):
            load(value)


def test_devices_are_checked_first(tmp_path):
    with pytest.raises(DeviceUnavailable):
        load(tmp_path / "gone", device="warp")


def test_registering(registry, tmp_path):
    requests = []

    def loader(request):
        requests.append(request)
        return toy()

    register_dataset("my_birds", loader)
    assert list_datasets() == sorted([*NAMES, "my_birds"])
    source = load("My-Birds", root=tmp_path, download=True, holdout=0.3, holdout_seed=5)
    assert source.name == "toy"
    assert requests == [LoadRequest(tmp_path, True, 0.3, 5)]
    for name in ("mybirds", "digits", "FASHIONMNIST".lower()):
        with pytest.raises(InvalidSetting, match="is taken; the data sets are cifar10"):
            register_dataset(name, loader)
    for name in ("", "Birds", "a/b", "my birds"):
        with pytest.raises(InvalidSetting, match="use lower-case letters, digits and '_'"):
            register_dataset(name, loader)


def test_sources_can_be_sent_to_another_process(tmp_path):
    write_mnist(tmp_path)
    for source in (load("digits"), load("mnist", root=tmp_path)):
        copied = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert copied.fingerprint == source.fingerprint
        assert copied.test.fingerprint == source.test.fingerprint
