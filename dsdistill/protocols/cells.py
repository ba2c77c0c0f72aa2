"""Rows of CV-DD, RDED and Minimax for one dataset and budget, where these change the training: "cvdd/cifar100/ipc10".

CV-DD (Cui et al., arXiv 2501.07575) has settings for each student, which is named behind others than ResNet-18:
"cvdd/cifar100/ipc10/resnet50". Those of RDED (Sun et al., CVPR 2024) are the step sizes of the students, and the
mini-batch by budget; those of Minimax (Gu et al., CVPR 2024) the epochs by budget, and three networks:
"minimax/imagenet_woof/ipc50/convnet".
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from dsdistill.networks import NetworkSpec
from dsdistill.protocols.protocol import EvaluationProtocol
from dsdistill.protocols.table import PROTOCOLS


class _Data(NamedTuple):
    classes: int
    small: bool
    """Up to 64 pixels."""


DATA = {
    "cifar10": _Data(10, True),
    "cifar100": _Data(100, True),
    "tiny_imagenet": _Data(200, True),
    "imagenette": _Data(10, False),
    "imagenet": _Data(1000, False),
}
BUDGETS = (1, 10, 50)

# By dataset: (lr, slowdown) at IPC 1, 10 and 50.
_RESNET18 = {
    "cifar10": ((1e-3, 1), (1e-3, 1), (1e-3, 1)),
    "cifar100": ((1e-3, 1), (1e-3, 2), (1e-3, 1)),
    "tiny_imagenet": ((1e-3, 2), (1e-3, 1), (1e-3, 2)),
    "imagenette": ((5e-4, 2), (5e-4, 1), (5e-4, 2)),
    "imagenet": ((1e-3, 2), (1e-3, 2), (1e-3, 1)),
}
CVDD: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = {
    "resnet18": _RESNET18,
    "resnet50": {
        **_RESNET18,
        "tiny_imagenet": ((1e-3, 1), (1e-3, 1), (1e-3, 1)),
        "imagenette": ((5e-4, 2), (1e-3, 1), (5e-4, 1)),
    },
    "resnet101": {
        "cifar10": ((5e-4, 1), (5e-4, 1), (5e-4, 1)),
        "cifar100": ((5e-4, 1), (5e-4, 1), (5e-4, 1)),
        "tiny_imagenet": ((5e-4, 2), (5e-4, 2), (5e-4, 2)),
        "imagenette": ((5e-4, 2), (5e-4, 2), (1e-3, 2)),
        "imagenet": ((1e-3, 2), (1e-3, 2), (5e-4, 2)),
    },
}
RDED = {
    "resnet18": 1e-3,
    "mobilenet_v2": 2.5e-3,
    "efficientnet_b0": 2e-3,
    "vgg11": 5e-4,
    "alexnet": 1e-4,
    "vit_b_16": 1e-4,
    "swin_v2_t": 1e-4,
}
MINIMAX = {"imagenet_nette": 10, "imagenet_woof": 10, "imagenet_idc": 10, "imagenet_100": 100}
"""Classes by dataset."""
MINIMAX_NETWORKS = {
    "": NetworkSpec("resnet_ap10"),
    "/convnet": NetworkSpec("convnet", depth=6),
    "/resnet18": NetworkSpec("resnet18"),
}


def cells() -> Iterator[tuple[str, EvaluationProtocol]]:
    """Every cell with its name."""
    for data, kind in DATA.items():
        for place, ipc in enumerate(BUDGETS):
            for student, rows in CVDD.items():
                yield _named("cvdd", data, ipc, student, _cvdd(kind, ipc, student, *rows[data][place]))
            for student, lr in RDED.items():
                if not (kind.small and student in _LARGE):
                    yield _named("rded", data, ipc, student, _rded(kind, ipc, student, lr))
    for data, classes in MINIMAX.items():
        for ipc in (10, 20, 50, 70, 100):
            epochs = 2000 if ipc <= 10 else 1500 if ipc <= 50 else 1000
            epochs = epochs * 2 // 3 if classes == 100 else epochs
            for suffix, network in MINIMAX_NETWORKS.items():
                yield f"minimax/{data}/ipc{ipc}{suffix}", replace(PROTOCOLS["minimax"], network=network, epochs=epochs)


_LARGE = ("vit_b_16", "swin_v2_t", "alexnet")  # models of 224 pixels


def _named(row: str, data: str, ipc: int, student: str, protocol: EvaluationProtocol) -> tuple[str, EvaluationProtocol]:
    suffix = "" if student == "resnet18" else f"/{student}"
    return f"{row}/{data}/ipc{ipc}{suffix}", protocol


def _cvdd(data: _Data, ipc: int, student: str, lr: float, slowdown: float) -> EvaluationProtocol:
    # 10 also for ImageNette, whose labels were made so (their networks then asked for 16).
    batch = 10 if data.classes == 10 and (ipc == 1 or not data.small) else 16
    return replace(
        PROTOCOLS["cvdd"], network=_network(data, student), lr=lr, slowdown=slowdown, batch_size=batch, sub_batches=2
    )


def _rded(data: _Data, ipc: int, student: str, lr: float) -> EvaluationProtocol:
    row = PROTOCOLS["rded_small" if data.small else "rded"]
    batch = {1: 10, 10: 50, 50: 100}[ipc] * (2 if data.classes in (100, 1000) else 1)
    batch = 100 if data.classes == 200 else batch
    return replace(row, network=_network(data, student), lr=lr, batch_size=min(batch, ipc * data.classes))


def _network(data: _Data, student: str) -> NetworkSpec:
    if student == "resnet18":
        return PROTOCOLS["cvdd"].network
    # VGG-11 begins with a convolution of stride 1 as it is.
    return NetworkSpec(f"torchvision:{student}", stem="small" if data.small and student != "vgg11" else None)
