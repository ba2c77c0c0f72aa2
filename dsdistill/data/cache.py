"""Images decoded once into a file of bytes that sources draw from, so that sets need not fit in memory.

::

    CACHE/listings/DIGEST.json      names, sizes and times of files -> key, which saves hashing them again
    CACHE/images/KEY/images.u8      N * C * H * W bytes, class after class
    CACHE/images/KEY/images.json    manifest: shape, sha256, statistics; written last, and then the rest counts
    CACHE/images/KEY/images.part    the file while it grows
    CACHE/images/KEY/journal.jsonl  finished blocks of it, for who goes on after a kill
    CACHE/images/KEY/lock           held by who builds

CACHE is ``$DSDISTILL_CACHE``, else ``$XDG_CACHE_HOME/dsdistill``, else ``~/.cache/dsdistill``. The key is a sha256 of
what the files hold, their classes and names and how they are decoded; where they are does not matter. Everything here
may be deleted while no process uses it; nothing is deleted by itself.

Before its first use in a process, a cache is compared with the sha256 in its manifest: one pass over the file, about a
second per GB where the disk keeps up. A damaged one is made again, with a warning.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import PIL
import torch

from dsdistill.core import storage
from dsdistill.data import measure
from dsdistill.data.build import PIXELS, Blocks, Killed, Look, build, look_at
from dsdistill.data.checksum import file_sha256
from dsdistill.data.decode import RULE_VERSION, Rule, shown
from dsdistill.data.listing import Listing
from dsdistill.data.normalize import Normalization
from dsdistill.data.read import BadImages
from dsdistill.data.source import ImageSource, Skipped
from dsdistill.data.store import FilePixels
from dsdistill.errors import BadArtifact, BadData, OutOfSpace, OutputConflict

MANIFEST = "images.json"
_FORMAT = {"format": "dsdistill.images", "version": 2}
_SETTLED_NS = 2 * 10**9  # a file changed again within the resolution of its time would look unchanged

logger = logging.getLogger("dsdistill")


@dataclass(frozen=True)
class Cached:
    """A finished cache of one split, to be opened any number of times.

    Attributes:
        folder: where it is.
        skipped: files left out.
    """

    folder: Path
    skipped: tuple[Skipped, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = storage.read_manifest(self.folder / MANIFEST)["shape"]
        return channels, height, width

    def open(
        self, name: str, *, mirror_safe: bool = True, open_test: Callable[[], ImageSource] | None = None
    ) -> ImageSource:
        """The images as a source that reads them from the file, after comparing it with its sha256 (see the module).

        Raises:
            BadArtifact: the cache was removed or damaged meanwhile.
        """
        manifest = _checked(self.folder)
        count, channels, height, width = manifest["shape"]
        return ImageSource(
            name,
            manifest["classes"],
            FilePixels(self.folder / PIXELS, (count, channels, height, width), _good_rows(count, manifest["bad"])),
            _targets(manifest["counts"], _good_rows(count, manifest["bad"])),
            normalization=Normalization.from_json(manifest["normalization"]),
            mirror_safe=mirror_safe,
            open_test=open_test,
            skipped=self.skipped,
            fingerprint=manifest["fingerprint"],
        )


def cache_folder() -> Path:
    """Where decoded images are kept: see the module."""
    own, shared = os.environ.get("DSDISTILL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else Path(shared, "dsdistill") if shared else Path("~/.cache/dsdistill")
    return base.expanduser().absolute()


def ensure_cached(
    where: str,
    listing: Listing,
    rule: Rule,
    *,
    channels: int | None = None,
    bad_images: BadImages = BadImages(),  # noqa: B008 (frozen)
    workers: int | None = None,
) -> Cached:
    """Decode the files of a split into the cache, unless they are there.

    An interrupted build goes on where it was. Of two processes that build the same, one waits for the other. A cache
    that is there is read once by each process, about a second per GB, to compare its sha256; a damaged one is made
    again.

    Args:
        where: what to call the split in messages.
        listing: its files.
        rule: size and resize policy.
        channels: how many the images must have; None takes 1 when every image is grey.
        bad_images: what to do with files that cannot be decoded.
        workers: processes that decode; by default one for each processor, fewer for few files.

    Raises:
        BadData: a bad file, mixed sizes or channels, a class left empty, or processes killed twice.
        OutOfSpace: the disk cannot hold the images.
        OutputConflict: the cache folder cannot be written.
    """
    root, settings = cache_folder(), {"rule": RULE_VERSION, **asdict(rule), "channels": channels}
    listed, settled = _listing_digest(listing, settings)
    memo = root / "listings" / f"{listed}.json"
    key = _remembered(memo)
    manifest = None if key is None else _finished(root / "images" / key)
    if key is None or manifest is None:
        look = look_at(where, listing, workers)
        if look.bad and bad_images.action == "error":
            bad_images.check(where, _skipped(listing, look.bad), len(listing))
        key = _key(listing, look, settings)
        blocks = Blocks(root / "images" / key, listing, look, rule, look.shape(where, listing, rule, channels))
        manifest = _finished(blocks.folder) or _built(blocks, where, bad_images, workers)
        if settled and look.all_read:
            _remember(memo, key)
    bad = _skipped(listing, dict(manifest["bad"]))
    return Cached(root / "images" / key, bad_images.judge(where, bad, len(listing)))


def _built(blocks: Blocks, where: str, bad_images: BadImages, workers: int | None) -> dict[str, Any]:
    """The manifest, after whatever work or waiting it takes to have one."""
    folder = blocks.folder
    try:
        storage.ensure_writable(folder)
    except OutputConflict as error:
        raise OutputConflict(
            folder, f"images cannot be cached here ({error}); set DSDISTILL_CACHE, or load with storage='memory'"
        ) from None
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("%s: another process is decoding the same images; waiting for it", where)
        lock.acquire()
    try:
        manifest = _finished(folder, warn=True)
        if manifest is None:
            manifest = _commit(blocks, where, build(blocks, where, bad_images, workers), bad_images)
    except Killed:
        raise
    except (BadData, OutOfSpace):
        Blocks.clear(folder)  # the mend changes the key, or needs the space
        raise
    except OSError as error:
        if error.errno not in storage.FULL:
            raise
        Blocks.clear(folder)
        raise OutOfSpace(folder, blocks.total, shutil.disk_usage(folder).free) from None
    finally:
        lock.release()
    return manifest


def _commit(blocks: Blocks, where: str, bad: dict[int, str], bad_images: BadImages) -> dict[str, Any]:
    """Give the complete file its name, describe it in one pass, and write the manifest."""
    folder, listing, count = blocks.folder, blocks.listing, len(blocks.listing)
    bad_images.check(where, _skipped(listing, bad), count)
    rows = _good_rows(count, list(bad.items()))
    targets = listing.targets_at(where, rows)
    blocks.complete()
    shape = (count, *blocks.shape)
    store, histograms = FilePixels(folder / PIXELS, shape, rows), measure.Histograms(blocks.shape[0])
    fingerprint = measure.fingerprint(listing.classes, store.shape, histograms.watching(store.chunks()), targets)
    manifest = storage.sealed(
        {
            **_FORMAT,
            "classes": list(listing.classes),
            "counts": list(listing.counts),
            "shape": list(shape),
            "bad": [[index, why] for index, why in sorted(bad.items())],
            "sha256": file_sha256(folder / PIXELS),
            "fingerprint": fingerprint,
            "normalization": histograms.normalization().to_json(),
            "rule": asdict(blocks.rule),
            "decoder": f"Pillow {PIL.__version__}",
        }
    )
    storage.write_json(folder / MANIFEST, manifest)
    Blocks.clear(folder)
    return manifest


def _finished(folder: Path, *, warn: bool = False) -> dict[str, Any] | None:
    """The manifest of a finished cache; None where there is none that is whole."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        return _checked(folder)
    except BadArtifact as error:
        if warn:
            logger.warning("the image cache is damaged and made again: %s", error)
            (folder / MANIFEST).unlink(missing_ok=True)
        return None


