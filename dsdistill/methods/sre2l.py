"""SRe2L (Yin et al., Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective,
arXiv 2306.13092), and its strengthened baseline SRe2L++ (the baseline of CV-DD, arXiv 2501.07575).

Squeeze: a teacher f learns the real images; its batch norms remember mean μ_ℓ and variance σ²_ℓ of their inputs.
Recover: images X, one of each class of a chunk, are to be recognised and to have those statistics under views A::

    min_X  CE(f(A(X)), y) + α Σ_ℓ m_ℓ ( ‖m_ℓ(A(X)) − μ_ℓ‖₂ + ‖v_ℓ(A(X)) − σ²_ℓ‖₂ ),     m_1 = 10, m_ℓ = 1 else

Relabel: the teacher labels random views of X, and networks learn those labels (`dsdistill.relabel`). With its own hard
labels alone a set teaches little: score it under the protocol "sre2l" or "cvdd", with labels or teachers.

SRe2L++ is the presets "small" and "large": a start from real patches instead of noise, crops at every size, one
setting for all data, and batch-specific soft labels (protocol "cvdd").

Departures from the authors' code: pixels are stored as they are, float32 in [0, 1], where the code writes JPEG and cuts
off instead of rounding. Every chunk has a random stream of its own, so results do not depend on what passes together.
Exactly ``iterations`` updates are made. The code draws one crop for a batch, as here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsdistill.engine import Preset
from dsdistill.experts import RECIPES, Teachers
from dsdistill.matching.fitting import LEAST_SHARE
from dsdistill.matching.recovery import Recovery

_SCRIPTS = "scripts of the authors' code"
_CIFAR, _TINY = (Teachers(training=RECIPES[name]) for name in ("sre2l_cifar", "sre2l_tiny"))
_PLUS: dict[str, Any] = {"init": "patches"}


@dataclass(frozen=True, kw_only=True)
class SRe2L(Recovery):
    """Squeeze, recover, relabel: images that a teacher recognises, with the statistics of what it was trained on."""

    paper: ClassVar[str] = (
        "Yin et al., Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective, "
        "NeurIPS 2023, arXiv 2306.13092"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar100": Preset(_SCRIPTS, {"iterations": 1000, "shift": 4, "crop": False, "teachers": _CIFAR}),
        "tiny_imagenet": Preset(
            _SCRIPTS,
            {"lr_images": 0.1, "statistics_weight": 1.0, "shift": 4, "shift_both": True, "teachers": _TINY},
        ),
        "imagenet": Preset(f"{_SCRIPTS}; the teacher has the weights of torchvision", {"shift": 32}),
        "small": Preset("SRe2L++, baseline of CV-DD's code at 32 and 64 pixels", {**_PLUS, "shift": 4}),
        "large": Preset("SRe2L++, baseline of CV-DD's code at 224 pixels", {**_PLUS, "shift": 32}),
    }

    def least_share(self, iteration: int) -> float:
        return LEAST_SHARE
