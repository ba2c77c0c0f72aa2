import itertools
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.data import Batch, ImageSource, Normalization, draws
from dsdistill.data.source import Skipped
from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch

COUNTS = (5, 2, 9)
IDENTITY = Normalization((0.0,), (1.0,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(counts=COUNTS, **options) -> ImageSource:
    """Image i is filled with the value i; the classes are given interleaved."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.arange(len(targets), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 3)
    order = torch.argsort(torch.cat([torch.arange(count) for count in counts]), stable=True)
    options.setdefault("normalization", IDENTITY)
    names = [f"class {index}" for index in range(len(counts))]
    return ImageSource("numbered", names, images[order], targets[order], **options)


def values(images: torch.Tensor) -> list[int]:
    """The number each standardised image is filled with."""
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


class NoHostSync(TorchDispatchMode):
    """Fails on every operation that makes the host wait for a value of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "item"), func
        if func._overloadpacket.__name__ == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "boolean index"
        return func(*args, **(kwargs or {}))


def test_storage_is_sorted_by_class_and_stable():
    targets = torch.tensor([1, 0, 1, 0, 2])
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    source = ImageSource("s", "abc", images, targets)
    assert source.images.flatten().tolist() == [1, 3, 0, 2, 4]
    assert source.targets.tolist() == [0, 0, 1, 1, 2]
    assert source.targets.dtype == torch.int64
    assert (source.counts, source.offsets) == ((2, 2, 1), (0, 2, 4, 5))
    assert (len(source), source.shape, source.num_classes) == (5, (1, 1, 1), 3)
    assert source.classes == ("a", "b", "c")
    assert source.normalization == Normalization.measure(images)


def test_repr_names_everything():
    text = repr(numbered(mirror_safe=False))
    for part in ("numbered", "images=16", "shape=(1, 2, 3)", "'class 2'", "counts=(5, 2, 9)", "mean=(0.0,)",
                 "mirror_safe=False", "device='cpu'", "test='none'", "fingerprint='not computed'"):  # fmt: skip
        assert part in text
    assert "test='closed'" in repr(numbered().train_only())


# Draws ---------------------------------------------------------------------------------------------------


def test_per_class_is_class_major_and_without_replacement():
    source = numbered()
    for seed in range(50):
        batch = source.per_class([2, 0], 4, generator(seed))
        assert isinstance(batch, Batch)
        assert batch.targets.tolist() == [2] * 4 + [0] * 4
        drawn = values(batch.images)
        assert len(set(drawn)) == 8
        assert all(7 <= value < 16 for value in drawn[:4])
        assert all(0 <= value < 5 for value in drawn[4:])


def test_short_classes_give_all_they_have():
    source = numbered()
    batch = source.per_class([0, 1, 2], 6, generator())
    assert source.sizes_per_class([0, 1, 2], 6) == [5, 2, 6]
    assert batch.targets.tolist() == [0] * 5 + [1] * 2 + [2] * 6
    drawn = values(batch.images)
    assert sorted(drawn[:7]) == [0, 1, 2, 3, 4, 5, 6]
    assert len(set(drawn)) == 13
    assert sorted(values(source.per_class([1, 2], 100, generator()).images)) == list(range(5, 16))


def test_every_ordered_pair_is_equally_likely():
    # 4 images, draws of 2: 12 ordered pairs, 6000 draws. The chi-square with 11 degrees of freedom exceeds 31.3
    # once in a thousand; the seed is fixed. Drawing with replacement, or a biased order, gives hundreds.
    source = numbered((3, 4))
    stream = generator(1)
    seen = dict.fromkeys(itertools.permutations(range(3, 7), 2), 0)
    for _ in range(6000):
        seen[tuple(source.per_class_indices([1], 2, stream).tolist())] += 1
    assert sum((count - 500) ** 2 / 500 for count in seen.values()) < 31.3


def test_draws_of_two_classes_are_independent():
    source = numbered((2, 2))
    pairs = [tuple(source.per_class_indices([0, 1], 1, generator(seed)).tolist()) for seed in range(400)]
    assert all(70 <= pairs.count(pair) <= 130 for pair in itertools.product((0, 1), (2, 3)))


def test_a_draw_is_a_function_of_the_generator():
    source = numbered()
    first = source.per_class_indices([0, 2], 3, generator(3))
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = numbered().per_class([0, 2], 3, generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(source.gather(first), again.images)
    assert not torch.equal(first, source.per_class_indices([0, 2], 3, generator(4)))


def test_gathering_in_chunks_equals_per_class():
    source = numbered(normalization=Normalization((0.1,), (0.3,)))
    whole = source.per_class([0, 1, 2], 4, generator()).images
    chunks = source.per_class_indices([0, 1, 2], 4, generator()).split(3)
    assert torch.equal(torch.cat([source.gather(chunk) for chunk in chunks]), whole)
    assert whole.dtype == torch.float32


def test_draws_do_not_wait_for_the_device():
    source = numbered()
    source.per_class([0, 1, 2], 4, generator())  # constants of this draw are uploaded once
    with NoHostSync():
        source.per_class([0, 1, 2], 4, generator())
        list(source.batches(4, generator()))
        list(source.batches(4))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            int(source.targets[0])


def test_plans_are_bounded():
    source = numbered()
    for size in range(1, 600):
        source.per_class_indices([0], size, generator())
    assert len(source._plans) <= 256


@pytest.mark.parametrize("classes", [[], [3], [-1], [0, 0]])
def test_unsuitable_classes_are_refused(classes):
    with pytest.raises(InvalidSetting, match=r"classes = .* at least one class of numbered, 0 to 2, each once"):
        numbered().per_class(classes, 1, generator())


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_unsuitable_sizes_are_refused(size):
    source = numbered()
    for call in (
        lambda: source.per_class([0], size, generator()),
        lambda: source.batches(size),
        lambda: source.sizes_per_class([0], size),
    ):
        with pytest.raises(InvalidSetting, match=f"size = {size} .* at least 1"):
            call()


class ElsewhereGenerator:
    device = torch.device("cuda:0")


def test_a_generator_of_another_device_is_refused():
    source = numbered()
    with pytest.raises(InvalidSetting, match=r"generator = 'cuda:0' .* source's device, cpu"):
        source.per_class([0], 1, ElsewhereGenerator())
    with pytest.raises(InvalidSetting, match="generator = 'cuda:0'"):
        source.batches(1, ElsewhereGenerator())


def test_batches_in_order_and_shuffled():
    source = numbered()
    ordered = list(source.batches(6))
    assert [len(batch.targets) for batch in ordered] == [6, 6, 4]
    assert values(torch.cat([batch.images for batch in ordered])) == list(range(16))
    shuffled = list(source.batches(6, generator(5)))
    seen = values(torch.cat([batch.images for batch in shuffled]))
    assert seen != sorted(seen)
    assert sorted(seen) == list(range(16))
    targets = torch.cat([batch.targets for batch in shuffled]).tolist()
    assert targets == [0 if value < 5 else 1 if value < 7 else 2 for value in seen]
    assert values(next(source.batches(6, generator(5))).images) == seen[:6]


def test_changing_a_batch_does_not_change_the_source():
    source = numbered()
    for batch in (next(source.batches(16)), source.per_class([0], 2, generator())):
        batch.targets.fill_(7)
        batch.images.fill_(7)
    assert source.targets.max() == 2
    assert values(source.gather(torch.arange(16))) == list(range(16))


# Other sources -------------------------------------------------------------------------------------------


def test_split_is_stratified_and_complete():
    fit, held = numbered((10, 2, 5)).split(0.2, generator())
    assert (fit.counts, held.counts) == ((8, 1, 4), (2, 1, 1))
    assert sorted(values(fit.gather(torch.arange(13))) + values(held.gather(torch.arange(4)))) == list(range(17))
    again = numbered((10, 2, 5)).split(0.2, generator())[1]
    other = numbered((10, 2, 5)).split(0.2, generator(1))[1]
    assert again.fingerprint == held.fingerprint != other.fingerprint
    assert numbered((10, 2, 5)).split(0.99, generator())[0].counts == (1, 1, 1)


def test_split_refuses_what_it_cannot_do():
    with pytest.raises(BadData, match=r"numbered: one image cannot be split .* 'class 1'"):
        numbered((3, 1)).split(0.5, generator())
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(InvalidSetting, match="above 0 and below 1"):
            numbered().split(fraction, generator())


def test_subset():
    source = numbered(normalization=Normalization((0.1,), (0.3,)), mirror_safe=False)
    part = source.subset([15, 0, 5, 6])
    assert part.images[:, 0, 0, 0].tolist() == [0, 5, 6, 15]
    assert (part.counts, part.classes, part.mirror_safe) == ((1, 2, 1), source.classes, False)
    assert part.normalization == source.normalization
    with pytest.raises(BadData, match="index 16 is not in numbered: use 0 to 15"):
        source.subset([0, 16])
    with pytest.raises(BadData, match="index -1"):
        source.subset(torch.tensor([-1]))
    with pytest.raises(BadData, match="no images of 'class 1', 'class 2'"):
        source.subset([0])
    for indices in ([], [0.5], torch.ones(16, dtype=torch.bool), [[1]]):
        with pytest.raises(BadData, match="non-empty list of integer indices"):
            source.subset(indices)


def test_to_the_same_device_is_itself():
    source = numbered()
    assert source.to("cpu") is source


@pytest.mark.gpu
def test_fingerprint_and_split_do_not_depend_on_the_device():
    on_gpu = ImageSource("s", numbered().classes, numbered().images.cuda(), numbered().targets)
    assert numbered().to("cuda").device.type == "cuda"
    assert on_gpu.fingerprint == numbered().fingerprint
    assert on_gpu.split(0.5, generator())[0].fingerprint == numbered().split(0.5, generator())[0].fingerprint
    batch = on_gpu.per_class([0, 1], 3, torch.Generator("cuda").manual_seed(0))
    assert batch.images.device.type == batch.targets.device.type == "cuda"


def test_fingerprint_sees_pixels_labels_and_names_and_nothing_else():
    base = numbered()
    known = base.fingerprint
    assert len(known) == 64
    assert numbered().fingerprint == known
    used = numbered(normalization=Normalization((0.1,), (0.3,)), mirror_safe=False)
    used.per_class([0], 1, generator())
    assert used.fingerprint == known

    pixel, targets = base.images.clone(), base.targets.clone()
    pixel[3, 0, 1, 2] += 1
    targets[4] = 1  # the last image of class 0 becomes the first of class 1: the pixels stay in order
    others = [
        ImageSource("s", base.classes, pixel, base.targets),
        ImageSource("s", base.classes, base.images, targets),
        ImageSource("s", ["class 0", "class 1", "class two"], base.images, base.targets),
        ImageSource("s", base.classes, base.images.view(16, 1, 3, 2), base.targets),  # the same bytes
    ]
    assert len({known, *(other.fingerprint for other in others)}) == 5


def test_fingerprint_accepts_names_that_are_not_utf8():
    source = numbered((1,))
    strange = ImageSource("s", ["\udcff \N{DOG FACE}"], source.images, source.targets)
    assert strange.fingerprint != source.fingerprint


# The test split ------------------------------------------------------------------------------------------


class Opener:
    def __init__(self, **changes):
        self.calls, self.changes = 0, changes

    def __call__(self):
        self.calls += 1
        base = numbered((1, 1, 1))
        parts = {"classes": base.classes, "images": base.images, "targets": base.targets} | self.changes
        return ImageSource("numbered (test)", **parts)


def test_the_test_split_is_opened_once_and_takes_over_the_statistics():
    opener = Opener()
    source = numbered(open_test=opener, normalization=Normalization((0.1,), (0.3,)), mirror_safe=False)
    assert source.has_test
    assert "test='not opened'" in repr(source)
    assert opener.calls == 0
    assert source.test is source.test
    assert source.subset(range(16)).test.normalization == source.normalization
    assert source.split(0.2, generator())[0].test.mirror_safe is False
    assert opener.calls == 1
    assert "test='opened'" in repr(source)
    assert not source.test.has_test


def test_other_statistics_and_mirror_statement_reach_the_test_split():
    source = numbered(open_test=Opener())
    assert source.test.normalization == IDENTITY
    other = Normalization((0.1,), (0.3,))
    changed = source.normalized_by(other)
    assert (changed.normalization, changed.test.normalization) == (other, other)
    assert (source.normalization, source.test.normalization) == (IDENTITY, IDENTITY)
    assert changed.fingerprint == source.fingerprint
    with pytest.raises(ShapeMismatch, match=r"expected \(3, H, W\)"):
        source.normalized_by(Normalization((0.0,) * 3, (1.0,) * 3))
    assert source.with_mirror_safe(False).test.mirror_safe is False
    assert source.mirror_safe is source.test.mirror_safe is True


def test_train_only_has_no_way_to_the_test_split():
    source = numbered(open_test=Opener())
    _ = source.test
    closed = source.train_only()
    expected = "the test split is closed during synthesis; only dsdistill.evaluate opens it"
    derived = [closed, closed.subset(range(16)), *closed.split(0.2, generator()), closed.normalized_by(IDENTITY),
               closed.with_mirror_safe(False), pickle.loads(pickle.dumps(closed))]  # noqa: S301  # fmt: skip
    for blind in derived:
        assert not blind.has_test
        with pytest.raises(BadData) as caught:
            _ = blind.test
        assert str(caught.value) == expected
        assert not any(isinstance(value, (ImageSource, Opener)) for value in vars(blind).values())
        assert blind._open_test is None
    assert closed.fingerprint == source.fingerprint
    assert source.has_test


def test_without_a_test_split_the_error_says_how_to_get_one():
    assert not numbered().has_test
    with pytest.raises(BadData, match=r"numbered has no test split; add a test/ folder .* from_dataset\(train, test\)"):
        _ = numbered().test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["class 0", "class 1", "x"]}, "lacks 'class 2' and has 'x', which the train split lacks"),
        (
            {"classes": ["class 1", "class 0", "class 2"]},
            "has 'class 1' as class 0 where the train split has 'class 0'",
        ),
        ({"images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8)}, r"\(1, 4, 4\), expected \(1, 2, 3\) as in the train"),
    ],
)
def test_a_test_split_that_differs_is_refused(changes, message):
    with pytest.raises(BadData, match=message):
        _ = numbered(open_test=Opener(**changes)).test


