"""Evaluation protocols as data: a named one is a row of this table, a custom one an instance.

The published protocols of a family give numbers 10 to 20 points apart on the same images, so a score is only
meaningful together with its protocol.
"""

from collections.abc import Mapping
from dataclasses import replace

from dsdistill.augmentations import (
    CutMix,
    Mixup,
    PadCrop,
    PatchShuffle,
    ResizedCrop,
    Siamese,
    always_flip_color_cutout,
    flip_first,
)
from dsdistill.networks import NetworkSpec
from dsdistill.protocols.protocol import EvaluationProtocol
from dsdistill.training import Distillation

_ALL = ("color", "crop", "cutout", "flip", "scale", "rotate")
_UNCUT = ("color", "crop", "flip", "scale", "rotate")  # with CutMix, the line of IDC leaves cutout out

# What students of the decoupled line have in common: AdamW whose decay leaves biases and norms out, half a cosine, and
# the logits of teachers on views that were cropped and mixed by CutMix, at temperature 20 without the factor T². Rows
# name each departure from it. Common departures from the authors' code: the epoch that is scored is the last, where
# most of them report the best on test; networks are those of this package, which at 32 and 64 pixels are the ResNets
# with a stem of stride 1; a frame around images has the mean colour instead of black (PadCrop).
_DECOUPLED = EvaluationProtocol(
    network=NetworkSpec("resnet18", norm="batch"),
    epochs=300,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.01,
    decay_only_weights=True,
    schedule="cosine",
    augmentation=ResizedCrop(),
    mix=CutMix(probability=1.0),
    distillation=Distillation(temperature=20.0),
)
_UFC = replace(
    _DECOUPLED,
    epochs=400,
    batch_size=64,
    decay_only_weights=False,
    augmentation=PadCrop(),
    mix=Mixup(alpha=0.8),
    distillation=Distillation(temperature=30.0),
)

