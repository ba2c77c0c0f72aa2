"""Verbs on what was saved: inspect, verify, export, import."""

import os
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli import inspect
from dsdistill.cli.options import Verb, data_arguments, load_source, path_arguments, say, summary
from dsdistill.errors import BadArtifact, InvalidSetting

_EIGHT_BITS = ("folder", "parquet")  # formats that round


def _verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, help="Folder of a set, of a run, finished or not, of a study, of labels, or of teachers."
    )


def _verify(config: Namespace) -> Any:
    from dsdistill.studies.verify import verify

    if not os.path.exists(config.path):
        raise BadArtifact(config.path, "there is no such file or folder")
    findings = verify(config.path)
    say(config, "\n".join(f"{'DAMAGED' if f.problem else 'whole  '}  {f.what:<18}  {f.path}" for f in findings))
    problems = [finding.problem for finding in findings if finding.problem]
    if problems:
        raise BadArtifact(config.path, f"{len(problems)} of {len(findings)} parts are damaged: {'; '.join(problems)}")
    return [{"path": str(finding.path), "what": finding.what, "whole": True} for finding in findings]


def _export_arguments(parser: ArgumentParser) -> None:
    path_arguments(parser)
    parser.add_argument(
        "--format",
        type=str,
        default="folder",
        help="folder: PNG files by class, 8 bits; npz: arrays, images standardised as networks take them; "
        "pt: images.pt, labels.pt and the learned step size, if any; parquet: as Hugging Face data sets, 8 bits.",
    )
    parser.add_argument(
        "--out", type=Path | None, default=None, help="Target; by default beside the set, named after it."
    )


def _export(config: Namespace) -> Any:
    import dsdistill as dd

    suffix = {"folder": "-images", "pt": "-pt"}.get(config.format, f".{config.format}")
    target = config.out or config.path.resolve().with_name(config.path.resolve().name + suffix)
    report = dd.SyntheticDataset.load(config.path).export(target, config.format)
    loss = (
        f"; {100 * report.clipped:.2f} % of values were outside [0, 1] and clipped, 8-bit rounding changed the others "
        f"by at most {report.rounding:.4f}"
    )
    say(config, f"{report.images} images in {report.path}{loss if config.format in _EIGHT_BITS else ''}")
    return {**report._asdict(), "path": str(report.path)}


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="The .pt file, or a folder with images.pt and labels.pt.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the set.")
    data_arguments(parser, required=False)
    parser.add_argument(
        "--normalization",
        type=str | None,
        default=None,
        help="How the pixels were standardised: as published for cifar10, svhn, ...; default: as --data is.",
    )
    parser.add_argument("--mean", type=list[float] | None, default=None, help="Or the means, as [0.5, 0.4, 0.3].")
    parser.add_argument("--std", type=list[float] | None, default=None, help="And the standard deviations.")
    parser.add_argument(
        "--classes", type=list[str] | None, default=None, help="Class names in label order; default: those of --data."
    )
    parser.add_argument(
        "--pixels",
        type=Literal["standardised", "unit"],
        default="standardised",
        help="unit: the pixels are in 0..1 and yet to be standardised (IDC, NCFM).",
    )
    parser.add_argument("--factor", type=int, default=1, help="Tiles along each side of an image (IDC, NCFM: 2).")
    parser.add_argument("--labels", type=Path | None, default=None, help="The .pt file of the labels, if apart.")
    parser.add_argument("--lr", type=Path | None, default=None, help="The .pt file of a learned step size.")
    parser.add_argument("--which", type=int | None, default=None, help="Which set of several in the file, from 0.")


def _import(config: Namespace) -> Any:
    import dsdistill as dd

    stated = _stated(config)
    source = load_source(config) if config.data is not None else None
    classes = config.classes or (source.classes if source else None)
    if classes is None:
        raise InvalidSetting(
            "classes", None, "state them in label order (--classes '[cat, dog]'), or name their --data"
        )
    made = dd.import_published(
        config.path,
        normalization=source.normalization if source else stated,
        classes=classes,
        pixels=config.pixels,
        factor=config.factor,
        labels=config.labels,
        lr=config.lr,
        which=config.which,
        source=source.name if source else "unknown",
    )
    made.save(config.out)
    say(config, f"{made!r}\nsaved in {config.out}")
    return summary(config.out)


def _stated(config: Namespace) -> Any:
    """The normalisation that the user states, None for that of the data: a file of tensors does not know it."""
    from dsdistill.data import Normalization, published_normalization

    named = published_normalization(config.normalization) if config.normalization is not None else None
    numbers = config.mean is not None and config.std is not None
    if numbers + (named is not None) + (config.data is not None) != 1:
        raise InvalidSetting(
            "normalization",
            config.normalization,
            "state it once: by name (--normalization cifar10), by numbers (--mean and --std), or by the real data "
            "(--data cifar10)",
        )
    return Normalization(tuple(config.mean), tuple(config.std)) if numbers else named


VERBS = {
    "inspect": Verb(
        "Check a set, labels or teachers, and say what they are and how they were made.",
        "  dsdistill inspect runs/dm\n  dsdistill inspect labels/sre2l\n  dsdistill inspect teachers --json",
        inspect.arguments,
        inspect.run,
    ),
    "verify": Verb(
        "Check every byte of a set, a run with its checkpoints, a study, labels, or teachers.",
        "  dsdistill verify runs/dm\n  dsdistill verify labels/sre2l",
        _verify_arguments,
        _verify,
    ),
    "export": Verb(
        "Write a synthetic set for other programs.",
        "  dsdistill export runs/dm --format folder --out dm-images\n  dsdistill export runs/dm --format npz",
        _export_arguments,
        _export,
    ),
    "import": Verb(
        "Take over a set that a paper published as .pt tensors (read without executing anything).",
        "  dsdistill import res_DM_CIFAR10_ConvNet_10ipc.pt --data cifar10 --which 0 --out sets/dm\n"
        "  dsdistill import idc/data_best.pt --data cifar10 --pixels unit --factor 2 --out sets/idc\n"
        "  dsdistill import mtt/ --data cifar10 --load.zca unit --out sets/mtt\n"
        "  dsdistill import x.pt --mean '[0.5]' --std '[0.25]' --classes '[cat, dog]' --out sets/x",
        _import_arguments,
        _import,
    ),
}
