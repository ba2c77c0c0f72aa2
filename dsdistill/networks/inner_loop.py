"""Training any module with torch's own optimisers, differentiated: the inner loop of a bilevel method of one's own.

Methods of this package train their students by `dsdistill.networks.functional`, in constant memory. `unroll` is for
those who have a module and an optimiser already::

    module, optimizer = Net(), ...                        # SGD, Adam or AdamW over parameters of the module
    def loss(network): return cross_entropy(network(images), targets)          # of images that are learned
    parameters = unroll(module, optimizer, [loss] * 10)   # ten steps; all of their graphs are held
    torch.func.functional_call(module, parameters, (real,)) ...               # .backward() reaches images

SGD runs on `higher` (Grefenstette et al., arXiv 1910.01727), exact for all of its settings. Adam and AdamW run on
`dsdistill.networks.rules`: higher adds Adam's eps before the bias is corrected, has no AdamW, and steps down where
``maximize`` asks for up.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsdistill.errors import InvalidSetting, ShapeMismatch
from dsdistill.networks.rules import Adam, Moments

Forward = Callable[..., Any]
"""What the module does when called, with the parameters of the moment."""

KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimisers that can be differentiated; subclasses may step otherwise and are refused."""


def unroll(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[Forward], Tensor]],
    *,
    lr: Tensor | None = None,
) -> dict[str, Tensor]:
    """Parameters after one step for each loss, differentiable in what the losses depend on and in ``lr``.

    The module and the optimiser are not changed. Training starts from the parameters, buffers and moments that they
    have now, which count as constants; the mode (train or eval) is that of the module. Parameters that the optimiser
    does not have, or that want no gradient, stay what they are. Step sizes are those of now: schedulers and hooks
    of the optimiser are not consulted, and forward hooks of the module may not be called.

    Running statistics of batch normalisation move in copies without a graph, which are not handed out. An outer loss
    in training mode is differentiated exactly; in eval mode it would use statistics that are those of ``module`` and
    do not depend on what is learned: normalise by groups instead. Attention runs on torch's plain kernel, as the
    fused ones can be differentiated once only. Dropout draws from the global generators, as ever.

    Args:
        module: not compiled.
        optimizer: SGD, Adam or AdamW, without ``maximize`` or ``amsgrad``. Groups may differ in their settings.
        losses: one for each step. Each is called once, when its turn has come, with a function that does what
            ``module`` does under the parameters of that moment; it returns a scalar. It must call that function, not
            the module, and make its batch anew from what is learned: a batch made before an earlier ``backward()``
            belongs to a graph that is gone.
        lr: step size in place of the optimiser's, a scalar tensor, or (G,) for its G parameter groups.

    Returns:
        all parameters of the module by name, for `torch.func.functional_call`.

    Raises:
        InvalidSetting: another optimiser, a setting named above, a parameter of another module, a compiled module, or
            a loss that does not depend on the parameters.
        ShapeMismatch: ``lr`` is neither a scalar nor (G,).
    """
    _check(module, optimizer)
    rates = _rates(optimizer, lr)
    steps = _sgd_steps if type(optimizer) is torch.optim.SGD else _adam_steps
    # Losses are asked one at a time: each may look at what those before it have led to.
    return steps(module, optimizer, iter(losses), rates)


def _sgd_steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[Callable[[Forward], Tensor]], rates: list[Any]
) -> dict[str, Tensor]:
    higher = _import_higher()
    with higher.innerloop_ctx(module, optimizer, override={"lr": rates}) as (copy, differentiable):

        def forward(*inputs: Any, **options: Any) -> Any:
            return copy(*inputs, **options)

        for loss in losses:
            differentiable.step(_value(loss, forward), grad_callback=_refuse_untouched)
        return {name: tensor for (name, _), tensor in zip(module.named_parameters(), copy.parameters(), strict=True)}


def _adam_steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[Callable[[Forward], Tensor]], rates: list[Any]
) -> dict[str, Tensor]:
    parameters = {
        name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    names = {parameter: name for name, parameter in module.named_parameters()}
    stepped = {
        names[parameter]: _Stepped(optimizer, group, parameter, rate)
        for group, rate in zip(optimizer.param_groups, rates, strict=True)
        for parameter in group["params"]
        if parameter.requires_grad
    }

    def forward(*inputs: Any, **options: Any) -> Any:
        return functional_call(module, (parameters, buffers), inputs, options)

    for loss in losses:
        wanted = [parameters[name] for name in stepped]
        gradients = torch.autograd.grad(_value(loss, forward), wanted, create_graph=True, allow_unused=True)
        _refuse_untouched(gradients)
        for (name, rule), gradient in zip(stepped.items(), gradients, strict=True):
            if gradient is not None:  # as torch.optim, which leaves out what has no gradient
                parameters[name] = rule.step(parameters[name], gradient)
    return parameters


class _Stepped:
    """One parameter under Adam: its rule, and its moments from where the optimiser has them."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, rate: float | Tensor
    ) -> None:
        self.rule = Adam(
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
        )
        self.rate = torch.as_tensor(rate, dtype=parameter.dtype, device=parameter.device)
        state = optimizer.state.get(parameter)
        self.number = int(state["step"]) if state else 0
        self.moments: Moments = self.rule.start(parameter.detach())
        if state:
            self.moments = (state["exp_avg"].clone(), state["exp_avg_sq"].clone())

    def step(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        after, self.moments = self.rule.step(parameter, gradient, self.moments, self.rate, self.number)
        self.number += 1
        return after


def _value(loss: Callable[[Forward], Tensor], forward: Forward) -> Tensor:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return loss(forward)


def _refuse_untouched(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if all(gradient is None for gradient in gradients):
        raise InvalidSetting(
            "losses", "a loss without parameters", "each must call the function that it is given, not the module"
        )
    return gradients


def _rates(optimizer: torch.optim.Optimizer, lr: Tensor | None) -> list[Any]:
    """The step size of each group."""
    count = len(optimizer.param_groups)
    if lr is None:
        return [group["lr"] for group in optimizer.param_groups]
    if lr.shape not in ((), (count,)):
        raise ShapeMismatch("lr", tuple(lr.shape), f"() or ({count},), one for each parameter group")
    return list(lr.expand(count))


def _check(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in KNOWN:
        known = ", ".join(kind.__name__ for kind in KNOWN)
        raise InvalidSetting("optimizer", type(optimizer).__name__, f"torch.optim's {known} can be differentiated")
    for part in module.modules():
        # What torch.compile(module) wraps, and what module.compile() leaves behind; both can be differentiated once.
        if "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None:
            raise InvalidSetting(
                "module", type(part).__name__, "compiled steps cannot be differentiated twice; give it uncompiled"
            )
    own = {id(parameter) for parameter in module.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for name, mend in (("maximize", "minimise the negative loss"), ("amsgrad", "use Adam without it")):
            if group.get(name):
                raise InvalidSetting(f"optimizer.param_groups[{number}].{name}", True, mend)
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                raise InvalidSetting(
                    f"optimizer.param_groups[{number}].params[{place}]",
                    tuple(parameter.shape),
                    "not a parameter of the module; make the optimizer over module.parameters()",
                )


def _import_higher() -> ModuleType:
    with warnings.catch_warnings():
        # Its docstrings and comparisons warn when it is compiled, which is at its first import.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        import higher  # type: ignore[import-untyped]
    found: ModuleType = higher
    return found
