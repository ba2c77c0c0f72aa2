"""What each verb of the command line takes and does."""

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Lt
from jsonargparse import ArgumentParser, Namespace

from dsdistill.errors import DistillError, OutputConflict


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to read the real images (see dsdistill.data.load)."""

    root: Path | None = None
    """Folder of named datasets; by default the variable DSDISTILL_DATA, else ./data."""
    download: bool = False
    """Fetch a named dataset that is not there yet."""
    image_size: int | None = None
    """Resize every image of a folder to this many pixels squared; needed where sizes differ."""
    holdout: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of each class kept for testing where the data has no test split of its own."""
    holdout_seed: int = 0
    """Seed of that split."""
    mirror_safe: bool | None = None
    """Whether a mirrored image keeps its class; null takes what is known of the dataset (folders: true)."""


@dataclass(frozen=True)
class Verb:
    """A subcommand: its one-line help, what adds its arguments, what runs it and returns JSON content."""

    help: str
    examples: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Any]


def _say(config: Namespace, text: str) -> None:
    if not config.get("json"):
        print(
            text.encode(sys.stdout.encoding or "utf-8", errors="backslashreplace").decode(
                sys.stdout.encoding or "utf-8"
            )
        )


# -- shared arguments ------------------------------------------------------------------------------------------


def _data_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=str,
        required=True,
        help="Name (digits, mnist, cifar10, ...) or image folder with train/ and val/ or test/.",
    )
    parser.add_class_arguments(LoadOptions, "load")


def _run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="Every random draw is a function of it.")
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, cuda:1, mps; by default the best one present."
    )


def _load_source(config: Namespace) -> Any:
    import dsdistill as dd
    from dsdistill.core.device import resolve_device

    resolve_device(config.get("device"))  # before minutes go into decoding
    return dd.data.load(config.data, **vars(config.load))


# -- verbs -----------------------------------------------------------------------------------------------------


def _synthesize_arguments(parser: ArgumentParser) -> None:
    from dsdistill.engine import Synthesizer
    from dsdistill.methods import get_method, list_methods

    for name in list_methods():  # a class must be imported for the parser to know it by name
        try:
            get_method(name)
        except DistillError as error:  # of another package: no reason to fail those who do not use it
            logging.getLogger("dsdistill").warning("%s", error)
    _data_arguments(parser)
    parser.add_subclass_arguments(
        Synthesizer,
        "method",
        required=True,
        help="Method by name, its settings as --method.SETTING. See: dsdistill methods; dsdistill show NAME.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="Output folder; the same command again continues an interrupted run."
    )
    _run_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace a run that the output folder already holds.")
    parser.add_argument("--checkpoint_every", type=int, default=100, help="Steps between checkpoints.")
    parser.add_argument(
        "--chunk", type=int | None, default=None, help="Images per forward pass; lower it when memory runs out."
    )


def _synthesize(config: Namespace) -> Any:
    import dsdistill as dd

    source = _load_source(config)
    synthetic = dd.synthesize(
        config.method,
        source,
        seed=config.seed,
        device=config.device,
        out=config.out,
        overwrite=config.overwrite,
        checkpoint_every=config.checkpoint_every,
        chunk=config.chunk,
    )
    loading = [
        f"--load.{name}={value}" for name, value in vars(config.load).items() if value != getattr(LoadOptions, name)
    ]
    command = shlex.join(["dsdistill", "evaluate", str(config.out), "--data", config.data, *loading])
    _say(config, f"{synthetic!r}\nsaved in {config.out}; score it with: {command}")
    return _summary(config.out)


