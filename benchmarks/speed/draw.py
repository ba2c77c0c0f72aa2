"""Drawing images from a latent diffusion model against a plain loop, at CIFAR-10's size or the published one.

The plain loop draws and decodes one image at a time, as published codes do: a latent passes the denoiser twice in one
batch, with its class and without, and the scheduler of diffusers takes each step. On CUDA it multiplies in TF32, as
they do, and dsdistill's denoiser in bfloat16. Networks are random, also where training would begin at 0: what they know
does not change the work. The size "dit-xl" is that of the published experiments: the architectures of DiT-XL/2 and of
Stable Diffusion's autoencoder, images of 256 pixels.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from benchmarks.speed import pairs
from benchmarks.speed.stage import SHAPE, TOLERANCES, make_source
from dsdistill.core.device import default_chunk, settle_allocator
from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.generative.autoencoder import KL, Autoencoder, PatchPCA, halvings, small_kl
from dsdistill.generative.denoiser import COSINE, Denoiser, small_transformer
from dsdistill.generative.growing import SIZES
from dsdistill.generative.models import patch_of
from dsdistill.generative.sampling import Sampler, drawn, noise_numbers

MODULE = "benchmarks.speed.draw"
CHECKED = {"classes": 3, "ipc": 2, "chunk": 4}  # most, in the equality check
LIKENESS = 0.05  # tolerance where one of the programs works in bfloat16
WARMED = 2  # steps of the sampler, over all images, before the timing
XL = "dit-xl"


class Models(NamedTuple):
    autoencoder: Autoencoder
    denoiser: Denoiser


def make_models(options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Models:
    """Networks as dsdistill builds them; whatever of the denoiser is 0 gets random numbers, so that it says something.

    A closed-form autoencoder is fitted on random images.
    """
    rng = Rng(options.seed)
    autoencoder, denoiser = published(options.classes, rng) if options.size == XL else small(options, rng)
    generator = rng.at("zeroed")
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    for network in (autoencoder, denoiser):
        network.to(options.device, dtype).eval().requires_grad_(False)
    return Models(autoencoder, denoiser)


def small(options: argparse.Namespace, rng: Rng) -> Models:
    size = SIZES[options.size]
    if size.pca:
        squares = 2 * make_source(argparse.Namespace(classes=10, per_class=8, seed=options.seed)).images / 255 - 1
        autoencoder: Autoencoder = PatchPCA.fitted(squares, patch_of(SHAPE))
    else:
        autoencoder = small_kl(SHAPE[0], SHAPE[1], halvings(SHAPE[1]), rng)
    transformer = small_transformer(autoencoder.latent, options.classes, size.layers, size.heads, size.width, rng)
    return Models(autoencoder, transformer)


def published(classes: int, rng: Rng) -> Models:
    """DiT-XL/2, without its learned variance, and the autoencoder of Stable Diffusion, as networks go."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    transformer = small_transformer((4, 32, 32), classes, layers=28, heads=16, width=72, rng=rng)
    with isolated_global_rng(torch.device("cpu")):
        seed_global(rng.integer("autoencoder"), torch.device("cpu"))
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=256,
        )
    return Models(KL(network, 256), transformer)


def shape_of(options: argparse.Namespace) -> tuple[int, int, int]:
    """Of the images, (C, H, W)."""
    return (3, 256, 256) if options.size == XL else SHAPE


