import pickle
import threading
from pathlib import Path

import pytest
import torch

from dsdistill.data import ImageSource, Normalization, store
from dsdistill.data.store import FilePixels, ResidentPixels
from dsdistill.errors import BadArtifact, BadData

SHAPE = (11, 3, 4, 5)
IMAGES = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "images.u8").write_bytes(IMAGES.numpy().tobytes())
    return tmp_path / "images.u8"


@pytest.fixture(params=["resident", "file", "rows"])
def pixels(request, path):
    """The same images in every way to keep them; the last one is a part of a file in another order."""
    if request.param == "resident":
        return ResidentPixels(IMAGES)
    if request.param == "file":
        return FilePixels(path, SHAPE)
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    whole = torch.cat([IMAGES.new_zeros(1, 3, 4, 5), IMAGES[order]])
    path.write_bytes(whole.numpy().tobytes())
    return FilePixels(path, (12, 3, 4, 5), order.argsort() + 1)


def test_every_store_gives_the_same_images(pixels):
    assert (pixels.shape, len(pixels), pixels.row_bytes) == (SHAPE, 11, 60)
    assert pixels.device == torch.device("cpu")
    for indices in ([], [3], [10, 0, 0, 7], range(11)):
        places = torch.tensor(list(indices), dtype=torch.int64)
        assert torch.equal(pixels.take(places), IMAGES[places])
    for size in (None, 1, 4, 11, 100):
        parts = list(pixels.chunks(size))
        assert all(len(part) == (size or 11) for part in parts[:-1])
        assert torch.equal(torch.cat(parts), IMAGES)
    part = pixels.subset(torch.tensor([9, 2, 5])).subset(torch.tensor([2, 0]))
    assert part.shape == (2, 3, 4, 5)
    assert torch.equal(torch.cat(list(part.chunks())), IMAGES[[5, 9]])
    assert torch.equal(part.take(torch.tensor([1])), IMAGES[[9]])
    assert pixels.to("cpu") is pixels
    again = pickle.loads(pickle.dumps(pixels))  # noqa: S301
    assert torch.equal(again.take(torch.arange(11)), IMAGES)


def test_chunks_are_bounded(pixels, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 150)
    assert [len(chunk) for chunk in pixels.chunks()] == [2] * 5 + [1]
    monkeypatch.setattr(store, "CHUNK_BYTES", 10)
    assert [len(chunk) for chunk in pixels.chunks()] == [1] * 11


def test_what_is_given_out_is_a_copy(pixels):
    pixels.take(torch.arange(3)).fill_(7)
    assert torch.equal(pixels.take(torch.arange(3)), IMAGES[:3])


def test_a_subset_of_a_file_copies_nothing(path):
    part = FilePixels(path, SHAPE).subset(torch.arange(5))
    assert (part.path, part.file_shape, part.rows.tolist()) == (path, SHAPE, [0, 1, 2, 3, 4])
    assert len(pickle.dumps(part)) < 1500


def test_reading_without_positional_reads(path, monkeypatch):
    monkeypatch.delattr(store.os, "preadv")
    pixels, wrong = FilePixels(path, SHAPE), []

    def draw(seed):
        places = torch.randint(0, 11, (500,), generator=torch.Generator().manual_seed(seed))
        if not torch.equal(pixels.take(places), IMAGES[places]):
            wrong.append(seed)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_short_reads_are_continued(path, monkeypatch):
    whole = store.os.preadv
    monkeypatch.setattr(store.os, "preadv", lambda file, parts, place: whole(file, [parts[0][:7]], place))
    assert torch.equal(FilePixels(path, SHAPE).take(torch.arange(11)), IMAGES)


def test_missing_and_damaged_files_are_named(path):
    pixels = FilePixels(path, SHAPE)
    frozen = pickle.dumps(pixels)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadArtifact, match=r"images.u8: was cut short while in use; load the data again"):
        pixels.take(torch.tensor([10]))
    with pytest.raises(BadArtifact, match=r"images.u8: holds 659 bytes where 660 are expected; load the data again"):
        FilePixels(path, SHAPE)
    path.unlink()
    with pytest.raises(BadArtifact, match=r"images.u8: the cached images cannot be read \(No such file"):
        pickle.loads(frozen)  # noqa: S301
    assert torch.equal(pixels.take(torch.tensor([0])), IMAGES[:1])  # removed, but open


