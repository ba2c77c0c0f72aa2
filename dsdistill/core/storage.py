"""Files that are either whole or absent, and that say when they are damaged.

Everything is safetensors for tensors and JSON for the rest; nothing is ever unpickled. A file is written to
a temporary name beside its target, flushed to the disk and renamed. A folder of files is committed by its
manifest, a JSON file written last, which carries the sha256 of every other file and of itself.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import struct
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dsdistill.errors import BadArtifact, OutOfSpace, OutputConflict

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What the system says when a disk, a quota or the largest allowed file (``ulimit -f``) is full."""
STORE = "a folder of what runs share (--store)"
"""What to call the store in messages."""
_TEMPORARY = ".tmp-"
_MANIFEST_LIMIT = 64 * 2**20


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: temporary name, fsync, rename, fsync of the folder; mode as the umask says.

    Raises:
        OutOfSpace: the disk or the quota is full; what was there before is untouched.
    """
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    with space_for(path, len(data)):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextmanager
def space_for(path: Path, needed: int) -> Iterator[None]:
    """Say so where the disk fills up while ``needed`` bytes are written at ``path``.

    Raises:
        OutOfSpace: naming path, needed and free bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = largest_file() if error.errno == errno.EFBIG else free_space(path.parent)
        raise OutOfSpace(path, needed, free) from error


def free_space(folder: Path) -> int:
    """Bytes free for us on the disk that holds ``folder``, or would hold it once it is made."""
    return shutil.disk_usage(
        next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    ).free


def largest_file() -> int:
    """Bytes that this process may write into one file (``ulimit -f``)."""
    import resource  # absent on Windows, which has no such limit

    return resource.getrlimit(resource.RLIMIT_FSIZE)[0]


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing ``needed`` bytes into an existing folder on a disk that lacks them.

    Raises:
        OutOfSpace: naming folder, needed and free bytes.
    """
    free = free_space(folder)
    if needed > free:
        raise OutOfSpace(folder, needed, free)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, renamed to ``path`` when all went well and removed when not."""
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, keys in the order given, no NaN."""
    write_bytes(path, encode_json(content))


def encode_json(content: Any) -> bytes:
    """UTF-8 JSON with two-space indents and a final newline; NaN and infinity are refused."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes, moved to the CPU; the same tensors always give the same bytes."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def write_folder(folder: Path, files: Mapping[str, bytes], manifest_name: str, manifest: Mapping[str, Any]) -> None:
    """Commit ``files`` and their manifest into an existing folder, the manifest last.

    A reader that finds no valid manifest treats the folder as unfinished.
    """
    for name, data in files.items():
        write_bytes(folder / name, data)
    listing = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    write_json(folder / manifest_name, sealed({**manifest, "files": listing}))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest written by `write_folder` and check its own seal (not yet the files it lists).

    Raises:
        BadArtifact: missing, not JSON, or altered.
    """
    manifest = read_json(path)
    try:
        whole = isinstance(manifest, dict) and manifest.get("seal") == sealed(manifest)["seal"]
    except RecursionError as error:
        raise BadArtifact(path, f"nested too deeply for a manifest ({error})") from None
    if not whole:
        raise BadArtifact(path, "the manifest was altered or damaged (its seal does not match); get a fresh copy")
    return manifest  # type: ignore[no-any-return]  # a dict, as was checked


def read_json(path: Path) -> Any:
    """Read a JSON file of at most 64 MiB.

    Raises:
        BadArtifact: missing, too large, no regular file, or not JSON; a key given twice and NaN are no JSON.
    """
    try:
        status = path.stat()
        if status.st_size > _MANIFEST_LIMIT:
            raise BadArtifact(path, f"larger than {_MANIFEST_LIMIT} bytes: this is no manifest of dsdistill")
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise BadArtifact(path, "not readable as JSON (it is no regular file)")
        return _strict_json(path.read_bytes())
    except FileNotFoundError:
        raise BadArtifact(path, "no such file: the folder is not a finished dsdistill folder") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadArtifact):
            raise
        raise BadArtifact(path, f"not readable as JSON ({error})") from None


def read_listed(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """Bytes of a file the manifest lists, after its size and sha256 were checked.

    Raises:
        BadArtifact: unlisted, outside the folder, missing, truncated or altered.
    """
    listed = manifest.get("files")
    entry = listed.get(name) if isinstance(listed, dict) else None
    if not isinstance(entry, dict):
        raise BadArtifact(folder, f"the manifest lists no file {name!r}")
    path = folder / name
    if name == ".." or PurePosixPath(name).name != name or os.path.islink(path):
        raise BadArtifact(folder, f"the manifest points outside the folder: {name!r}")
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise BadArtifact(path, "listed in the manifest but not readable (it is no regular file)")
        data = path.read_bytes() if size == entry.get("bytes") else b""
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        if isinstance(error, BadArtifact):
            raise
        problem = error.strerror if isinstance(error, OSError) else error
        raise BadArtifact(path, f"listed in the manifest but not readable ({problem})") from None
    if size != entry.get("bytes"):
        raise BadArtifact(path, f"holds {size} bytes where the manifest says {entry.get('bytes')}; get a fresh copy")
    if sha256(data) != entry.get("sha256"):
        raise BadArtifact(
            path, "its sha256 differs from the manifest: the file was altered or damaged; get a fresh copy"
        )
    return data


def read_listed_tensors(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Tensors of a listed safetensors file; see `read_listed`. NaN and infinity are refused.

    Raises:
        BadArtifact: as `read_listed`, or not a safetensors file, or not finite.
    """
    data = read_listed(folder, manifest, name)
    path = folder / name
    try:
        tensors = load(data)
        _strict_json(data[8 : 8 + struct.unpack_from("<Q", data)[0]])  # the library takes the last of equal names
    except (SafetensorError, ValueError) as error:
        raise BadArtifact(path, f"not a valid safetensors file ({error}); pickles are never read") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadArtifact(path, f"tensor {key!r} holds NaN or infinity")
    return tensors


