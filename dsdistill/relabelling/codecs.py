"""How a teacher's logits are stored: as they are, in 8 bits, or only the largest probabilities.

Every codec turns the logits (B, K) of a mini-batch into tensors with one row an image, and those back into logits.
Shen & Xing, FKD, ECCV 2022 (arXiv 2112.01528), keep probabilities at temperature 1 of the top classes; what is rebuilt
of them are log probabilities, which are logits up to a constant. (Their code keeps the class indices in half precision
too, which is exact up to 2048 classes only. Here they are integers.)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.errors import InvalidSetting, UnknownName

_NOWHERE = -1e6  # the log probability of what is impossible; so it stays at any temperature below 10 000
Layout = Mapping[str, tuple[torch.dtype, int]]
"""Tensors of a codec: type, and numbers for an image; 0 for one number in a tensor (B,)."""


@dataclass(frozen=True)
class Codec(ABC):
    """A way to store logits; subclasses are frozen settings."""

    def __post_init__(self) -> None:
        validate(self)

    @abstractmethod
    def layout(self, width: int) -> Layout:
        """What is stored of ``width`` logits an image.

        Raises:
            InvalidSetting: the codec does not fit so few or so many.
        """

    @abstractmethod
    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits (B, K), any floating type, as tensors (B, ...) of the types in `layout`.

        Raises:
            InvalidSetting: a number is too large for the type.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], width: int) -> Tensor:
        """Logits (B, K), float32, of rows of what `encode` made; ``width`` is K."""


@dataclass(frozen=True)
class Float(Codec):
    """All logits, in single or half precision."""

    bits: Literal[32, 16] = 16
    """Of each."""

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.bits == 32 else torch.float16

    def layout(self, width: int) -> Layout:
        return {"logits": (self._dtype, width)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        made = logits.to(self._dtype)
        if not bool(torch.isfinite(made).all()):
            largest = float(logits.abs().max())
            raise InvalidSetting("codec", f"float{self.bits}", f"a type that holds logits of up to {largest:.3g}")
        return {"logits": made}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Tensor:
        return stored["logits"].float()


@dataclass(frozen=True)
class EightBits(Codec):
    """All logits in 8 bits, evenly between the least and the largest of an image: off by half a step at most."""

    def layout(self, width: int) -> Layout:
        return {"codes": (torch.uint8, width), "least": (torch.float32, 0), "step": (torch.float32, 0)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        logits = logits.float()
        least = logits.amin(1)
        step = (logits.amax(1) - least) / 255
        codes = ((logits - least[:, None]) / torch.where(step > 0, step, 1.0)[:, None]).round().clamp(0, 255)
        return {"codes": codes.to(torch.uint8), "least": least, "step": step}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Tensor:
        return stored["least"][:, None] + stored["codes"].float() * stored["step"][:, None]


@dataclass(frozen=True)
class TopK(Codec):
    """The largest probabilities at temperature 1, in half precision, and their classes."""

    k: Annotated[int, Ge(1)] = 10
    """How many."""
    rest: Literal["smooth", "renorm"] = "smooth"
    """What the other classes get: evenly what is missing to 1 ("marginal smoothing"), or nothing ("re-norm")."""

    def layout(self, width: int) -> Layout:
        if self.k > width:
            raise InvalidSetting("TopK.k", self.k, f"at most {width}, the number of classes")
        return {"probabilities": (torch.float16, self.k), "classes": (_index_type(width), self.k)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        probabilities, classes = logits.float().softmax(1).topk(self.k, dim=1)
        return {"probabilities": probabilities.half(), "classes": classes.to(_index_type(logits.shape[1]))}

    def decode(self, stored: Mapping[str, Tensor], width: int) -> Tensor:
        # A finite number for log 0, or 0 times infinity would make the divergence of two such rows NaN.
        return self.probabilities(stored, width).log().clamp_min(_NOWHERE).float()

    def probabilities(self, stored: Mapping[str, Tensor], width: int) -> Tensor:
        """(B, K), float64, of sum 1 in each row; exactly 0 where nothing is left for a class."""
        kept = stored["probabilities"].double()
        others = width - self.k
        missing = (1 - kept.sum(1)).clamp_min(0) if self.rest == "smooth" else kept.new_zeros(len(kept))
        full = (missing / max(1, others))[:, None].repeat(1, width).scatter_(1, stored["classes"].long(), kept)
        return full / full.sum(1, keepdim=True)


def _index_type(width: int) -> torch.dtype:
    return torch.int16 if width <= 2**15 else torch.int32


CODECS: Mapping[str, Codec] = {
    "float32": Float(32),
    "float16": Float(16),
    "uint8": EightBits(),
    "topk": TopK(),
}
"""Codecs by name; a changed one is an instance: ``TopK(k=5, rest="renorm")``."""


def get_codec(name: str | Codec) -> Codec:
    """A codec by its name; an instance is itself.

    Raises:
        UnknownName: with the nearest known name.
    """
    if isinstance(name, Codec):
        return name
    if name not in CODECS:
        raise UnknownName("codec", name, CODECS)
    return CODECS[name]
