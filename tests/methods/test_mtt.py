"""MTT against a plain program: every step's graph kept, in float64."""

from dataclasses import replace

import pytest
import torch
from methods.following import compare_by_hand, followed, gap, table_of
from methods.stepping import begin, run_of

from dsdistill import synthesize
from dsdistill.augmentations import Siamese
from dsdistill.core.config import to_dict
from dsdistill.data import ImageSource
from dsdistill.experts import Experts, PlainTraining
from dsdistill.methods import FYI, MTT
from dsdistill.networks import NetworkSpec
from dsdistill.parameterizations import Mirrored, Tiled
from dsdistill.testing import check_synthesizer

SMALL = NetworkSpec(width=4, depth=1)
FEW = Experts(count=2, training=PlainTraining(epochs=4, batch_size=12, lr=0.05))
PLAIN = MTT(
    ipc=2,
    iterations=4,
    student_steps=4,
    max_start_epoch=3,
    batch_size=4,
    lr_images=2.0,
    lr_student=0.05,
    lr_lr=1e-3,
    network=SMALL,
    augmentation=None,
    experts=FEW,
)
VIEWED = replace(PLAIN, augmentation=Siamese())


def gradients_of(method, run, state, iteration):
    """What a step leaves behind: of pixels, and of the step size."""
    method.step(run, state, iteration)
    return [parameter.grad.clone() for parameter in state.images.parameters()], state.extras["lr"].raw.grad.clone()


@pytest.mark.parametrize("backward", ["sweep", "unroll", "forward"])
@pytest.mark.parametrize(
    "method",
    [PLAIN, VIEWED, replace(VIEWED, batch_size=None), replace(VIEWED, form=Tiled(factor=2)), FYI(base=VIEWED)],
    ids=["plain", "viewed", "whole", "tiles", "mirrored"],
)
def test_a_step_equals_the_formula(source, method, backward):
    inner = getattr(method, "base", method)
    inner = replace(inner, backward=backward)
    method = replace(method, base=inner) if isinstance(method, FYI) else inner
    run = run_of(source, chunk=6)
    state, twin = begin(method, run), begin(method, run)
    segment = inner.segment(run, 1)
    start, target = segment.after(0, inner.expert_epochs)
    path, images, _, rate = followed(inner, run, twin, 1, start)
    loss = gap(path[-1], start, target)
    of_images, of_rate = torch.autograd.grad(loss, (images, rate))
    twin.images.decode().images.backward(of_images.float())
    pixels, step_size = gradients_of(method, run, state, 1)
    for found, parameter in zip(pixels, twin.images.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))
    assert float(step_size) == pytest.approx(float(of_rate), rel=1e-3)


def test_a_step_moves_pixels_and_step_size_against_their_gradients(source):
    run = run_of(source)
    state = begin(PLAIN, run)
    before, rate = state.images.decode().images.detach().clone(), state.extras["lr"].raw.detach().clone()
    told = PLAIN.step(run, state, 0)
    pixels = next(state.images.parameters())
    assert torch.allclose(pixels, before - 2.0 * pixels.grad, atol=1e-6)
    raw = state.extras["lr"].raw
    assert torch.allclose(raw, rate - 1e-3 * raw.grad)
    assert set(told) == {"loss", "lr", "start_epoch"}
    assert told["lr"].item() == state.extras["lr"]().item()


def test_steps_are_those_of_sgd_on_images_step_size_and_labels(source):
    method = replace(VIEWED, labels="soft", lr_images=1.0, lr_labels=20.0)
    compare_by_hand(method, run_of(source), 3, begin)


def test_the_truncated_gradient_is_another_one_but_for_a_single_step(source):
    for steps, same in ((1, True), (4, False)):
        run, found = run_of(source), []
        for backward in ("sweep", "truncated"):
            method = replace(PLAIN, student_steps=steps, backward=backward)
            found.append(gradients_of(method, run, begin(method, run), 0)[0][0])
        assert torch.allclose(*found, rtol=1e-4, atol=1e-8) is same


