import builtins
import inspect
import pickle
import re
import signal
from pathlib import Path

import pytest

from dsdistill import errors
from dsdistill.errors import (
    BadArtifact,
    BadData,
    DeviceUnavailable,
    DistillError,
    Diverged,
    InvalidSetting,
    MissingExtra,
    MissingWeights,
    OutOfMemory,
    OutOfSpace,
    OutputConflict,
    OutputLocked,
    ShapeMismatch,
    Stopped,
    UnknownName,
)

SAMPLES = [
    DistillError("text"),
    InvalidSetting("ipc", 0, "at least 1"),
    UnknownName("method", "DN", ["DM"]),
    OutputConflict(Path("out"), "is a file"),
    OutputLocked(Path("out"), "process 1"),
    DeviceUnavailable("cuda", "absent"),
    MissingExtra("timm", "timm", "the zoo"),
    BadData("empty"),
    ShapeMismatch("x", (1,), "(2,)"),
    Diverged("DM", "all", 3, "loss"),
    BadArtifact(Path("set"), "damaged"),
    Stopped(signal.SIGTERM, 5, Path("out")),
    OutOfSpace(Path("out"), 2000, 500),
    OutOfMemory("DM", 4, "CUDA out of memory", "Lower ipc."),
    MissingWeights("a text encoder", "there", "model.safetensors", "or train one"),
]


def tree():
    """The table of the module's docstring: name -> (names of its bases, exit code)."""
    found = {}
    parents = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^    ([│ ├└─]*)(\w+)(?: \((\w+)\))? +(?:exit code )?(\d+(?:/\d+)?)", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            bases = {parents[depth - 1]} if depth else set()
            found[match[2]] = (bases | ({match[3]} if match[3] else set()), match[4])
    return found


def test_the_docstring_lists_every_error_and_its_place():
    classes = {
        name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, DistillError)
    }
    assert set(tree()) == set(classes)
    for name, (bases, _) in tree().items():
        actual = {base.__name__ for base in classes[name].__bases__}
        assert actual == (bases or {"Exception"}), name
        assert all(hasattr(builtins, base) or base in classes for base in bases)


def test_exit_codes_are_those_of_the_docstring():
    codes = {type(sample).__name__: sample for sample in SAMPLES}
    assert set(codes) == set(tree())
    for name, (_, stated) in tree().items():
        if name == "Stopped":
            assert stated == "130/143"
            assert [Stopped(signum, 1, Path("x")).exit_code for signum in (signal.SIGINT, signal.SIGTERM)] == [130, 143]
        else:
            assert codes[name].exit_code == int(stated), name


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_errors_say_something_and_are_caught_as_one(sample):
    assert isinstance(sample, DistillError)
    assert str(sample)
    assert "\n" not in str(sample)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_errors_cross_process_borders(sample):
    again = pickle.loads(pickle.dumps(sample))  # noqa: S301 (what a worker process does with an exception)
    assert type(again) is type(sample)
    assert str(again) == str(sample)
    assert vars(again) == vars(sample)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SAMPLES[1], "ipc = 0 is not valid: at least 1"),
        (SAMPLES[2], "unknown method 'DN'; did you mean 'DM'? Known: DM."),
        (UnknownName("method", "x", ["DM"], "Try again."), "unknown method 'x'. Known: DM. Try again."),
        (UnknownName("method", "x", []), "unknown method 'x'. Known: none."),
        (SAMPLES[3], "out: is a file"),
        (SAMPLES[4], "out: in use by process 1; wait for it to end or choose another output folder"),
        (SAMPLES[5], "device 'cuda': absent; use device='cpu' or leave it out to pick the best one"),
        (SAMPLES[6], "the zoo needs the package 'timm': pip install 'dsdistill[timm]'"),
        (SAMPLES[8], "x has shape (1,), expected (2,)"),
        (SAMPLES[9], "DM, job 'all', iteration 3: loss is not finite. Lower the learning rate."),
        (
            Diverged("DM", "all", 3, "loss", metrics={"loss": 2.0}, saved=Path("kept")),
            "DM, job 'all', iteration 3: loss is not finite. Last good metrics: {'loss': 2.0}. "
            "The last good state is saved in kept. Lower the learning rate.",
        ),
        (
            Diverged("MTT", "all", 3, "lr", lower="lr_student or lr_lr"),
            "MTT, job 'all', iteration 3: lr is not finite. Lower lr_student or lr_lr.",
        ),
        (SAMPLES[10], "set: damaged"),
        (
            SAMPLES[11],
            "stopped by SIGTERM after 5 iterations; state saved in out. Run the same command again to continue.",
        ),
        (
            Stopped(signal.SIGTERM, 0, Path("out"), "7 epochs of experts, kept in store"),
            "stopped by SIGTERM after 7 epochs of experts, kept in store. Run the same command again to continue.",
        ),
        (
            SAMPLES[12],
            "out: 2000 bytes are needed and 500 are free; "
            "free space or choose another folder (caches: DSDISTILL_CACHE)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_messages_say_what_where_and_what_to_do(error, message):
    assert str(error) == message


def test_facts_are_attributes():
    setting = SAMPLES[1]
    assert (setting.setting, setting.value, setting.allowed) == ("ipc", 0, "at least 1")
    unknown = UnknownName("method", "DN", iter(["DM", "MTT"]))
    assert (unknown.kind, unknown.name, unknown.known) == ("method", "DN", ("DM", "MTT"))
    diverged = Diverged("DM", "all", 3, "loss", last_good="set")
    assert (diverged.method, diverged.job, diverged.iteration, diverged.metrics) == ("DM", "all", 3, {})
    assert (diverged.last_good, diverged.saved) == ("set", None)
    assert (SAMPLES[3].path, SAMPLES[10].path, SAMPLES[4].holder) == (Path("out"), Path("set"), "process 1")
    assert (SAMPLES[8].actual, SAMPLES[8].expected) == ((1,), "(2,)")
    assert (SAMPLES[6].package, SAMPLES[6].extra, SAMPLES[5].device) == ("timm", "timm", "cuda")
    assert (SAMPLES[12].path, SAMPLES[12].needed, SAMPLES[12].free) == (Path("out"), 2000, 500)
    assert (SAMPLES[11].signum, SAMPLES[11].iteration, SAMPLES[11].path) == (signal.SIGTERM, 5, Path("out"))


@pytest.mark.parametrize(
    ("name", "nearest"), [("dm", "DM"), ("Dm", "DM"), ("randomreel", "RandomReal"), ("RandomReal ", "RandomReal")]
)
def test_the_nearest_name_is_found_in_any_case(name, nearest):
    assert f"did you mean {nearest!r}?" in str(UnknownName("method", name, ["DM", "RandomReal"]))
