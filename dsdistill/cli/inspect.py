"""What ``dsdistill inspect`` says of a set, of labels, and of teachers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import say, summary


def arguments(parser: ArgumentParser) -> None:
    """What inspect takes."""
    parser.add_argument(
        "path", type=Path, help="Folder of a set, of labels, of a teacher, of a committee, or of a study."
    )


def run(config: Namespace) -> Any:
    """Check every byte, and print what is there.

    Raises:
        BadArtifact: there is nothing of ours, or it is damaged.
    """
    from dsdistill.experts.committee import ORDER
    from dsdistill.experts.teacher import MANIFEST as TEACHER
    from dsdistill.relabelling.heading import MANIFEST as LABELS
    from dsdistill.studies.folder import RESULTS
    from dsdistill.synthetic import MANIFEST as SET

    if os.path.lexists(config.path / LABELS):
        return _labels(config)
    if os.path.lexists(config.path / SET):
        return _set(config)
    if any(map(os.path.lexists, (config.path / TEACHER, config.path / ORDER))) or any(config.path.glob(f"*/{TEACHER}")):
        return _teachers(config)
    if os.path.lexists(config.path / RESULTS):
        return _study(config)
    return _set(config)


def _set(config: Namespace) -> Any:
    import dsdistill as dd
    from dsdistill.exchange.report import shown_learned

    synthetic = dd.SyntheticDataset.load(config.path)  # checks every byte
    recipe, learned = synthetic.recipe, synthetic.learned
    lines = [
        repr(synthetic),
        _line("classes", _some(synthetic.classes)),
        _line("normalization", synthetic.normalization),
        _line("source", f"{recipe.source.get('name')}, fingerprint {recipe.source.get('fingerprint')}"),
        _line("seed", recipe.seed),
        _line("method", recipe.method.get("type")),
        *(_line("learned", told) for told in shown_learned(learned)),
        *(_line("setting", f"{key} = {value}") for key, value in recipe.method.items() if key != "type"),
        *(_line("version", f"{name} {number}") for name, number in recipe.versions.items()),
        *(_line("note", note) for note in recipe.notes),
        "all files match their sha256",
    ]
    say(config, "\n".join(lines))
    numbers = {name: tensor.item() for name, tensor in learned.items() if tensor.numel() == 1}
    return {**summary(config.path), "learned": numbers}


def _study(config: Namespace) -> Any:
    from dsdistill import studies

    result = studies.report(config.path)
    say(config, str(result))
    return result.to_json()


def _labels(config: Namespace) -> Any:
    from dsdistill.relabelling import LabelSet

    labels = LabelSet.load(config.path)
    labels.verify()
    heading = labels.heading
    voted = zip(heading.teachers, heading.weights, strict=True)
    recipe = heading.to_json()["recipe"]
    lines = [
        repr(labels),
        _line("classes", _some(heading.classes)),
        _line("images", f"{heading.count} of {heading.shape}, digest {heading.images}"),
        *(_line("teacher", f"{one['name']}, weight {share:.4f}, digest {one['digest']}") for one, share in voted),
        _line("statistics", "running" if heading.teacher_mode == "eval" else "of each part of a mini-batch"),
        _line("codec", heading.codec),
        _line("calibration", heading.calibration or "none"),
        _line("views", heading.records),
        _line("seed", heading.seed),
        *(_line("training", f"{key} = {value}") for key, value in (recipe or {}).items()),
        *_versions(heading.versions),
        "all files match their sha256",
    ]
    say(config, "\n".join(lines))
    return {"path": str(config.path), "bytes": labels.nbytes, **heading.to_json()}


def _teachers(config: Namespace) -> Any:
    from dsdistill.core.config import to_dict
    from dsdistill.experts import Committee

    told = []
    for teacher in Committee.load(config.path):
        lines = [
            f"{teacher.name} ({teacher.nbytes / 2**20:.1f} MiB)",
            _line("network", teacher.spec),
            _line("classes", _some(teacher.classes)),
            _line("images", f"{teacher.shape}, {teacher.normalization}"),
            _line("accuracy", f"{100 * teacher.accuracy:.1f} % of training images"),
            _line("prior", _prior_of(teacher)),
            _line("digest", teacher.digest),
            *(_line("history", f"{key} = {value}") for key, value in teacher.history.items()),
        ]
        say(config, "\n".join(lines))
        kept = ("name", "digest", "classes", "shape", "accuracy", "performance", "history", "nbytes")
        told.append({key: getattr(teacher, key) for key in kept} | {"network": to_dict(teacher.spec)})
    say(config, "all files match their sha256")
    return {"path": str(config.path), "teachers": told}


def _prior_of(teacher: Any) -> str:
    if teacher.performance is None:
        return "unknown (dsdistill prior)"
    how = teacher.history.get("prior")
    return f"{teacher.performance:.1f} %{f', {how}' if how else ''}"


def _line(what: str, value: object) -> str:
    return f"{what:<14} {value}"


def _some(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}"


def _versions(versions: Mapping[str, str]) -> list[str]:
    return [_line("version", f"{name} {number}") for name, number in versions.items()]