def test_the_chunk_is_no_matter(source):
    found = []
    for chunk in (2, 1000):
        run = run_of(source, chunk=chunk)
        found.append(gradients_of(VIEWED, run, begin(VIEWED, run), 0)[0][0])
    assert torch.allclose(*found, rtol=1e-3, atol=1e-6)


def test_mirroring_images_that_are_their_own_mirror_image_changes_nothing(source):
    run, found = run_of(source), []
    for method in (replace(PLAIN, batch_size=None), FYI(base=replace(PLAIN, batch_size=None))):
        state = begin(method, run)
        with torch.no_grad():
            for parameter in state.images.parameters():
                parameter.copy_((parameter + parameter.flip(3)) / 2)
        loss = method.step(run, state, 0)["loss"]
        found.append(torch.stack([loss, state.extras["lr"].raw.grad]))
    assert torch.allclose(*found, rtol=1e-4)


def test_flipping_some_of_the_images_changes_nothing_where_all_are_mirrored(source):
    run, found = run_of(source), []
    method = FYI(base=replace(PLAIN, batch_size=None))
    for flipped in ([], [0, 3]):
        state = begin(method, run)
        assert isinstance(state.images, Mirrored)
        with torch.no_grad():
            for parameter in state.images.parameters():
                parameter[flipped] = parameter[flipped].flip(3)
        found.append(method.step(run, state, 0)["loss"])
    assert torch.allclose(*found, rtol=1e-4)


def test_flips_are_left_out_where_they_change_the_class(source):
    always = replace(PLAIN, augmentation=Siamese(ops=("flip",)))
    found = []
    for mirror_safe in (True, False):
        data = ImageSource("toy", source.classes, source.images, source.targets, mirror_safe=mirror_safe)
        run = run_of(data)
        found.append(gradients_of(always, run, begin(always, run), 0)[0][0])
    plain = gradients_of(PLAIN, run, begin(PLAIN, run), 0)[0][0]
    assert torch.equal(found[1], plain)
    assert not torch.equal(found[0], plain)


def test_mirroring_views_of_images_that_are_their_own_mirror_image_are_the_images(source):
    flips = Siamese(ops=("flip",))
    images = torch.randn(40, *source.shape, generator=torch.Generator().manual_seed(0))
    record = flips.sample(40, source.shape, torch.Generator().manual_seed(1), per="image")
    assert torch.equal(flips.apply(images + images.flip(3), record), images + images.flip(3))
    moved = (flips.apply(images, record) != images).flatten(1).any(1)
    assert 0 < int(moved.sum()) < 40  # the draw does mirror some


def test_the_set_carries_its_step_size(source):
    made = synthesize(PLAIN, source, progress=False)
    assert made.learned["lr"].shape == ()
    assert float(made.learned["lr"]) > 0
    assert float(made.learned["lr"]) != pytest.approx(0.05, abs=1e-9)


def test_soft_labels_are_learned(source):
    method = replace(PLAIN, labels="soft", lr_labels=50.0)
    run = run_of(source)
    state = begin(method, run)
    before = state.labels.logits.detach().clone()
    method.step(run, state, 0)
    assert not torch.equal(before, state.labels.logits)
    assert torch.allclose(state.labels.logits.grad.sum(1), torch.zeros(6), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": "soft", "backward": "unroll"},
        {"backward": "forward", "form": Tiled(factor=2), "augmentation": Siamese()},
        {"backward": "truncated", "form": Tiled(factor=3, bound=9), "ipc": 3, "on_small_class": "duplicate"},
        {"network": NetworkSpec("mlp", width=6), "experts": replace(FEW, precision="float16")},
        {"network": replace(SMALL, norm="batch")},
    ],
    ids=str,
)
def test_mtt_keeps_the_contract_in_all_its_variants(changes):
    assert len(check_synthesizer(replace(PLAIN, **changes))) == 9


