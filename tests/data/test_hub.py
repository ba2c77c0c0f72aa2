import io
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dsdistill.data import Normalization, load
from dsdistill.data.decode import Rule
from dsdistill.data.hub import HubName, from_hub, load_hub
from dsdistill.errors import BadData, InvalidSetting, MissingExtra

datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")

NAMES = ["cat", "dog", "newt"]


def picture(value, size=(5, 4), mode="RGB"):
    """Width 5, height 4, filled with one value; the top left pixel is white."""
    image = Image.new(mode, size, value)
    image.putpixel((0, 0), 255 if mode == "L" else (255,) * 3)
    return image


def rows(count=6, *, first=0, mode="RGB", size=(5, 4), labels=None, names=NAMES, **columns):
    colours = [first + index if mode == "L" else (first + index, 7, 9) for index in range(count)]
    content = {
        "id": list(range(count)),
        "picture": [picture(colour, size, mode) for colour in colours],
        "kind": [index % 3 for index in range(count)] if labels is None else labels,
    }
    features = {"id": datasets.Value("int64"), "picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict(content | columns, features=datasets.Features(features))


def both(**test):
    return datasets.DatasetDict(train=rows(), test=rows(3, first=100, **test))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Objects -------------------------------------------------------------------------------------------------


def test_splits_columns_pixels_and_names():
    source = from_hub(both(), name="pets")
    assert (source.name, source.shape, source.classes) == ("pets", (3, 4, 5), tuple(NAMES))
    assert source.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.images[:, :, 3, 4].tolist() == [[red, 7, 9] for red in (0, 3, 1, 4, 2, 5)]
    assert source.images[:, :, 0, 0].unique().tolist() == [255]
    assert source.test.images[:, :, 3, 4].tolist() == [[red, 7, 9] for red in (100, 101, 102)]
    assert source.normalization == source.test.normalization == Normalization.measure(source.images)
    assert source.mirror_safe is True


def test_more_rows_than_a_batch_keep_their_order():
    source = from_hub(datasets.DatasetDict(train=rows(600, mode="L", labels=[0] * 600, names=["a"]), test=rows(
        1, mode="L", names=["a"])))  # fmt: skip
    assert source.images[:, 0, 3, 4].tolist() == [index % 256 for index in range(256)] + [255] * 344


def test_formats_and_transforms_of_the_dataset_are_not_applied():
    train = rows().with_transform(lambda batch: {"picture": [None], "kind": [7]})
    source = from_hub({"train": train, "test": rows(3).with_format("numpy")})
    assert torch.equal(source.images, from_hub(both()).images)


def test_other_splits_and_columns_by_name():
    data = datasets.DatasetDict(
        fit=rows().rename_column("kind", "fine").add_column("coarse", [0, 1, 0, 1, 0, 1]),
        held=rows(3, first=50).rename_column("kind", "fine").add_column("coarse", [0, 1, 0]),
    )
    source = from_hub(data, train_split="fit", test_split="held", label_column="coarse", image_column="picture")
    assert source.classes == ("0", "1")
    assert source.test.targets.tolist() == [0, 0, 1]
    assert source.test.images[:, 0, 3, 4].tolist() == [50, 52, 51]


@pytest.mark.parametrize("title", ["test", "validation", "valid", "val"])
def test_the_test_split_is_found(title):
    source = from_hub({"train": rows(), title: rows(3, first=90), "extra": rows(4)})
    assert source.test.images[0, 0, 3, 4] == 90


def test_without_a_test_split_a_seeded_part_is_held_out():
    source = from_hub(rows(30))
    assert (source.counts, source.test.counts) == ((8, 8, 8), (2, 2, 2))
    together = torch.cat([source.images, source.test.images])[:, 0, 3, 4]
    assert sorted(together.tolist()) == list(range(30))
    assert from_hub(rows(30)).fingerprint == source.fingerprint
    assert from_hub(rows(30), holdout_seed=1).fingerprint != source.fingerprint
    assert from_hub(rows(30), holdout=0.5).test.counts == (5, 5, 5)
    only = from_hub({"validation": rows(30)}, train_split="validation")
    assert torch.equal(only.images, source.images)


def test_grey_and_colour():
    assert from_hub(rows(mode="L")).shape == (1, 4, 5)
    mixed = datasets.concatenate_datasets([rows(mode="L", first=60), rows()])
    source = from_hub({"train": mixed, "test": rows(3, mode="L", first=80)})
    assert source.shape == source.test.shape == (3, 4, 5)
    assert source.images[0, :, 3, 4].tolist() == [60, 60, 60]
    assert source.test.images[0, :, 3, 4].tolist() == [80, 80, 80]
    with pytest.raises(BadData, match=r"hub \(test\), item 0: a colour image where all .* are grey"):
        _ = from_hub({"train": rows(mode="L"), "test": rows(3)}).test


def test_mixed_sizes_need_an_image_size():
    mixed = datasets.concatenate_datasets([rows(), rows(size=(9, 9))])
    with pytest.raises(BadData, match=r"mixed sizes, height x width: 4x5 \(6\), 9x9 \(6\); pass image_size="):
        from_hub(mixed)
    assert from_hub(mixed, image_size=(3, 2)).shape == (3, 3, 2)
    cropped = from_hub(rows(size=(8, 4)), image_size=4, resize="crop")
    assert cropped.images.max() < 255  # the white corner lies outside the centre
    with pytest.raises(InvalidSetting, match="resize = 'squash'"):
        from_hub(mixed, image_size=4, resize="squash")


def test_images_are_read_from_their_files_too(tmp_path):
    for index in range(4):
        picture((index, 0, 0)).save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 1, 0]}, features=features)
    whole = from_hub({"train": data, "test": data})
    assert whole.images[:, 0, 3, 4].tolist() == [0, 3, 1, 2]
    (tmp_path / "2.png").unlink()
    with pytest.raises(BadData, match=r"2\.png: cannot be read \(No such file"):
        from_hub({"train": data, "test": data})


