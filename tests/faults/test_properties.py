"""What holds for every input that hypothesis can think of."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dsdistill import SyntheticDataset
from dsdistill.augmentations import Chain, CutMix, Mixup, Siamese
from dsdistill.augmentations.siamese import OPS
from dsdistill.core import storage
from dsdistill.core.config import from_dict, to_dict
from dsdistill.core.rng import Rng
from dsdistill.data import Normalization
from dsdistill.engine import checkpoint
from dsdistill.engine.verify import verify
from dsdistill.errors import BadArtifact, DistillError, InvalidSetting, UnknownName
from dsdistill.evaluation import EvaluationProtocol
from dsdistill.labels import HardLabels, SoftLabels
from dsdistill.methods import DM, RandomReal
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import FORMS, Form, Mirrored, Pixels, Plain, Tiled, Tiles

bounded = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Settings -----------------------------------------------------------------------------------------------------

positive = st.floats(1e-300, 1e300)
share = st.floats(0, 1)
stages = st.builds(
    Siamese,
    ops=st.lists(st.sampled_from(OPS), min_size=1, unique=True).map(tuple),
    brightness=st.floats(0, 1e6),
    saturation=st.floats(0, 1e6),
    contrast=st.floats(0, 1e6),
    crop_ratio=share,
    cutout_ratio=share,
    scale=st.floats(1, 1e6),
    rotate=st.floats(0, 180),
)
augmentations = st.none() | stages | st.builds(Chain, stages=st.lists(stages, min_size=1, max_size=3).map(tuple))
networks = st.builds(
    NetworkSpec,
    name=st.just("convnet"),
    width=st.none() | st.integers(1, 2**70),
    depth=st.none() | st.integers(1, 9),
    norm=st.none() | st.sampled_from(["none", "batch", "layer", "instance", "group"]),
    activation=st.none() | st.sampled_from(["sigmoid", "relu", "leaky_relu", "swish"]),
    pooling=st.none() | st.sampled_from(["none", "max", "avg"]),
)
forms = st.just(Plain()) | st.builds(Tiled, factor=st.integers(1, 255), bound=st.none() | st.integers(1, 2**40))
counts = st.integers(1, 2**70)
policies = st.sampled_from(["error", "cap", "duplicate"])
methods = st.builds(
    DM,
    ipc=counts,
    form=forms,
    on_small_class=policies,
    iterations=counts,
    real_batch=counts,
    lr_images=positive | st.integers(1, 99),
    momentum=st.floats(0, 1, exclude_max=True),
    network=networks,
    augmentation=augmentations,
) | st.builds(RandomReal, ipc=counts, form=forms, on_small_class=policies)
protocols = st.builds(
    EvaluationProtocol,
    name=st.text(max_size=5),
    network=networks,
    epochs=counts,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    lr=positive,
    weight_decay=st.floats(0, 1e300),
    milestones=st.lists(st.floats(0.01, 0.99), max_size=3).map(sorted).map(tuple),
    gamma=st.floats(1e-9, 1),
    augmentation=augmentations,
    mix=st.none() | st.builds(CutMix, probability=share) | st.builds(Mixup, probability=share),
    selection=st.sampled_from(["last", "validation"]),
)


@bounded
@given(methods | protocols | networks | augmentations.filter(bool) | forms)
def test_settings_survive_json(made):
    plain = json.loads(json.dumps(to_dict(made), allow_nan=False))
    again = from_dict(type(made), plain)
    assert again == made
    assert to_dict(again) == to_dict(made)


scraps = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@bounded
@given(st.sampled_from([DM(), EvaluationProtocol(), NetworkSpec(), Siamese(), Tiled()]), st.data())
def test_settings_with_a_foreign_value_are_refused_in_words_or_taken(made, data):
    plain = to_dict(made)
    plain[data.draw(st.sampled_from(sorted(plain)) | st.text(max_size=4))] = data.draw(scraps)
    try:
        again = from_dict(type(made), plain)
    except DistillError:
        pass  # in words, whatever the value was
    else:
        assert from_dict(type(again), to_dict(again)) == again


@pytest.mark.parametrize("named", ["Form", ["Tiled"], None, 5], ids=repr)
def test_a_class_that_cannot_be_made_is_unknown(named):
    with pytest.raises(UnknownName, match=r"Known: Plain, Tiled\."):
        from_dict(Form, {"type": named})
    with pytest.raises(InvalidSetting, match=r"DM\.form"):
        DM(form={"type": named})


# Files --------------------------------------------------------------------------------------------------------


@cache
def whole_set():
    """The files of a saved set."""
    made = SyntheticDataset.from_tensors(
        torch.linspace(-1, 1, 2 * 3 * 2 * 2).reshape(2, 3, 2, 2),
        torch.tensor([[0.9, 0.1], [0.2, 0.8]]),
        normalization=Normalization((0.5,) * 3, (0.25,) * 3),
        classes=("a", "b"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = made.save(Path(scratch) / "set")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def set_with(name, data, *, reseal=False):
    """A folder with the whole set but for one file."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for other, content in whole_set().items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(data)
        if reseal:
            manifest = json.loads(whole_set()["dataset.json"])
            manifest["files"][name] = {"bytes": len(data), "sha256": storage.sha256(data)}
            (folder / "dataset.json").write_text(json.dumps(storage.sealed(manifest)))
        yield folder


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
ends = st.floats(0, 1)


