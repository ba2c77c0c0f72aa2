import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision import transforms

from dsdistill.data import Normalization, from_dataset
from dsdistill.errors import BadData, DeviceUnavailable


class Items:
    """A map-style dataset over a list that counts how often each item is read."""

    def __init__(self, items, classes=None):
        self.items, self.reads = items, [0] * len(items)
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.items[index]


BYTES = torch.arange(24, dtype=torch.uint8).view(3, 2, 4) * 10
EQUIVALENT = {
    "uint8 tensor": BYTES,
    "float tensor": transforms.functional.to_tensor(BYTES.permute(1, 2, 0).numpy()),
    "double tensor": BYTES.double() / 255,
    "pillow": Image.fromarray(BYTES.permute(1, 2, 0).numpy()),
    "array": BYTES.permute(1, 2, 0).numpy(),
    "float array": BYTES.permute(1, 2, 0).numpy() / 255,
}


@pytest.mark.parametrize("image", EQUIVALENT.values(), ids=EQUIVALENT)
def test_every_kind_of_image_gives_the_same_bytes(image):
    source = from_dataset(Items([(image, 0)]))
    assert torch.equal(source.images, BYTES[None])
    assert source.images.is_contiguous()


@pytest.mark.parametrize("image", [BYTES[0], BYTES[:1], BYTES[0].numpy(), Image.fromarray(BYTES[0].numpy())])
def test_images_without_a_channel_axis_have_one_channel(image):
    assert torch.equal(from_dataset(Items([(image, 0)])).images, BYTES[None, :1])


def test_all_256_values_survive_totensor():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    item = (transforms.functional.to_tensor(pixels[0].numpy()), 0)
    assert torch.equal(from_dataset(Items([item])).images[0], pixels)


def test_floats_between_bytes_are_rounded_to_the_nearest():
    source = from_dataset(Items([(torch.tensor([[0.001, 0.003, 0.999, 1.0]]), 0)]))
    assert source.images.flatten().tolist() == [0, 1, 255, 255]


def test_labels_of_every_integer_kind_and_sorting():
    labels = [2, np.int64(0), torch.tensor(1), np.array(2), np.uint8(0)]
    source = from_dataset(Items([(BYTES + index, label) for index, label in enumerate(labels)]))
    assert source.classes == ("0", "1", "2")
    assert source.counts == (2, 1, 2)
    assert (source.images[:, 0, 0, 0]).tolist() == [1, 4, 2, 0, 3]
    assert (source.name, source.mirror_safe, source.has_test) == ("custom", True, False)
    assert source.normalization == Normalization.measure(source.images)


def test_class_names_come_from_the_argument_then_the_dataset():
    items = Items([(BYTES, 0), (BYTES, 1)], ["cat", "dog"])
    assert from_dataset(items).classes == ("cat", "dog")
    assert from_dataset(Subset(Subset(items, [0, 1]), [1, 0])).classes == ("cat", "dog")
    assert from_dataset(items, classes=["x", "y"]).classes == ("x", "y")
    assert from_dataset(TensorDataset(BYTES[None], torch.tensor([0]))).classes == ("0",)


