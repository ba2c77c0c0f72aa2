"""What is to be labelled, checked before any work: the heading of the labels, from a set, its teachers and a recipe."""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from dsdistill.core.config import require_instance, to_dict, whole_number
from dsdistill.core.device import default_chunk
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.experts import Committee
from dsdistill.relabelling.calibration import FerKD
from dsdistill.relabelling.codecs import Codec, Float, get_codec
from dsdistill.relabelling.distances import Distances
from dsdistill.relabelling.heading import KINDS, Heading, Kind, Records, images_digest
from dsdistill.relabelling.record import require_recordable
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `relabel` was asked for; see there."""

    recipe: TrainingRecipe | None
    epochs: int | None = None
    kind: Kind = "replayed"
    codec: str | Codec = "float16"
    teacher_mode: Literal["eval", "batch"] | None = None
    temperature: float | None = None
    calibration: FerKD | None = None
    records: Records | None = None
    mirror_safe: bool | None = None
    seed: int = 0


def planned(
    synthetic: SyntheticDataset, committee: Committee, asked: Asked, device: torch.device, chunk: int | None
) -> Heading:
    """The heading of the labels.

    Raises:
        BadData: the teachers know other classes, shapes or pixels than the set has.
        InvalidSetting: the recipe's views cannot be recorded, or settings do not fit one another.
    """
    require_instance("synthetic", synthetic, SyntheticDataset, "a set: SyntheticDataset.load(...) opens folders")
    require_instance("committee", committee, Committee, "teachers: Committee.load(...) opens folders")
    passing = default_chunk(synthetic.shape, device) if chunk is None else whole_number("chunk", chunk, 1)
    if asked.kind not in KINDS:
        raise InvalidSetting("kind", asked.kind, f"one of {', '.join(KINDS)}")
    codec = get_codec(asked.codec)
    require_teachers(committee, synthetic)
    recipe = None if asked.kind == "static" else _recorded(synthetic, asked)
    _check_kind(asked, recipe, codec)
    heading = Heading(
        kind=asked.kind,
        classes=synthetic.classes,
        count=len(synthetic),
        shape=synthetic.shape,
        images=images_digest(synthetic),
        teachers=tuple(
            {"name": one.name, "network": to_dict(one.spec), "digest": one.digest, "accuracy": one.accuracy}
            for one in committee
        ),
        weights=voting(committee, _temperature(asked)),
        vote_temperature=_temperature(asked),
        teacher_mode=_mode(asked),
        recipe=recipe,
        epochs=None if recipe is None else recipe.epochs,
        codec=codec,
        calibration=asked.calibration,
        records=asked.records or ("drawn" if asked.kind == "distances" else "stored"),
        seed=whole_number("seed", asked.seed),
        execution={"device": device.type, "threads": torch.get_num_threads(), "chunk": passing},
    )
    heading.layout()  # refuses a codec that does not fit
    return heading


def label_bytes(
    synthetic: SyntheticDataset, committee: Committee, recipe: TrainingRecipe, count: int | None = None
) -> int:
    """Bytes that labels of a set take for all epochs of a training, as 16-bit numbers: what `relabel` would store.

    Of views that cannot be recorded, those of the labels alone. Errors as in `relabel`.

    Args:
        count: of so many images instead of the set's.
    """
    kind: Kind = "distances" if isinstance(recipe.distillation, Distances) else "replayed"
    kind = "static" if getattr(recipe, "targets", "views") == "images" else kind
    images = len(synthetic) if count is None else count
    try:
        recipe_or_none = None if kind == "static" else recipe
        heading = planned(synthetic, committee, Asked(recipe=recipe_or_none, kind=kind), torch.device("cpu"), None)
    except InvalidSetting as error:
        if error.setting != "augmentation":
            raise
        return 2 * len(synthetic.classes) * images * recipe.epochs
    return replace(heading, count=images).predicted_bytes()


def require_teachers(committee: Committee, synthetic: SyntheticDataset) -> None:
    """Refuse teachers of other classes, shapes or pixels than a set has.

    Raises:
        BadData: naming the teacher and what differs.
    """
    for teacher in committee:
        title = f"teacher {teacher.name!r}"
        if teacher.classes != synthetic.classes:
            same = set(teacher.classes) == set(synthetic.classes)
            problem = "the same classes in another order" if same else "other classes"
            raise BadData(f"{title} knows {problem} than the set has: take teachers trained on the set's real data")
        if teacher.shape != synthetic.shape:
            raise BadData(f"{title} takes images of shape {teacher.shape}, those of the set are {synthetic.shape}")
        if teacher.normalization.identity() != synthetic.normalization.identity():
            raise BadData(
                f"{title} knows pixels standardised by {teacher.normalization}, those of the set are by "
                f"{synthetic.normalization}: make set and teachers from data loaded alike"
            )


def voting(committee: Committee, temperature: float | None) -> tuple[float, ...]:
    """Weights of the members, of sum 1: softmax(performance / temperature); equal where there is no temperature.

    Raises:
        InvalidSetting: the temperature is not positive, or one of several members has no known performance.
    """
    if temperature is None:
        return (1 / len(committee),) * len(committee)
    if not temperature > 0:
        raise InvalidSetting("temperature", temperature, "a positive number, or None")
    unknown = [member.name for member in committee if member.performance is None]
    if unknown and len(committee) > 1:
        raise InvalidSetting(
            "vote temperature",
            temperature,
            f"none, as long as the prior performance of {', '.join(unknown)} is unknown: measure it with `dsdistill "
            "prior`, or let all vote alike, replace(protocol, vote_temperature=None) or `dsdistill relabel "
            "--temperature equal`",
        )
    weights: Tensor = committee.weights(temperature)
    return tuple(weights.tolist())


def _temperature(asked: Asked) -> float | None:
    """Of the vote; as `_mode`."""
    if asked.temperature is not None:
        return asked.temperature
    found: float | None = getattr(asked.recipe, "vote_temperature", None)
    return found


def _mode(asked: Asked) -> Literal["eval", "batch"]:
    """How teachers' batch normalisation works; protocols, of a layer above this one, have a mode beside a recipe's."""
    if asked.kind == "static":
        return "eval"
    mode = asked.teacher_mode or getattr(asked.recipe, "teacher_mode", "eval")
    if mode not in ("eval", "batch"):
        raise InvalidSetting("teacher_mode", mode, "'eval' or 'batch'")
    return "batch" if mode == "batch" else "eval"


def _recorded(synthetic: SyntheticDataset, asked: Asked) -> TrainingRecipe:
    """The plain recipe, without mirroring where that changes a class, of as many epochs as are asked for."""
    require_instance("recipe", asked.recipe, TrainingRecipe, "how networks will be trained: get_protocol('cvdd'), say")
    assert asked.recipe is not None
    plain = TrainingRecipe(**{f.name: getattr(asked.recipe, f.name) for f in fields(TrainingRecipe)})
    epochs = plain.epochs if asked.epochs is None else whole_number("epochs", asked.epochs, 1)
    known = synthetic.recipe.source.get("mirror_safe", True) if asked.mirror_safe is None else asked.mirror_safe
    augmentation = plain.augmentation and plain.augmentation.suited(bool(known))
    recipe = replace(plain, epochs=epochs, augmentation=augmentation)
    require_recordable(recipe)
    return recipe


def _check_kind(asked: Asked, recipe: TrainingRecipe | None, codec: Codec) -> None:
    if asked.kind == "distances" and not isinstance(codec, Float):
        raise InvalidSetting("codec", codec, "distances are stored as float32 or float16")
    if asked.kind == "distances" and (recipe is None or recipe.mix is None):
        raise InvalidSetting("kind", asked.kind, "a recipe that mixes: distances are to two classes")
    if asked.kind == "static" and asked.epochs is not None:
        raise InvalidSetting("epochs", asked.epochs, "none: static labels are made once, for any number of epochs")
    if asked.kind != "static" and getattr(asked.recipe, "targets", "views") == "images":
        raise InvalidSetting(
            "kind", asked.kind, "'static': the protocol has targets='images'; or replace(protocol, targets='views')"
        )
    if asked.calibration is None:
        return
    if asked.kind != "replayed" or recipe is None:
        raise InvalidSetting("kind", asked.kind, "'replayed' beside a calibration, which looks at every view")
    if recipe.mix is not None:
        raise InvalidSetting(
            "mix",
            recipe.mix,
            "none beside a calibration, as a mixed view has no class of its own to be sure of: replace(protocol, "
            "mix=None) or --no_mix, here and where networks are scored",
        )
    if _mode(asked) == "batch":
        raise InvalidSetting(
            "teacher_mode",
            "batch",
            "'eval' beside a calibration: networks see a mini-batch without the views that it leaves out, and split it "
            "into other parts than those whose statistics the teachers took",
        )
