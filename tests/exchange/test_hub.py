"""The Hub's names, with the Hub itself played by a folder: nothing here reaches a network."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from dsdistill import SyntheticDataset
from dsdistill.data import Normalization
from dsdistill.errors import BadArtifact, BadData, MissingExtra, OutputConflict

hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")


@pytest.fixture
def made():
    return SyntheticDataset.from_tensors(
        torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), normalization=Normalization((0.5,), (0.5,)), classes=("a", "b")
    )


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A hub that keeps repositories as folders and remembers how it was asked."""
    asked = []
    home = tmp_path / "site"

    class Api:
        def __init__(self, token=None):
            asked.append(("token", token))

        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            asked.append(("create", repo_id, repo_type, private, exist_ok))
            (home / repo_id).mkdir(parents=True, exist_ok=True)
            address = type("Address", (str,), {"repo_id": f"me/{repo_id}" if "/" not in repo_id else repo_id})
            return address(f"https://hub/{repo_id}")

        def upload_folder(self, *, folder_path, repo_id, repo_type, allow_patterns, commit_message):
            asked.append(("upload", repo_id, repo_type, commit_message))
            for name in allow_patterns:
                if (folder_path / name).exists():
                    (home / repo_id).mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder_path / name, home / repo_id)

    def snapshot_download(repo_id, *, repo_type, allow_patterns, **options):
        asked.append(("download", repo_id, repo_type, options))
        if not (home / repo_id).exists():
            raise hub.errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache")
        return str(home / repo_id)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(asked=asked, home=home)


def test_pushed_and_fetched_sets_are_equal(made, site):
    address = made.push_to_hub("me/digits-dm", private=True, token="secret", commit_message="first")
    assert address == "https://hub/me/digits-dm"
    assert ("create", "me/digits-dm", "dataset", True, True) in site.asked
    assert ("upload", "me/digits-dm", "dataset", "first") in site.asked
    again = SyntheticDataset.from_pretrained("me/digits-dm", revision="main", local_files_only=True)
    assert torch.equal(again.tensors()[0], made.tensors()[0])
    *_, (_, _, kind, options) = site.asked
    assert kind == "dataset"
    assert (options["revision"], options["local_files_only"]) == ("main", True)


def test_saving_and_pushing_at_once(made, site, tmp_path):
    folder = made.save_pretrained(tmp_path / "digits", push_to_hub=True, private=False)
    assert ("create", "digits", "dataset", False, True) in site.asked
    assert torch.equal(SyntheticDataset.from_pretrained(folder).tensors()[0], made.tensors()[0])
    assert (site.home / "me/digits" / "dataset.json").exists()
    with pytest.raises(OutputConflict):
        made.save_pretrained(folder)


def test_saving_alone_asks_nobody(made, site, tmp_path):
    made.save_pretrained(tmp_path / "set")
    assert not site.asked


def test_what_is_not_there(made, site, tmp_path):
    with pytest.raises(
        BadData, match=r"'me/none' cannot be had from the Hub \(Cannot find.*fetch it once while online"
    ):
        SyntheticDataset.from_pretrained("me/none", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadArtifact):
        SyntheticDataset.from_pretrained(tmp_path / "empty")


def test_a_refusal_is_explained(made, monkeypatch):
    class Closed:
        def __init__(self, token=None):
            pass

        def create_repo(self, *_, **__):
            raise ValueError("Invalid token passed!\nmore")

    monkeypatch.setattr(hub, "HfApi", Closed)
    with pytest.raises(BadData, match=r"cannot be sent to the Hub \(Invalid token passed!\); check name and token"):
        made.push_to_hub("me/x")


def test_without_the_library_the_extra_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"dsdistill\[hub\]"):
        made.push_to_hub("me/x")
    with pytest.raises(MissingExtra, match=r"dsdistill\[hub\]"):
        SyntheticDataset.from_pretrained("me/x")
