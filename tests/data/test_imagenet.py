"""Layouts of ImageNet's relatives, on generated copies with the true names of files and folders."""

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torchvision.models._meta import _IMAGENET_CATEGORIES

from dsdistill.data import imagenet, load
from dsdistill.errors import BadData, InvalidSetting

# The lists as they stand in the code of MTT (utils.py, class Config), by ImageNet's class indices.
PUBLISHED = {
    "nette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
    "woof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
    "meow": [281, 282, 283, 284, 285, 291, 292, 290, 289, 287],
    "squawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
    "fruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
    "yellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
}
# Some synsets by index, from the devkit of ILSVRC 2012; ids ascend with the index.
KNOWN = {0: "n01440764", 217: "n02102040", 207: "n02099601", 281: "n02123045", 84: "n01806143", 954: "n07753592",
         309: "n02206856", 72: "n01773157", 599: "n03530642", 951: "n07749582", 9: "n01518878"}  # fmt: skip
TINY = ["n02124075", "n01443537", "n04067472"]  # the order of wnids.txt


def save(path, colour=0, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path, "JPEG", quality=100)


def write_tiny(root, *, sorted_into=None):
    """Three classes of two training images and one or two validation images; the official layout unless sorted."""
    place = root / "tiny-imagenet-200"
    for index, wnid in enumerate(TINY):
        for image in range(2):
            save(place / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", 100 * index + 20 * image, (64, 64))
        (place / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    (place / "wnids.txt").write_text("\n".join(TINY) + "\n")
    (place / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    save(place / "test/images/test_0.JPEG", 0, (64, 64))
    held = [("val_9.JPEG", 0, 0), ("val_8.JPEG", 1, 50), ("val_7.JPEG", 2, 100), ("val_1.JPEG", 0, 150)]
    for file, index, colour in held:
        folder = place / "val/images" if sorted_into is None else place / sorted_into.format(TINY[index])
        save(folder / file, colour, (64, 64))
    lines = [f"{file}\t{TINY[index]}\t0\t32\t44\t62\n" for file, index, _ in held]
    (place / "val/val_annotations.txt").write_text("".join(lines))
    return place


def write_classes(place, classes, *, val="{wnid}/ILSVRC2012_val_{index:08}.JPEG"):
    """Two training images and one validation image of each class; sizes differ."""
    for index, wnid in enumerate(classes):
        for image in range(2):
            save(place / "train" / wnid / f"{wnid}_{image}.JPEG", 20 * index + image, (40 + index, 30))
        save(place / "val" / val.format(wnid=wnid, index=index), 20 * index)
    return place


def shown_paths(listing):
    return [path.name for path in listing.paths]


# The tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_lists_are_the_published_ones_in_their_order(name):
    assert [title for _, title in imagenet.SUBSETS[name]] == [_IMAGENET_CATEGORIES[index] for index in PUBLISHED[name]]
    wnids = [wnid for wnid, _ in imagenet.SUBSETS[name]]
    # Ids ascend with the class index, so sorting by either is the same.
    assert [wnids[place] for place in sorted(range(10), key=PUBLISHED[name].__getitem__)] == sorted(wnids)
    for wnid, index in zip(wnids, PUBLISHED[name], strict=True):
        assert KNOWN.get(index, wnid) == wnid


def test_ids_of_the_subsets_against_timm():
    info = pytest.importorskip("timm.data", reason="needs the extra 'timm'").ImageNetInfo()
    for name, indices in PUBLISHED.items():
        assert [wnid for wnid, _ in imagenet.SUBSETS[name]] == [info.index_to_label_name(index) for index in indices]


def test_names_of_shared_classes_agree():
    assert len(imagenet.NAMES) == 60 - 3  # banana, lemon and lion are in two lists
    assert all(imagenet.NAMES[wnid] == name for pairs in imagenet.SUBSETS.values() for wnid, name in pairs)


# Tiny-ImageNet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, "val/{}", "val/{}/images", "val/images/{}"])
def test_tiny_imagenet_in_every_known_layout(tmp_path, layout):
    write_tiny(tmp_path, sorted_into=layout)
    train, test = imagenet.tiny_imagenet(tmp_path)
    assert train.classes == test.classes == ("n01443537", "n02124075", "n04067472")  # sorted, not as in wnids.txt
    assert (train.counts, test.counts) == ((2, 2, 2), (1, 2, 1))
    assert shown_paths(train)[:3] == ["n01443537_0.JPEG", "n01443537_1.JPEG", "n02124075_0.JPEG"]
    assert shown_paths(test) == ["val_8.JPEG", "val_1.JPEG", "val_9.JPEG", "val_7.JPEG"]
    assert all(path.is_file() for listing in (train, test) for path in listing.paths)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_9.JPEG\tn00000000\t0\t0\t1\t1", r"line 5: 'val_9.JPEG\\tn00000000.* is no image name, tab and class"),
        ("../../secret.png\tn02124075\t0\t0\t1\t1", r"line 5: '../../secret.png"),
        ("..\tn02124075", r"line 5"),
        ("val_9.JPEG n02124075", r"line 5"),
        ("\tn02124075", r"line 5"),
    ],
)
def test_bad_annotations_are_refused(tmp_path, line, message):
    place = write_tiny(tmp_path)
    with (place / "val/val_annotations.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(BadData, match=message):
        imagenet.tiny_imagenet(tmp_path)


def test_incomplete_copies_of_tiny_imagenet(tmp_path):
    with pytest.raises(BadData, match=rf"tiny_imagenet: tiny-imagenet-200/train not found in {tmp_path}; unpack "
                                      r"tiny-imagenet-200.zip .*DSDISTILL_DATA"):  # fmt: skip
        imagenet.tiny_imagenet(tmp_path)
    place = write_tiny(tmp_path)
    (place / "wnids.txt").write_text("\n".join([*TINY, "n09999999"]))
    with pytest.raises(BadData, match=r"wnids.txt against train/.*lacks|has 'n09999999'"):
        imagenet.tiny_imagenet(tmp_path)
    (place / "wnids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadData, match=r"wnids.txt: cannot be read .*unpack the archive again"):
        imagenet.tiny_imagenet(tmp_path)
    (place / "wnids.txt").unlink()
    (place / "val/val_annotations.txt").write_text("val_9.JPEG\tn02124075\n")
    with pytest.raises(
        BadData, match=r"no images in '.*val/images \(n01443537\)', '.*val/images \(n04067472\)'; unpack"
    ):
        imagenet.tiny_imagenet(tmp_path)
    (place / "val/val_annotations.txt").unlink()
    with pytest.raises(BadData, match=r"val_annotations.txt: not found, and no class folders beside it"):
        imagenet.tiny_imagenet(tmp_path)


# Imagenette and ImageWoof --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenette", "imagewoof"])
@pytest.mark.parametrize("size", ["", "-320", "-160", "-128sq"])
def test_fastai_folders(tmp_path, name, size):
    classes = [wnid for wnid, _ in imagenet.SUBSETS[name.removeprefix("image")]]
    write_classes(tmp_path / f"{name}2{size}", classes)
    train, test = imagenet.fastai(name, tmp_path)
    assert train.classes == test.classes == tuple(sorted(classes))
    assert (train.counts, test.counts) == ((2,) * 10, (1,) * 10)
    assert all(path.is_file() for listing in (train, test) for path in listing.paths)


def test_of_several_copies_the_largest_is_taken(tmp_path):
    classes = sorted(wnid for wnid, _ in imagenet.SUBSETS["nette"])
    for size in ("-128sq", "-160", "-320", ""):
        place = write_classes(tmp_path / f"imagenette2{size}", classes)
        assert imagenet.fastai("imagenette", tmp_path).train.folders[0] == place / "train" / classes[0]


def test_incomplete_fastai_folders(tmp_path):
    with pytest.raises(BadData, match=rf"imagewoof: imagewoof2/train \(or imagewoof2-320.* not found in {tmp_path}; "
                                      r"unpack imagewoof2-160.tgz \(.*\) there, or point root"):  # fmt: skip
        imagenet.fastai("imagewoof", tmp_path)
    with pytest.raises(BadData, match=r"imagenette: .* there, fetch it with download=True"):
        imagenet.fastai("imagenette", tmp_path)
    place = write_classes(tmp_path / "imagenette2", sorted(wnid for wnid, _ in imagenet.SUBSETS["nette"])[1:])
    with pytest.raises(BadData, match=r"imagenette2/train.* lacks 'n01440764'"):
        imagenet.fastai("imagenette", tmp_path)
    for split in ("train", "val"):
        (place / split / "n01440764").mkdir()
    with pytest.raises(BadData, match=r"no images in '.*train/n01440764 \(n01440764\)'"):
        imagenet.fastai("imagenette", tmp_path)


# Subsets of ImageNet -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "."])
@pytest.mark.parametrize("name", ["meow", "yellow"])
def test_subsets_are_cut_out_in_the_order_of_their_labels(tmp_path, name, place):
    classes = [wnid for wnid, _ in imagenet.SUBSETS[name]]
    write_classes(tmp_path / place, sorted({*classes, "n01440764", "n02102040"}))
    train, test = imagenet.subset(name, tmp_path)
    assert train.classes == test.classes == tuple(classes)
    assert (train.counts, test.counts) == ((2,) * 10, (1,) * 10)
    assert shown_paths(train)[::2] == [f"{wnid}_0.JPEG" for wnid in classes]
    assert all(path.is_file() for path in test.paths)


def test_incomplete_imagenet(tmp_path):
    with pytest.raises(
        BadData, match=rf"imagenet_fruit: imagenet/train/n07753275 not found in {tmp_path}; put ImageNet"
    ):
        imagenet.subset("fruit", tmp_path)
    classes = [wnid for wnid, _ in imagenet.SUBSETS["fruit"]]
    write_classes(tmp_path / "imagenet", classes[:-1], val="ILSVRC2012_val_{index:08}.JPEG")
    with pytest.raises(BadData, match=r"imagenet/val/n07753275: not found; sort the validation images into class"):
        imagenet.subset("fruit", tmp_path)
    write_classes(tmp_path / "imagenet", classes[:-1])
    with pytest.raises(BadData, match=r"no folder '.*imagenet/train/n07742313'; unpack the whole archive"):
        imagenet.subset("fruit", tmp_path)


# As sources ----------------------------------------------------------------------------------------------


def wnids(name):
    return [wnid for wnid, _ in imagenet.SUBSETS[name]]


def test_tiny_imagenet_as_a_source(tmp_path):
    write_tiny(tmp_path)
    source = load("Tiny-ImageNet", root=tmp_path)
    assert (source.name, source.shape, source.test.shape) == ("tiny_imagenet", (3, 64, 64), (3, 64, 64))
    assert source.classes == source.test.classes == tuple(sorted(TINY))
    # Colours by the place in TINY: 100 and 120, 0 and 20, 200 and 220; the JPEGs are a level or two off.
    assert (source.images[:, 0, 9, 9].int() - torch.tensor([100, 120, 0, 20, 200, 220])).abs().max() <= 2
    assert (source.test.images[:, 0, 9, 9].int() - torch.tensor([50, 150, 0, 100])).abs().max() <= 2
    assert source.normalization == source.test.normalization == imagenet.NORMALIZATION
    assert (imagenet.NORMALIZATION.mean, imagenet.NORMALIZATION.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert source.mirror_safe is True


@pytest.mark.parametrize(
    ("name", "place", "classes"),
    [
        ("imagenette", "imagenette2-160", sorted(wnids("nette"))),
        ("imagewoof", "imagewoof2", sorted(wnids("woof"))),
        ("imagenet_woof", "imagenet", wnids("woof")),
        ("imagenet_squawk", "ILSVRC2012", wnids("squawk")),
    ],
)
def test_images_of_many_sizes_become_128_pixels_as_published(tmp_path, name, place, classes):
    write_classes(tmp_path / place, classes)
    source = load(name, root=tmp_path)
    assert (source.name, source.shape, source.test.shape) == (name, (3, 128, 128), (3, 128, 128))
    assert source.classes == source.test.classes == tuple(classes)
    assert (source.images[::2, 0, 60, 60].int() - 20 * torch.arange(10)).abs().max() <= 3
    assert (source.test.images[:, 0, 60, 60].int() - 20 * torch.arange(10)).abs().max() <= 3
    assert source.normalization == imagenet.NORMALIZATION
    assert source.mirror_safe is True
    assert load(name, root=tmp_path, image_size=(16, 24)).shape == (3, 16, 24)


def test_the_whole_frame_is_stretched_unless_a_crop_is_asked_for(tmp_path):
    place = write_classes(tmp_path / "imagenet", wnids("nette"))
    bars = np.zeros((30, 60, 3), np.uint8)
    bars[:, :12] = bars[:, -12:] = 255
    Image.fromarray(bars).save(place / "train/n01440764/n01440764_0.JPEG", quality=100)
    whole = load("imagenet_nette", root=tmp_path).images[0, 0, 64]
    assert whole[:24].min() > 200
    assert whole[-24:].min() > 200
    assert load("imagenet_nette", root=tmp_path, image_size=128, resize="crop").images[0, 0, 64].max() < 50


def test_kept_on_disk_the_images_and_their_whitening_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path)
    resident, on_disk = (
        load("tiny_imagenet", root=tmp_path, image_size=4, storage=storage, zca=True) for storage in ("memory", "cache")
    )
    assert list((tmp_path / "cache").iterdir())
    assert on_disk.fingerprint == resident.fingerprint
    assert on_disk.normalization == on_disk.test.normalization == resident.normalization
    assert on_disk.normalization.zca.shape == (3, 4, 4)


def test_a_failed_download_of_imagenette_says_so(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", offline)
    with pytest.raises(BadData, match=r"imagenette: could not be fetched \(no route to host\); check the network"):
        load("imagenette", root=tmp_path, download=True)


def test_download_fetches_the_small_copy_once(tmp_path, monkeypatch):
    asked = []

    def fetch(root, **settings):
        asked.append(settings)
        write_classes(root / "imagenette2-160", wnids("nette"))

    monkeypatch.setattr(torchvision.datasets, "Imagenette", fetch)
    assert load("imagenette", root=tmp_path, download=True, image_size=8).counts == (2,) * 10
    assert load("imagenette", root=tmp_path, download=True, image_size=8).counts == (2,) * 10
    assert asked == [{"split": "train", "size": "160px", "download": True}]


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenette", "imagewoof", "imagenet_nette"])
def test_what_is_missing_is_named_with_the_place(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DSDISTILL_DATA", str(tmp_path / "env"))
    with pytest.raises(BadData, match=rf"{name}: .* not found in {tmp_path}/env; .*root or\s+DSDISTILL_DATA"):
        load(name)
    assert list(tmp_path.iterdir()) == []


def test_broken_files_are_named(tmp_path):
    place = write_tiny(tmp_path)
    broken = place / "val/images/val_8.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(BadData, match=r"val_8.JPEG: not a readable image"):
        load("tiny_imagenet", root=tmp_path)
    with pytest.raises(InvalidSetting, match="max_skipped"):
        load("tiny_imagenet", root=tmp_path, on_bad_image="skip", max_skipped=2)