def test_options_of_the_source():
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    source = from_hub(both(), normalization=normalization, mirror_safe=False, device="cpu")
    assert source.normalization == source.test.normalization == normalization
    assert source.mirror_safe is source.test.mirror_safe is False


# Refusals ------------------------------------------------------------------------------------------------


def test_a_single_class_is_worth_one_warning(caplog):
    cats = rows(labels=[0] * 6, names=["cat"])
    _ = from_hub({"train": cats, "test": cats}).test
    assert caplog.messages == ["hub: one class only ('cat'): nothing to tell apart"]


def test_columns_that_cannot_be_guessed_are_listed():
    listing = r"Columns: id \(int64\), picture \(.*Image\), kind \(ClassLabel of 3\)"
    with pytest.raises(BadData, match=r"hub: has no columns of type Image; name one with image_column=.*Columns: id"):
        from_hub(rows().remove_columns("picture"))
    with pytest.raises(BadData, match=r"has no columns of type ClassLabel; name one with label_column= \(\?label="):
        from_hub(rows().remove_columns("kind"))
    doubled = rows().cast_column("id", datasets.ClassLabel(names=list("abcdef")))
    with pytest.raises(BadData, match=r"has 2 columns of type ClassLabel.*id \(ClassLabel of 6\)"):
        from_hub(doubled)
    with pytest.raises(BadData, match=rf"has no column 'photo'. {listing}"):
        from_hub(rows(), image_column="photo")
    with pytest.raises(BadData, match=rf"column 'id' is no Image; cast it first .*{listing}"):
        from_hub(rows(), image_column="id")
    texts = rows().add_column("text", ["a"] * 6)
    with pytest.raises(BadData, match=r"labels in column 'text' are neither ClassLabel nor integers"):
        from_hub(texts, label_column="text")


def test_splits_that_do_not_fit():
    with pytest.raises(BadData, match="has no split 'train'; there are 'fit': name them"):
        from_hub({"fit": rows()})
    with pytest.raises(BadData, match="has no split 'held'; there are 'train', 'test'"):
        from_hub(both(), test_split="held")
    with pytest.raises(BadData, match="split 'train' cannot be both"):
        from_hub(both(), test_split="train")
    with pytest.raises(BadData, match="split 'test' has no rows"):
        from_hub({"train": rows(), "test": rows(0)})
    with pytest.raises(BadData, match=r"the test split lacks 'newt' and has 'eft'"):
        from_hub({"train": rows(), "test": rows(names=["cat", "dog", "eft"])})
    with pytest.raises(BadData, match=r"hub: 'train' is a IterableDataset; .*without streaming=True"):
        from_hub(rows().to_iterable_dataset())
    with pytest.raises(BadData, match="hub: 'train' is a list"):
        from_hub([1, 2])
    with pytest.raises(InvalidSetting, match="holdout = 1"):
        from_hub(rows(), holdout=1)


def test_rows_that_do_not_fit():
    with pytest.raises(BadData, match=r"pets, item 2: has the label -1; .*choose another"):
        from_hub(rows(3, labels=[0, 1, -1]), name="pets")
    with pytest.raises(BadData, match=r"hub, item 299: has the label -1"):
        from_hub(rows(300, mode="L", labels=[0] * 299 + [-1]))
    with pytest.raises(BadData, match=r"item 1: has the label None"):
        from_hub(rows(3, labels=[0, None, 1]))
    with pytest.raises(BadData, match=r"item 0: has no image"):
        from_hub(rows(2, picture=[None, picture(0, mode="L")]))
    broken = io.BytesIO()
    picture((0, 0, 0)).save(broken, "PNG")
    with pytest.raises(BadData, match=r"hub, item 0: not a readable image"):
        from_hub(rows(1, picture=[{"path": None, "bytes": broken.getvalue()[:50]}]))


