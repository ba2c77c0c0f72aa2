"""The unroll and its derivative: against torch.optim, finite differences, autograd, and where it must be nought."""

import math
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dsdistill.engine import frozen
from dsdistill.networks import FlatNetwork, NetworkSpec, Outer, Student, backpropagate, functional
from dsdistill.networks.rules import SGD, Adam, Rule

COUNT, CLASSES = 6, 3
ROWS = torch.arange(COUNT)
HEAVY = SGD(momentum=0.9)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block(channels):
    return [nn.Conv2d(channels, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.Softplus(), nn.AvgPool2d(2)]


def smooth_network():
    """597 parameters, no kinks."""
    network = nn.Sequential(*block(3), *block(6), nn.Flatten(), nn.Linear(24, CLASSES)).double()
    with torch.no_grad():
        for place, parameter in enumerate(network.parameters()):
            near = 1.0 if parameter.dim() == 1 and place % 4 == 2 else 0.0
            parameter.copy_(near + 0.3 * draws(*parameter.shape, seed=place))
    return frozen(network)


FLAT = FlatNetwork(smooth_network())
START = FLAT.vector()
TARGET = START + 0.05 * draws(FLAT.size, seed=50)
SPREAD = (START - TARGET).square().sum()
IMAGES, LOGITS = draws(COUNT, 3, 8, 8, seed=51), draws(COUNT, CLASSES, seed=52)


def mini_batches(size, rows=ROWS):
    """Batches of ``size``, the last of a pass smaller; an augmentation that differs from step to step."""

    def show(step, images, targets):
        chosen = rows.split(size)[step % math.ceil(len(rows) / size)]
        return torch.roll(images[chosen], step, -1) * (1 + 0.1 * step % 0.3), targets[chosen]

    return show


def to_target(states):
    return (states[-1] - TARGET).square().sum() / SPREAD


@dataclass(frozen=True)
class Setting:
    """What is trained, and how; soft labels unless ``classes``."""

    steps: int = 6
    size: int = 4
    rule: Rule = SGD()
    rate: float = 0.1
    factor: float = 1.0
    chunk: int | None = None
    outer: Outer | None = None
    classes: bool = False
    images: torch.Tensor = IMAGES
    logits: torch.Tensor = LOGITS
    rows: torch.Tensor = ROWS
    flat: FlatNetwork = FLAT
    start: torch.Tensor = START

    def run(self, way):
        """The loss, the end, and derivatives in images, logits (None for classes) and step size."""
        made = [self.images, self.logits, torch.tensor(self.rate, dtype=self.start.dtype)]
        images, logits, rate = (tensor.clone().requires_grad_() for tensor in made)
        targets = self.logits.argmax(1) if self.classes else logits.softmax(1)
        student = Student(self.flat, mini_batches(self.size, self.rows), self.steps, self.rule, self.factor, self.chunk)
        outer = self.outer or Outer(to_target, (self.steps,))
        found = backpropagate(student, outer, self.start, rate, images, targets, way)
        return found, (images.grad, logits.grad, rate.grad)

    def trained(self, kind=torch.optim.SGD, **options):
        """The parameters after each step, from 0, by a module and torch.optim."""
        network, show = smooth_network().requires_grad_(), mini_batches(self.size, self.rows)
        optimizer = kind(network.parameters(), lr=self.rate, **options)
        states = [FlatNetwork(network).vector()]
        for step in range(self.steps):
            images, targets = show(step, self.images, self.logits.softmax(1))
            optimizer.zero_grad()
            (self.factor * cross_entropy(network(images), targets)).backward()
            optimizer.step()
            states.append(FlatNetwork(network).vector())
        return states


def assert_same(found, expected, tolerance=1e-12):
    """Relative to the length of each."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
            assert theirs.norm() > 0


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


RULES = [
    (SGD(), torch.optim.SGD, {}),
    (HEAVY, torch.optim.SGD, {"momentum": 0.9}),
    (Adam(eps=1e-3), torch.optim.Adam, {"eps": 1e-3}),
]


@pytest.mark.parametrize(("rule", "kind", "options"), RULES, ids=["sgd", "momentum", "adam"])
def test_a_derivative_is_that_of_training_with_torch_optim(rule, kind, options):
    setting = Setting(rule=rule, factor=0.8, rate=0.01 if kind is torch.optim.Adam else 0.1)

    def loss(setting):
        return to_target(setting.trained(kind, **options))

    found, slopes = setting.run("sweep")
    torch.testing.assert_close(found.end, setting.trained(kind, **options)[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss, loss(setting), rtol=1e-12, atol=0)
    step = 1e-6
    for name, slope in zip(("images", "logits", "rate"), slopes, strict=True):
        value = getattr(setting, name)
        along = 1.0 if name == "rate" else draws(*value.shape, seed=60)
        ahead, behind = (loss(replace(setting, **{name: value + sign * step * along})) for sign in (1, -1))
        expected = float(ahead - behind) / (2 * step)
        # A difference of losses near 1 is off by 1e-16 / 1e-6.
        assert float((slope * along).sum()) == pytest.approx(expected, rel=1e-6, abs=2e-9)


@pytest.mark.parametrize("rule", [SGD(), HEAVY], ids=["sgd", "momentum"])
@pytest.mark.parametrize("size", [3, 4, 6])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_every_exact_way_gives_the_same(steps, size, rule):
    setting = Setting(steps, size, rule, rate=0.03)
    expected, slopes = setting.run("unroll")
    for way in ("sweep", "forward"):
        found, ours = setting.run(way)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert_same(ours, slopes)


BETWEEN = Outer(lambda states: sum((n + 1) * (s - TARGET).square().sum() for n, s in enumerate(states)), (6, 12, 20))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(20, 4, SGD(), 0.03, 1.292, outer=BETWEEN),
        Setting(20, 4, HEAVY, 0.03, 1.292, outer=BETWEEN),
        Setting(20, 4, SGD(momentum=0.8, nesterov=True, weight_decay=0.1), 0.03, outer=BETWEEN),
        Setting(4, 6, SGD(momentum=0.8, dampening=0.2), outer=BETWEEN._replace(at=(0, 1, 3))),
        Setting(5, 6, HEAVY, chunk=4),
        Setting(5, 4, HEAVY, chunk=3),
        Setting(5, 4, HEAVY, chunk=4),
        Setting(5, 6, HEAVY, chunk=1, classes=True),
        Setting(6, 4, Adam(eps=1e-3, weight_decay=0.1), 0.01),
        Setting(6, 4, Adam(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, decoupled=True), 0.01),
    ],
    ids=[
        "between",
        "between-momentum",
        "nesterov",
        "start",
        "chunks",
        "some-chunks",
        "no-chunks",
        "classes",
        "adam",
        "adamw",
    ],
)
def test_every_exact_way_gives_the_same_with_all_there_is(setting):
    expected, slopes = setting.run("unroll")
    for way in ("sweep", "forward"):
        found, ours = setting.run(way)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_same(ours, slopes)


def test_chunks_change_nothing():
    whole, parts = Setting(5, 6, HEAVY), Setting(5, 6, HEAVY, chunk=4)
    assert_same(parts.run("sweep")[1], whole.run("sweep")[1])


@pytest.mark.parametrize("way", ["sweep", "unroll"])
def test_standing_still_costs_1_and_its_slope_is_that_of_the_first_gradient(way):
    found, (of_images, of_logits, of_rate) = Setting(rate=0.0).run(way)
    assert float(found.loss) == 1.0
    assert torch.equal(found.end, START)
    assert not of_images.any()
    assert not of_logits.any()
    student = Student(FLAT, mini_batches(4), 6)
    theta = START.clone().requires_grad_()
    total = sum(student.gradient(theta, *student.show(step, IMAGES, LOGITS.softmax(1))) for step in range(6))
    expected = -2 * total @ (START - TARGET) / SPREAD
    torch.testing.assert_close(of_rate, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("kappa", "expected"), [(1.0, 0.0), (0.5, 1.0), (2.0, 0.25), (-1.0, 4.0)])
def test_the_loss_of_a_target_on_the_way(kappa, expected):
    end = Setting().run("sweep")[0].end
    target = START + kappa * (end - START)

    def distance(states):
        return (states[0] - target).square().sum() / (START - target).square().sum()

    found, slopes = Setting(outer=Outer(distance, (6,))).run("sweep")
    assert float(found.loss) == pytest.approx(expected, abs=1e-13)
    if expected == 0:
        assert all(slope.abs().max() < 1e-12 for slope in slopes)


def test_the_truncated_way_is_exact_for_one_step():
    setting = Setting(steps=1)
    assert_same(setting.run("truncated")[1], setting.run("unroll")[1])


def test_the_truncated_way_is_off_by_a_share_of_the_step_size():
    off = {}
    for rate in (0.1, 1e-4, 1e-5):
        setting = Setting(steps=20, rate=rate)
        (found, ours), (expected, exact) = setting.run("truncated"), setting.run("unroll")
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        off[rate] = [error(mine, theirs) for mine, theirs in zip(ours, exact, strict=True)]
    assert all(value > 0.05 for value in off[0.1][:2])
    for larger, smaller in zip(off[1e-4][:2], off[1e-5][:2], strict=True):
        assert 9 < larger / smaller < 12


class Linear(FlatNetwork):
    """A loss linear in θ (K D,)."""

    def loss(self, theta, images, targets):
        return ((images.flatten(1).sin() @ self.split(theta)[0].T) * targets).sum()


@pytest.mark.parametrize("way", ["truncated", "sweep", "forward"])
@pytest.mark.parametrize("rule", [SGD(), HEAVY], ids=["sgd", "momentum"])
def test_every_way_is_exact_where_the_loss_is_linear_in_the_parameters(way, rule):
    flat = Linear(nn.Linear(192, CLASSES, bias=False).double())
    start = draws(flat.size)
    outer = Outer(lambda states: (states[0] - 1).square().sum(), (20,))
    setting = Setting(20, 4, rule, flat=flat, start=start, outer=outer)
    assert_same(setting.run(way)[1], setting.run("unroll")[1])


@pytest.mark.parametrize("way", ["sweep", "forward", "truncated"])
def test_a_shift_of_all_logits_of_a_label_teaches_nothing(way):
    of_logits = Setting().run(way)[1][1]
    assert of_logits.abs().max() > 1e-4
    assert of_logits.sum(1).abs().max() < 1e-15


@pytest.mark.parametrize("way", ["sweep", "forward", "truncated", "unroll"])
def test_images_never_drawn_have_no_gradient(way):
    of_images, of_logits, _ = Setting(rows=ROWS[:4], size=2).run(way)[1]
    for gradient in (of_images, of_logits):
        assert not gradient[4:].any()
        assert gradient[:4].flatten(1).any(1).all()


def test_permuted_images_have_permuted_gradients():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = Setting(images=IMAGES[order], logits=LOGITS[order], rows=order.argsort())
    (found, ours), (expected, slopes) = permuted.run("sweep"), Setting().run("sweep")
    assert torch.equal(found.loss, expected.loss)
    assert_same(ours, (slopes[0][order], slopes[1][order], slopes[2]))


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(LOGITS[0] + 2)

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_a_student_that_says_the_labels_already_learns_nothing():
    flat = FlatNetwork(Constant())
    targets = LOGITS[:1].softmax(1).expand(COUNT, -1)
    theta = flat.vector().requires_grad_()
    entropy = -(targets * targets.log()).sum()
    torch.testing.assert_close(flat.loss(theta, IMAGES, targets), entropy)
    assert Student(flat, mini_batches(6), 1).gradient(theta, IMAGES, targets).abs().max() < 1e-15


@pytest.mark.parametrize("way", ["sweep", "forward", "unroll"])
def test_gradients_are_added_to_what_wants_them_alone(way):
    images, rate = IMAGES.clone(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    rate.grad = torch.ones_like(rate)
    student, outer = Student(FLAT, mini_batches(4), 2), Outer(to_target, (2,))
    backpropagate(student, outer, START, rate, images, LOGITS.argmax(1), way)
    expected = Setting(2, classes=True).run("unroll")[1][2]
    torch.testing.assert_close(rate.grad, expected + 1, rtol=1e-13, atol=0)
    assert images.grad is None
    assert all(parameter.grad is None for parameter in FLAT.module.parameters())
    silent = backpropagate(student, outer, START, rate.detach(), images, LOGITS.argmax(1), way)  # nothing wants any
    assert not silent.loss.requires_grad


class Kept:
    """Bytes that autograd holds at a time, and the most of them."""

    def __init__(self):
        self.now = self.most = 0

    def _add(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def pack(self, tensor):
        held, size = _Held(tensor.detach()), tensor.nbytes
        self._add(size)
        weakref.finalize(held, self._add, -size)
        return held


@dataclass(eq=False)
class _Held:
    tensor: torch.Tensor


def most_kept(way, steps):
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        Setting(steps, 6, HEAVY).run(way)
    return kept.most


def test_the_sweep_holds_the_graph_of_one_step_whatever_their_number():
    assert most_kept("sweep", 3) == most_kept("sweep", 12)
    one, two, three = (most_kept("unroll", steps) for steps in (3, 6, 9))
    assert three - two == pytest.approx(two - one, rel=0.01)
    assert two - one > 1.5 * most_kept("sweep", 3)


def built(dtype=torch.float64, **options):
    """A network of this package with 8x8 images, channels-last as it is built."""
    spec = NetworkSpec(width=8, depth=2, **options)
    network = spec.build((3, 8, 8), CLASSES, generator=torch.Generator().manual_seed(0), device="cpu")
    return frozen(network.to(dtype))


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_a_flat_network_is_its_module(norm):
    network = built(norm=norm)
    flat = FlatNetwork(network)
    theta = flat.vector()
    assert theta.shape == (flat.size,) == (sum(parameter.numel() for parameter in network.parameters()),)
    assert torch.equal(theta, torch.cat([parameter.contiguous().flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(flat(theta, IMAGES), network(IMAGES), rtol=1e-13, atol=1e-13)
    other = draws(flat.size)
    expected = flat(other, IMAGES)
    assert torch.equal(flat.vector(), theta)
    assert flat.load(other) is network
    assert torch.equal(flat.vector(), other)
    torch.testing.assert_close(network(IMAGES), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of code of its own
@pytest.mark.parametrize(("classes", "steps"), [(True, 5), (False, 5), (True, 1)])
def test_the_compiled_way_is_the_forward_one(classes, steps):
    images = draws(COUNT, 3, 32, 32, dtype=torch.float32)
    network = NetworkSpec(width=16, depth=2, activation="swish")
    module = network.build((3, 32, 32), CLASSES, generator=torch.Generator().manual_seed(0), device="cpu")
    flat = FlatNetwork(frozen(module))
    start = torch.stack([flat.vector(), flat.vector()])[1]  # a view of more, as an expert's snapshot is
    outer = Outer(lambda states: (states[0] - 1.01 * start).square().sum(), (steps,))
    setting = Setting(
        steps,
        3,
        HEAVY,
        0.01,
        outer=outer,
        classes=classes,
        images=images,
        logits=LOGITS.float(),
        flat=flat,
        start=start,
    )
    (found, ours), (expected, slopes) = setting.run("compiled"), setting.run("forward")
    torch.testing.assert_close(found, expected)
    assert_same(ours, slopes, 1e-5)
    assert_same(setting.run("sweep")[1], slopes, 1e-5)


@pytest.mark.parametrize(
    ("way", "chunk", "kept"),
    [("sweep", None, []), ("truncated", None, []), ("sweep", 3, [4]), ("forward", None, [2, 4])],
)
def test_gradients_are_kept_only_where_they_are_not_made_anew(way, chunk, kept, monkeypatch):
    """By the sizes of the mini-batches whose gradients were kept."""
    walked, seen = functional._walked, []

    def watching(student, theta, rate, images, targets, backward):
        path = walked(student, theta, rate, images, targets, backward)
        for step, place in enumerate(path[:-1]):
            if place.gradient is not None:
                seen.append(len(student.show(step, images, targets)[0]))
        return path

    monkeypatch.setattr(functional, "_walked", watching)
    Setting(5, 4, HEAVY, chunk=chunk).run(way)
    assert sorted(set(seen)) == kept


@pytest.mark.parametrize("way", ["sweep", "forward"])
def test_images_that_share_statistics_are_differentiated_as_a_whole(way):
    """With running statistics too, and where the library's own derivatives are wrong."""
    flat = FlatNetwork(built(norm="batch", activation="swish"))
    outer = Outer(lambda ends: ends[0].square().sum(), (3,))
    setting = Setting(3, 4, HEAVY, flat=flat, start=flat.vector(), outer=outer)
    (found, ours), (expected, slopes) = setting.run(way), setting.run("unroll")
    torch.testing.assert_close(found, expected)
    assert_same(ours, slopes, 1e-11)