def source_of(images, **options):
    options.setdefault("normalization", None)
    return ImageSource("toy", "abc", images, TARGETS, **options)


def test_a_source_in_a_file_is_the_source_in_memory(pixels):
    one, other = source_of(IMAGES), source_of(pixels)
    assert other.fingerprint == one.fingerprint
    assert other.normalization == one.normalization == Normalization.measure(IMAGES)
    assert (other.shape, other.counts, len(other)) == (one.shape, one.counts, len(one))

    def generator():
        return torch.Generator().manual_seed(3)

    assert all(map(torch.equal, other.per_class([2, 0], 3, generator()), one.per_class([2, 0], 3, generator())))
    for stream in (None, generator):
        pairs = zip(*(made.batches(4, stream and stream()) for made in (one, other)), strict=True)
        assert all(torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in pairs)
    for first, second in zip(one.split(0.4, generator()), other.split(0.4, generator()), strict=True):
        assert (first.fingerprint, first.counts) == (second.fingerprint, second.counts)
    assert other.subset([10, 4, 5, 0]).fingerprint == one.subset([10, 4, 5, 0]).fingerprint
    assert pickle.loads(pickle.dumps(other)).fingerprint == one.fingerprint  # noqa: S301
    assert other.to("cpu") is other


def test_images_of_a_file_are_not_handed_out_whole(path):
    source = source_of(FilePixels(path, SHAPE))
    with pytest.raises(BadData, match=r"toy: the images \(0.0 GB\) stay in a file; draw .* storage='memory'"):
        _ = source.images
    assert source_of(IMAGES).images is IMAGES


def test_unsorted_targets_are_sorted_without_reading_pixels(path, monkeypatch):
    pixels = FilePixels(path, SHAPE)
    monkeypatch.setattr(FilePixels, "_read", None)
    source = ImageSource("toy", "abc", pixels, TARGETS.flip(0), normalization=Normalization((0.0,) * 3, (1.0,) * 3))
    assert source.store.rows.tolist() == [7, 8, 9, 10, 5, 6, 0, 1, 2, 3, 4]


def test_a_known_fingerprint_costs_nothing(path, monkeypatch):
    known = source_of(FilePixels(path, SHAPE), fingerprint="known", normalization=Normalization((0.0,) * 3, (1.0,) * 3))
    monkeypatch.setattr(FilePixels, "_read", None)
    assert known.fingerprint == known.with_mirror_safe(False).fingerprint == "known"
    assert known.subset(range(11))._fingerprint is None


@pytest.mark.gpu
def test_a_file_moves_to_a_gpu_when_it_fits_and_is_uploaded_in_parts_when_not(path, monkeypatch):
    places = torch.tensor([3, 9, 0], device="cuda")
    resident = FilePixels(path, SHAPE).to("cuda")
    assert isinstance(resident, ResidentPixels)
    monkeypatch.setattr(store, "DEVICE_SHARE", 0.0)
    streamed = FilePixels(path, SHAPE).to("cuda")
    assert isinstance(streamed, FilePixels)
    for pixels in (resident, streamed):
        assert pixels.device.type == "cuda"
        assert torch.equal(pixels.take(places).cpu(), IMAGES[[3, 9, 0]])
        assert torch.equal(torch.cat(list(pixels.chunks(4))).cpu(), IMAGES)
    source = source_of(FilePixels(path, SHAPE))
    assert source.to("cuda").fingerprint == source.fingerprint
    assert isinstance(source.to("cuda").to("cpu").store, FilePixels)


def test_where_free_memory_is_unknown_the_file_stays(path):
    moved = FilePixels(path, SHAPE).to("meta")
    assert isinstance(moved, FilePixels)
    assert moved.device.type == "meta"


def test_a_file_moves_whole_when_it_fits(path, monkeypatch):
    for free, kind in ((1320, ResidentPixels), (1319, FilePixels)):  # the share is a half of it
        monkeypatch.setattr(store, "_free_bytes", lambda _device, free=free: free)
        assert type(FilePixels(path, SHAPE).to("meta")) is kind


def test_names_of_every_kind_can_hold_a_file(tmp_path):
    odd = Path(tmp_path, "a \N{DOG FACE}")
    odd.write_bytes(IMAGES.numpy().tobytes())
    assert torch.equal(FilePixels(odd, SHAPE).take(torch.tensor([1])), IMAGES[[1]])