# What is no source ---------------------------------------------------------------------------------------

PIXELS = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("classes", "images", "targets", "message"),
    [
        ("ab", PIXELS.float(), LABELS, "toy: images have dtype torch.float32; give uint8"),
        ("ab", PIXELS[0], LABELS, r"toy: images has shape \(1, 2, 2\), expected \(N, C, H, W\)"),
        ("ab", PIXELS[:0], LABELS[:0], "at least one pixel"),
        ("ab", PIXELS, LABELS[:1], r"toy: targets has shape \(1,\), expected \(2,\)"),
        ("ab", PIXELS, LABELS.float(), "targets have dtype torch.float32; give integer"),
        ("ab", PIXELS, LABELS > 0, "targets have dtype torch.bool"),
        ("ab", PIXELS, LABELS + 1, "target 2 names no class; the 2 classes are 0 to 1"),
        ("ab", PIXELS, LABELS - 1, "target -1 names no class"),
        ("abcdefgh", PIXELS, LABELS, "toy: no images of 'c', 'd', 'e', 'f', 'g' and 1 more"),
        ("aba", PIXELS, LABELS, "each name once; repeated: 'a'"),
        ("", PIXELS, LABELS, "at least one class"),
    ],
)
def test_what_does_not_fit_together_is_refused(classes, images, targets, message):
    with pytest.raises(BadData, match=message):
        ImageSource("toy", tuple(classes), images, targets)


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ShapeMismatch, match=r"expected \(N, 3, H, W\)"):
        ImageSource("toy", "ab", PIXELS, LABELS, normalization=Normalization((0.0,) * 3, (1.0,) * 3))


