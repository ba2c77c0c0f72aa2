import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import die, write_until_the_second_block
from PIL import Image

from dsdistill.core import storage
from dsdistill.data import blocks, build, checksum, load
from dsdistill.data.cache import cache_folder, ensure_cached
from dsdistill.data.decode import Rule
from dsdistill.data.listing import list_images
from dsdistill.errors import BadArtifact, BadData, OutOfSpace, OutputConflict

LAYOUT = {"train/cat": 5, "train/dog": 4, "test/cat": 2, "test/dog": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(root, layout=LAYOUT, size=(4, 3), seed=0):
    """Write noise, {"train/cat": 5} means five colour images, old enough that their times can be trusted."""
    draw = np.random.default_rng(seed)
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
            age(root / folder / f"{index}.png")
    return root


def age(path, seconds=3600):
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "pets")


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files decoded into a cache in this process, in order."""
    names = []

    def decode(path, content, rule):
        names.append(path.name)
        return real(path, content, rule)

    real = blocks.decode
    monkeypatch.setattr(blocks, "decode", decode)
    return names


def cached(root, **options):
    return load(root, storage="cache", **options)


def entries(cache):
    return sorted(cache.glob("images/*/images.u8"))


def small_blocks(monkeypatch, rows=2):
    monkeypatch.setattr(build, "BLOCK_BYTES", rows * 36)  # 3 x 3 x 4 bytes per image


# What is kept, and when it is used again ----------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(0)


def test_a_cached_source_is_the_source_in_memory(root):
    kept, memory = cached(root), load(root, storage="memory")
    for one, other in ((kept, memory), (kept.test, memory.test)):
        assert (one.fingerprint, one.normalization) == (other.fingerprint, other.normalization)
        assert (one.name, one.classes, one.counts, one.shape) == (other.name, other.classes, other.counts, other.shape)
        assert torch.equal(torch.cat(list(one.store.chunks())), other.images)
        assert torch.equal(one.targets, other.targets)
    assert torch.equal(kept.per_class([1, 0], 3, generator()).images, memory.per_class([1, 0], 3, generator()).images)


def test_the_fingerprint_is_not_computed_again(root, monkeypatch):
    expected = cached(root).fingerprint
    monkeypatch.setattr("dsdistill.data.measure.fingerprint", None)
    assert cached(root).fingerprint == expected
    assert len(cached(root).test.fingerprint) == 64


def test_a_second_load_neither_decodes_nor_reads_the_files(root, decoded, monkeypatch):
    first = cached(root)
    assert len(decoded) == 14
    monkeypatch.setattr(build, "survey", None)
    assert cached(root).fingerprint == first.fingerprint
    assert len(decoded) == 14


def test_a_test_split_is_decoded_at_once_but_opened_on_use(root, decoded, monkeypatch):
    source = cached(root)
    assert len(decoded) == 14
    shutil.rmtree(root)
    assert source.test.counts == (2, 3)
    (root / "train/cat").mkdir(parents=True)
    fill(root)
    (root / "test/dog/1.png").write_bytes(b"broken")
    with pytest.raises(BadData, match=r"test/dog/1.png: not a readable image"):
        cached(root)


def test_a_copy_elsewhere_hits_by_content(root, decoded, cache):
    expected = cached(root).fingerprint
    shutil.copytree(root, root.with_name("copy"))
    assert cached(root.with_name("copy")).fingerprint == expected
    assert len(decoded) == 14
    assert len(entries(cache)) == 2


def test_files_whose_times_are_fresh_are_hashed_again(root, decoded, cache):
    (root / "train/cat/0.png").touch()
    cached(root)
    assert len(list((cache / "listings").iterdir())) == 1  # of the test split
    cached(root)
    assert len(decoded) == 14


@pytest.mark.parametrize("change", ["content", "name", "class", "size", "policy"])
def test_whatever_changes_the_pixels_or_their_order_makes_another_cache(root, cache, change):
    before = cached(root, image_size=2)
    options = {"image_size": 2}
    if change == "content":
        Image.new("RGB", (4, 3), "red").save(root / "train/cat/2.png")
        age(root / "train/cat/2.png")
    elif change == "name":
        (root / "train/cat/2.png").rename(root / "train/cat/2a.png")  # the order stays
    elif change == "class":
        for split in ("train", "test"):
            (root / split / "cat").rename(root / split / "cow")  # the order stays
    elif change == "size":
        options["image_size"] = (2, 3)
    else:
        options["resize"] = "crop"
    after = cached(root, **options)
    assert (after.fingerprint == before.fingerprint) is (change == "name")
    assert after.fingerprint == load(root, storage="memory", **options).fingerprint
    assert len(entries(cache)) == (3 if change in ("content", "name") else 4)


def test_another_version_of_the_rule_makes_another_cache(root, decoded, monkeypatch):
    cached(root)
    monkeypatch.setattr("dsdistill.data.cache.RULE_VERSION", 2)
    cached(root)
    assert len(decoded) == 28


def test_auto_takes_the_cache_above_the_limit(root, cache, monkeypatch):
    assert load(root).images.shape == (9, 3, 3, 4)
    assert not cache.exists()
    monkeypatch.setattr("dsdistill.data.folder.MEMORY_LIMIT", 14 * 3 * 12)
    assert load(root).images.shape == (9, 3, 3, 4)
    assert not cache.exists()
    monkeypatch.setattr("dsdistill.data.folder.MEMORY_LIMIT", 14 * 3 * 12 - 1)
    assert load(root).store.path.is_relative_to(cache)
    assert load(root, image_size=2).images.shape == (9, 3, 2, 2)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DSDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/dsdistill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/dsdistill"


def test_odd_names(tmp_path):
    names = ["a cat", "\N{DOG FACE}", "con", "aux.png", "n" * 255, os.fsdecode(b"z\xff")]
    files = ["\N{CAT FACE}.png", "nul.png", f"{'x' * 251}.png", os.fsdecode(b"\xfe.png"), "deep/er/a b.png"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, len(names), len(files), 3, 4, 3), dtype=np.uint8)
    for s, split in enumerate(("train", "test")):
        for n, name in enumerate(names):
            for f, file in enumerate(files):
                path = tmp_path / "odd" / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[s, n, f]).save(path)
                age(path)
    for _ in range(2):
        source = cached(tmp_path / "odd")
        memory = load(tmp_path / "odd", storage="memory")
        assert source.classes == tuple(sorted(names))
        assert (source.fingerprint, source.test.fingerprint) == (memory.fingerprint, memory.test.fingerprint)


def test_grey_colour_and_many_channels(tmp_path):
    for mode, channels in (("L", 1), ("RGB", 3)):
        folder = tmp_path / mode / "a"
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new(mode, (4, 3), index).save(folder / f"{index}.png")
        assert cached(tmp_path / mode).shape == cached(tmp_path / mode).test.shape == (channels, 3, 4)
    for index in range(5, 9):
        Image.new("RGB", (4, 3)).save(tmp_path / f"L/a/{index}.png")
    mixed = cached(tmp_path / "L")
    assert mixed.shape == mixed.test.shape == (3, 3, 4)
    assert mixed.fingerprint == load(tmp_path / "L", storage="memory").fingerprint
    (tmp_path / "five/a").mkdir(parents=True)
    for index in range(3):
        np.save(tmp_path / f"five/a/{index}.npy", np.full((3, 4, 5), index, np.uint8))
    assert cached(tmp_path / "five").shape == (5, 3, 4)
    assert cached(tmp_path / "five").fingerprint == load(tmp_path / "five", storage="memory").fingerprint
    Image.new("L", (4, 3)).save(tmp_path / "five/a/0.png")
    with pytest.raises(BadData, match="different numbers of channels"):
        cached(tmp_path / "five")


def test_a_test_split_of_another_form_is_refused(root):
    fill(root, {"test/cat": 2, "test/dog": 3}, size=(9, 9))
    with pytest.raises(BadData, match=r"\(test split\): 9 x 9 pixels where the training images have 3 x 4; .*image_s"):
        cached(root)
    assert cached(root, image_size=4).test.shape == (3, 4, 4)
    fill(root, {"train/cat": 5}, size=(9, 9))
    with pytest.raises(BadData, match=r"mixed sizes, height x width: 9x9 \(5\), 3x4 \(4\); pass image_size="):
        cached(root)


# Bad files ----------------------------------------------------------------------------------------------------


def spoil(path, how):
    content = path.read_bytes()
    path.write_bytes({"header": b"text", "body": content[:-30], "empty": b""}[how])
    age(path)


@pytest.mark.parametrize("how", ["header", "body", "empty"])
def test_a_bad_file_ends_it_and_leaves_nothing_behind(root, cache, how):
    spoil(root / "train/dog/1.png", how)
    with pytest.raises(BadData, match=r"train/dog/1.png: not a readable image"):
        cached(root)
    assert not entries(cache)
    assert not list(cache.rglob("*.part"))
    assert not list(cache.rglob("journal*"))


@pytest.mark.parametrize("storage_kind", ["memory", "cache"])
def test_bad_files_are_left_out_and_listed(root, storage_kind, caplog):
    spoil(root / "train/cat/1.png", "header")
    spoil(root / "train/dog/2.png", "body")
    spoil(root / "test/dog/0.png", "empty")
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "dsdistill"):
            source = load(root, storage=storage_kind, on_bad_image="skip", max_skipped=0.3)
        assert [(str(path.relative_to(root)), why.partition(" (")[0]) for path, why in source.skipped] == [
            ("train/cat/1.png", "not a readable image"),
            ("train/dog/2.png", "not a readable image"),
        ]
        assert [str(path.relative_to(root)) for path, _ in source.test.skipped] == ["test/dog/0.png"]
        assert (source.counts, source.test.counts) == ((4, 3), (2, 2))
        good = [root / f"train/cat/{index}.png" for index in (0, 2, 3, 4)]
        good += [root / f"train/dog/{index}.png" for index in (0, 1, 3)]
        expected = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in good])
        assert np.array_equal(torch.cat(list(source.store.chunks())).numpy(), expected)
        assert source.split(0.5, generator())[0].skipped == source.skipped
    assert caplog.text.count("2 of 9 images are bad and left out: ") == 2  # one for each load
    assert caplog.text.count("(test split): 1 of 5 images are bad and left out: ") == 2
    memory = load(root, storage="memory", on_bad_image="skip", max_skipped=0.3)
    assert (source.fingerprint, source.test.fingerprint) == (memory.fingerprint, memory.test.fingerprint)
    assert source.normalization == memory.normalization


@pytest.mark.parametrize("storage_kind", ["memory", "cache"])
def test_too_many_bad_files_are_refused(root, storage_kind):
    spoil(root / "train/cat/1.png", "body")
    with pytest.raises(BadData, match=r"1 of 9 images are bad, more than max_skipped=0.05 of them: .*cat/1.png: not"):
        load(root, storage=storage_kind, on_bad_image="skip")
    assert load(root, storage=storage_kind, on_bad_image="skip", max_skipped=1 / 9).counts == (4, 4)
    with pytest.raises(BadData, match=r"cat/1.png: not a readable image"):  # also when a cache of the others is there
        load(root, storage=storage_kind)
    spoil(root / "test/dog/1.png", "body")
    with pytest.raises(BadData, match=r"\(test split\): 1 of 5 images are bad, more than"):
        load(root, storage=storage_kind, on_bad_image="skip", max_skipped=1 / 9)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("storage_kind", ["memory", "cache"])
def test_a_class_without_good_files_is_refused(root, storage_kind, split):
    for path in (root / split / "dog").iterdir():
        spoil(path, "body")
    with pytest.raises(BadData, match="no image of 'dog' can be decoded; replace the files or remove the class"):
        load(root, storage=storage_kind, on_bad_image="skip", max_skipped=0.9)


def test_nothing_but_bad_files(root):
    for path in root.glob("train/*/*"):
        spoil(path, "header")
    for kind in ("memory", "cache"):
        with pytest.raises(BadData, match="no readable image"):
            load(root, storage=kind, on_bad_image="skip", max_skipped=1)


def test_a_file_that_changes_while_it_is_read_is_refused(root, monkeypatch):
    real = build.write

    def write(block):
        Image.new("RGB", (4, 3), "red").save(root / "train/cat/3.png")
        return real(block)

    monkeypatch.setattr(build, "write", write)
    with pytest.raises(BadData, match=r"cat/3.png: changed while the images were being read; load them again"):
        cached(root, on_bad_image="skip")


# Interruption -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from dsdistill.data import build, load
build.BLOCK_BYTES = 72
real, left = build.write, [int(sys.argv[2])]
def write(block):
    if not left[0]:
        if sys.argv[3] == "written":
            real(block)
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(block)
build.write = write
load(sys.argv[1], storage="cache")
"""