# The settings of the authors' code, with three departures throughout: exactly E epochs (the scripts of the DC line make
# one more), momentum kept when the step size drops, and the last epoch scored where some report the best one on test.
PROTOCOLS: Mapping[str, EvaluationProtocol] = {
    # Zhao et al., ICLR 2021, and their code: 300 epochs, x0.1 after epoch E/2 + 1, batch 256, no augmentation (their
    # MNIST row, with an augmentation of its own, is not this). Published figures: 20 networks on each of 5 sets.
    "dc": EvaluationProtocol(name="dc", epochs=300, milestone_delay=1),
    # Zhao & Bilen, ICML 2021 (DSA) and WACV 2023 (DM): the same with 1000 epochs under per-image DSA.
    "dsa": EvaluationProtocol(name="dsa", epochs=1000, milestone_delay=1, augmentation=Siamese()),
    "dm": EvaluationProtocol(name="dm", epochs=1000, milestone_delay=1, augmentation=Siamese()),
    # Son et al., ECCV 2024 (FYI): DSA, but every image is mirrored with probability 1/2 before the drawn operation.
    # Part of a gain measured so may come from here: compare within one protocol. (They scale and rotate on a grid
    # aligned to the corners' centres, which moves pixels by a fraction of one.)
    "fyi": EvaluationProtocol(name="fyi", epochs=1000, milestone_delay=1, augmentation=flip_first(_ALL)),
    # Cazenavette et al., CVPR 2022 (MTT), and FTD after it: DSA with the step size that the set carries. It was learned
    # for steps without momentum, and is used with momentum there as here. (They too scale and rotate on the other
    # grid.) Published figures are the best of all checkpoints of the synthesis, chosen on the test split.
    "mtt": EvaluationProtocol(name="mtt", epochs=1000, milestone_delay=1, augmentation=Siamese(), learned_lr=True),
    # Guo et al., ICLR 2024 (DATM): the same with batch 128, against soft labels where the set has them.
    "datm": EvaluationProtocol(
        name="datm", epochs=1000, batch_size=128, milestone_delay=1, augmentation=Siamese(), learned_lr=True
    ),
    # Sajedi et al., ICCV 2023 (DataDAM), their code: 1800 epochs, batch 64, batch normalisation. Published figures are
    # the best of several checkpoints of the synthesis, chosen on the test split; here a set is scored as it is.
    "datadam": EvaluationProtocol(
        name="datadam",
        network=NetworkSpec(norm="batch"),
        epochs=1800,
        batch_size=64,
        milestone_delay=1,
        augmentation=Siamese(),
    ),
    # Kim et al., ICML 2022 (IDC), small images: x0.2 after 2/3 and 5/6, batch 64, CutMix on half of the mini-batches.
    "idc": EvaluationProtocol(
        name="idc",
        epochs=1000,
        batch_size=64,
        milestones=(2 / 3, 5 / 6),
        gamma=0.2,
        augmentation=always_flip_color_cutout(_UNCUT),
        mix=CutMix(probability=0.5),
    ),
    # Wang et al., CVPR 2025 (NCFM), first release, CIFAR and the 128 px subsets: AdamW, x0.5 at each fifth, batch 128.
    # Its code does not read the weight decay of its settings files, so the library's 0.01 holds. Tiny-ImageNet has
    # fewer epochs (300 at IPC 10, 40 at IPC 50), later releases other ones. Published figures are the best on test.
    "ncfm": EvaluationProtocol(
        name="ncfm",
        epochs=2000,
        batch_size=128,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        milestones=(0.2, 0.4, 0.6, 0.8),
        gamma=0.5,
        augmentation=always_flip_color_cutout(_UNCUT),
        mix=CutMix(probability=0.5),
    ),
    # Yin, Xing & Shen, NeurIPS 2023 (SRe2L), and Yin & Shen, TMLR 2024 (CDA), ImageNet-1K: batch 1024 in two halves,
    # stored labels of a ResNet-18 in evaluation mode whatever the student.
    "sre2l": replace(_DECOUPLED, name="sre2l", batch_size=1024, sub_batches=2),
    # Tiny-ImageNet: the reference scripts of torchvision with a teacher at hand, SGD, no mixing, and the factor T²,
    # without which SGD would train 400 times slower.
    "sre2l_tiny": replace(
        _DECOUPLED,
        name="sre2l_tiny",
        epochs=100,
        optimizer="sgd",
        lr=0.2,
        weight_decay=1e-4,
        decay_only_weights=False,
        warmup=5,
        mix=None,
        distillation=Distillation(temperature=20.0, squared=True),
    ),
    # CIFAR-100: their script never puts the teacher into evaluation mode, and its figures depend on it.
    "sre2l_cifar100": replace(
        _DECOUPLED,
        name="sre2l_cifar100",
        epochs=400,
        batch_size=128,
        decay_only_weights=False,
        augmentation=PadCrop(),
        mix=Mixup(alpha=0.8),
        distillation=Distillation(temperature=30.0),
        teacher_mode="batch",
    ),
    # Cui et al., arXiv 2501.07575 (CV-DD, and SRe2L++ with one teacher): stored labels of teachers that take the
    # statistics of half a mini-batch, as the student does. The row is CIFAR-10; `cells` has the others. Theirs split a
    # last, smaller batch differently for teacher and student; here both split it in one way. Teachers vote at
    # temperature 10.
    "cvdd": replace(_DECOUPLED, name="cvdd", batch_size=16, sub_batches=2, teacher_mode="batch", vote_temperature=10.0),
    # Sun et al., CVPR 2024 (RDED), from 128 pixels on: the patches of a mosaic change places, and crops have at least
    # half of the area. Batch 100 is for 1000 classes at IPC 10; `cells` has the others. They test on the middle of
    # enlarged images; here images are tested as they are.
    "rded": replace(
        _DECOUPLED,
        name="rded",
        batch_size=100,
        slowdown=2.0,
        augmentation=PatchShuffle(factor=2, then=ResizedCrop(scale=(0.5, 1.0))),
    ),
    # RDED up to 64 pixels: an image is a single patch, and is shown whole. Batch 50 is for 10 classes at IPC 10;
    # `cells` has the others.
    "rded_small": replace(
        _DECOUPLED, name="rded_small", batch_size=50, slowdown=2.0, augmentation=ResizedCrop(scale=(1.0, 1.0))
    ),
    # Zhang, Du, Liu & Zhou, ICLR 2025 (INFER; its code: UFC), CIFAR: one set of labels for the whole images, mixed as
    # logits; or labels of each view, in 1/(M + 1) of the epochs, as M = 4 teachers make M + 1 images of a stored one.
    "ufc_static": replace(_UFC, name="ufc_static", targets="images"),
    "ufc_dynamic": replace(_UFC, name="ufc_dynamic", epochs=80),
    # Xiao, Liu, He & Wang, arXiv 2502.06434 (Rethinking), their two benchmarks: a ResNet-18 is asked about every
    # mini-batch, or there are hard labels alone, without mixing.
    "rethinking_soft": replace(_DECOUPLED, name="rethinking_soft", batch_size=128),
    "rethinking_hard": replace(_DECOUPLED, name="rethinking_hard", batch_size=128, mix=None, distillation=None),
    # Gu et al., CVPR 2024 (Minimax), and after it MGD3, IGD and EVLF: hard labels, CutMix on every mini-batch. Theirs
    # jitter colours and lighting too, resize to 224 pixels from 256, and report the best epoch on the test split.
    # Epochs are those up to 10 images per class; `cells` has the others, and the networks.
    "minimax": EvaluationProtocol(
        name="minimax",
        network=NetworkSpec("resnet_ap10"),
        epochs=2000,
        batch_size=64,
        milestones=(2 / 3, 5 / 6),
        gamma=0.2,
        augmentation=ResizedCrop(scale=(0.5, 1.0)),
        mix=CutMix(probability=1.0),
    ),
    # AST (Shen et al., arXiv 2310.10541) has no row: the scripts of its code differ in epochs (300 to 1500) and in
    # where the step size halves, lower the momentum there, and report the best epoch on the test split.
}