def test_broken_images_are_left_out_and_listed_when_asked():
    content = [picture((index, 0, 0)) for index in range(6)]
    content[4] = None
    data = {"train": rows(picture=content), "test": rows(picture=content)}
    source = from_hub(data, on_bad_image="skip", max_skipped=0.2)
    assert source.images[:, 0, 3, 4].tolist() == [0, 3, 1, 2, 5]
    assert source.targets.tolist() == [0, 0, 1, 2, 2]
    assert [(str(path), reason) for path, reason in source.skipped] == [("hub, item 4", "has no image; remove the row")]
    assert [str(path) for path, _ in source.test.skipped] == ["hub (test), item 4"]
    with pytest.raises(BadData, match=r"hub: 1 of 6 images are bad, more than max_skipped=0.1 of them: hub, item 4"):
        from_hub(data, on_bad_image="skip", max_skipped=0.1)
    with pytest.raises(BadData, match=r"hub, item 4: has no image; remove the row"):
        from_hub(data)


def test_the_rule_for_pixels_is_that_of_folders():
    """EXIF orientation is applied, and the formats are those of folders."""
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5)).save(turned, "PNG", exif=exif)
    content = [{"path": None, "bytes": turned.getvalue()}] * 3
    source = from_hub({"train": rows(3, picture=content), "test": rows(3, picture=content)})
    assert source.images[0, 0, 0].tolist() == [15, 10, 5, 0]
    icon = io.BytesIO()
    picture((0, 0, 0), size=(16, 16)).save(icon, "ICO")
    with pytest.raises(BadData, match="not a readable image"):
        from_hub(rows(1, picture=[{"path": None, "bytes": icon.getvalue()}]))


# Names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:mnist", HubName("mnist")),
        ("hf:ylecun/mnist", HubName("ylecun/mnist")),
        ("hf:a/b:plain", HubName("a/b", "plain")),
        ("hf:a/b?label=fine", HubName("a/b", label="fine")),
        (
            "hf:a/b:c?train=t%201&test=v&image=img&label=l",
            HubName("a/b", "c", train="t 1", test="v", image="img", label="l"),
        ),
    ],
)
def test_names(text, expected):
    assert HubName.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf:", "hf:a/", "hf:/b", "hf:a/b/c", "hf:../b", "hf:./b", "hf:~/b", "hf:a/..", "hf:a/b:", "hf:a/b?lable=x",
        "hf:a/b?label=", "hf:a/b?label", "hf:a/b?label=x&label=y", "hf:a/b?&",
    ],
)  # fmt: skip
def test_malformed_names_are_refused(text):
    with pytest.raises(InvalidSetting, match=r"give hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, and options \?train="):
        HubName.parse(text)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds owner/pets as datasets leaves it after a download."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "pets"
    data.mkdir()
    for title, split in both().items():
        split.to_parquet(data / f"{title}-00000-of-00001.parquet")
    built = datasets.load_dataset_builder(str(data), cache_dir=str(tmp_path / "built"))
    built.download_and_prepare()
    place = tmp_path / "cache/owner___pets/default/0.0.0/0123"
    shutil.copytree(built.cache_dir, place)
    info = place / "dataset_info.json"
    info.write_text(info.read_text().replace(built.config_id, "default"))
    return place


def test_a_cached_dataset_is_read_without_network(cache, no_network):
    source = load_hub("hf:owner/pets")
    assert source.name == "owner/pets"
    assert torch.equal(source.images, from_hub(both()).images)
    assert torch.equal(source.test.images, from_hub(both()).test.images)
    named = load_hub("hf:owner/pets:default?test=train&train=test&label=kind&image=picture", rule=Rule((2, 3)))
    assert (named.name, named.shape, len(named), len(named.test)) == ("owner/pets:default", (3, 2, 3), 3, 6)


def test_by_name_like_any_other_data(cache, no_network):
    source = load("hf:owner/pets", image_size=3, mirror_safe=False, zca=True)
    assert (source.name, source.shape, source.mirror_safe) == ("owner/pets", (3, 3, 3), False)
    assert source.test.normalization.zca is not None
    with pytest.raises(InvalidSetting, match="give hf:OWNER/NAME"):
        load("hf:")
    with pytest.raises(BadData, match="download=True"):
        load("hf:owner/birds")


def test_what_is_not_cached_is_named_with_the_mend(cache, no_network):
    message = r"hf:owner/birds: not usable from the cache .*find cache for owner/birds.*download=True \(--load.download"
    with pytest.raises(BadData, match=message):
        load_hub("hf:owner/birds")
    with pytest.raises(BadData, match=r"hf:owner/pets: not usable .*for config 'other'"):
        load_hub("hf:owner/pets:other")


def test_download_asks_datasets_and_trusts_no_code(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return both()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_hub("hf:owner/pets:c", download=True).counts == (2, 2, 2)
    assert asked == [(("owner/pets", "c"), {})]


def test_a_failed_download_says_so(cache, no_network, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadData, match=r"hf:owner/birds: could not be fetched \(.*\); check the name, .*HF_HUB_OFFLINE"):
        load_hub("hf:owner/birds", download=True)
    assert load_hub("hf:owner/pets", download=True).counts == (2, 2, 2)  # offline, datasets takes its cache


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"reading Hugging Face datasets needs the package 'datasets': pip install "
                                           r"'dsdistill\[hub\]'"):  # fmt: skip
        load_hub("hf:owner/pets")