def _checked(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache, after comparing the file of pixels with it; see `file_sha256` for the cost.

    Raises:
        BadArtifact: of another version, missing or damaged.
    """
    manifest, pixels = storage.read_manifest(folder / MANIFEST), folder / PIXELS
    if {key: manifest.get(key) for key in _FORMAT} != _FORMAT:
        raise BadArtifact(folder / MANIFEST, "is of another version")
    found = pixels.stat().st_size if pixels.exists() else 0
    if found != math.prod(manifest["shape"]):
        raise BadArtifact(
            pixels, f"holds {found} bytes where {math.prod(manifest['shape'])} belong; loading the data makes it again"
        )
    try:
        digest = file_sha256(pixels)
    except OSError as error:
        raise BadArtifact(
            pixels, f"the cached images cannot be read ({error.strerror}); loading the data makes them again"
        ) from None
    if digest != manifest["sha256"]:
        raise BadArtifact(pixels, "its sha256 differs from the manifest; loading the data makes it again")
    return manifest


def _skipped(listing: Listing, bad: dict[int, str]) -> list[Skipped]:
    return [Skipped(listing.paths[index], why) for index, why in sorted(bad.items())]


def _good_rows(count: int, bad: Sequence[Sequence[Any]]) -> torch.Tensor | None:
    """Rows of the images that could be decoded; None when all could."""
    if not bad:
        return None
    good = torch.ones(count, dtype=torch.bool)
    good[[index for index, _ in bad]] = False
    return good.nonzero().flatten()


def _targets(counts: Sequence[int], rows: torch.Tensor | None) -> torch.Tensor:
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return targets if rows is None else targets[rows]


# -- keys ------------------------------------------------------------------------------------------------------


def _key(listing: Listing, look: Look, settings: dict[str, Any]) -> str:
    """Content of all files, their classes and names, and how they are decoded."""
    digest = hashlib.sha256(json.dumps({**settings, "classes": listing.classes}, sort_keys=True).encode("ascii"))
    for index, name in enumerate(listing.names):
        digest.update(f"\n{listing.owner(index)}/".encode() + os.fsencode(Path(name).as_posix()) + b"\0")
        digest.update(look.hash_of(index))
    return digest.hexdigest()


def _listing_digest(listing: Listing, settings: dict[str, Any]) -> tuple[str, bool]:
    """Paths, sizes and times of all files; and whether the times are old enough to tell of any later change."""
    now, newest = time.time_ns(), 0
    folders = [os.fsencode(folder.absolute()).hex() for folder in listing.folders]
    header = {**settings, "classes": listing.classes, "folders": folders}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode("ascii"))
    for index, name in enumerate(listing.names):
        try:
            found = os.stat(listing.folders[listing.owner(index)] / name)
        except OSError:
            newest = now  # whoever decodes the file will say what is wrong; nothing is remembered
            continue
        newest = max(newest, found.st_mtime_ns)
        digest.update(f"\n{listing.owner(index)} {found.st_size} {found.st_mtime_ns} ".encode() + os.fsencode(name))
    return digest.hexdigest(), newest < now - _SETTLED_NS


def _remembered(memo: Path) -> str | None:
    if not memo.exists():
        return None
    try:
        key = storage.read_manifest(memo).get("key")
    except BadArtifact as error:
        logger.warning("ignored, the files are hashed again: %s", error)
        return None
    return key if isinstance(key, str) and len(key) == 64 and key.isalnum() else None


def _remember(memo: Path, key: str) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(memo, storage.sealed({"key": key}))
    except OSError as error:  # the next load hashes the files again
        logger.info("%s: cannot be written (%s)", shown(memo), error)
