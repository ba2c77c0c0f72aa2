"""Sharing sets through the Hugging Face Hub, as data set repositories."""

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from dsdistill.errors import BadData, MissingExtra


class Shared(ABC):
    """What the Hugging Face libraries' users expect of anything that can be shared, on top of `save` and `load`."""

    FILES: ClassVar[tuple[str, ...]]

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write into a folder."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read from a folder."""

    @classmethod
    def _shared_files(cls) -> tuple[str, ...]:
        return (*cls.FILES, "dataset.json")

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> Path:
        """`save` under the name that users of Hugging Face libraries know; ``options`` go to `push_to_hub`.

        Raises:
            OutputConflict: as `save`. Other errors as `push_to_hub`.
        """
        folder = self.save(save_directory)
        if push_to_hub:
            self._upload(folder, repo_id or folder.resolve().name, **options)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """`load` from a folder, or from a data set repository on the Hugging Face Hub.

        Raises:
            BadArtifact: as `load`. MissingExtra: the Hub needs dsdistill[hub]. BadData: not found or not reachable.
        """
        folder = Path(pretrained_model_name_or_path)
        if os.path.exists(folder):
            return cls.load(folder)
        fetched = download(
            str(pretrained_model_name_or_path),
            cls._shared_files(),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        with tempfile.TemporaryDirectory() as scratch:  # the cache consists of links, which `load` does not follow
            for file in cls._shared_files():
                if (fetched / file).is_file():
                    shutil.copyfile(fetched / file, Path(scratch) / file)
            return cls.load(scratch)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a synthetic set",
    ) -> str:
        """Commit the set to a data set repository of the Hugging Face Hub, made if needed; returns its address.

        Raises:
            MissingExtra: dsdistill[hub] is not installed. BadData: the Hub refused.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save(Path(scratch) / "set")
            return self._upload(folder, repo_id, private=private, token=token, commit_message=commit_message)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a synthetic set",
    ) -> str:
        files = self._shared_files()
        return upload(folder, files, repo_id, private=private, token=token, message=commit_message)


def download(
    repo_id: str,
    files: tuple[str, ...],
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """A local copy of a repository's set; only ``files`` are fetched.

    Raises:
        MissingExtra: the package ``huggingface_hub`` is not installed.
        BadData: not found, not reachable, or not in the local cache while offline.
    """
    hub = _library()
    try:
        return Path(
            hub.snapshot_download(
                repo_id,
                repo_type="dataset",
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )
    except (OSError, ValueError, RuntimeError) as error:  # the package's errors derive from these
        offline = hub.constants.HF_HUB_OFFLINE or local_files_only
        mend = "fetch it once while online" if offline else "check the name, the network and your token"
        raise BadData(f"data set {repo_id!r} cannot be had from the Hub ({_brief(error)}); {mend}") from error


def upload(
    folder: Path, files: tuple[str, ...], repo_id: str, *, private: bool | None, token: str | bool | None, message: str
) -> str:
    """Create the repository if needed and commit ``files`` of a saved set to it; returns its address.

    Raises:
        MissingExtra: the package ``huggingface_hub`` is not installed.
        BadData: the Hub refused.
    """
    hub = _library()
    try:
        interface = hub.HfApi(token=token)
        address = interface.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        interface.upload_folder(
            folder_path=folder,
            repo_id=address.repo_id,
            repo_type="dataset",
            allow_patterns=list(files),
            commit_message=message,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BadData(
            f"data set {repo_id!r} cannot be sent to the Hub ({_brief(error)}); check name and token"
        ) from error
    return str(address)


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub", "sharing sets through the Hugging Face Hub") from error
    return huggingface_hub
