"""One outer step of NCFM against a plain loop over classes, on random images of CIFAR-10's size.

Both sides mix networks from pairs kept in memory; scripts of the field read two files in every step, which is left out
here, as it times the disk. The pairs are random: what a step costs does not depend on whether they were trained.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed import pairs
from benchmarks.speed.reference import PlainConvNet, given_view, random_view
from benchmarks.speed.stage import (
    SHAPE,
    TOLERANCES,
    benchmark,
    make_source,
    precision,
    stage,
    step_parser,
    stepper,
    worst,
)
from dsdistill.augmentations import ChainViews
from dsdistill.core.rng import Rng
from dsdistill.engine import Run, State
from dsdistill.experts import Pool
from dsdistill.experts.pool import member_name
from dsdistill.methods import NCFM

MODULE = "benchmarks.speed.ncfm_step"
# Of gradients: characters are cosines of sums of 2048 products, whose rounding the frequencies magnify. In float64 the
# largest difference is below 1e-12 for most weights, and was 3e-10 for some.
GRADIENT_TOLERANCES = {torch.float32: 5e-3, torch.float64: 1e-8}


@dataclass(frozen=True, kw_only=True)
class Untrained(NCFM):
    """NCFM whose pool finds networks that differ from initial to final, and so trains none."""

    def prepare(self, run: Run) -> None:
        for index in range(self.networks):
            name = member_name(self.network, self.pretraining, index)
            run.shared.get(name, partial(random_pair, self, run, index))
        super().prepare(run)


def make_method(options: argparse.Namespace) -> NCFM:
    """The published settings but for the pool."""
    return Untrained(
        ipc=options.ipc,
        real_batch=options.real_batch,
        networks=options.networks,
        frequencies=options.frequencies,
    )


def random_pair(method: NCFM, run: Run, index: int) -> dict[str, Tensor]:
    """Two independent initialisations, as flat vectors."""
    found = {}
    for name in ("initial", "final"):
        network = method.network.build(
            run.source.shape, run.source.num_classes, generator=run.rng.at(name, index), device=run.device
        )
        found[name] = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
    return found


def loops(options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step the plain way."""
    source = make_source(options)
    device, ipc, classes = torch.device(options.device), options.ipc, options.classes
    np.random.seed(options.seed)  # noqa: NPY002 (the field's scripts draw from the global generator)
    torch.manual_seed(options.seed)
    known = source.normalization
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (known.mean, known.std))
    images = source.images.to(device).float() / 255
    members = [list(range(c * options.per_class, (c + 1) * options.per_class)) for c in range(classes)]
    synthetic = torch.cat([images[rows[:ipc]] for rows in members]).clone().requires_grad_(True)
    targets = torch.arange(classes, device=device).repeat_interleave(ipc)
    optimizer = torch.optim.AdamW([synthetic], lr=1e-3, weight_decay=5e-4)
    pool = [[PlainConvNet(classes).to(device).state_dict() for _ in range(2)] for _ in range(options.networks)]
    initial, final, mixed = (PlainConvNet(classes).to(device) for _ in range(3))

    def view(batch: Tensor) -> Tensor:
        batch = (batch - mean) / std
        for op in ("color", "crop", "cutout"):
            batch = random_view(batch, op, shared=True)
        return batch

    def step() -> None:
        pair = pool[np.random.randint(len(pool))]  # noqa: NPY002
        initial.load_state_dict(pair[0])
        final.load_state_dict(pair[1])
        share = torch.rand(1, device=device)
        for out, one, other in zip(mixed.parameters(), initial.parameters(), final.parameters(), strict=True):
            out.data.copy_(share * one.data + (1 - share) * other.data)
        synthetic.data.clamp_(0, 1)
        for c in range(classes):
            real = images[np.random.permutation(members[c])[: options.real_batch]]  # noqa: NPY002
            decoded = tiles(synthetic[targets == c])
            shown = view(torch.cat([real, decoded]))
            with torch.no_grad():
                target = F.normalize(mixed.embed(shown[: len(real)]), dim=1)
            learned = F.normalize(mixed.embed(shown[len(real) :]), dim=1)
            loss = plain_distance(target, learned, torch.randn(options.frequencies, target.shape[1], device=device))
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for c in range(classes):
            decoded = tiles(synthetic[targets == c])
            label = torch.full((len(decoded),), c, device=device)
            loss = F.cross_entropy(final(view(decoded)), label)
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def tiles(images: Tensor) -> Tensor:
    """Four tiles of each image, enlarged: (N, C, H, W) -> (4 N, C, H, W)."""
    half = images.shape[2] // 2
    parts = [images[:, :, i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
    return F.interpolate(torch.cat(parts), scale_factor=2, mode="bilinear")


def plain_distance(real: Tensor, synthetic: Tensor, frequencies: Tensor) -> Tensor:
    """The distance the way scripts write it: the product is made anew for each cosine and each sine."""
    found = []
    for features in (real, synthetic):
        cosine = torch.mean(torch.cos(torch.matmul(frequencies, features.t())), dim=1)
        sine = torch.mean(torch.sin(torch.matmul(frequencies, features.t())), dim=1)
        found.append((cosine, sine, torch.sqrt(cosine * cosine + sine * sine)))
    (a, b, loud), (c, d, quiet) = found
    phase = (2 * (loud * quiet - a * c - b * d)).clamp(min=1e-12)
    return 300 * torch.mean(torch.sqrt(0.5 * (loud - quiet) ** 2 + 0.5 * phase))


def check(options: argparse.Namespace, dtype: torch.dtype, iterations: int = 3) -> list[pairs.Equality]:
    """Losses and image gradient of both programs from the same weights, real images, views and frequencies.

    As in `benchmarks.speed.stage`, the bound on the largest difference of a gradient is strict in float64 only: in
    float32 a value may be on different sides of the kink of a ReLU.

    Raises:
        pydantic.ValidationError: they differ by more than that.
    """
    with precision(dtype) as kind:
        method = make_method(options)
        run, state = stage(method, make_source(options, kind), options)
        return worst([_compare(method, run, state, iteration) for iteration in range(iterations)])


def _compare(method: NCFM, run: Run, state: State, iteration: int) -> list[pairs.Equality]:
    draw = run.rng.at("network", iteration, device="cpu")
    which, share = int(torch.randint(method.networks, (), generator=draw)), float(torch.rand((), generator=draw))
    pool, sizes = Pool.of(run, method.network, method.pretraining, method.networks), run.source.num_classes
    mixed, final = (
        PlainConvNet(sizes).to(run.device).copy_from(network).requires_grad_(False)
        for network in (pool.mix(which, share), pool.final(which))
    )
    index = run.source.per_class_indices(run.classes, method.real_batch, run.rng.at("real", iteration))
    real = run.source.gather(index).split(run.source.sizes_per_class(run.classes, method.real_batch))
    frequencies = torch.randn(
        method.frequencies or 4096, pool.width, generator=run.rng.at("frequencies", iteration), device=run.device
    )
    (pixels,) = state.images.parameters()
    copy = pixels.detach().clone().requires_grad_(True)
    views, others = (_views(method, run, rng, iteration) for rng in (run.rng, run.rng.within("calibration")))
    distance = calibration = torch.zeros((), device=run.device)
    for c, (some, stored) in enumerate(zip(real, copy.split(method.ipc), strict=True)):
        decoded = tiles(stored)
        target, learned = (F.normalize(mixed.embed(_shown(views, c, batch))) for batch in (some, decoded))
        distance = distance + plain_distance(target, learned, frequencies)
        label = torch.full((len(decoded),), c, device=run.device)
        calibration = calibration + F.cross_entropy(final(_shown(others, c, decoded)), label)
    (gradient,) = torch.autograd.grad(distance + calibration, copy)
    reported = method.step(run, state, iteration)
    assert pixels.grad is not None
    ours = pixels.grad * torch.tensor(run.source.normalization.std, device=run.device).view(-1, 1, 1)
    strict, loose = TOLERANCES[pixels.dtype], GRADIENT_TOLERANCES[pixels.dtype]
    return [
        pairs.equality("loss", reported["loss"], distance.detach(), strict),
        pairs.equality("calibration", reported["calibration"], calibration.detach(), strict),
        pairs.equality("gradient, largest", ours, gradient, loose if pixels.dtype == torch.float64 else 0.1),
        pairs.equality("gradient, median image", ours, gradient, loose, median=True),
    ]


def _views(method: NCFM, run: Run, rng: Rng, iteration: int) -> ChainViews:
    assert method.augmentation is not None
    generator = rng.at("views", iteration, device="cpu")
    found = method.augmentation.sample(len(run.classes), SHAPE, generator)
    assert isinstance(found, ChainViews)
    return found


def _shown(views: ChainViews, position: int, images: Tensor) -> Tensor:
    for part in views.parts:
        images = torch.stack([given_view(image, part.ops[position], part.values[position]) for image in images])
    return images


def main() -> None:
    parser = step_parser(__doc__, real_batch=1024, steps=3)
    parser.add_argument("--frequencies", type=int, default=4096)
    parser.add_argument("--networks", type=int, default=20)
    options = parser.parse_args()
    programs = {"loops": loops, "dsdistill": lambda options: stepper(make_method(options), options)}
    what = f"NCFM step, {options.frequencies} frequencies"
    benchmark(options, MODULE, what, programs, check, {"real_batch": 64, "per_class": 1000})


if __name__ == "__main__":
    main()