@pytest.mark.parametrize(("blocks_done", "moment"), [(0, "before"), (2, "written")])
def test_a_killed_build_goes_on_where_it_was(root, cache, decoded, monkeypatch, blocks_done, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(blocks_done), moment])
    assert done.returncode == -signal.SIGKILL
    (entry,) = (cache / "images").iterdir()
    (entry / ".tmp-orphan").write_bytes(b"of a killed writer")
    if blocks_done:
        with (entry / "journal.jsonl").open("ab") as journal:
            journal.write(b'{"block": 3, "sha2')
    small_blocks(monkeypatch)
    source = cached(root)
    train = [name for name in decoded if name][: 9 - 2 * blocks_done]
    assert len(decoded) == 9 - 2 * blocks_done + 5
    assert train == ["0.png", "1.png", "2.png", "3.png", "4.png", "0.png", "1.png", "2.png", "3.png"][2 * blocks_done :]
    assert source.fingerprint == load(root, storage="memory").fingerprint
    assert sorted(path.name for path in entry.iterdir()) == ["images.json", "images.u8", "lock"]


def test_a_block_that_was_noted_but_lost_is_made_again(root, cache, decoded, monkeypatch):
    subprocess.run([sys.executable, "-c", KILLED, str(root), "3", "before"])
    (part,) = cache.rglob("images.part")
    with part.open("r+b") as file:
        file.seek(36)
        file.write(b"\0" * 36)  # what a power cut may leave
    small_blocks(monkeypatch)
    assert cached(root).fingerprint == load(root, storage="memory").fingerprint
    assert decoded[:2] == ["0.png", "1.png"]
    assert len(decoded) == 2 + 3 + 5


