"""The direction of imports, and what `import dsdistill` may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import dsdistill

PACKAGE = Path(dsdistill.__file__).parent

# A module may import from rows above its own; within a row only where `SIDEWAYS` says so.
LAYERS = [
    {"errors", "core"},
    {"data", "networks"},
    {"augmentations", "objectives", "parameterizations"},
    {"labels", "training"},
    {"protocols"},
    {"recipe", "exchange", "synthetic", "published"},
    {"engine"},
    {"experts"},
    {"matching"},
    {"selection"},
    {"relabelling"},
    {"generative"},
    {"methods", "evaluation"},
    {"testing", "studies"},
    {"cli", "__main__"},
]
SIDEWAYS = {
    ("__main__", "cli"),
    ("core", "errors"),
    ("synthetic", "exchange"),
    ("synthetic", "recipe"),
    ("published", "exchange"),
    ("published", "synthetic"),
}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def runtime_imports(path: Path) -> set[str]:
    """Top-level parts of this package that a file imports when it runs (not only for type checking)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    parts = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dsdistill"):
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            parts |= set(names)
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dsdistill.")}
    return parts


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_layer():
    found = {owner(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found == set(LEVEL)


def test_imports_point_downwards():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in PACKAGE.rglob("*.py")
        if (mine := owner(path)) != "__init__"
        for other in runtime_imports(path) - {mine}
        if other in LEVEL and LEVEL[other] >= LEVEL[mine] and (mine, other) not in SIDEWAYS
    ]
    assert not wrong, wrong


def test_no_method_imports_another():
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.name != "__init__.py":
            assert "methods" not in runtime_imports(path), path


def test_only_the_evaluator_opens_the_test_split():
    readers = {
        owner(path)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "test"
    }
    assert readers <= {"data", "evaluation"}, readers


def test_import_is_light():
    script = (
        "import sys, dsdistill, dsdistill.methods, dsdistill.evaluation, dsdistill.cli.main; "
        "dsdistill.methods.get_method('DM'); "
        "print([m for m in ('diffusers', 'kornia', 'higher', 'sklearn', 'torchvision', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_listed():
    for name in dsdistill.__all__:
        assert getattr(dsdistill, name) is not None
    assert sorted(dsdistill.__all__) == sorted(dir(dsdistill))
