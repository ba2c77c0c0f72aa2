"""ImageNet's relatives as they lie on disk: Tiny-ImageNet, Imagenette, ImageWoof and the ten-class subsets.

Classes are named by their WordNet ids ("n01440764"), which are unique where names are not and compare across these
data sets; `NAMES` has the words. Their order:

- Tiny-ImageNet, Imagenette and ImageWoof: sorted ids, as torchvision's ``ImageFolder`` and hence published code label
  them. The file wnids.txt of Tiny-ImageNet has another order, which is not used.
- The ten-class subsets: the order of the lists in the code of MTT (Cazenavette et al., CVPR 2022, arXiv 2203.11932),
  which labels its published sets. For "imagenet_nette" the two are the same.

"imagenette" and "imagenet_nette" (likewise "imagewoof" and "imagenet_woof") have the same classes and other splits:
fastai (version 2) drew a new 70/30 split of all their images, the subset takes ImageNet's own training and validation
images of these classes. Scores on one say nothing about the other.

Published code (MTT, DataDAM) takes images to 128 x 128 pixels by stretching the whole frame: its Resize gets both
sides, so that its CenterCrop has nothing left to cut.
"""

import importlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from dsdistill.data.checks import require_same_classes, some
from dsdistill.data.decode import EXTENSIONS, shown
from dsdistill.data.listing import Listing, class_folders
from dsdistill.data.normalize import Normalization
from dsdistill.errors import BadData

NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Statistics that published code standardises ImageNet and its parts with."""

SUBSETS: dict[str, tuple[tuple[str, str], ...]] = {
    "nette": (
        ("n01440764", "tench"),
        ("n02102040", "English springer"),
        ("n02979186", "cassette player"),
        ("n03000684", "chain saw"),
        ("n03028079", "church"),
        ("n03394916", "French horn"),
        ("n03417042", "garbage truck"),
        ("n03425413", "gas pump"),
        ("n03445777", "golf ball"),
        ("n03888257", "parachute"),
    ),
    "woof": (
        ("n02096294", "Australian terrier"),
        ("n02093754", "Border terrier"),
        ("n02111889", "Samoyed"),
        ("n02088364", "beagle"),
        ("n02086240", "Shih-Tzu"),
        ("n02089973", "English foxhound"),
        ("n02087394", "Rhodesian ridgeback"),
        ("n02115641", "dingo"),
        ("n02099601", "golden retriever"),
        ("n02105641", "Old English sheepdog"),
    ),
    "fruit": (
        ("n07753275", "pineapple"),
        ("n07753592", "banana"),
        ("n07745940", "strawberry"),
        ("n07747607", "orange"),
        ("n07749582", "lemon"),
        ("n07768694", "pomegranate"),
        ("n07753113", "fig"),
        ("n07720875", "bell pepper"),
        ("n07718472", "cucumber"),
        ("n07742313", "Granny Smith"),
    ),
    "meow": (
        ("n02123045", "tabby"),
        ("n02123159", "tiger cat"),
        ("n02123394", "Persian cat"),
        ("n02123597", "Siamese cat"),
        ("n02124075", "Egyptian cat"),
        ("n02129165", "lion"),
        ("n02129604", "tiger"),
        ("n02128925", "jaguar"),
        ("n02128757", "snow leopard"),
        ("n02127052", "lynx"),
    ),
    "squawk": (
        ("n01806143", "peacock"),
        ("n02007558", "flamingo"),
        ("n01818515", "macaw"),
        ("n02051845", "pelican"),
        ("n02056570", "king penguin"),
        ("n01614925", "bald eagle"),
        ("n01843383", "toucan"),
        ("n01518878", "ostrich"),
        ("n01860187", "black swan"),
        ("n01819313", "sulphur-crested cockatoo"),
    ),
    "yellow": (
        ("n02206856", "bee"),
        ("n12057211", "yellow lady's slipper"),
        ("n07753592", "banana"),
        ("n07749582", "lemon"),
        ("n12144580", "corn"),
        ("n04146614", "school bus"),
        ("n03530642", "honeycomb"),
        ("n02129165", "lion"),
        ("n01773157", "black and gold garden spider"),
        ("n01531178", "goldfinch"),
    ),
}
"""WordNet ids and ImageNet's names of the ten-class subsets, in the order of their labels."""

