"""One row of a table: what networks are trained on, their training, and what they make of the test split."""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.core.device import default_chunk, is_out_of_memory, release_memory
from dsdistill.core.rng import Rng, seed_global
from dsdistill.data import ImageSource, overlap
from dsdistill.errors import DistillError, Diverged, OutOfMemory
from dsdistill.evaluation.examine import accuracy, confusion, fresh_network
from dsdistill.evaluation.result import HARD
from dsdistill.evaluation.teaching import Teaching
from dsdistill.networks import has_batchnorm
from dsdistill.protocols import EvaluationProtocol
from dsdistill.synthetic import SyntheticDataset
from dsdistill.training import TrainingSet, train, train_together

logger = logging.getLogger("dsdistill")


@dataclass
class Scorer:
    """Trains and tests networks under one protocol.

    ``real`` is on ``device``, standardised as the synthetic set is. ``chunk`` images pass a network at a time; it is
    halved when memory runs out. ``sizes`` are the training images of each row trained so far. ``teaching`` is there
    where the protocol has distillation.
    """

    protocol: EvaluationProtocol
    synthetic: SyntheticDataset
    real: ImageSource
    seed: int
    device: torch.device
    teaching: Teaching | None = None
    chunk: int = field(init=False)
    sizes: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.chunk = default_chunk(self.real.shape, self.device)
        self._whole = False  # batch normalisation couples a mini-batch, so smaller chunks are no way out
        self.test = self.real.test.to(self.device)
        self._warn_of_overlap()
        self.held: ImageSource | None = None
        if self.protocol.selection == "validation":
            generator = Rng(self.seed).at("validation")
            self.real, self.held = self.real.split(self.protocol.validation_fraction, generator)

    def _warn_of_overlap(self) -> None:
        shared = overlap(self.real, self.test).shared
        if shared:
            logger.warning(
                "%d of the %d test images of %r are also training images: scores will be too high",
                shared,
                len(self.test),
                self.real.name,
            )

    def confusions(self, row: str, repeats: Sequence[int], epochs: int, lr: float) -> Iterator[Tensor]:
        """The (K, K) confusion table of a fresh network for each repeat, trained together where there are several.

        Each is trained for ``epochs`` from the step size ``lr`` on, whatever the protocol has; those of a hard row on
        classes, in the same way otherwise.
        """
        protocol = replace(self.protocol, epochs=epochs, lr=lr)
        if row.endswith(HARD):
            protocol = replace(protocol, distillation=None)
        rngs = [Rng(self.seed, job=f"repeat/{repeat}", device=self.device) for repeat in repeats]
        data = [self._training_set(row, protocol, rng) for rng in rngs]
        self.sizes[row] = data[0].size
        networks = self._trained(protocol, data, rngs)
        for repeat, network in zip(repeats, networks, strict=True):
            if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
                raise Diverged(f"training of {protocol.network.name}", f"repeat {repeat}", epochs, "a parameter")
            yield confusion(network, self.test, chunk=self.chunk)

    def _training_set(self, row: str, protocol: EvaluationProtocol, rng: Rng) -> TrainingSet:
        data = self._images(row, rng)
        if protocol.distillation is None or self.teaching is None:
            return data
        return self.teaching.given(row, data, protocol, rng, mirror_safe=self.real.mirror_safe)

    def _images(self, row: str, rng: Rng) -> TrainingSet:
        real = self.real
        if row == "whole":
            return TrainingSet(lambda rows: (real.gather(rows), real.targets[rows]), len(real), real.shape, self.device)
        if row == "synthetic":
            images, targets = (tensor.to(self.device) for tensor in self.synthetic.tensors())
            return TrainingSet.of(images, targets)
        if row == f"synthetic{HARD}":
            images = self.synthetic.tensors()[0].to(self.device)
            return TrainingSet.of(images, torch.tensor(self.synthetic.targets, device=self.device))
        classes, counts = range(real.num_classes), affordable(self.synthetic)
        drawn = real.per_class_indices(classes, max(counts), rng.at("random real"))
        blocks = torch.split(drawn, real.sizes_per_class(classes, max(counts)))
        index = torch.cat([block[:n] for block, n in zip(blocks, counts, strict=True)])
        return TrainingSet.of(real.gather(index), real.targets[index])

    def _trained(self, protocol: EvaluationProtocol, data: list[TrainingSet], rngs: list[Rng]) -> list[nn.Module]:
        """A trained network for each set; after running out of memory, from the start again with half the chunk."""
        while True:
            try:
                return self._train(protocol, data, rngs)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, DistillError) or not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold tensors
            if self.chunk == 1 or len(data) > 1 or self._whole:
                knob = "Lower together" if len(data) > 1 else "Take a smaller batch_size or network"
                what = f"training of {protocol.network.name}"
                held = protocol.batch_size if self._whole else self.chunk
                raise OutOfMemory(what, held, str(failure), f"{knob}, or a device with more memory.") from failure
            self.chunk //= 2
            release_memory(self.device)
            logger.warning("memory ran out: %d images pass the network at a time from now on (%s)", self.chunk, failure)

    def _train(self, protocol: EvaluationProtocol, data: list[TrainingSet], rngs: list[Rng]) -> list[nn.Module]:
        shape, classes, mirror_safe = self.real.shape, self.real.num_classes, self.real.mirror_safe
        networks = [fresh_network(protocol, shape, classes, rng) for rng in rngs]
        self._whole = has_batchnorm(networks[0])
        seed_global(rngs[0].integer("global"), self.device)
        if len(networks) > 1:
            train_together(networks, data, protocol, rngs, num_classes=classes, mirror_safe=mirror_safe)
            return networks
        taught = protocol.distillation is not None and data[0].lessons is None
        teacher = self.teaching.teacher(protocol) if self.teaching is not None and taught else None
        best = _Best(protocol, self.held, self.chunk) if self.held is not None else None
        train(
            networks[0],
            data[0],
            protocol,
            rngs[0],
            num_classes=classes,
            mirror_safe=mirror_safe,
            chunk=self.chunk,
            watch=best,
            teacher=teacher,
        )
        if best is not None:
            networks[0].load_state_dict(best.state)
        return networks


class _Best:
    """Keeps the state of the epoch that does best on held-out images; among equals, of the latest."""

    def __init__(self, protocol: EvaluationProtocol, held: ImageSource, chunk: int) -> None:
        epochs, checks = protocol.epochs, min(protocol.validation_checks, protocol.epochs)
        self.epochs = {-(-epochs * check // checks) for check in range(1, checks + 1)}
        self.held, self.chunk = held, chunk
        self.accuracy = -1.0
        self.state: dict[str, Any] = {}

    def __call__(self, epoch: int, network: nn.Module) -> None:
        if epoch not in self.epochs:
            return
        reached = accuracy(confusion(network, self.held, chunk=self.chunk))
        if reached >= self.accuracy:
            self.accuracy, self.state = reached, copy.deepcopy(network.state_dict())


def affordable(synthetic: SyntheticDataset) -> tuple[int, ...]:
    """Real images of each class that take as many pixels as the set stores.

    As many as the set has items; more where a form stores pixels that belong to no single item (the compensators of
    INFER), which are spread over the classes.
    """
    pixels = sum(tensor.numel() for tensor in synthetic.images.tensors().values() if tensor.is_floating_point())
    spare = pixels // math.prod(synthetic.shape) - synthetic.images.count
    more = -(-spare // len(synthetic.classes))
    return tuple(count + max(0, more) for count in synthetic.counts)
