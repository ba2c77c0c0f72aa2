"""Training a fusion: latents that say their class, and stay what they were; the formulas are in `fusion`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss, normalize

from dsdistill.core.rng import Rng, isolated_global_rng, seed_global
from dsdistill.errors import BadData, Diverged, ShapeMismatch
from dsdistill.generative.fusion import Fusion, FusionModule
from dsdistill.generative.text import ByteText, TextStates, clip_states, prompts_of

Fetch = Callable[[Tensor, torch.Generator], Tensor]
"""Unscaled latents (B, c, h, w) of real images at rows (B,), int64 on the CPU; what it draws is from the generator."""
Watch = Callable[[int, dict[str, Tensor]], None]
"""Called after each step, counted from 0, with "loss", "contrastive" and "closeness"; may raise to stop."""


class Projector(nn.Module):
    """Latents to vectors as long as those of texts: for training only.

    A convolution to 64 channels with kernel and stride 4, the mean of each cell of 4x4, a linear map and a norm. For
    latents with a side below 4 kernel and stride are as short as that side; where the convolution leaves fewer than
    4x4 places, cells share places. A grid that the stride does not divide loses what is left over, as in the original.

    Args:
        channels: c of the latents.
        text_dim: D of the result.
        side: the shorter side of the latents.
    """

    def __init__(self, channels: int, text_dim: int, side: int = 4) -> None:
        super().__init__()
        size = min(4, side)
        self.conv = nn.Conv2d(channels, 64, size, stride=size)
        self.map = nn.Linear(64 * 16, text_dim)
        self.norm = nn.LayerNorm(text_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, D) of latents (B, c, h, w)."""
        maps: Tensor = self.conv(latents)
        rows, columns = _cells(maps.shape[2]).to(maps), _cells(maps.shape[3]).to(maps)
        result: Tensor = self.norm(self.map((rows @ maps @ columns.T).flatten(1)))
        return result


