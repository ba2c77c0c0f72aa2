"""One recovery step of SRe2L (or CV-DD with ``--members 2``) against a plain program, at CIFAR-10's size.

The plain program collects statistics with forward hooks that permute and copy what every batch norm receives, draws
and applies crop, mirroring and shift with the library's transforms, and differentiates the sum of all losses at once,
as the authors' code does. Teachers are random networks that have seen random images: what they know does not change the
work.
"""

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from benchmarks.speed import pairs
from benchmarks.speed.stage import SHAPE, TOLERANCES, make_source, precision
from dsdistill.data import ImageSource
from dsdistill.engine import Run, State
from dsdistill.engine.run import prepared_run
from dsdistill.experts import Committee, Teacher, Teachers, teacher_name, teacher_spec
from dsdistill.matching.recovery import Recovery, drawn
from dsdistill.methods import CVDD, SRe2L

MODULE = "benchmarks.speed.recover_step"
ITERATIONS = 1000


def parse() -> argparse.Namespace:
    parser = pairs.parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=["torchvision:resnet18"], help="teachers, by name")
    parser.add_argument("--classes", type=int, default=10, help="images of a problem")
    parser.add_argument("--together", type=int, default=1, help="problems that pass as one batch; plain: one by one")
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of dsdistill's teachers"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--warmups", type=int, default=2)
    return parser.parse_args()


@functools.cache
def teachers_of(names: tuple[str, ...], classes: int, seed: int, dtype: torch.dtype) -> str:
    """A folder of random teachers with the statistics of the random images."""
    source = make_source(argparse.Namespace(classes=classes, per_class=8, seed=seed))
    folder = Path(tempfile.mkdtemp(prefix="dsdistill-teachers-"))
    for name in names:
        spec = teacher_spec(name, SHAPE)
        network = spec.build(SHAPE, classes, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype)
        with torch.no_grad():
            for _ in range(3):
                network(source.gather(torch.arange(len(source))).to(dtype))
        Teacher(
            name=teacher_name(spec),
            spec=spec,
            network=network,
            classes=source.classes,
            shape=SHAPE,
            normalization=source.normalization,
            accuracy=0.0,
            performance=60.0,
        ).save(folder / teacher_name(spec))
    return str(folder)


