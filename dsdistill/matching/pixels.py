"""Updates of pixels that are kept in [0, 1], as IDC and NCFM do."""

import torch

from dsdistill.data import ImageSource
from dsdistill.errors import BadData
from dsdistill.parameterizations import Parameterization


@torch.no_grad()
def unit_step(optimizer: torch.optim.Optimizer, images: Parameterization, source: ImageSource, *, clamp: bool) -> None:
    """One update of what is stored as if it were in [0, 1], where step sizes of IDC and NCFM belong.

    With z = (u - mean) / std the gradient in u is that in z divided by std. The pixels are brought to [0, 1], the
    optimiser makes its step there (momentum, moments and decay included), and they are standardised again.

    Args:
        optimizer: of the parameters of ``images`` alone; their gradients are in standardised units.
        images: parameters of shape (N, C, H, W).
        source: what says how pixels are standardised; see `refuse_whitened`.
        clamp: project onto [0, 1] after the step.
    """
    parameters = list(images.parameters())
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (source.normalization.mean, source.normalization.std))
    for pixels in parameters:
        mean, std = mean.to(pixels), std.to(pixels)
        pixels.mul_(std).add_(mean)
        if pixels.grad is not None:
            pixels.grad.div_(std)
    optimizer.step()
    for pixels in parameters:
        if clamp:
            pixels.clamp_(0, 1)
        pixels.sub_(mean).div_(std)


def refuse_whitened(method: str, source: ImageSource) -> None:
    """Refuse whitened images: their pixels have no range to be kept in.

    Raises:
        BadData: naming the method and the mend.
    """
    if source.normalization.zca is not None:
        raise BadData(
            f"{method} keeps pixels in [0, 1], and those of {source.name!r} are whitened: load it without zca"
        )