NAMES: dict[str, str] = dict(pair for pairs in SUBSETS.values() for pair in pairs)
"""Names of the classes of all subsets by WordNet id."""

logger = logging.getLogger("dsdistill")


@cache
def wnids() -> tuple[str, ...]:
    """WordNet ids of the 1000 classes of ImageNet, in the order of their labels, which is that of the ids."""
    return tuple(files("dsdistill.data").joinpath("imagenet_wnids.txt").read_text(encoding="ascii").split())


def worded(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, with those of ImageNet in the place of WordNet ids; what is no such id stays."""
    places = {wnid: place for place, wnid in enumerate(wnids())}
    if not any(name in places for name in classes):
        return tuple(classes)
    table: Any = importlib.import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(NAMES.get(name) or (table[places[name]] if name in places else name) for name in classes)


_TINY = ("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet")
_WHOLE = ("imagenet", "ImageNet", "ILSVRC2012", "imagenet-1k", "ILSVRC/Data/CLS-LOC", ".")


class Splits(NamedTuple):
    """Image files of both splits, with the same classes in the same order."""

    train: Listing
    test: Listing


def tiny_imagenet(root: Path) -> Splits:
    """Files of Tiny-ImageNet below ``root``: the official layout, or one with validation images in class folders.

    Raises:
        BadData: not there, or incomplete; names the file or folder.
    """
    place = next((root / name for name in _TINY if (root / name / "train").is_dir()), None)
    if place is None:
        raise BadData(
            f"tiny_imagenet: {_TINY[0]}/train not found in {shown(root.absolute())}; unpack tiny-imagenet-200.zip "
            "(cs231n.stanford.edu/tiny-imagenet-200.zip) there, or point root or DSDISTILL_DATA to it"
        )
    classes = [folder.name for folder in class_folders(place / "train")]
    stated = place / "wnids.txt"
    if stated.exists():
        require_same_classes(f"{shown(place)} (wnids.txt against train/)", sorted(_lines(stated)), classes)
    train = _listing(place / "train", classes)
    annotations = place / "val/val_annotations.txt"
    # Who sorts the validation images into class folders puts these at one of two places.
    sorted_in = [folder for folder in (place / "val/images", place / "val") if (folder / classes[0]).is_dir()]
    if sorted_in:
        return Splits(train, _listing(sorted_in[0], classes))
    if not annotations.exists():
        raise BadData(f"{shown(annotations)}: not found, and no class folders beside it; unpack the whole archive")
    return Splits(train, _annotated(annotations, classes))


def fastai(name: str, root: Path) -> Splits:
    """Files of "imagenette" or "imagewoof" below ``root``: the full images, or copies of any size.

    Of several copies the full one is taken, then the 320 and the 160 pixel one, then the first by name.

    Raises:
        BadData: not there, or incomplete; names the folder.
    """
    prefix = f"{name}2"
    published = (prefix, f"{prefix}-320", f"{prefix}-160")
    others = [folder.name for folder in sorted(root.glob(f"{prefix}-*"))]
    place = next((root / copy for copy in (*published, *others) if (root / copy / "train").is_dir()), None)
    if place is None:
        fetch = ", fetch it with download=True (--load.download true)" if name == "imagenette" else ""
        raise BadData(
            f"{name}: {prefix}/train (or {prefix}-320, {prefix}-160, another {prefix}-*) not found in "
            f"{shown(root.absolute())}; unpack {prefix}-160.tgz (github.com/fastai/imagenette) there{fetch}, or point "
            "root or DSDISTILL_DATA to it"
        )
    logger.info("%s: reading %s", name, shown(place))
    classes = sorted(wnid for wnid, _ in SUBSETS[name.removeprefix("image")])
    for split in ("train", "val"):
        require_same_classes(shown(place / split), classes, [folder.name for folder in class_folders(place / split)])
    return Splits(_listing(place / "train", classes), _listing(place / "val", classes))


def fetch_imagenette(root: Path) -> None:
    """Have torchvision fetch the 160 pixel copy of "imagenette" into ``root`` and check its md5; not if one is there.

    Raises:
        BadData: it could not be fetched.
    """
    if any(root.glob("imagenette2*/train")):
        return
    reader: Any = importlib.import_module("torchvision.datasets").Imagenette
    try:
        reader(root, split="train", size="160px", download=True)
    except Exception as error:  # whatever the network and the archive raise
        raise BadData(f"imagenette: could not be fetched ({error}); check the network and {shown(root)}") from error


def subset(name: str, root: Path) -> Splits:
    """Files of a ten-class subset ("nette", "woof", ...) cut out of ImageNet below ``root``, or at ``root`` itself.

    Raises:
        BadData: ImageNet or one of the classes is not there; names the folder.
    """
    classes = [wnid for wnid, _ in SUBSETS[name]]
    place = next((root / folder for folder in _WHOLE if (root / folder / "train" / classes[0]).is_dir()), None)
    if place is None:
        raise BadData(
            f"imagenet_{name}: imagenet/train/{classes[0]} not found in {shown(root.absolute())}; put ImageNet "
            "(ILSVRC2012, image-net.org) there as imagenet/train/WNID and imagenet/val/WNID, or point root or "
            "DSDISTILL_DATA to it"
        )
    if not (place / "val" / classes[0]).is_dir():
        raise BadData(
            f"{shown(place / 'val' / classes[0])}: not found; sort the validation images into class folders "
            "(torchvision.datasets.ImageNet does it when it unpacks the archives)"
        )
    return Splits(_listing(place / "train", classes), _listing(place / "val", classes))


def _listing(root: Path, classes: Sequence[str]) -> Listing:
    """Files of the named class folders in ``root``; of "CLASS/images" where there is such a folder."""
    absent = [shown(root / name) for name in classes if not (root / name).is_dir()]
    if absent:
        raise BadData(f"no folder {some(absent)}; unpack the whole archive")
    folders = [root / name / "images" if (root / name / "images").is_dir() else root / name for name in classes]
    return _of(classes, folders, [_images(folder) for folder in folders])


def _of(classes: Sequence[str], folders: Sequence[Path], found: Sequence[Sequence[str]]) -> Listing:
    empty = [
        f"{shown(folder)} ({name})" for name, folder, files in zip(classes, folders, found, strict=True) if not files
    ]
    if empty:
        raise BadData(f"no images in {some(empty)}; unpack the whole archive")
    return Listing(
        tuple(classes),
        tuple(folders),
        tuple(len(files) for files in found),
        tuple(file for files in found for file in files),
    )


def _images(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted."""
    return sorted(
        name for name in os.listdir(folder) if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
    )


def _annotated(annotations: Path, classes: Sequence[str]) -> Listing:
    """Validation images in one folder, whose classes a table states: file name, WordNet id, a box."""
    files: dict[str, list[str]] = {name: [] for name in classes}
    for number, line in enumerate(_lines(annotations), 1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in files or Path(file).name != file or Path(file).suffix.lower() not in EXTENSIONS:
            raise BadData(
                f"{shown(annotations)}, line {number}: {line[:80]!r} is no image name, tab and class of train/; "
                "unpack the archive again"
            )
        files[wnid].append(file)
    return _of(classes, [annotations.parent / "images"] * len(classes), [sorted(files[name]) for name in classes])


def _lines(path: Path) -> Iterable[str]:
    """Lines of a text file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{shown(path)}: cannot be read ({error}); unpack the archive again") from None
    return [line for line in text.splitlines() if line.strip()]