def make_method(options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Recovery:
    """The settings of the authors' code."""
    names = tuple(options.networks)
    folder = teachers_of(names, options.classes, options.seed, dtype)
    settings = {
        "ipc": options.together,
        "iterations": ITERATIONS,
        "classes_together": options.classes,
        "problems_together": options.together,
        "precision": options.precision,
        "teachers": Teachers(folder=folder),
    }
    if len(names) == 1:
        return SRe2L(**settings, shift=4)
    return CVDD(**settings, shift=4, init="noise", drawn=len(names), voting="equal")


def staged(method: Recovery, source: ImageSource, options: argparse.Namespace) -> tuple[Run, State]:
    """The one job of the run, at its first step."""
    run = prepared_run(method, source, seed=options.seed, device=options.device, chunk=None)
    method.prepare(run)
    (job,) = method.jobs(run)
    scoped = run.scoped(job)
    state = method.start(scoped, job)
    state.images.to(run.device)
    return scoped, state


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step with dsdistill and waits for its loss."""
    method = make_method(options)
    run, state = staged(method, make_source(options), options)
    iteration = iter(range(ITERATIONS))

    def step() -> None:
        float(method.step(run, state, next(iteration))["loss"])

    return step


class Hook:
    """What one batch norm receives, compared with what it remembers, as the field's scripts do it."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.handle = layer.register_forward_hook(self.compare)
        self.distance = torch.zeros(())

    def compare(self, layer: nn.BatchNorm2d, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        maps = arguments[0]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean = maps.mean([0, 2, 3])
        variance = maps.permute(1, 0, 2, 3).contiguous().view(maps.shape[1], -1).var(1, unbiased=False)
        self.distance = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - mean, 2)


def hooked(folder: str, device: str) -> list[tuple[nn.Module, list[Hook]]]:
    """The teachers in evaluation mode, with a hook on every batch norm."""
    networks = [teacher.network for teacher in Committee.load(folder, device)]
    return [
        (network, [Hook(part) for part in network.modules() if isinstance(part, nn.BatchNorm2d)])
        for network in networks
    ]


def plain_loss(
    members: Sequence[tuple[nn.Module, list[Hook]]], shown: Tensor, targets: Tensor, method: Recovery
) -> Tensor:
    """Mean over teachers of cross-entropy and distances."""
    loss = torch.zeros((), device=shown.device)
    for network, hooks in members:
        entropy = F.cross_entropy(network(shown), targets)
        rescale = [method.first_layer, *[1.0] * (len(hooks) - 1)]
        distances = sum(hook.distance * factor for hook, factor in zip(hooks, rescale, strict=True))
        loss = loss + (entropy + method.statistics_weight * distances) / len(members)
    return loss


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step of every problem the plain way."""
    torch.manual_seed(options.seed)
    method, source = make_method(options), make_source(options)
    members = hooked(str(method.teachers.folder), options.device)
    mean, std = source.normalization.mean, source.normalization.std
    crop = transforms.Compose([transforms.RandomResizedCrop(SHAPE[1]), transforms.RandomHorizontalFlip()])
    targets = torch.arange(options.classes, device=options.device)
    problems = []
    for _ in range(options.together):
        images = torch.randn((options.classes, *SHAPE), requires_grad=True, device=options.device, dtype=torch.float)
        problems.append((images, torch.optim.Adam([images], lr=method.lr_images, betas=(0.5, 0.9), eps=1e-8)))
    iteration = iter(range(ITERATIONS))

    def step() -> None:
        t = next(iteration)
        for images, optimizer in problems:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (1 + math.cos(math.pi * t / ITERATIONS)) * method.lr_images
            down, right = (int(torch.randint(0, 5, ())) for _ in range(2))
            shown = torch.roll(crop(images), shifts=(down, right), dims=(2, 3))
            optimizer.zero_grad()
            loss = plain_loss(members, shown, targets, method)
            loss.backward()
            optimizer.step()
            for c in range(3):
                least, most = (0 - mean[c]) / std[c], (1 - mean[c]) / std[c]
                images.data[:, c] = torch.clamp(images.data[:, c], least, most)
            loss.item()

    return step


def check(options: argparse.Namespace, dtype: torch.dtype) -> list[pairs.Equality]:
    """Loss and image gradient of the first problem, under the same view, of both."""
    with precision(dtype) as kind:
        method = make_method(argparse.Namespace(**{**vars(options), "precision": "float32"}), dtype)
        run, state = staged(method, make_source(options, kind), options)
        problems = method.problems(run, run.rng.job)
        (pixels,) = state.images.parameters()
        start = pixels.detach().clone()
        loss = method.step(run, state, 0)["loss"]
        record = drawn(method.views(run, 0), run, problems, 0)
        members, total = hooked(str(method.teachers.folder), options.device), torch.zeros(())
        leaf = start.requires_grad_()
        for number, part in enumerate(leaf.chunk(len(problems))):
            top, left, height, width = record.boxes[number].tolist()
            view = F.interpolate(
                part[:, :, top : top + height, left : left + width], SHAPE[1:], mode="bilinear", align_corners=False
            )
            view = view.flip(3) if record.flips[number] else view
            view = torch.roll(view, tuple(record.shifts[number].tolist()), (2, 3))
            total = total + plain_loss(members, view, torch.arange(options.classes), method)
        (gradient,) = torch.autograd.grad(total, leaf)
        assert pixels.grad is not None
        strict = TOLERANCES[dtype]
        return [
            pairs.equality("loss", loss, total.detach() / len(problems), strict),
            pairs.equality("gradient, largest", pixels.grad, gradient, strict if dtype == torch.float64 else 0.1),
            pairs.equality("gradient, median image", pixels.grad, gradient, 10 * strict, median=True),
        ]


def main() -> None:
    options = parse()
    if options.worker:
        program = {"loops": loops, "dsdistill": ours}[options.worker](options)
        return pairs.work(options, [program] * options.warmups, program, options.steps)
    equality = [one for dtype in TOLERANCES for one in check(options, dtype)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    names = ", ".join(name.partition(":")[2] or name for name in options.networks)
    general = {*vars(pairs.parser(None).parse_args([])), "warmups"}
    grouped = f", {options.together} problems together" if options.together > 1 else ""
    half = ", bfloat16 teachers" if options.precision == "bfloat16" else ""
    content = {
        "kind": "speed",
        "title": f"Recovery step, 3x32x32, {options.classes} images{grouped}, {names}{half}",
        "unit": "Recovery step",
        "settings": {name: value for name, value in vars(options).items() if name not in general},
        "warmups": options.warmups,
        "target": 4.0 if torch.device(options.device).type == "cuda" else 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    slug = "-".join(name.partition(":")[2] or name for name in options.networks)
    words = ["speed-recover_step", slug, f"{options.classes}x{options.together}", options.precision]
    pairs.publish(options, MODULE, "-".join(word for word in words if word != "float32"), content)


if __name__ == "__main__":
    main()