def _strict_json(data: bytes) -> Any:
    """JSON that every reader understands alike: no key twice, no NaN, no infinity.

    Raises:
        ValueError: it is not. RecursionError: it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is there twice")
        return made

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(data.decode("utf-8", "surrogatepass"), object_pairs_hook=unique, parse_constant=refuse)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a ``seal``: the sha256 of its canonical JSON without the seal."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return {**body, "seal": sha256(canonical.encode())}


def sha256(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed writer left behind. Only call it while holding the folder's lock."""
    for orphan in folder.glob(f"{_TEMPORARY}*"):
        orphan.unlink(missing_ok=True)


def require_folder(folder: Path, what: str) -> None:
    """Refuse a path that is no folder and cannot become one; nothing is made.

    Args:
        what: the folder is, with its article, for the message.

    Raises:
        OutputConflict: the path is a file, or lies below one.
    """
    for place in (folder, *folder.absolute().parents):
        if os.path.lexists(place):  # unlike Path's, these take any name
            if not os.path.isdir(place):
                raise OutputConflict(place, f"is a file, {what} is needed; choose another path")
            return


def ensure_writable(folder: Path, what: str = "an output folder") -> None:
    """Create ``folder`` if needed and prove that a file can be written there.

    Args:
        what: the folder is, with its article, for messages.

    Raises:
        OutputConflict: the path is a file, or the folder is read-only. OutOfSpace: the disk takes no further file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):  # unlike Path's, these take any name
        raise OutputConflict(folder, f"is a file, {what} is needed; choose another path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=_TEMPORARY, dir=folder):
            pass
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        if isinstance(error, OSError) and error.errno in FULL:
            raise OutOfSpace(folder, 1, 0) from error  # not one more file
        problem = error.strerror if isinstance(error, OSError) else error
        raise OutputConflict(folder, f"cannot be written ({problem}); choose another path for {what}") from None


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into named tensors and a JSON skeleton; `unflatten` is the inverse.

    Args:
        tree: dicts (str or int keys), lists, tuples, tensors, numbers, strings, booleans, None.

    Raises:
        TypeError: any other value, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _skeleton(tree, "", tensors)


def _skeleton(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = f"{len(tensors)}:{place}"  # the number keeps {"a": {"b": ...}} apart from {"a/b": ...}
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, (dict, list, tuple)):
        items = []
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if not isinstance(key, (str, int)):
                raise TypeError(f"checkpoint key {key!r} at {place!r} is neither str nor int")
            items.append([key, _skeleton(value, f"{place}/{key}" if place else str(key), tensors)])
        return {type(tree).__name__: items}
    if tree is None or isinstance(tree, (bool, int, str)):
        return {"value": tree}
    if isinstance(tree, float):
        return {"value": tree} if math.isfinite(tree) else {"float": repr(tree)}
    raise TypeError(f"checkpoint entry {place!r} has type {type(tree).__name__}, which cannot be stored")


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Rebuild the tree that `flatten` took apart."""
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(tensors, value) for key, value in content}
    if kind in ("list", "tuple"):
        values = [unflatten(tensors, value) for _, value in content]
        return values if kind == "list" else tuple(values)
    return float(content) if kind == "float" else content