def _evaluate_arguments(parser: ArgumentParser) -> None:
    from dsdistill.evaluation import list_protocols
    from dsdistill.networks import NetworkSpec

    parser.add_argument("path", type=Path, help="Folder of a synthetic set.")
    _data_arguments(parser)
    parser.add_argument(
        "--protocol", type=str, default="dsa", help=f"How networks are trained: {', '.join(list_protocols())}."
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs instead of the protocol's.")
    parser.add_argument(
        "--network",
        type=NetworkSpec | None,
        default=None,
        help="Network instead of the protocol's: --network.name, --network.width, ...",
    )
    parser.add_argument("--repeats", type=int, default=5, help="Fresh networks per row of the table.")
    parser.add_argument(
        "--baselines", type=str, nargs="*", default=["random"], help="Rows beside the set: random, whole, or none."
    )
    parser.add_argument("--whole_epochs", type=int | None, default=None, help="Epochs of the whole-training-set row.")
    _run_arguments(parser)
    parser.add_argument("--out", type=Path | None, default=None, help="JSON file for the result.")
    parser.add_argument("--overwrite", action="store_true", help="Replace that file if it exists.")


def _evaluate(config: Namespace) -> Any:
    from dataclasses import replace

    import dsdistill as dd

    if config.out and config.out.exists() and not config.overwrite:
        raise OutputConflict(config.out, "exists already; choose another file, or --overwrite it")
    protocol = dd.evaluation.get_protocol(config.protocol)
    if config.network is not None:
        protocol = replace(protocol, network=config.network)
    synthetic = dd.SyntheticDataset.load(config.path)
    result = dd.evaluate(
        synthetic,
        _load_source(config),
        protocol=protocol,
        epochs=config.epochs,
        repeats=config.repeats,
        baselines=[name for name in config.baselines if name != "none"],
        whole_epochs=config.whole_epochs,
        seed=config.seed,
        device=config.device,
    )
    if config.out:
        result.save(config.out, overwrite=config.overwrite)
        _say(config, f"written to {config.out}")
    _say(config, str(result))
    return result.to_json()


def _methods_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", type=str, nargs="?", default="", help='Wildcard, e.g. "D*".')


def _methods(config: Namespace) -> Any:
    from dsdistill.methods import get_method, list_methods

    table = {name: get_method(name).paper for name in list_methods(config.pattern or "")}
    width = max(map(len, table), default=0)
    _say(
        config, "\n".join(f"{name.ljust(width)}  {paper}" for name, paper in table.items()) or "no method of that name"
    )
    return table


def _show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("method", type=str, help="Name of a method.")


def _show(config: Namespace) -> Any:
    from dsdistill.core.config import describe, to_dict
    from dsdistill.methods import get_method

    cls = get_method(config.method)
    fields = describe(cls)
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [f"{cls.__name__}: {summary}", f"Paper: {cls.paper}", ""]
    width = max(len(field.name) for field in fields)
    for field in fields:
        lines += [
            f"  {field.name.ljust(width)}  {field.type}, default {field.default!r}",
            f"  {' ' * width}  {field.doc}",
        ]
    if cls.presets:
        lines += ["", "Presets, as in dd.methods." + f"{cls.__name__}.preset({next(iter(cls.presets))!r}):"]
        lines += [f"  {name}: {settings}" for name, settings in cls.presets.items()]
    _say(config, "\n".join(lines))
    settings = [{"name": f.name, "type": f.type, "default": to_dict(f.default), "doc": f.doc} for f in fields]
    presets = {name: dict(preset) for name, preset in cls.presets.items()}
    return {"name": cls.__name__, "summary": summary, "paper": cls.paper, "settings": settings, "presets": presets}


def _path_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="Folder of a synthetic set.")


def _summary(path: Path) -> dict[str, Any]:
    from dsdistill.synthetic import read_manifest

    return {
        "path": str(path),
        **{key: value for key, value in read_manifest(path).items() if key not in ("seal", "files")},
    }


