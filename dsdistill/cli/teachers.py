"""Verbs on teachers: train a committee or take over weights, and measure what each member is worth alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import Verb, data_arguments, load_source, run_arguments, say, split
from dsdistill.errors import InvalidSetting

_RECIPE = "sre2l_cifar"


def _teachers_arguments(parser: ArgumentParser) -> None:
    from dsdistill.experts import RECIPES

    data_arguments(parser)
    parser.add_argument(
        "--networks",
        type=str,
        nargs="+",
        default=["resnet18"],
        help="Networks by name, with batch normalisation: resnet18, convnet, torchvision:resnet50, ... Models of "
        "torchvision get a stem for small images up to 64 pixels.",
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder of the committee, one below for each teacher.")
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help=f"How they are trained, by default {_RECIPE}: {', '.join(RECIPES)}.",
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs instead of the recipe's.")
    parser.add_argument("--batch_size", type=int | None, default=None, help="Images per step instead of the recipe's.")
    parser.add_argument("--lr", type=float | None, default=None, help="Step size instead of the recipe's.")
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="Take a single network's weights instead of training it: a safetensors file, or 'library' for those that "
        "torchvision or timm publish.",
    )
    parser.add_argument("--width", type=int | None, default=None, help="Of convnet and mlp.")
    run_arguments(parser)
    parser.add_argument(
        "--chunk", type=int | None, default=None, help="Images per forward pass; lower it when memory runs out."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Make a few steps only, write nothing, print what the whole will cost."
    )


def _teachers(config: Namespace) -> Any:
    from dsdistill.evaluation.teachers import score_teachers
    from dsdistill.experts import (
        Committee,
        estimate_teachers,
        get_recipe,
        import_teacher,
        keep_teacher,
        teacher_spec,
        train_teachers,
    )

    changes = {name: config[name] for name in ("epochs", "batch_size", "lr") if config[name] is not None}
    recipe = replace(get_recipe(config.recipe or _RECIPE), **changes)
    names = split(config.networks)
    if config.weights is not None:
        _check_weights(config, names, ["recipe"] * (config.recipe is not None) + list(changes))
    source = load_source(config)
    specs = [teacher_spec(name, source.shape) for name in names]
    specs = [replace(spec, width=config.width) if config.width and spec.has("width") else spec for spec in specs]
    placed = {name: config[name] for name in ("seed", "device", "chunk")}
    if config.dry_run:
        cost = estimate_teachers(source, specs, config.out, recipe, **placed)
        say(config, str(cost))
        return cost.to_json()
    if config.weights is not None:
        # Published weights are those of the library's own stem.
        spec = replace(specs[0], stem=None) if config.weights == "library" else specs[0]
        teacher = import_teacher(spec, config.weights, source, device=config.device)
        committee = Committee([keep_teacher(teacher, config.out)])
    else:
        committee = train_teachers(source, specs, config.out, recipe, **placed)
    scores = score_teachers(committee, source) if source.has_test else {}
    every = Committee.load(config.out)
    size = f"{every.nbytes / 2**20:.1f} MiB"
    lines = [f"the committee in {config.out}: {', '.join(one.name for one in every)} ({size})"]
    for teacher in committee:
        test = f", {100 * scores[teacher.name]:.1f} % of test images" if scores else ""
        lines.append(f"  {teacher.name}: {100 * teacher.accuracy:.1f} % of training images{test}")
    say(config, "\n".join(lines))
    return {
        "folder": str(config.out),
        "bytes": committee.nbytes,
        "teachers": [
            {"name": one.name, "digest": one.digest, "train": one.accuracy, "test": scores.get(one.name)}
            for one in committee
        ],
    }


def _check_weights(config: Namespace, names: list[str], training: list[str]) -> None:
    """Refuse what says nothing beside weights that are there."""
    if len(names) != 1:
        raise InvalidSetting("--weights", config.weights, f"they are those of one network, not of {', '.join(names)}")
    if training or config.dry_run:
        options = ", ".join(f"--{name}" for name in [*training, *["dry-run"] * config.dry_run])
        raise InvalidSetting("--weights", config.weights, f"without {options}: nothing is trained")


def _prior_arguments(parser: ArgumentParser) -> None:
    from dsdistill.evaluation import list_protocols
    from dsdistill.networks import NetworkSpec
    from dsdistill.studies.prior import PLUS

    parser.add_argument("path", type=Path, help="Folder of a committee, as `dsdistill teachers` makes it.")
    data_arguments(parser)
    parser.add_argument("--ipc", type=int, default=PLUS.ipc, help="Images per class of the sets.")
    parser.add_argument("--iterations", type=int, default=PLUS.iterations, help="Steps of their recovery.")
    parser.add_argument("--protocol", type=str, default="cvdd", help=f"One of {', '.join(list_protocols())}.")
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs instead of the protocol's.")
    parser.add_argument("--network", type=NetworkSpec | None, default=None, help="Network instead of the protocol's.")
    parser.add_argument("--repeats", type=int, default=1, help="Networks for each teacher.")
    parser.add_argument("--again", action="store_true", help="Measure those that have a prior already, too.")
    parser.add_argument(
        "--published",
        action="store_true",
        help="Measure nothing: write the priors that CV-DD publishes for this --data and the committee's networks.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Make a few steps only, write nothing, print what the whole will cost."
    )
    run_arguments(parser)


def _prior(config: Namespace) -> Any:
    from dsdistill.evaluation import get_protocol
    from dsdistill.studies.prior import PLUS, estimate_priors, measure_priors, write_published

    if config.published:
        measured = ("ipc", "iterations", "protocol", "epochs", "network", "repeats", "dry_run")
        usual = {"ipc": PLUS.ipc, "iterations": PLUS.iterations, "protocol": "cvdd", "repeats": 1}
        idle = [name for name in measured if config[name] != usual.get(name) and config[name] is not False]
        if idle:
            raise InvalidSetting("--published", True, f"without --{', --'.join(idle)}: nothing is measured")
        found = write_published(config.path, config.data, again=config.again)
        say(config, "\n".join(f"{name}: {value:.1f} %, published" for name, value in found.items()))
        return dict(found)
    changes = {name: config[name] for name in ("epochs", "network") if config[name] is not None}
    method = replace(PLUS, ipc=config.ipc, iterations=config.iterations)
    options = {name: config[name] for name in ("repeats", "seed", "device", "again")}
    options["protocol"] = replace(get_protocol(config.protocol), **changes)
    if config.dry_run:
        cost = estimate_priors(config.path, load_source(config), method, **options)
        say(config, str(cost))
        return cost.to_json()
    found = measure_priors(config.path, load_source(config), method, **options)
    say(config, "\n".join(f"{name}: {value:.1f} %" for name, value in found.items()))
    return dict(found)


VERBS = {
    "teachers": Verb(
        "Train the networks that SRe2L, CDA, CV-DD, INFER, NRR-DD and RDED ask, or take over weights.",
        "  dsdistill teachers --data cifar10 --networks resnet18 torchvision:mobilenet_v2 --recipe cvdd_cifar "
        "--out teachers\n"
        "  dsdistill teachers --data digits --networks convnet --width 32 --epochs 20 --batch_size 64 --out teachers\n"
        "  dsdistill teachers --data imagenet --networks torchvision:resnet18 --weights library --out teachers\n"
        "  dsdistill teachers --data my/images --load.image_size 64 --networks resnet18 --weights mine.safetensors "
        "--out teachers",
        _teachers_arguments,
        _teachers,
    ),
    "prior": Verb(
        "Measure what each teacher of a committee is worth alone, by which CV-DD lets them vote.",
        "  dsdistill prior teachers --data cifar10 --dry-run\n"
        "  dsdistill prior teachers --data cifar10\n"
        "  dsdistill prior teachers --data cifar10 --published\n"
        "  dsdistill prior teachers --data digits --ipc 1 --iterations 200 --epochs 100",
        _prior_arguments,
        _prior,
    ),
}