# Huge classes --------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(monkeypatch):
    """Every draw counts as one that would need too many keys."""
    monkeypatch.setattr(draws, "MAX_KEYS", 0)


def sized(*counts):
    return ImageSource(
        "sized",
        [str(index) for index in range(len(counts))],
        torch.zeros(sum(counts), 1, 1, 1, dtype=torch.uint8),
        torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        normalization=IDENTITY,
    )


def chi_square(seen, draws_made):
    expected = draws_made / len(seen)
    return sum((count - expected) ** 2 / expected for count in seen.values())


@pytest.mark.parametrize("reverse", [False, True])
def test_every_ordered_pair_of_a_huge_class_is_equally_likely(crowded, reverse):
    # 9 images, draws of 2 (huge: more than 4 times as many): 72 ordered pairs, 14400 draws. The chi-square with 71
    # degrees of freedom exceeds 112 once in a thousand; the seed is fixed. 24 classes of each kind are drawn together.
    source, stream = sized(*[3, 9] * 24), generator(1)
    seen = dict.fromkeys(itertools.permutations(range(9), 2), 0)
    small = dict.fromkeys(itertools.permutations(range(3), 2), 0)
    classes = range(47, -1, -1) if reverse else range(48)
    for _ in range(14400 // 24):
        drawn = source.per_class_indices(classes, 2, stream).view(48, 2).tolist()
        for label, pair in zip(classes, drawn, strict=True):
            within = tuple(index - 12 * (label // 2) - 3 * (label % 2) for index in pair)
            (seen if label % 2 else small)[within] += 1
    assert chi_square(seen, 14400) < 112
    assert chi_square(small, 14400) < 20.5  # 5 degrees of freedom


def test_where_repeated_values_leave_too_few_more_are_drawn(monkeypatch):
    # Among the first 4 values of a class only one differs: those of the second call are needed, and follow them.
    calls = iter([torch.tensor([[5, 5, 5, 5], [1, 2, 3, 4]]), torch.tensor([[5, 7, 8, 5], [9, 9, 9, 9]])])
    monkeypatch.setattr(draws.torch, "randint", lambda *_, **__: next(calls))
    drawn = draws._by_indices(torch.tensor([[10], [10]]), 2, generator())
    assert drawn.tolist() == [[5, 7], [1, 2]]


def test_keys_are_bounded_where_classes_are_huge(monkeypatch):
    asked = []
    rand = torch.rand
    monkeypatch.setattr(draws.torch, "rand", lambda *shape, **rest: asked.append(shape) or rand(*shape, **rest))
    source = sized(3_000_000, 5, 3_000_000, 40)
    drawn = source.per_class_indices([0, 1, 2, 3], 10, generator())
    assert asked == [(2, 40)]
    assert len(set(drawn.tolist())) == len(drawn) == 35
    assert drawn[10:15].sort().values.tolist() == list(range(3_000_000, 3_000_005))
    source.per_class_indices([0], 10, generator())
    assert asked[1:] == [(1, 3_000_000)]  # as ever below the limit, 2^22 keys


def test_draws_of_normal_classes_stay_what_they_were():
    assert numbered().per_class_indices([2, 0, 1], 4, generator(3)).tolist() == [7, 10, 12, 8, 3, 4, 1, 2, 5, 6]
    assert draws.make_plan([5000] * 100, range(100), 256, torch.device("cpu")).huge is None


some_counts = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(counts=some_counts, size=st.integers(1, 50), seed=st.integers(0, 2**32), keys=st.sampled_from([0, 60, 2**22]),
       data=st.data())  # fmt: skip
def test_each_class_gives_distinct_images_of_its_own(counts, size, seed, keys, data):
    source = sized(*counts)
    classes = data.draw(st.permutations(range(len(counts))).flatmap(lambda order: st.integers(1, len(order)).map(
        lambda length: list(order)[:length])))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "MAX_KEYS", keys)
        drawn = source.per_class_indices(classes, size, generator(seed)).tolist()
        again = sized(*counts).per_class_indices(classes, size, generator(seed)).tolist()
    assert drawn == again
    expected = [min(size, counts[index]) for index in classes]
    assert source.sizes_per_class(classes, size) == expected
    parts = torch.tensor(drawn).split(expected)
    for index, part in zip(classes, parts, strict=True):
        assert len(set(part.tolist())) == len(part)
        assert all(source.offsets[index] <= place < source.offsets[index + 1] for place in part.tolist())


@settings(max_examples=100, deadline=None)
@given(counts=some_counts, size=st.integers(1, 50), fewer=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_a_smaller_draw_is_the_beginning_of_a_larger_one(counts, size, fewer, seed):
    source, classes = sized(*counts), range(len(counts))
    few, many = (
        source.per_class_indices(classes, number, generator(seed)).split(source.sizes_per_class(classes, number))
        for number in sorted((size, fewer))
    )
    assert all(torch.equal(first, part[: len(first)]) for first, part in zip(few, many, strict=True))


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 60), size=st.integers(1, 70), seed=st.one_of(st.none(), st.integers(0, 2**32)))
def test_a_pass_shows_every_image_once(count, size, seed):
    source = ImageSource(
        "pass",
        "a",
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1),
        torch.zeros(count, dtype=torch.int64),
        normalization=IDENTITY,
    )
    parts = list(source.batches(size, None if seed is None else generator(seed)))
    assert [len(part.images) for part in parts] == [size] * (count // size) + [count % size] * (count % size > 0)
    assert sorted(values(torch.cat([part.images for part in parts]))) == list(range(count))


# Other processes -----------------------------------------------------------------------------------------


def test_a_source_and_its_test_split_can_be_sent_to_another_process():
    opener = Opener()
    source = numbered(open_test=opener, mirror_safe=False, skipped=[Skipped(Path("a.png"), "broken")])
    size = len(pickle.dumps(source))
    source.per_class([0, 1], 2, generator())
    for _ in range(2):  # before and after the test split was opened
        copied = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert torch.equal(copied.images, source.images)
        assert (copied.fingerprint, copied.skipped) == (source.fingerprint, source.skipped)
        assert torch.equal(copied.per_class([2], 3, generator()).images, source.per_class([2], 3, generator()).images)
        assert copied.test.fingerprint == source.test.fingerprint
        assert copied.test.mirror_safe is False
        assert opener.calls == 1
        assert abs(len(pickle.dumps(source)) - size) < 100  # neither constants of draws nor the opened split


def test_what_cannot_be_sent_says_so_and_how_to_do_without():
    source = numbered(open_test=lambda: numbered())
    with pytest.raises(BadData, match=r"its test split cannot be pickled .*lambda.*; .*or send source.train_only\(\)"):
        pickle.dumps(source)
    assert pickle.loads(pickle.dumps(source.train_only())).fingerprint == source.fingerprint  # noqa: S301
