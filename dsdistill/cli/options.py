"""What several verbs of the command line share."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from jsonargparse import ArgumentParser, Namespace

NO_MIX = "Mix no images, whatever the protocol does; FerKD's calibration asks for it."


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to read the real images (see dsdistill.data.load)."""

    root: Path | None = None
    """Folder of named datasets; by default the variable DSDISTILL_DATA, else ./data."""
    download: bool = False
    """Fetch a named dataset that is not there yet."""
    image_size: int | tuple[int, int] | None = None
    """Resize every image of a folder to this many pixels squared, or to [height, width]; needed where sizes differ."""
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    """How: stretch the whole frame, crop its centre, or pad it with black."""
    holdout: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of each class kept for testing where the data has no test split of its own."""
    holdout_seed: int = 0
    """Seed of that split."""
    storage: Literal["auto", "memory", "cache"] = "auto"
    """Where images of a folder are kept: auto is memory up to 1 GiB, else a cache file (DSDISTILL_CACHE)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with a file of a folder that cannot be decoded."""
    max_skipped: Annotated[float, Ge(0), Le(1)] = 0.05
    """Largest share of a split that may be skipped."""
    mirror_safe: bool | None = None
    """Whether a mirrored image keeps its class; null takes what is known of the dataset (folders: true)."""
    zca: bool | Literal["unit"] = False
    """Whiten the images (ZCA, eps 0.1, fitted on the train split): true when standardised, unit when in 0..1 (MTT)."""


@dataclass(frozen=True)
class Verb:
    """A subcommand: its one-line help, what adds its arguments, what runs it and returns JSON content."""

    help: str
    examples: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Any]


def say(config: Namespace, text: str) -> None:
    """Print for a human, unless JSON was asked for; what the terminal cannot show is escaped."""
    if not config.get("json"):
        print(
            text.encode(sys.stdout.encoding or "utf-8", errors="backslashreplace").decode(
                sys.stdout.encoding or "utf-8"
            )
        )


def split(names: str | Iterable[str]) -> list[str]:
    """Names with commas between, in one text or several."""
    texts = (names,) if isinstance(names, str) else names
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def data_arguments(parser: ArgumentParser, *, required: bool = True) -> None:
    """Which real images, and how to read them."""
    parser.add_argument(
        "--data",
        type=str if required else str | None,
        required=required,
        help="Name (digits, mnist, cifar10, ...), hf:OWNER/NAME of the Hugging Face Hub, or image folder: "
        "train/CLASS/ and val/CLASS/ or test/CLASS/, or plain CLASS/, of which a share is held out.",
    )
    parser.add_class_arguments(LoadOptions, "load")


def run_arguments(parser: ArgumentParser) -> None:
    """Seed and device."""
    parser.add_argument("--seed", type=int, default=0, help="Every random draw is a function of it.")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, cuda:1, mps; by default the best one present."
    )


def path_arguments(parser: ArgumentParser) -> None:
    """The folder of a set."""
    parser.add_argument("path", type=Path, help="Folder of a synthetic set.")


def load_source(config: Namespace) -> Any:
    """The real images, after the device was found to be there."""
    import dsdistill as dd
    from dsdistill.core.device import resolve_device

    resolve_device(config.get("device"))  # before minutes go into decoding
    return dd.data.load(config.data, **vars(config.load))


def summary(path: Path) -> dict[str, Any]:
    """A saved set's manifest for ``--json``."""
    from dsdistill.synthetic import read_manifest

    return {
        "path": str(path),
        **{key: value for key, value in read_manifest(path).items() if key not in ("seal", "files")},
    }