def _cells(size: int) -> Tensor:
    """(4, size): which of ``size`` places each of 4 cells of adaptive average pooling has, and their shares.

    As products with these, pooling has a deterministic gradient on every device, and takes all sizes on all of them.
    """
    places, cells = torch.arange(size), torch.arange(4)[:, None]
    inside = (places >= cells * size // 4) & (places < -(-(cells + 1) * size // 4))
    return inside / inside.sum(1, keepdim=True)


def multi_positive_nce(images: Tensor, texts: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The contrastive loss of images and texts in which all texts of the same class are right.

    Because of the mean over those, perfect alignment costs the logarithm of their number: 0 only if there is one.

    Args:
        images: (B, D), of any length each.
        texts: (B, D), of the class of each image.
        classes: (B,) int64, on any device.
        temperature: T, above 0.

    Returns:
        A scalar, float32 or finer: the mean over images and both directions.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
    logits = normalize(images.to(wide), dim=1) @ normalize(texts.to(wide), dim=1).T / temperature
    right = (classes[:, None] == classes).to(logits.device)
    number = right.sum(1).to(wide).log()

    def direction(scores: Tensor) -> Tensor:
        found = log_softmax(scores, 1).masked_fill(~right, -math.inf).logsumexp(1)
        return (number - found).mean()

    return (direction(logits) + direction(logits.T)) / 2


def closeness_weight(step: int, total: int, first: float, last: float) -> float:
    """λ₂ at a step, counted from 0: linear from ``first`` to ``last`` over half of ``total`` steps, then constant.

    The authors count two half batches to a step, in the numerator and the denominator, which comes to the same.
    """
    return first + (last - first) * min(1.0, 2 * step / total)


class Trained:
    """A fusion that has learned, and the text states of all classes.

    Attributes:
        fusion: in evaluation mode, without gradients.
        texts: of all classes, clean.
        losses: "contrastive" and "closeness", each its mean over the first and over the last twentieth of training.
    """

    def __init__(self, fusion: FusionModule, texts: TextStates, losses: Mapping[str, tuple[float, float]]) -> None:
        self.fusion = fusion.eval().requires_grad_(False)
        self.texts = TextStates(texts.states.detach(), texts.ends)
        self.losses = dict(losses)

    @torch.no_grad()
    def fuse(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Latents fused with the prompts of their classes.

        Args:
            latents: (B, c, h, w), unscaled, on the device of the fusion.
            classes: (B,) int64, on any device.

        Returns:
            (B, c, h, w), as ``latents`` are; counted in float32.

        Raises:
            ShapeMismatch: the latents do not suit the fusion.
        """
        fused: Tensor = self.fusion(latents.float(), self.texts.of(classes).states)
        return fused.to(latents.dtype)

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs beside the settings, as tensors."""
        losses = [self.losses[name] for name in _LOSSES]
        return {
            **{f"fusion.{name}": tensor for name, tensor in self.fusion.state_dict().items()},
            "states": self.texts.states,
            "ends": self.texts.ends,
            "losses": torch.tensor(losses, dtype=torch.float64),
        }

    @classmethod
    def restore(
        cls,
        state: Mapping[str, Tensor],
        grid_shape: tuple[int, int, int],
        settings: Fusion,
        device: torch.device | str = "cpu",
    ) -> "Trained":
        """What `state` was taken of, on a device.

        Args:
            state: tensors of `state`.
            grid_shape: (c, h, w) of the latents that it was trained on.
            settings: that it was trained with.
            device: where it is to be.

        Raises:
            BadData: the tensors are not those of such a fusion.
        """
        try:
            states, ends = state["states"], state["ends"]
            first, last = state["losses"].double().cpu().T.tolist()
            with isolated_global_rng(torch.device("cpu")):  # weights are drawn before they are replaced
                fusion = _module(grid_shape, states.shape[2], settings)
            own = {name[len("fusion.") :]: part for name, part in state.items() if name.startswith("fusion.")}
            fusion.load_state_dict(own)
            losses = {name: (first[place], last[place]) for place, name in enumerate(_LOSSES)}
        except (IndexError, KeyError, RuntimeError, ValueError) as error:
            raise BadData(f"these tensors are not of a fusion of latents {grid_shape} ({error})") from error
        return cls(fusion.to(device), TextStates(states.to(device), ends.to(device)), losses)


_LOSSES = ("contrastive", "closeness")


def _module(grid_shape: tuple[int, int, int], text_dim: int, settings: Fusion) -> FusionModule:
    return FusionModule(
        grid_shape[0],
        (grid_shape[1], grid_shape[2]),
        text_dim,
        settings.width,
        settings.heads,
        settings.layers,
        settings.dropout,
        settings.residual,
        settings.refresh,
    )


def train_fusion(
    fetch: Fetch,
    targets: Tensor,
    classes: Sequence[str],
    grid_shape: tuple[int, int, int],
    settings: Fusion,
    rng: Rng,
    device: torch.device | str,
    *,
    texts: TextStates | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train a fusion on the latents of real images.

    The same arguments give the same bits on a CPU. On CUDA attention adds up its gradients in an order of its own.

    Args:
        fetch: gives the latents at rows, on ``device``; its generator is on the device of ``rng``.
        targets: (N,) int64, the class of each real image, on any device.
        classes: names of all of them.
        grid_shape: (c, h, w) of the latents.
        settings: of the fusion.
        rng: named streams for everything that is drawn.
        device: where it is trained.
        texts: states of all classes, if they are at hand; else they are made as the settings say.
        watch: sees every step; see `Watch`.

    Raises:
        BadData: there are no images, or targets beyond the classes. ShapeMismatch: latents have another shape.
        MissingExtra, MissingWeights: the text encoder cannot be had; see `clip_states`.
        Diverged: a loss was not finite.
    """
    place, labels = torch.device(device), targets.cpu()
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise BadData(f"a fusion learns from at least one image, of the {len(classes)} classes that have names")
    with isolated_global_rng(place):  # modules and dropout know no generator
        learner = _Learner(classes, grid_shape, settings, rng, place, texts)
        history = []
        for step, rows in enumerate(_batches(len(labels), settings, rng)):
            latents = fetch(rows, rng.at("fetch", step))
            if tuple(latents.shape) != (len(rows), *grid_shape):
                raise ShapeMismatch("fetched latents", tuple(latents.shape), str((len(rows), *grid_shape)))
            metrics = learner.step(step, latents.float(), labels[rows])
            history.append(torch.stack([metrics[name] for name in _LOSSES]))
            if watch is not None:
                watch(step, metrics)
        states = learner.all_texts()
    return Trained(learner.fusion, states, _summary(torch.stack(history).double().cpu(), settings, rng))


def _batches(size: int, settings: Fusion, rng: Rng) -> Iterator[Tensor]:
    """Rows of each step, (B,) int64 on the CPU: each epoch in an order of its own, without what fills no batch."""
    batch = min(settings.batch_size, size)
    per_epoch = size // batch
    for step in range(settings.steps):
        epoch, place = divmod(step, per_epoch)
        if not place:
            order = torch.randperm(size, generator=rng.at("rows", epoch, device="cpu"))
        yield order[place * batch : (place + 1) * batch]


def _summary(history: Tensor, settings: Fusion, rng: Rng) -> dict[str, tuple[float, float]]:
    """First and last losses of a training (steps, 2). Raises Diverged at the first that is not finite."""
    bad = (~history.isfinite().all(1)).nonzero()
    if len(bad):
        raise Diverged("fusion", rng.job, int(bad[0]), "the loss", lower="Fusion.lr")
    some = max(1, settings.steps // 20)
    first, last = history[:some].mean(0).tolist(), history[-some:].mean(0).tolist()
    return {name: (first[place], last[place]) for place, name in enumerate(_LOSSES)}


class _Learner:
    """What changes while a fusion is trained; draws its weights on the CPU, whatever the device. Inside
    `isolated_global_rng` only.
    """

    def __init__(
        self,
        classes: Sequence[str],
        grid_shape: tuple[int, int, int],
        settings: Fusion,
        rng: Rng,
        device: torch.device,
        texts: TextStates | None,
    ) -> None:
        self.settings, self.rng, self.device = settings, rng, device
        prompts = prompts_of(classes, settings.template)
        self.letters: ByteText | None = None
        if settings.text is None:
            generator = rng.at("letters", device="cpu")
            self.letters = ByteText(prompts, settings.text_width, generator=generator).to(device)
            text_dim = settings.text_width
        else:
            options = {"revision": settings.revision, "download": settings.download, "device": device}
            self.frozen = clip_states(settings.text, prompts, **options) if texts is None else texts  # type: ignore[arg-type]
            text_dim = self.frozen.states.shape[2]
        seed_global(rng.integer("weights"), torch.device("cpu"))
        self.fusion = _module(grid_shape, text_dim, settings).to(device)
        self.projector = Projector(grid_shape[0], text_dim, min(grid_shape[1:])).to(device)
        groups = [(self.fusion, settings.lr), (self.projector, settings.lr_projector)]
        groups += [] if self.letters is None else [(self.letters, settings.lr_text)]
        self.parameters = [parameter for part, _ in groups for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(part.parameters()), "lr": lr} for part, lr in groups], weight_decay=settings.weight_decay
        )

    def step(self, step: int, latents: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """One update by latents (B, c, h, w) of classes (B,), on the CPU; its losses."""
        settings = self.settings
        seed_global(self.rng.integer("dropout", step), self.device)
        texts = self._texts(classes)
        fused = self.fusion(latents, self._disturbed(texts.states, step))
        contrastive = multi_positive_nce(self.projector(fused), texts.vectors(), classes, settings.temperature)
        closeness = mse_loss(fused, latents)
        weight = closeness_weight(step, settings.steps, *settings.closeness)
        loss = settings.alignment * contrastive + weight * closeness
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        self.optimizer.step()
        found = {"loss": loss, "contrastive": contrastive, "closeness": closeness}
        return {name: value.detach() for name, value in found.items()}

    def _texts(self, classes: Tensor) -> TextStates:
        """Clean states of the class of each latent."""
        if self.letters is None:
            return self.frozen.of(classes)
        present, places = torch.unique(classes, return_inverse=True)  # each class is encoded once
        found: TextStates = self.letters(present)
        return found.of(places)

    def _disturbed(self, states: Tensor, step: int) -> Tensor:
        """Text states (B, T, D) as the fusion sees them while it is trained."""
        settings = self.settings
        if float(torch.rand((), generator=self.rng.at("drop text", step, device="cpu"))) < settings.drop_text:
            return torch.zeros_like(states)
        generator = self.rng.at("text noise", step, device=states.device)
        kept = torch.empty_like(states, requires_grad=False).bernoulli_(1 - settings.text_dropout, generator=generator)
        noise = torch.randn(states.shape, generator=generator, device=states.device, dtype=states.dtype)
        return states * kept / (1 - settings.text_dropout) + settings.text_noise * noise

    @torch.no_grad()
    def all_texts(self) -> TextStates:
        """Clean states of all classes."""
        if self.letters is None:
            return self.frozen
        found: TextStates = self.letters.eval()()
        return found