def test_every_item_is_read_once_and_the_test_split_when_used():
    train, test = Items([(BYTES, 0), (BYTES, 1)]), Items([(BYTES, 1), (BYTES + 1, 0)])
    given = Normalization((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    source = from_dataset(train, test, normalization=given, name="mine", mirror_safe=False)
    assert (train.reads, test.reads) == ([1, 1], [1, 0])  # the first one, to compare its shape
    assert source.test.targets.tolist() == [0, 1]
    assert source.test.images[0, 0, 0, 0] == 1
    assert (source.test.normalization, source.test.mirror_safe) == (given, False)
    _ = source.subset([0, 1]).test
    assert test.reads == [2, 1]
    assert (source.name, source.normalization, source.mirror_safe) == ("mine", given, False)


BAD_ITEMS = [
    ((BYTES.float() / 255 - 0.5, 0), r"item 1: float pixels reach from -0.5 to .*; drop the Normalize transform"),
    ((BYTES.float(), 0), "item 1: float pixels reach from 0 to 230, expected 0 to 1"),
    ((torch.full((3, 2, 4), float("nan")), 0), "item 1: float pixels reach from nan"),
    ((BYTES.long(), 0), "item 1: pixels have dtype torch.int64"),
    ((BYTES.numpy().astype(np.int32), 0), "item 1: an array of int32; give uint8"),
    ((BYTES[None], 0), r"item 1: an image of shape \(1, 3, 2, 4\)"),
    ((BYTES[:, :0], 0), r"item 1: an image of shape \(3, 0, 4\)"),
    (("a.png", 0), "item 1: an image of type str"),
    ((Image.fromarray(np.ones((2, 4), np.float32)), 0), "item 1: float pixels have no agreed range"),
    ((BYTES, -1), "item 1: label -1 is negative; map labels"),
    ((BYTES, "cat"), "item 1: label 'cat' is no int"),
    ((BYTES, 1.0), "item 1: label 1.0 is no int"),
    ((BYTES, True), "item 1: label True is no int"),
    ((BYTES, torch.tensor(0.5)), "item 1: label 0.5 is no int"),
    ((BYTES, None), "item 1: label None is no int"),
    (BYTES, r"item 1: expected \(image, label\), got Tensor"),
    ((BYTES, 0, 0), r"item 1: expected \(image, label\), got tuple"),
    ((BYTES[:, :, :2], 0), r"have 2 shapes \(C, H, W\): \(3, 2, 4\) \(1\), \(3, 2, 2\) \(1\); resize and convert"),
    ((BYTES[:1], 0), r"have 2 shapes .* \(1, 2, 4\) \(1\)"),
]


@pytest.mark.parametrize(("item", "message"), BAD_ITEMS)
def test_an_unsuitable_item_is_named_in_either_split(item, message):
    bad, good = Items([(BYTES, 0), item]), Items([(BYTES, 0)])
    with pytest.raises(BadData, match=rf"^mine \(train\).*{message}"):
        from_dataset(bad, name="mine")
    source = from_dataset(good, bad, name="mine")
    with pytest.raises(BadData, match=rf"^mine \(test\).*{message}"):
        _ = source.test


def test_labels_beyond_the_classes_are_refused():
    items = Items([(BYTES, 0), (BYTES, 1), (BYTES, 2)])
    with pytest.raises(BadData, match=r"custom \(train\), item 2: label 2 has no name; the 2 classes are 0 to 1"):
        from_dataset(items, classes="ab")
    source = from_dataset(Items([(BYTES, 0), (BYTES, 1)]), items)
    with pytest.raises(BadData, match=r"custom \(test\), item 2: label 2 has no name"):
        _ = source.test


def test_a_failing_dataset_is_named_with_its_cause():
    class Failing(Items):
        def __getitem__(self, index):
            raise KeyError("lost")

    with pytest.raises(BadData, match=r"item 0: reading it failed \(KeyError: 'lost'\)") as caught:
        from_dataset(Failing([1]))
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_no_map_style_dataset_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield BYTES, 0

    with pytest.raises(BadData, match="no map-style dataset; it needs len"):
        from_dataset(Stream())
    with pytest.raises(BadData, match=r"custom \(train\): the dataset has no items"):
        from_dataset(Items([]))


def test_an_unsuitable_test_split_is_refused_before_anything_of_it_is_read():
    train = Items([(BYTES, 0), (BYTES, 1)], ["cat", "dog"])
    swapped = Items([(BYTES, 0)], ["dog", "cat"])
    with pytest.raises(BadData, match="has 'dog' as class 0 where the train split has 'cat'"):
        from_dataset(train, swapped)
    with pytest.raises(BadData, match=r"custom \(test\): the dataset has no items"):
        from_dataset(train, Items([]))
    assert swapped.reads == [0]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ((BYTES[:1], 0), r"an image has shape \(1, 2, 4\), expected \(3, 2, 4\) as in the train split"),
        ((BYTES[:, :, :3], 0), r"an image has shape \(3, 2, 3\), expected \(3, 2, 4\)"),
        ((BYTES, 2), "label 2 has no name; the 2 classes are 0 to 1"),
        ((BYTES.float(), 0), "float pixels reach from 0 to 230"),
    ],
)
def test_the_first_test_item_is_compared_at_once(first, message):
    test = Items([first, (BYTES, 0)])
    with pytest.raises(BadData, match=rf"^custom \(test\), item 0:? ?.*{message}"):
        from_dataset(Items([(BYTES, 0), (BYTES, 1)]), test)
    assert test.reads == [1, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_with_the_channels_last_are_refused(channels, dtype):
    image = torch.zeros(16, 5, channels, dtype=dtype)
    with pytest.raises(BadData, match=rf"item 0: .* \(16, 5, {channels}\) looks like \(H, W, C\); give \(C, H, W\)"):
        from_dataset(Items([(image, 0)]))
    assert from_dataset(Items([(image.numpy(), 0)])).shape == (channels, 16, 5)
    assert from_dataset(Items([(image.permute(2, 0, 1), 0)])).shape == (channels, 16, 5)


@pytest.mark.parametrize("shape", [(3, 16, 3), (4, 16, 4), (16, 4, 3), (16, 16, 2), (5, 16, 16)])
def test_other_tensors_are_taken_at_their_word(shape):
    assert from_dataset(Items([(torch.zeros(shape), 0)])).shape == shape


def test_a_single_class_is_worth_one_warning(caplog):
    items = Items([(BYTES, 0), (BYTES, 0)])
    with caplog.at_level(logging.WARNING, "dsdistill"):
        source = from_dataset(items, items, classes=["cat"])
        _ = source.test, source.subset([0])
    assert [record.message for record in caplog.records] == ["custom: one class only ('cat'): nothing to tell apart"]
    with pytest.raises(BadData, match="item 1: label 1 has no name; the only class is 0"):
        from_dataset(Items([(BYTES, 0), (BYTES, 1)]), classes=["cat"])


def test_a_missing_class_and_a_missing_device_are_refused():
    with pytest.raises(BadData, match="no images of '1'"):
        from_dataset(Items([(BYTES, 0), (BYTES, 2)]))
    items = Items([(BYTES, 0)])
    with pytest.raises(DeviceUnavailable):
        from_dataset(items, device="warp")
    assert items.reads == [0]
