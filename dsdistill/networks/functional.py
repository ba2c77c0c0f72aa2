"""Training a network on images, differentiated in the images: the unroll that trajectory methods share.

A student starts at θ_0 and makes T steps on mini-batches of synthetic images X with targets Y::

    g_i = s ∇_θ ℓ(θ_i; show_i(X, Y)),    θ_{i+1}, v_{i+1} = rule(θ_i, g_i, v_i, β),    L = outer(θ_τ, ..., θ_T)

`backpropagate` gives L and adds ∂L/∂X, ∂L/∂Y and ∂L/∂β to what made them. The ways to get there (`Backward`):

"unroll"
    Autograd through all steps. Holds the graphs of T steps.
"sweep"
    Exact too, holding the graph of one: the steps are made without a graph, keeping θ_i, and swept from the last to
    the first with the adjoint λ of θ. Each step i is shown again, the rule gives u = ∂L/∂g_i from λ_{i+1}, and one
    vector-Jacobian product of (θ, x, y) ↦ g gives H_i u for λ_i beside the gradients of its images and targets.
"forward"
    The same sweep; the product is taken as the gradient of the derivative along u, reverse over forward mode, which
    needs no graph of second order.
"compiled"
    "forward", compiled (which a graph of second order cannot be). Compiling takes about 20 seconds on a CPU for each
    size of a batch (5 where torch has it on disk); from the 9th size on torch does without, and says so.
"truncated"
    The sweep without H_i u: later steps do not see that earlier ones moved. This is the gradient of TESLA (Cui et
    al., arXiv 2211.10586), exact for T = 1 alone. Its images' gradient is longer (1.1 to 2.5 times in the settings
    of the field) and turned a little; that of β is up to 5 times too large, so step sizes do not carry over.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.functional import cross_entropy

from dsdistill.core.device import in_parts
from dsdistill.networks.plain_norm import plain_batchnorm
from dsdistill.networks.rules import SGD, Moments, Rule

Backward = Literal["sweep", "forward", "compiled", "unroll", "truncated"]
Show = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(step, X, Y) -> the images (b, C, H, W) and targets (b,) or (b, K) of that step; the same ones at every call."""
Pull = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Direction (P,) -> its product with the Jacobian of g in θ, images and targets; see `Student.pull`."""


class FlatNetwork:
    """A network as a function of one vector θ (P,), all its parameters in the order of the module, row-major.

    Buffers are those of the module; it is run in the mode that it is in.

    Attributes:
        size: P.
    """

    def __init__(self, network: nn.Module) -> None:
        self.module = network
        named = dict(network.named_parameters())
        self._names, self._shapes = list(named), [parameter.shape for parameter in named.values()]
        self._sizes = [parameter.numel() for parameter in named.values()]
        self.size = sum(self._sizes)

    def vector(self) -> Tensor:
        """The module's own parameters (P,), copied."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.module.parameters()])

    @torch.no_grad()
    def load(self, theta: Tensor) -> nn.Module:
        """The module, its own parameters set to θ."""
        for parameter, part in zip(self.module.parameters(), self.split(theta), strict=True):
            parameter.copy_(part)
        return self.module

    def split(self, theta: Tensor) -> list[Tensor]:
        """θ as tensors of the shapes of the module's parameters, which are views of it."""
        parts = torch.split(theta, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """θ as the module's named parameters, differentiable."""
        return dict(zip(self._names, self.split(theta), strict=True))

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = functional_call(self.module, self.named(theta), (images,))
        return logits

    def loss(self, theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed over images."""
        return cross_entropy(self(theta, images), targets, reduction="sum")

    def product(self, theta: Tensor, images: Tensor, targets: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ⟨∇_θ loss, direction⟩ in θ, images and, where they are probabilities, targets."""
        network = self.forwardable

        def slope(theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
            value: Tensor = jvp(lambda point: network.loss(point, images, targets), (theta,), (direction,))[1]
            return value

        wanted = (0, 1, 2) if targets.is_floating_point() else (0, 1)
        products: tuple[Tensor, ...] = grad(slope, argnums=wanted)(theta, images, targets)
        return products

    @cached_property
    def forwardable(self) -> "FlatNetwork":
        """The same function, whose derivative along a direction has a right gradient; as the modes are at first use."""
        module = plain_batchnorm(self.module)
        return self if module is self.module else FlatNetwork(module)

    @cached_property
    def compiled_slope(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The gradient of `loss` in θ, compiled as `compiled_product` is."""
        compiled: Callable[..., Tensor] = torch.compile(grad(self.loss), dynamic=False)
        return compiled

    @cached_property
    def compiled_product(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """`product`, compiled at its first call for each shape of images."""
        _ = self.forwardable  # made outside of what is compiled
        compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(self.product, dynamic=False)
        return compiled


@dataclass(frozen=True)
class Student:
    """What a student does, whatever it starts from.

    Args:
        network: without dropout; see `dsdistill.engine.frozen`.
        show: what it sees; a pure function, as every way but "unroll" calls it twice for a step.
        steps: T.
        rule: how a gradient becomes a step.
        factor: s, of the loss.
        chunk: images that pass at a time, None for all. Gradients of chunks add up, so images must not couple: a
            network with batch normalisation takes None.
    """

    network: FlatNetwork
    show: Show
    steps: int
    rule: Rule = SGD()
    factor: float = 1.0
    chunk: int | None = None

    def gradient(self, theta: Tensor, images: Tensor, targets: Tensor, backward: Backward = "sweep") -> Tensor:
        """g (P,): s times the gradient of the mean loss of the images, differentiable for "unroll"."""
        total, scale = torch.zeros_like(theta), self.factor / len(images)
        for part, wanted in self._parts(images, targets):
            if backward == "compiled":
                total += self.network.compiled_slope(theta, part, wanted) * scale
                continue
            point = theta if backward == "unroll" else _leaf(theta)
            loss = self.network.loss(point, part, wanted) * scale
            total = total + torch.autograd.grad(loss, point, create_graph=backward == "unroll")[0]
        return total

    def _parts(self, images: Tensor, targets: Tensor) -> "zip[tuple[Tensor, Tensor]]":
        size = self.chunk or len(images)
        return zip(in_parts(images, size), in_parts(targets, size), strict=True)

    def pull(
        self, theta: Tensor, images: Tensor, targets: Tensor, direction: Tensor, backward: Backward
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The product of ``direction`` (P,) with the Jacobian of g in θ, images and targets, one chunk at a time.

        That in θ is 0 for "truncated"; that in targets is None for classes.
        """
        if backward in ("forward", "compiled"):
            _load_forward_mode()
        scale = self.factor / len(images)
        soft = targets.is_floating_point()
        of_theta = torch.zeros_like(theta)
        of_images: list[Tensor] = []
        of_targets: list[Tensor] = []
        for part, wanted in self._parts(images, targets):
            if backward in ("forward", "compiled"):
                product = self.network.compiled_product if backward == "compiled" else self.network.product
                found = product(theta, part, wanted, direction * scale)
            else:
                found = self._twice(theta, part, wanted, exact=backward != "truncated")[1](direction * scale)
            of_theta += found[0]
            of_images.append(found[1])
            of_targets += found[2:]
        return of_theta, torch.cat(of_images), torch.cat(of_targets) if soft else None

    def _twice(
        self, theta: Tensor, images: Tensor, targets: Tensor, *, exact: bool
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The gradient of the summed loss, and the product of a direction with its Jacobian in reverse mode."""
        theta, images = _leaf(theta), _leaf(images)
        inputs = [images]
        if targets.is_floating_point():
            targets = _leaf(targets)
            inputs.append(targets)
        loss = self.network.loss(theta, images, targets)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)

        def product(direction: Tensor) -> tuple[Tensor, ...]:
            wanted = [theta, *inputs] if exact else inputs
            found = torch.autograd.grad(gradient, wanted, direction, allow_unused=True, materialize_grads=True)
            return found if exact else (torch.zeros_like(theta), *found)

        return gradient.detach(), product

    def remakes(self, count: int, backward: Backward) -> bool:
        """Whether g_i of ``count`` images need not be kept: made anew, it comes with the graph that its product takes.

        Chunks would need all their graphs at once, and the derivative along a direction comes without it.
        """
        return backward in ("sweep", "truncated") and (self.chunk is None or count <= self.chunk)

    def linearised(self, theta: Tensor, images: Tensor, targets: Tensor, backward: Backward) -> tuple[Tensor, Pull]:
        """g made anew, and `pull` from the same graph, once; where `remakes` says so."""
        scale = self.factor / len(images)
        gradient, product = self._twice(theta, images, targets, exact=backward != "truncated")

        def pull(direction: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            of_theta, of_images, *of_targets = product(direction * scale)
            return of_theta, of_images, of_targets[0] if of_targets else None

        return gradient * scale, pull


class Outer(NamedTuple):
    """What is asked of a student: a loss of its parameters after ``at`` steps, in this order, ascending."""

    loss: Callable[[Sequence[Tensor]], Tensor]
    at: tuple[int, ...]


class Unrolled(NamedTuple):
    """The outer loss, a detached scalar, and the student's last parameters (P,), detached."""

    loss: Tensor
    end: Tensor


def backpropagate(
    student: Student,
    outer: Outer,
    start: Tensor,
    rate: Tensor,
    images: Tensor,
    targets: Tensor,
    backward: Backward = "sweep",
) -> Unrolled:
    """Train the student and propagate the outer loss back to what it learned from, as ``loss.backward()`` does.

    Args:
        start: θ_0 (P,).
        rate: β, a scalar tensor.
        images: X (M, C, H, W), made of what is learned.
        targets: Y, (M,) classes, or (M, K) probabilities.
        backward: how; see this module.
    """
    if backward == "unroll":
        return _through(student, outer, start, rate, images, targets)
    return _swept(student, outer, start, rate, images, targets, backward)


def _through(student: Student, outer: Outer, start: Tensor, rate: Tensor, images: Tensor, targets: Tensor) -> Unrolled:
    theta, moments = _leaf(start), student.rule.start(start)
    states = [theta]
    for step in range(student.steps):
        gradient = student.gradient(theta, *student.show(step, images, targets), "unroll")
        theta, moments = student.rule.step(theta, gradient, moments, rate, step)
        states.append(theta)
    loss = outer.loss([states[after] for after in outer.at])
    loss.backward()  # type: ignore[no-untyped-call]
    return Unrolled(loss.detach(), theta.detach())


def _swept(
    student: Student,
    outer: Outer,
    start: Tensor,
    rate: Tensor,
    images: Tensor,
    targets: Tensor,
    backward: Backward,
) -> Unrolled:
    shown, wanted = _leaf(images), _leaf(targets) if targets.is_floating_point() else targets
    # A copy: the compiler's forward mode takes no vector that is a view of more.
    path = _walked(student, start.detach().clone(), rate.detach(), shown, wanted, backward)
    watched = [_leaf(path[after].theta) for after in outer.at]
    loss = outer.loss(watched)
    slopes = dict(zip(outer.at, torch.autograd.grad(loss, watched), strict=True))
    adjoint, of_moments = torch.zeros_like(start), tuple(map(torch.zeros_like, path[-1].moments))
    of_rate = torch.zeros_like(rate)
    end = path[-1].theta
    for step in reversed(range(student.steps)):
        path.pop()
        if step + 1 in slopes:
            adjoint = adjoint + slopes[step + 1]
        here = path[-1]
        with torch.enable_grad():
            batch, labels = student.show(step, shown, wanted)
        seen = here.theta, batch.detach(), labels.detach()
        pull: Pull
        if here.gradient is None:
            gradient, pull = student.linearised(*seen, backward)
        else:
            gradient, pull = here.gradient, partial(student.pull, *seen, backward=backward)
        adjoint, of_gradient, of_moments, moved = _rule_pulled(
            student.rule, here, gradient, rate.detach(), step, adjoint, of_moments
        )
        of_rate = of_rate + moved
        of_theta, of_batch, of_labels = pull(of_gradient)
        adjoint = adjoint + of_theta
        _hand_on([(batch, of_batch), (labels, of_labels)])
    _hand_on([(images, shown.grad), (targets, wanted.grad), (rate, of_rate)])
    return Unrolled(loss.detach(), end)


class _Place(NamedTuple):
    """The student before a step: θ_i, v_i, and g_i unless it is to be made anew (see `Student.remakes`)."""

    theta: Tensor
    moments: Moments
    gradient: Tensor | None


def _walked(
    student: Student, theta: Tensor, rate: Tensor, images: Tensor, targets: Tensor, backward: Backward
) -> list[_Place]:
    moments = student.rule.start(theta)
    path = []
    for step in range(student.steps):
        with torch.no_grad():
            batch, labels = student.show(step, images, targets)
        gradient = student.gradient(theta, batch, labels, backward)
        path.append(_Place(theta, moments, None if student.remakes(len(batch), backward) else gradient))
        with torch.no_grad():
            theta, moments = student.rule.step(theta, gradient, moments, rate, step)
    return [*path, _Place(theta, moments, None)]


def _rule_pulled(
    rule: Rule, here: _Place, gradient: Tensor, rate: Tensor, step: int, adjoint: Tensor, of_moments: Moments
) -> tuple[Tensor, Tensor, Moments, Tensor]:
    """From the adjoints of what a step made to those of what it was given: θ, g, v and β."""
    theta, gradient, size = _leaf(here.theta), _leaf(gradient), _leaf(rate)
    moments = tuple(map(_leaf, here.moments))
    with torch.enable_grad():
        after, kept = rule.step(theta, gradient, moments, size, step)
    found = torch.autograd.grad(
        (after, *kept),
        (theta, gradient, size, *moments),
        (adjoint, *of_moments),
        allow_unused=True,
        materialize_grads=True,
    )
    return found[0], found[1], found[3:], found[2]


@cache
def _load_forward_mode() -> None:
    """Have torch load its rules of forward mode, which it does at first use with a warning about code of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _hand_on(gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Add gradients to what made the tensors, where anything did."""
    pairs = [(tensor, gradient) for tensor, gradient in gradients if tensor.requires_grad and gradient is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
