"""Small teachers for tests: an untrained network will do where only what is made of it matters."""

import torch

from dsdistill.experts import Teacher, teacher_name
from dsdistill.networks import NetworkSpec

SPECS = tuple(NetworkSpec(width=width, depth=1, norm="batch") for width in (4, 6, 8))


def untrained(source, spec=SPECS[0], seed=0, **changes):
    """A teacher with the statistics of the images of a source, and random weights."""
    network = spec.build(source.shape, source.num_classes, generator=torch.Generator().manual_seed(seed), device="cpu")
    with torch.no_grad():
        for _ in range(5):
            network(source.gather(torch.arange(len(source))))
    settings = {
        "name": teacher_name(spec),
        "spec": spec,
        "network": network,
        "classes": source.classes,
        "shape": source.shape,
        "normalization": source.normalization,
        "accuracy": 0.0,
    }
    return Teacher(**settings | changes)