def _inspect(config: Namespace) -> Any:
    import dsdistill as dd

    synthetic = dd.SyntheticDataset.load(config.path)  # checks every byte
    recipe = synthetic.recipe
    lines = [
        repr(synthetic),
        f"classes        {', '.join(synthetic.classes[:20])}{' ...' if len(synthetic.classes) > 20 else ''}",
        f"normalization  {synthetic.normalization}",
        f"source         {recipe.source.get('name')}, fingerprint {recipe.source.get('fingerprint')}",
        f"seed           {recipe.seed}",
        f"method         {recipe.method.get('type')}",
        *(f"setting        {key} = {value}" for key, value in recipe.method.items() if key != "type"),
        *(f"version        {name} {number}" for name, number in recipe.versions.items()),
        *(f"note           {note}" for note in recipe.notes),
        "all files match their sha256",
    ]
    _say(config, "\n".join(lines))
    return _summary(config.path)


def _export_arguments(parser: ArgumentParser) -> None:
    _path_arguments(parser)
    parser.add_argument(
        "--format",
        type=str,
        default="folder",
        help="folder: PNG files by class, 8 bits; npz: arrays, images standardised as networks take them.",
    )
    parser.add_argument(
        "--out", type=Path | None, default=None, help="Target; by default beside the set, named after it."
    )


def _export(config: Namespace) -> Any:
    import dsdistill as dd

    suffix = ".npz" if config.format == "npz" else "-images"
    target = config.out or config.path.resolve().with_name(config.path.resolve().name + suffix)
    report = dd.SyntheticDataset.load(config.path).export(target, config.format)
    _say(
        config,
        f"{report.images} images in {report.path}; {100 * report.clipped:.2f} % of values were outside [0, 1] and "
        f"clipped, 8-bit rounding changed the others by at most {report.rounding:.4f}",
    )
    return {**report._asdict(), "path": str(report.path)}


def _quickstart_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="Output folder.")
    _run_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier quickstart in that folder.")


def _quickstart(config: Namespace) -> Any:
    from dsdistill.cli.quickstart import quickstart

    result = quickstart(config.out, seed=config.seed, device=config.device, overwrite=config.overwrite)
    _say(config, f"{result}\n\nset, card and grid.png: {config.out}\nresults: {config.out / 'results.json'}")
    return result.to_json()


VERBS = {
    "quickstart": Verb(
        "Distil scikit-learn's digits and score the result, in about a minute.",
        "  dsdistill quickstart --out digits-dm",
        _quickstart_arguments,
        _quickstart,
    ),
    "synthesize": Verb(
        "Distil real images into a few synthetic ones per class.",
        "  dsdistill synthesize --data digits --method DM --method.ipc 10 --method.iterations 500 --out runs/dm\n"
        "  dsdistill synthesize --data my/images --load.image_size 32 --method DM --method.ipc 1 --out runs/mine\n"
        "  dsdistill synthesize --method DM --data digits --out runs/dm --print_config > run.yaml\n"
        "  dsdistill synthesize --config run.yaml --seed 1 --out runs/dm-seed1",
        _synthesize_arguments,
        _synthesize,
    ),
    "evaluate": Verb(
        "Score a synthetic set by training fresh networks on it.",
        "  dsdistill evaluate runs/dm --data digits --protocol dsa --epochs 300 --repeats 5\n"
        "  dsdistill evaluate runs/dm --data digits --baselines random whole --out score.json",
        _evaluate_arguments,
        _evaluate,
    ),
    "methods": Verb(
        "List the methods.", "  dsdistill methods\n  dsdistill methods 'D*' --json", _methods_arguments, _methods
    ),
    "show": Verb(
        "Explain a method: its settings, defaults, presets and paper.", "  dsdistill show DM", _show_arguments, _show
    ),
    "inspect": Verb(
        "Check a synthetic set and say what it is and how it was made.",
        "  dsdistill inspect runs/dm",
        _path_arguments,
        _inspect,
    ),
    "export": Verb(
        "Write a synthetic set for other programs.",
        "  dsdistill export runs/dm --format folder --out dm-images\n  dsdistill export runs/dm --format npz",
        _export_arguments,
        _export,
    ),
}
