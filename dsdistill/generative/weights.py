"""Pretrained models: where they lie, and that all of them is there.

They are read from a folder, or from a repository of the Hugging Face Hub, of which only what is needed is fetched, and
only where that is allowed. Weights are safetensors: pickles are refused. The libraries only warn of tensors that a file
lacks and leave them random; here that is an error, as is anything else that is not as it should be.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dsdistill.core.rng import isolated_global_rng, seed_global
from dsdistill.errors import InvalidSetting, MissingWeights

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_QUIET = ("diffusers", "transformers", "huggingface_hub")


class Place(NamedTuple):
    """Where a model lies, and how to speak of it when something is wrong with it."""

    what: str
    """"a CLIP text encoder", say."""
    named: str
    """As the user named it."""
    folder: Path
    commit: str | None
    """Of a repository of the Hub."""
    expected: str
    """Files that make it up."""
    instead: str
    """What else would do."""

    def missing(self, problem: str) -> MissingWeights:
        """The error that names the problem."""
        return MissingWeights(self.what, self.tried, f"{problem}; expected are {self.expected}", self.instead)

    @property
    def tried(self) -> str:
        """For errors and notes."""
        return f"{self.named!r}{f' at {self.commit}' if self.commit else ''}"


def located(
    what: str,
    where: str | Path,
    files: Sequence[str],
    *,
    expected: str,
    instead: str,
    revision: str | None = None,
    download: bool = False,
) -> Place:
    """The folder of a model, whose files are fetched first where that is allowed.

    Args:
        what: kind of model, for errors.
        where: a local folder, or an id of the Hub.
        files: patterns of what is fetched of a repository.
        expected: files, in words.
        instead: what else would do, in words.
        revision: of the id: a branch or commit. What it was resolved to is `Place.commit`.
        download: let files be fetched that are not in the local cache of the Hub.

    Raises:
        MissingWeights: there is no such folder or id, or it is not in the cache and must not be fetched.
        InvalidSetting: a folder with a revision.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InvalidSetting("revision", revision, f"left out: {str(where)!r} is a folder, which has none")
        return Place(what, str(where), folder, None, expected, instead)
    tried = f"{str(where)!r}{f' at {revision}' if revision else ''}"
    if folder.is_file():
        raise MissingWeights(what, tried, f"a file, where a folder is wanted; expected in it are {expected}", instead)
    if not _ID.fullmatch(str(where)):
        raise MissingWeights(what, tried, f"no such folder; expected are {expected}", instead)
    hub = import_module("huggingface_hub")
    try:
        with quiet():
            found = hub.snapshot_download(
                str(where), revision=revision, allow_patterns=list(files), local_files_only=not download
            )
    except Exception as error:  # absent, offline, private, without space: each has an error of its own
        absent = not download and type(error).__name__ == "LocalEntryNotFoundError"
        problem = f"no such folder, and {'not in the cache of the Hub' if absent else first_line(error)}"
        allowed = "" if download else "nothing was downloaded: that needs the setting download (true); "
        raise MissingWeights(what, tried, f"{problem}; expected are {expected}", f"{allowed}{instead}") from error
    return Place(what, str(where), Path(found), Path(found).name, expected, instead)


def loaded(
    place: Place, make: Callable[..., Any], part: str, kind: str, extra: Sequence[str] = (), **options: Any
) -> Any:
    """A network of diffusers or transformers in float32, of which every tensor was read.

    Args:
        place: where.
        make: ``from_pretrained`` of its class.
        part: folder in it; "" for itself.
        kind: the option that names the type of numbers: "dtype" or "torch_dtype".
        extra: beginnings of names of tensors that may be there beside.
        options: more of ``make``.

    Raises:
        MissingWeights: files are missing or incomplete; tensors are missing, unknown, of another shape or not finite.
    """
    folder = place.folder / part
    if not folder.is_dir():
        raise place.missing(f"it has no folder {part}/")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        told = "which are not read: have its makers' library save it as safetensors"
        raise place.missing(f"{part or 'it'} has weights as pickles alone ({pickled[0]}), {told}")
    cpu = torch.device("cpu")
    with quiet(), isolated_global_rng(cpu):  # libraries draw weights before they read them
        seed_global(0, cpu)
        try:
            network, told = make(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **{kind: torch.float32},
                **options,
            )
        except Exception as error:  # absent, truncated, of another shape: each has an error of its own
            raise place.missing(f"{part or 'the model'}: {first_line(error)}") from error
    wrong = not_whole(told, extra) or not_finite(network)
    if wrong:
        raise place.missing(f"{part or 'the model'} has {wrong}")
    return network.eval().requires_grad_(False)


def not_whole(told: Mapping[str, Any], extra: Sequence[str] = ()) -> str:
    """What is wrong with loaded weights, of which the libraries only warn; nothing if they are whole."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(map(str, told.get(kind, ())))
        if kind == "unexpected_keys":
            keys = [key for key in keys if not key.startswith(tuple(extra)) and not key.endswith("position_ids")]
        if keys:
            return f"{len(keys)} {kind.replace('_', ' ')}, {keys[0]} first"
    return ""


def not_finite(network: nn.Module) -> str:
    """The first tensor that holds numbers which are not finite; nothing if all are."""
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"numbers that are not finite, in {name}"
    return ""


def first_line(error: Exception) -> str:
    """Kind and text of an error of a library, cut off."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and tables of the libraries about weights: what matters of them is raised."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    before = [one.level for one in loggers]
    told = sys.modules.get("transformers.utils.logging")
    bars = told is not None and told.is_progress_bar_enabled()
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    if told is not None and bars:
        told.disable_progress_bar()
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
        if told is not None and bars:
            told.enable_progress_bar()