def edited(data, changes, end):
    made = bytearray(data)
    for place, value in changes:
        made[int(place * len(made))] = value
    return bytes(made[: max(0, round(end * len(made)))])


def read(folder):
    """Nothing but the one error may come of it, and `verify` reports what `load` refuses."""
    try:
        loaded = SyntheticDataset.load(folder)
    except BadArtifact:
        assert [finding for finding in verify(folder) if finding.problem]
        return None
    assert bool(torch.isfinite(loaded.tensors()[0]).all())
    return loaded


@bounded
@given(st.sampled_from(["dataset.json", "images.safetensors", "labels.safetensors"]), edits, st.just(1.0) | ends)
def test_an_edited_file_is_refused_and_nothing_else_happens(name, changes, end):
    data = edited(whole_set()[name], changes, end)
    if name == "dataset.json":
        assume(data.split() != whole_set()[name].split())  # space between entries says nothing
    assume(data != whole_set()[name])
    with set_with(name, data) as folder:
        assert read(folder) is None


@bounded
@given(st.sampled_from(["images.safetensors", "labels.safetensors"]), edits, st.just(1.0) | ends)
def test_tensor_files_of_any_bytes_are_read_or_refused_though_the_hash_matches(name, changes, end):
    with set_with(name, edited(whole_set()[name], changes, end), reseal=True) as folder:
        read(folder)


def places(content, path=()):
    """Paths to every value of nested containers."""
    yield path
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


@bounded
@given(st.data(), scraps)
def test_a_resealed_manifest_with_any_value_anywhere_is_read_or_refused(data, value):
    manifest = json.loads(whole_set()["dataset.json"])
    *path, last = data.draw(st.sampled_from([place for place in places(manifest) if place]))
    target = manifest
    for key in path:
        target = target[key]
    if data.draw(st.booleans()) or not isinstance(target, dict):
        target[last] = value
    else:
        del target[last]
    text = json.dumps(storage.sealed(manifest))
    with set_with("dataset.json", text.encode("utf-8", "surrogatepass")) as folder:
        read(folder)


@bounded
@given(st.floats(0, 1), st.sampled_from(["state.json", "state.safetensors"]))
def test_a_checkpoint_cut_anywhere_gives_way_to_an_older_one(end, name):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "job"
        for iteration in (1, 2):
            checkpoint.write(folder, iteration, {"x": torch.full((3,), float(iteration)), "n": iteration}, keep=2)
        path = folder / "step_000000002" / name
        data = path.read_bytes()
        path.write_bytes(data[: int(end * len(data))])
        iteration, tree = checkpoint.read_newest(folder)
        assert iteration == (2 if path.read_bytes().rstrip() == data.rstrip() else 1)  # the last line break may go
        assert tree["n"] == iteration
        assert torch.equal(tree["x"], torch.full((3,), float(iteration)))
        shutil.rmtree(folder)


dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, dtypes)
leaves = tensors | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
names = st.text(st.characters(blacklist_categories=["Cs"]), max_size=4) | st.integers()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(names, inner, max_size=3),
    max_leaves=9,
)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


@bounded
@given(st.dictionaries(names, trees, max_size=3))
def test_any_state_comes_back_from_its_checkpoint(tree):
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint.write(Path(scratch) / "job", 3, tree, keep=1)
        assert same(checkpoint.read_newest(Path(scratch) / "job"), (3, tree))


# Images and labels --------------------------------------------------------------------------------------------


@st.composite
def stored_images(draw):
    """Images of any form with 1 to 5 items of 4 x 5 pixels."""
    count = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    images = torch.randn(count, 2, 4, 5, generator=generator)
    base = Pixels(images)
    if draw(st.booleans()):
        base = Tiles(images, torch.tensor(draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))))
    return Mirrored(base) if draw(st.booleans()) else base


@bounded
@given(stored_images(), st.data())
def test_subsets_joins_and_files_of_every_form_decode_alike(made, data):
    index = torch.tensor(data.draw(st.lists(st.integers(0, made.count - 1), min_size=1, max_size=6)))
    images, owner = made.decode()
    assert torch.equal(owner.bincount(minlength=made.count), made.multiplicity)
    chosen = made.subset(index)
    assert chosen.count == len(index)
    assert torch.equal(chosen.multiplicity, made.multiplicity[index])
    for item, kept in zip(index.tolist(), range(len(index)), strict=True):
        alone, _ = made.decode(torch.tensor([item]))
        assert torch.equal(alone, chosen.decode(torch.tensor([kept])).images)
        assert torch.equal(alone, images[owner == item])
    parts = [made.subset(torch.tensor([item])) for item in range(made.count)]
    joined = type(made).join(parts)
    assert torch.equal(joined.decode().images, images)
    settings_of = json.loads(json.dumps(made.settings()))
    restored = FORMS[made.key].restore(made.tensors(), settings_of)
    assert torch.equal(restored.decode().images, images)
    assert joined.nbytes == made.nbytes == sum(part.nbytes for part in parts)


@bounded
@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=6), st.booleans(), st.data())
def test_labels_come_back_from_their_files_and_parts(extra, targets, soft, data):
    classes = max(targets) + extra
    made = HardLabels(torch.tensor(targets), classes)
    if soft:
        logits = torch.randn(len(targets), classes, generator=torch.Generator().manual_seed(classes))
        made = SoftLabels(logits, torch.tensor(targets))
    every = torch.arange(made.count)
    index = torch.tensor(data.draw(st.lists(st.integers(0, made.count - 1), min_size=1, max_size=6)))
    restored = type(made).restore(made.tensors(), json.loads(json.dumps(made.settings())))
    joined = type(made).join([made.subset(every[:1]), made.subset(every[1:])]) if made.count > 1 else made
    for other in (restored, joined):
        assert torch.equal(other.target(every), made.target(every))
        assert torch.equal(other.classes, made.classes)
        assert other.num_classes == classes
    assert torch.equal(made.subset(index).target(torch.arange(len(index))), made.target(index))
    assert made.subset(index).classes.tolist() == [targets[place] for place in index]


# Random streams -----------------------------------------------------------------------------------------------

texts = st.text(st.characters(blacklist_characters="\x1f", blacklist_categories=["Cs"]), max_size=6)
addresses = st.tuples(st.integers(), texts, texts, st.integers(0, 2**40))


@bounded
@given(addresses, addresses)
def test_streams_are_functions_of_their_address_and_of_nothing_else(one, other):
    def stream(address):
        seed, job, name, iteration = address
        return Rng(seed).scoped(job).at(name, iteration)

    first = torch.rand(4, generator=stream(one))
    stream(other)
    assert torch.equal(first, torch.rand(4, generator=stream(one)))
    assert (one == other) == torch.equal(first, torch.rand(4, generator=stream(other)))