def wanted(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Class and place of each image."""
    return [(label, place) for label in range(options.classes) for place in range(options.ipc)]


def stream(options: argparse.Namespace, label: int, place: int, device: str) -> torch.Generator:
    """What the noise of an image is drawn from, all at once or latent by latent."""
    return Rng(options.seed).within("class", label).at("image", place, device=device)


@torch.no_grad()
def batched(options: argparse.Namespace, models: Models, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images (M, C, H, W) by dsdistill, as many together as in its runs unless ``options`` say otherwise."""
    device, sampler = torch.device(options.device), Sampler(kind="ddpm", steps=options.steps, guidance=options.guidance)
    shape = (noise_numbers(sampler), *models.autoencoder.latent)
    chunk = options.chunk or default_chunk(shape_of(options), device)
    every, made = wanted(options), []
    for part in (every[begin : begin + chunk] for begin in range(0, len(every), chunk)):
        own = [torch.randn(shape, generator=stream(options, *one, "cpu"), dtype=dtype) for one in part]
        classes = torch.tensor([label for label, _ in part], device=device)
        latents = drawn(models.denoiser, classes, torch.stack(own, 1).to(device), sampler)
        made.append(models.autoencoder.decode(latents / models.autoencoder.scale))
    return torch.cat(made)


@torch.no_grad()
def one_by_one(options: argparse.Namespace, models: Models, noise: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images (M, C, H, W) the plain way.

    Args:
        noise: device that noise is drawn on.
    """
    (autoencoder, denoiser), device = models, torch.device(options.device)
    scheduler: Any = DDPMScheduler(**COSINE, timestep_spacing="linspace", clip_sample=False)
    if dtype == torch.float64:
        scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.set_timesteps(options.steps)
    images: list[Tensor] = []
    for label, place in wanted(options):
        generator = stream(options, label, place, noise)
        latent = torch.randn((1, *autoencoder.latent), generator=generator, device=noise, dtype=dtype).to(device)
        labels = torch.tensor([label, options.classes], device=device)  # the last one stands for no class
        for time in scheduler.timesteps:
            both = torch.cat([latent, latent])
            said = denoiser.network(both, timestep=time.expand(2).to(device), class_labels=labels).sample
            told, plain = said.chunk(2)
            guided = plain + options.guidance * (told - plain)
            latent = scheduler.step(guided, time, latent, generator=generator).prev_sample
        images.append(autoencoder.decode(latent / autoencoder.scale))
    return torch.cat(images)


def ours(options: argparse.Namespace, models: Models) -> Callable[[], None]:
    """A function that draws all images with dsdistill."""
    settle_allocator(torch.device(options.device))

    def draw() -> None:
        batched(options, models)

    return draw


def loops(options: argparse.Namespace, models: Models) -> Callable[[], None]:
    """A function that draws all images the plain way."""
    if torch.device(options.device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True

    def draw() -> None:
        one_by_one(options, models, options.device)

    return draw


def check(options: argparse.Namespace, dtype: torch.dtype) -> list[pairs.Equality]:
    """Images of both from the same noise.

    Float64 is never lowered, so the bound is strict there on every device; of bfloat16 no more than likeness is asked.

    Raises:
        pydantic.ValidationError: they differ by more than rounding.
    """
    models = make_models(options, dtype)
    found, plain = batched(options, models, dtype), one_by_one(options, models, "cpu", dtype)
    if dtype == torch.float32 and lowers(options):
        return [pairs.equality("images, denoiser in bfloat16", found, plain, LIKENESS)]
    return [pairs.equality("images", found, plain, TOLERANCES[dtype])]


def lowers(options: argparse.Namespace) -> bool:
    """Whether dsdistill has its denoiser work in bfloat16."""
    return torch.device(options.device).type == "cuda"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = pairs.parser(__doc__)
    parser.add_argument("--size", choices=[*SIZES, XL], default="nano", help="of the models; all but nano want a GPU")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler, of 1,000")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free; 1 is none")
    parser.add_argument("--chunk", type=int, help="images that dsdistill draws together; default: as in its runs")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.worker:
        program, models = {"loops": loops, "dsdistill": ours}[options.worker], make_models(options)
        warm = program(argparse.Namespace(**{**vars(options), "steps": WARMED}), models)
        return pairs.work(options, [warm], program(options, models), steps=1)
    small = {name: min(most, getattr(options, name) or most) for name, most in CHECKED.items()}
    equality = [one for dtype in TOLERANCES for one in check(argparse.Namespace(**{**vars(options), **small}), dtype)]
    for one in equality:
        print(f"{one.quantity} ({one.dtype}): relative difference {one.relative:.2e}")
    chunk = options.chunk or default_chunk(shape_of(options), torch.device(options.device))
    count = options.classes * options.ipc
    names = ("size", "classes", "ipc", "steps", "guidance")
    pixels = "x".join(map(str, shape_of(options)))
    content = {
        "kind": "speed",
        "title": f"Drawing {count} images, {pixels}, {options.size} models, {options.steps} guided steps of DDPM, "
        f"{min(chunk, count)} together" + (", bfloat16 denoiser" if lowers(options) else ""),
        "unit": f"{count} images",
        "settings": {**{name: getattr(options, name) for name in names}, "chunk": chunk},
        "warmups": 1,
        "target": 2.0,
        "equality": [one.model_dump() for one in equality],
    }
    pairs.publish(options, MODULE, f"speed-draw-{options.size}", content)


if __name__ == "__main__":
    main()