def test_settings_by_default_are_those_of_the_authors():
    experts = {
        "type": "Experts",
        "count": 100,
        "training": {
            "type": "PlainTraining",
            "epochs": 50,
            "batch_size": 256,
            "lr": 0.01,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "augmentation": to_dict(Siamese()),
        },
        "precision": "float32",
        "seed": 0,
        "together": None,
        "compiled": False,
    }
    found = to_dict(MTT())
    wanted = {
        "iterations": 5000,
        "student_steps": 30,
        "expert_epochs": 2,
        "min_start_epoch": 0,
        "max_start_epoch": 20,
        "batch_size": None,
        "lr_images": 100.0,
        "momentum": 0.5,
        "lr_student": 0.01,
        "lr_lr": 1e-5,
        "labels": "hard",
        "lr_labels": 2.0,
        "momentum_labels": 0.9,
        "network": to_dict(NetworkSpec("convnet")),
        "augmentation": to_dict(Siamese(ops=("color", "crop", "cutout", "flip", "scale", "rotate"))),
        "backward": "sweep",
    }
    assert {name: found[name] for name in wanted} == wanted
    assert {name: value for name, value in found["experts"].items() if name in experts} == experts


def test_presets_are_those_of_the_authors():
    subsets = [f"imagenet_{name}" for name in ("nette", "woof", "fruit", "meow", "squawk", "yellow")]
    assert table_of(MTT, "backward") == {
        "cifar10/ipc1": (1, 50, 2, 2, None, 100, 1e-7, 0.01, 5000, "sweep", True),
        "cifar10/ipc10": (10, 30, 2, 20, None, 100, 1e-5, 0.001, 5000, "sweep", True),
        "cifar10/ipc50": (50, 30, 2, 40, None, 1000, 1e-5, 0.001, 5000, "sweep", False),
        "cifar100/ipc1": (1, 20, 3, 20, None, 1000, 1e-5, 0.01, 5000, "sweep", True),
        "cifar100/ipc10": (10, 20, 2, 20, None, 1000, 1e-5, 0.01, 5000, "sweep", False),
        "cifar100/ipc50": (50, 80, 2, 40, 125, 1000, 1e-5, 0.01, 5000, "sweep", True),
        "tiny_imagenet/ipc1": (1, 10, 2, 10, None, 10_000, 1e-4, 0.01, 5000, "sweep", False),
        "tiny_imagenet/ipc10": (10, 20, 2, 40, 200, 10_000, 1e-4, 0.01, 5000, "sweep", False),
        "tiny_imagenet/ipc50": (50, 20, 2, 40, 300, 10_000, 1e-4, 0.01, 5000, "sweep", False),
        **{f"{name}/ipc1": (1, 20, 2, 10, None, 1000, 1e-6, 0.01, 5000, "sweep", False) for name in subsets},
        **{f"{name}/ipc10": (10, 20, 2, 10, 20, 1000, 1e-6, 0.01, 5000, "sweep", False) for name in subsets},
        "cifar10/ipc1/tesla": (1, 50, 2, 5, None, 1000, 1e-7, 0.01, 10_000, "truncated", False),
        "cifar100/ipc50/tesla": (50, 80, 2, 40, 125, 1000, 1e-5, 0.01, 10_000, "truncated", True),
    }


@pytest.mark.parametrize(("name", "told"), [("cifar100/ipc10", True), ("cifar10/ipc50", False)])
def test_presets_say_where_images_were_standardised_otherwise(name, told):
    assert ("mean and deviation of CIFAR-10" in MTT.presets[name].source) is told


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_experts_with_a_momentum_that_students_lack_are_warned_of(momentum, source, caplog):
    method = replace(PLAIN, experts=replace(FEW, training=replace(FEW.training, momentum=momentum)))
    method.prepare(run_of(source))
    told = "MTT: experts.training.momentum = 0.9, and the student's momentum is 0: it can hardly follow them"
    assert (told in caplog.text) is (momentum > 0)
