"""The code that README and CONTRIBUTING show runs as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import dsdistill as dd
from dsdistill.methods import get_method, list_methods

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_method_of_contributing_keeps_the_contract(monkeypatch):
    module = types.ModuleType("sharpen")
    monkeypatch.setitem(sys.modules, "sharpen", module)  # dataclasses look their module up
    method, contract = python_blocks("CONTRIBUTING.md")
    exec(method + contract, module.__dict__)
    assert module.Sharpen(ipc=1).steps == 1000


def test_the_calls_of_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls, loader, _, study = python_blocks("README.md")
    for long, short in (("iterations=500", "iterations=1"), ("repeats=5", "repeats=1"), ("epochs=100", "epochs=1")):
        assert long in calls
        calls = calls.replace(long, short)
    names: dict[str, object] = {}
    exec(calls + loader, names)
    quick = 'methods=["RandomReal"], ipc=(1, 2), seeds=2, epochs=1, repeats=1, workers=1, '
    assert '["DM", "RandomReal"], ipc=(1, 10, 50), seeds=3, ' in study
    exec(study.replace('["DM", "RandomReal"], ipc=(1, 10, 50), seeds=3, ', quick), names)
    assert "random real images" in capsys.readouterr().out
    images, targets = names["images"], names["targets"]
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)
    assert targets.dtype == torch.int64


PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "methods").glob("*.md"))


@pytest.fixture
def few_digits(monkeypatch):
    """Every third image: which images an example sees is of no account."""
    load = dd.data.load
    monkeypatch.setattr(dd.data, "load", lambda name: (digits := load(name)).subset(range(0, len(digits), 3)))


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.usefixtures("few_digits")
def test_the_examples_of_method_pages_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(name):
        exec(block, {})


def test_every_method_has_a_page_that_names_its_paper():
    for method in list_methods():
        page = next(page for page in PAGES if Path(page).stem.replace("_", "") == method.lower())
        text = (ROOT / page).read_text(encoding="utf-8")
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", get_method(method).paper):
            assert number in text, f"{page} does not cite arXiv {number}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", *PAGES])
def test_links_between_documents_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target
