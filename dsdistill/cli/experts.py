"""The verb on experts: train what trajectory methods will ask for, ahead of them."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from dsdistill.cli.options import Verb, data_arguments, load_source, run_arguments, say

STORE_HELP = "Folder of experts that runs share; by default the cache folder, DSDISTILL_CACHE or ~/.cache/dsdistill."


def _experts_arguments(parser: ArgumentParser) -> None:
    from dsdistill.experts import Experts, ExpertTraining
    from dsdistill.networks import NetworkSpec

    data_arguments(parser)
    parser.add_argument("--count", type=int, default=Experts.count, help="Networks to train.")
    parser.add_argument(
        "--epochs", type=int | None, default=None, help="Epochs of each; by default all of --training.epochs."
    )
    parser.add_argument(
        "--training",
        type=ExpertTraining,
        default=Experts.training,
        help="PlainTraining (MTT), FlatTraining (FTD, DATM) or SmoothTraining (AST); settings as --training.SETTING.",
    )
    parser.add_argument(
        "--network",
        type=NetworkSpec,
        default=NetworkSpec(),
        help="What to train: a network's name; --network.width, ...",
    )
    parser.add_argument(
        "--precision", type=Literal["float32", "float16"], default=Experts.precision, help="Of stored parameters."
    )
    parser.add_argument(
        "--together", type=int | None, default=None, help="Experts trained as one stacked computation (GPU: 8, CPU: 1)."
    )
    run_arguments(parser)
    parser.add_argument("--store", type=Path | None, default=None, help=STORE_HELP)
    parser.add_argument(
        "--chunk", type=int | None, default=None, help="Images per forward pass; lower it when memory runs out."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Make a few steps only, write nothing, print what the whole will cost."
    )


def _experts(config: Namespace) -> Any:
    from dsdistill.evaluation.experts import score_experts
    from dsdistill.experts import Experts, estimate_experts, train_experts

    experts = Experts(
        count=config.count,
        training=config.training,
        precision=config.precision,
        seed=config.seed,
        together=config.together,
    )
    source = load_source(config)
    options = {name: config[name] for name in ("epochs", "store", "device", "chunk")}
    if config.dry_run:
        cost = estimate_experts(source, experts, config.network, **options)
        say(config, str(cost))
        return cost.to_json()
    made = train_experts(source, experts, config.network, **options)
    score = score_experts(made, source) if source.has_test else None
    told = f"{made.count} experts of {made.epochs} epochs in {made.folder} ({made.nbytes / 2**20:.1f} MiB)"
    if score is not None:
        spread = f" ± {100 * score.std:.1f}" if score.n > 1 else ""
        told += f"\ntest accuracy of {score.n} of them after the last epoch: {100 * score.mean:.1f}{spread} %"
    say(config, told)
    return {
        "folder": str(made.folder),
        "count": made.count,
        "epochs": made.epochs,
        "bytes": made.nbytes,
        "accuracies": None if score is None else list(score.values),
    }


VERBS = {
    "experts": Verb(
        "Train the networks whose trajectories MTT, FTD, AST and DATM follow, ahead of them; find what is there.",
        "  dsdistill experts --data cifar10 --load.zca unit --count 20 --epochs 50 --dry-run\n"
        "  dsdistill experts --data cifar10 --load.zca unit --count 20 --epochs 50\n"
        "  dsdistill experts --data digits --training FlatTraining --training.alpha 0.3 --count 10 --epochs 20\n"
        "  dsdistill experts --data my/images --load.image_size 32 --count 10 --store /data/experts",
        _experts_arguments,
        _experts,
    )
}
