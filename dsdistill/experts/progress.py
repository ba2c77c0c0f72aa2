"""Trainings that may be interrupted and go on to the same bits."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsdistill.core import storage
from dsdistill.errors import BadArtifact

logger = logging.getLogger("dsdistill")
_MANIFEST = "progress.json"


class Progress:
    """A training that may be interrupted: parameters, buffers and moments after the last epoch that was kept.

    Args:
        folder: where it is kept; None to keep nothing.
        network: what is trained.
        optimizer: of its parameters.
        every: seconds between two writes.
    """

    def __init__(
        self,
        folder: Path | None,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: float = 60.0,
    ) -> None:
        self.folder, self.network, self.optimizer, self.every = folder, network, optimizer, every
        self._epoch, self._kept, self._written = 0, 0, time.monotonic()

    def read(self) -> int:
        """Epochs that are behind it; 0 where nothing whole is kept."""
        if self.folder is None or not (self.folder / _MANIFEST).exists():
            return 0
        try:
            manifest = storage.read_manifest(self.folder / _MANIFEST)
            tensors = storage.read_listed_tensors(self.folder, manifest, manifest["file"])
            tree = storage.unflatten(tensors, manifest["skeleton"])
            self.network.load_state_dict(tree["network"])
            own = [{name: value for name, value in group.items() if name != "params"} for group in self._groups]
            self.optimizer.load_state_dict(tree["optimizer"])
            for group, settings in zip(self._groups, own, strict=True):
                group.update(settings)  # what is kept may be of a device that makes steps in another way
            self._lay_out_moments()
        except BadArtifact as error:
            logger.warning("this training begins anew: %s", error)
            return 0
        self._epoch = self._kept = int(manifest["epoch"])
        return self._epoch

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _lay_out_moments(self) -> None:
        """In memory as the parameters are: fused steps of others are slower, and not the same to the last bit.

        Counts of steps are with the parameters where they are wanted there, else on the host.
        """
        there = any(group.get("capturable") or group.get("fused") for group in self._groups)
        for parameter, moments in self.optimizer.state.items():
            for name, tensor in moments.items():
                if name == "step":
                    moments[name] = tensor.to(parameter.device if there else "cpu")
                elif torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(tensor)

    def add(self, epoch: int) -> None:
        """The epochs behind it; what is to be kept is written from time to time."""
        self._epoch = epoch
        if time.monotonic() - self._written > self.every:
            self.write()

    def write(self) -> None:
        """Keep what was reached."""
        if self.folder is None or self._epoch == self._kept:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {"network": dict(self.network.state_dict()), "optimizer": self.optimizer.state_dict()}
        tensors, skeleton = storage.flatten(tree)
        name = f"epoch-{self._epoch:05d}.safetensors"
        told = {"epoch": self._epoch, "file": name, "skeleton": skeleton}
        storage.write_folder(self.folder, {name: storage.encode_tensors(tensors)}, _MANIFEST, told)
        for older in self.folder.glob("epoch-*.safetensors"):
            if older.name != name:
                older.unlink()
        self._kept, self._written = self._epoch, time.monotonic()


def forget(progress: Path) -> None:
    """Remove what a training that is finished had kept."""
    if progress.exists():
        for file in progress.iterdir():
            file.unlink()
        progress.rmdir()