def test_a_kill_before_the_manifest_costs_no_decoding(root, cache, decoded, monkeypatch):
    listing = list_images(root / "train")
    write_json = storage.write_json
    monkeypatch.setattr(storage, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ensure_cached("train", listing, Rule())
    monkeypatch.setattr(storage, "write_json", write_json)
    assert len(entries(cache)) == 1
    for workers in (1, 2):
        ensure_cached("train", listing, Rule(), workers=workers)
    assert len(decoded) == 9


def test_bad_files_are_remembered_across_a_kill(root, monkeypatch):
    spoil(root / "train/cat/0.png", "body")
    script = KILLED.replace('"cache"', '"cache", on_bad_image="skip"')
    subprocess.run([sys.executable, "-c", script, str(root), "2", "before"])
    small_blocks(monkeypatch)
    options = {"on_bad_image": "skip", "max_skipped": 0.2}
    assert cached(root, **options).fingerprint == load(root, storage="memory", **options).fingerprint


def test_several_processes_decode_and_one_may_die(root, monkeypatch, caplog, tmp_path):
    expected = load(root, storage="memory").fingerprint
    small_blocks(monkeypatch)
    listing = list_images(root / "train")
    monkeypatch.setattr(build, "write", write_until_the_second_block)
    with caplog.at_level(logging.WARNING, "dsdistill"), pytest.raises(BadData) as caught:
        ensure_cached("train", listing, Rule(), workers=2)
    assert "train: processes that decode images were killed twice while they worked on files from" in str(caught.value)
    assert "load again to go on" in str(caught.value)
    assert "trying once more" in caplog.text
    monkeypatch.setattr(build, "write", blocks.write)
    assert ensure_cached("train", listing, Rule(), workers=2).open("pets").fingerprint == expected


def test_processes_killed_during_the_first_look(root, monkeypatch):
    monkeypatch.setattr(build, "survey", die)
    with pytest.raises(BadData, match=r"killed twice .* from .*cat/0.png to .*dog/3.png: memory ran out, or one of"):
        ensure_cached("train", list_images(root / "train"), Rule(), workers=2)


def test_two_builders_of_one_cache(root, decoded, monkeypatch, caplog):
    listing = list_images(root / "train")
    entered, go_on, found = threading.Event(), threading.Event(), []
    real = build.write

    def slow(block):
        entered.set()
        assert go_on.wait(60)
        return real(block)

    monkeypatch.setattr(build, "write", slow)

    def make():
        found.append(ensure_cached("train", listing, Rule()))

    first, second = threading.Thread(target=make), threading.Thread(target=make)
    with caplog.at_level(logging.INFO, "dsdistill"):
        first.start()
        assert entered.wait(60)
        second.start()
        end = time.monotonic() + 60
        while "another process is decoding the same images" not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
        go_on.set()
        first.join(60)
        second.join(60)
    assert "another process is decoding the same images; waiting for it" in caplog.text
    assert len(decoded) == 9
    assert found[0] == found[1]


# Damage and lack of space -------------------------------------------------------------------------------------


def alter(path):
    """Overwrite four bytes in the middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(value ^ 0xFF for value in content[middle : middle + 4])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["short", "missing", "altered", "manifest", "version"])
def test_a_damaged_cache_is_made_again_with_one_warning(root, decoded, cache, caplog, damage):
    source = cached(root)
    expected, path = source.fingerprint, source.store.path
    manifest = path.with_name("images.json")
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "altered":
        alter(path)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"cat"', '"car"'))
    else:
        content = storage.read_manifest(manifest) | {"version": 99}
        storage.write_json(manifest, storage.sealed(content))
    with caplog.at_level(logging.WARNING, "dsdistill"):
        again = cached(root)
    assert again.fingerprint == expected
    assert again.classes == ("cat", "dog")
    assert caplog.text.count("the image cache is damaged and made again") == len(caplog.records) == 1
    assert len(decoded) == 14 + 9


def test_a_manifest_without_a_checksum_is_of_another_version(root, decoded, caplog):
    manifest = cached(root).store.path.with_name("images.json")
    content = storage.read_manifest(manifest) | {"version": 1}
    del content["sha256"]
    storage.write_json(manifest, storage.sealed(content))
    with caplog.at_level(logging.WARNING, "dsdistill"):
        cached(root)
    assert "images.json: is of another version" in caplog.text
    assert len(decoded) == 14 + 9


def test_a_test_split_that_is_damaged_meanwhile_is_refused(root, cache):
    source = cached(root)
    (path,) = (path for path in entries(cache) if path != source.store.path)
    alter(path)
    with pytest.raises(BadArtifact, match=r"images.u8: its sha256 differs from the manifest; loading the data makes"):
        _ = source.test
    assert cached(root).test.fingerprint == load(root, storage="memory").test.fingerprint


def test_a_cache_is_read_once_to_be_checked(root, monkeypatch, caplog):
    cached(root)
    real, read = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind))
    monkeypatch.setattr(checksum, "ANNOUNCED_BYTES", 9 * 36)
    monkeypatch.setattr(checksum, "_known", {})  # as in a new process
    with caplog.at_level(logging.INFO, "dsdistill"):
        for _ in range(2):
            source = cached(root)
            _ = source.test
    assert read == [str(source.store.path), str(source.test.store.path)]
    assert caplog.text.count("images.u8: checking 0.0 GB") == 1  # not of the smaller test split


def test_an_interrupted_repair_does_not_warn_again(root, monkeypatch, caplog):
    path = cached(root).store.path
    path.write_bytes(b"")

    def stop(_block):
        raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "dsdistill"):
        monkeypatch.setattr(build, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            cached(root)
        monkeypatch.setattr(build, "write", blocks.write)
        cached(root)
    assert caplog.text.count("the image cache is damaged and made again") == 1


def test_a_damaged_memo_is_ignored(root, decoded, cache, caplog):
    cached(root)
    for memo in (cache / "listings").iterdir():
        memo.write_text(json.dumps({"key": "../../outside"}))
    cached(root)
    assert len(decoded) == 14
    assert "ignored, the files are hashed again" in caplog.text


def test_a_removed_cache_of_the_test_split_is_named(root, cache):
    source = cached(root)
    shutil.rmtree(cache)
    assert len(list(source.batches(4))) == 3  # open already
    with pytest.raises(BadArtifact, match=r"images.json: no such file"):
        _ = source.test


def test_disk_space_is_checked_first(root, cache, decoded, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=100))
    with pytest.raises(OutOfSpace) as caught:
        cached(root)
    assert (caught.value.needed, caught.value.free) == (9 * 36, 100)
    assert caught.value.path.is_relative_to(cache)
    assert not decoded
    assert not list(cache.rglob("*.part"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_meanwhile(root, tmp_path):
    paths = (root / "train/cat/0.png",)
    block = blocks.Block(Path("/dev/full"), 0, (3, 3, 4), Rule(), paths, blocks.survey(paths).hashes, {})
    with pytest.raises(OutOfSpace) as caught:
        blocks.write(block)
    assert (caught.value.path, caught.value.needed) == (Path("/dev/full"), 36)


def test_a_disk_without_room_for_the_journal(root, cache, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.Blocks, "note", refuse)
    with pytest.raises(OutOfSpace) as caught:
        cached(root)
    assert caught.value.needed == 9 * 36
    assert not list(cache.rglob("*.part"))


def test_a_cache_folder_that_cannot_be_written(root, cache):
    cache.write_text("a file")
    with pytest.raises(OutputConflict, match=r"cannot be cached here .*set DSDISTILL_CACHE, or load with storage='mem"):
        cached(root)


def test_only_files_are_cached():
    with pytest.raises(Exception, match=r"storage = 'cache' .* only image files are cached; digits is in memory"):
        load("digits", storage="cache")
