"""A set, teachers of its data, and recipes whose views are recorded: small, and of nothing in particular."""

import torch

from dsdistill import SyntheticDataset, synthesize
from dsdistill.augmentations import CutMix, ResizedCrop
from dsdistill.experts import Committee, Teacher
from dsdistill.methods import RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.training import Distillation, TrainingRecipe

SPEC = NetworkSpec(width=4, depth=1, norm="batch")
CUT = TrainingRecipe(
    epochs=3,
    batch_size=4,
    augmentation=ResizedCrop(),
    mix=CutMix(probability=0.8),
    sub_batches=2,
    distillation=Distillation(),
)


def make_set(source, ipc=3) -> SyntheticDataset:
    return synthesize(RandomReal(ipc=ipc), source, seed=3)


def make_teacher(source, name="one", seed=0, **changes) -> Teacher:
    """Untrained, but decided, and with running statistics of the real images."""
    network = SPEC.build(source.shape, source.num_classes, generator=torch.Generator().manual_seed(seed), device="cpu")
    with torch.no_grad():
        network.train()(source.gather(torch.arange(len(source))))
        list(network.parameters())[-2].mul_(10)  # the weights of the last layer
    options = {
        "name": name,
        "spec": SPEC,
        "network": network,
        "classes": source.classes,
        "shape": source.shape,
        "normalization": source.normalization,
        "accuracy": 0.0,
        "performance": 60.0 + 10 * seed,
    }
    return Teacher(**{**options, **changes})


def make_committee(source, count=2) -> Committee:
    return Committee([make_teacher(source, f"teacher{seed}", seed) for seed in range(count)])
