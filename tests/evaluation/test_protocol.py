import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from dsdistill.augmentations import CutMix, Mixup, MixViews, PadCrop, PatchShuffle, ResizedCrop, Siamese
from dsdistill.core.config import from_dict, to_dict
from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.evaluation import EvaluationProtocol, get_protocol, list_protocols
from dsdistill.networks import NetworkSpec
from dsdistill.training import Distillation

# epochs, batch, sub-batches, optimiser, step size, η, weight decay, on weights only, temperature, with T², teachers
DECOUPLED = {
    "sre2l": (300, 1024, 2, "adamw", 1e-3, 1, 0.01, True, 20, False, "eval"),
    "sre2l_tiny": (100, 256, 1, "sgd", 0.2, 1, 1e-4, False, 20, True, "eval"),
    "sre2l_cifar100": (400, 128, 1, "adamw", 1e-3, 1, 0.01, False, 30, False, "batch"),
    "cvdd": (300, 16, 2, "adamw", 1e-3, 1, 0.01, True, 20, False, "batch"),
    "rded": (300, 100, 1, "adamw", 1e-3, 2, 0.01, True, 20, False, "eval"),
    "rded_small": (300, 50, 1, "adamw", 1e-3, 2, 0.01, True, 20, False, "eval"),
    "ufc_static": (400, 64, 1, "adamw", 1e-3, 1, 0.01, False, 30, False, "eval"),
    "ufc_dynamic": (80, 64, 1, "adamw", 1e-3, 1, 0.01, False, 30, False, "eval"),
    "rethinking_soft": (300, 128, 1, "adamw", 1e-3, 1, 0.01, True, 20, False, "eval"),
    "rethinking_hard": (300, 128, 1, "adamw", 1e-3, 1, 0.01, True, None, None, "eval"),
}
CUTMIX, MIXUP = CutMix(probability=1.0), Mixup(alpha=0.8)
VIEWS = {
    "sre2l": (ResizedCrop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5), CUTMIX),
    "sre2l_tiny": (ResizedCrop(), None),
    "sre2l_cifar100": (PadCrop(pad=4, flip=0.5), MIXUP),
    "cvdd": (ResizedCrop(), CUTMIX),
    "rded": (PatchShuffle(factor=2, then=ResizedCrop(scale=(0.5, 1.0))), CUTMIX),
    "rded_small": (ResizedCrop(scale=(1.0, 1.0)), CUTMIX),
    "ufc_static": (PadCrop(pad=4), MIXUP),
    "ufc_dynamic": (PadCrop(pad=4), MIXUP),
    "rethinking_soft": (ResizedCrop(), CUTMIX),
    "rethinking_hard": (ResizedCrop(), None),
}


@pytest.mark.parametrize(
    ("name", "epochs", "views"), [("dc", 300, None), ("dsa", 1000, Siamese()), ("dm", 1000, Siamese())]
)
def test_named_protocols_are_the_published_rows(name, epochs, views):
    protocol = get_protocol(name)
    assert protocol.name == name
    assert protocol.epochs == epochs
    assert (protocol.lr, protocol.momentum, protocol.weight_decay, protocol.batch_size) == (0.01, 0.9, 5e-4, 256)
    assert protocol.augmentation == views
    assert protocol.selection == "last"
    assert protocol.network == NetworkSpec("convnet")
    # x 0.1 after epoch E/2 + 1, that is, from epoch E/2 + 1 on when they are counted from 0
    rates = [protocol.learning_rate(epoch) for epoch in range(epochs)]
    assert rates[: epochs // 2 + 1] == [0.01] * (epochs // 2 + 1)
    assert rates[epochs // 2 + 1 :] == pytest.approx([0.001] * (epochs - epochs // 2 - 1), rel=1e-12)


def test_the_rows_of_datadam_and_fyi_differ_from_dsa_in_a_word():
    dsa = get_protocol("dsa")
    assert get_protocol("datadam").network == NetworkSpec(norm="batch")
    assert replace(get_protocol("datadam"), name="dsa", epochs=1000, batch_size=256, network=NetworkSpec()) == dsa
    assert get_protocol("datadam").epochs == 1800
    assert [stage.ops for stage in get_protocol("fyi").augmentation.stages] == [
        ("flip",),
        ("color", "crop", "cutout", "scale", "rotate"),
    ]
    assert replace(get_protocol("fyi"), name="dsa", augmentation=Siamese()) == dsa


def test_the_rows_of_trajectory_matching_are_dsa_with_a_learned_step_size():
    dsa, mtt, datm = map(get_protocol, ("dsa", "mtt", "datm"))
    assert replace(dsa, name="mtt", learned_lr=True) == mtt
    assert replace(mtt, name="datm", batch_size=128) == datm
    assert [name for name in list_protocols() if get_protocol(name).learned_lr] == ["datm", "mtt"]


def test_the_rows_of_idc_and_ncfm_mix_and_leave_cutout_out():
    for name in ("idc", "ncfm"):
        protocol = get_protocol(name)
        assert protocol.mix == CutMix(probability=0.5)
        assert [stage.ops for stage in protocol.augmentation.stages] == [
            ("flip",),
            ("color",),
            ("crop", "scale", "rotate"),
        ]
    idc, ncfm = get_protocol("idc"), get_protocol("ncfm")
    assert (idc.optimizer, idc.lr, idc.batch_size, idc.epochs) == ("sgd", 0.01, 64, 1000)
    rates = [idc.learning_rate(epoch) for epoch in range(1000)]
    assert [rates.count(rate) for rate in dict.fromkeys(rates)] == [666, 167, 167]
    assert list(dict.fromkeys(rates)) == pytest.approx([0.01, 0.002, 0.0004])
    assert (ncfm.optimizer, ncfm.lr, ncfm.weight_decay, ncfm.batch_size) == ("adamw", 0.001, 0.01, 128)
    rates = [ncfm.learning_rate(epoch) for epoch in range(2000)]
    assert [rates.count(rate) for rate in dict.fromkeys(rates)] == [400] * 5
    assert rates[-1] == pytest.approx(0.001 / 16)


@pytest.mark.parametrize("name", DECOUPLED)
def test_the_rows_of_the_decoupled_line_are_the_published_ones(name):
    row = get_protocol(name)
    taught = row.distillation or Distillation(temperature=1.0)
    assert (
        row.epochs,
        row.batch_size,
        row.sub_batches,
        row.optimizer,
        row.lr,
        row.slowdown,
        row.weight_decay,
        row.decay_only_weights,
        row.distillation and taught.temperature,
        row.distillation and taught.squared,
        row.teacher_mode,
    ) == DECOUPLED[name]
    assert (row.augmentation, row.mix) == VIEWS[name]
    assert (row.name, row.title) == (name, name)
    assert row.network == NetworkSpec("resnet18", norm="batch")
    assert (row.schedule, row.momentum, taught.hard_share) == ("cosine", 0.9, 0)
    assert row.selection == "last"
    assert not row.learned_lr
    assert (row.warmup, row.warmup_start) == (5 if name == "sre2l_tiny" else 0, 0.01)


def test_cvdd_votes_by_its_priors_and_ufc_labels_clean_images():
    known = [get_protocol(name) for name in list_protocols()]
    assert [(row.name, row.vote_temperature) for row in known if row.vote_temperature is not None] == [("cvdd", 10.0)]
    assert [row.name for row in known if row.targets == "images"] == ["ufc_static"]


def test_the_step_size_of_rded_ends_at_half_and_that_of_sre2l_at_nothing():
    for name, ends in (("rded", 0.5026), ("sre2l", 0.0)):
        row = get_protocol(name)
        assert row.learning_rate(0) == 1e-3
        assert row.learning_rate(299) / 1e-3 == pytest.approx(ends, abs=5e-5)
    tiny = get_protocol("sre2l_tiny")
    assert [tiny.learning_rate(epoch) for epoch in (0, 1, 5)] == pytest.approx([0.002, 0.0416, 0.2])


@pytest.mark.parametrize(
    ("share", "place", "box", "area"),
    [
        (0.75, (0.5, 0.5), (8, 8, 24, 24), 0.25),
        (0.75, (0.0, 0.0), (0, 0, 8, 8), 0.0625),
        (0.5, (0.5, 0.5), (5, 5, 27, 27), 0.47265625),  # a side of 22 pixels
    ],
)
def test_the_boxes_of_the_decoupled_line(monkeypatch, share, place, box, area):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, share, *place], dtype=torch.float64))
    mix = get_protocol("cvdd").mix
    views = mix.sample(2, (3, 32, 32), torch.Generator().manual_seed(0))
    assert views.box == box
    assert views.share == 1 - area
    crossed = MixViews(views.shape, 2, torch.tensor([1, 0]), views.share, views.box)
    assert mix.targets(torch.tensor([2, 0]), crossed, 3).tolist() == [[area, 0, 1 - area], [1 - area, 0, area]]


def test_boxes_are_smaller_than_the_drawn_share_says():
    mix, generator = get_protocol("sre2l").mix, torch.Generator().manual_seed(0)
    areas = [1 - mix.sample(1, (3, 32, 32), generator).share for _ in range(4000)]
    assert sum(areas) / 4000 == pytest.approx(0.30, abs=0.02)  # sides rounded down and clipped, where λ alone says 0.5


def test_the_title_tells_what_differs():
    assert replace(get_protocol("cvdd"), lr=5e-4, slowdown=2.0).title == "cvdd (changed: lr, slowdown)"


def test_the_list_is_complete_and_any_case_will_do():
    classic = ["datadam", "datm", "dc", "dm", "dsa", "fyi", "idc", "minimax", "mtt", "ncfm"]
    assert list_protocols() == sorted([*classic, *DECOUPLED])
    assert get_protocol("DSA") is get_protocol("dsa")
    with pytest.raises(
        UnknownName, match=r"unknown protocol 'dsaa'; did you mean 'dsa'\? Known: cvdd, datadam, datm, dc, dm, dsa"
    ):
        get_protocol("dsaa")


@pytest.mark.parametrize(("epochs", "last_at_full_rate"), [(1, 0), (2, 1), (3, 1), (7, 3), (10, 5)])
def test_the_step_size_drops_after_half_the_epochs_and_one(epochs, last_at_full_rate):
    protocol = EvaluationProtocol(epochs=epochs, lr=1.0, milestone_delay=1)
    full = [epoch for epoch in range(epochs) if protocol.learning_rate(epoch) == 1.0]
    assert full == list(range(last_at_full_rate + 1))


def test_milestones_multiply():
    protocol = EvaluationProtocol(epochs=12, lr=0.5, milestones=(0.25, 0.5), gamma=0.2)
    rates = [protocol.learning_rate(epoch) for epoch in range(12)]
    assert rates == pytest.approx([0.5] * 3 + [0.1] * 3 + [0.02] * 6)


@pytest.mark.parametrize(("epochs", "percent"), [(50, 58), (100, 29), (100, 57), (1000, 55), (300, 50)])
def test_milestones_are_exact_fractions(epochs, percent):
    protocol = EvaluationProtocol(epochs=epochs, lr=1.0, milestones=(percent / 100,))
    full = sum(protocol.learning_rate(epoch) == 1.0 for epoch in range(epochs))
    assert full == epochs * percent // 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", "0.01"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("milestones", (0.5, 0.25)),
        ("milestones", (0.0,)),
        ("milestones", (1.0,)),
        ("milestones", (float("nan"),)),
        ("milestones", 0.5),
        ("learned_lr", 0.1),
        ("selection", "best"),
        ("network", "convnet"),
        ("augmentation", "dsa"),
        ("mix", "cutmix"),
        ("optimizer", "lion"),
        ("teacher_mode", "train"),
        ("targets", "pixels"),
        ("vote_temperature", 0.0),
        ("validation_fraction", 1.0),
        ("validation_checks", 0),
        ("name", 3),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InvalidSetting, match=rf"EvaluationProtocol\.{field} = "):
        EvaluationProtocol(**{field: value})


@pytest.mark.parametrize("name", list_protocols())
def test_every_protocol_survives_json(name):
    assert from_dict(EvaluationProtocol, json.loads(json.dumps(to_dict(get_protocol(name))))) == get_protocol(name)


def test_a_protocol_is_frozen_data():
    protocol = replace(get_protocol("dsa"), epochs=3)
    assert get_protocol("dsa").epochs == 1000
    with pytest.raises(FrozenInstanceError):
        protocol.epochs = 4


# Cells -------------------------------------------------------------------------------------------------------

# lr and slowdown by dataset at IPC 1, 10 and 50: CV-DD's table, read from its scripts
CELLS = {
    "cvdd/cifar10/ipc1": (1e-3, 1, 10),
    "cvdd/cifar10/ipc10": (1e-3, 1, 16),
    "cvdd/cifar100/ipc1": (1e-3, 1, 16),
    "cvdd/cifar100/ipc10": (1e-3, 2, 16),
    "cvdd/cifar100/ipc50": (1e-3, 1, 16),
    "cvdd/tiny_imagenet/ipc10": (1e-3, 1, 16),
    "cvdd/tiny_imagenet/ipc50": (1e-3, 2, 16),
    "cvdd/imagenette/ipc10": (5e-4, 1, 10),
    "cvdd/imagenette/ipc50": (5e-4, 2, 10),
    "cvdd/imagenet/ipc10": (1e-3, 2, 16),
    "cvdd/imagenet/ipc50": (1e-3, 1, 16),
    "cvdd/imagenette/ipc10/resnet50": (1e-3, 1, 10),
    "cvdd/imagenette/ipc1/resnet50": (5e-4, 2, 10),
    "cvdd/tiny_imagenet/ipc50/resnet50": (1e-3, 1, 16),
    "cvdd/cifar10/ipc50/resnet101": (5e-4, 1, 16),
    "cvdd/imagenette/ipc50/resnet101": (1e-3, 2, 10),
    "cvdd/imagenet/ipc50/resnet101": (5e-4, 2, 16),
    "rded/cifar10/ipc1": (1e-3, 2, 10),
    "rded/cifar10/ipc50": (1e-3, 2, 100),
    "rded/cifar100/ipc10": (1e-3, 2, 100),
    "rded/tiny_imagenet/ipc1": (1e-3, 2, 100),
    "rded/imagenet/ipc50": (1e-3, 2, 200),
    "rded/imagenette/ipc10/mobilenet_v2": (2.5e-3, 2, 50),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_the_published_ones(name):
    protocol = get_protocol(name)
    assert (protocol.lr, protocol.slowdown, protocol.batch_size) == CELLS[name]
    assert protocol.title == name


def test_cells_differ_from_their_row_in_what_the_table_has():
    row = get_protocol("cvdd")
    cell = get_protocol("cvdd/cifar100/ipc10")
    assert replace(cell, name=row.name, lr=row.lr, slowdown=row.slowdown, batch_size=row.batch_size) == row
    assert get_protocol("rded/cifar10/ipc10") == replace(get_protocol("rded_small"), name="rded/cifar10/ipc10")
    large = get_protocol("rded/imagenet/ipc10")
    assert large == replace(get_protocol("rded"), name=large.name)


def test_names_of_cells_are_listed_apart_and_the_nearest_is_told():
    assert not [name for name in list_protocols() if "/" in name]
    cells = [name for name in list_protocols(cells=True) if "/" in name]
    assert sum(name.startswith("cvdd/") for name in cells) == 5 * 3 * 3
    with pytest.raises(UnknownName, match="did you mean 'cvdd/cifar100/ipc10'"):
        get_protocol("cvdd/cifar100/ipc100")


def test_students_of_small_cells_can_be_built():
    cells = [get_protocol(name) for name in list_protocols(cells=True) if "/" in name]
    specs = {cell.network for cell in cells if cell.network.stem == "small" or cell.network.name.endswith("vgg11")}
    assert len(specs) == 5
    for spec in specs:
        spec.require((), (3, 32, 32), 10)


def test_cells_of_minimax_have_the_epochs_of_their_budget():
    epochs = [get_protocol(f"minimax/imagenet_woof/ipc{ipc}").epochs for ipc in (10, 20, 50, 70, 100)]
    assert epochs == [2000, 1500, 1500, 1000, 1000]
    assert get_protocol("minimax/imagenet_100/ipc10").epochs == 1333
    row = get_protocol("minimax")
    assert (row.batch_size, row.lr, row.milestones, row.gamma, row.mix) == (64, 0.01, (2 / 3, 5 / 6), 0.2, CUTMIX)
    assert get_protocol("minimax/imagenet_nette/ipc50/convnet").network == NetworkSpec("convnet", depth=6)
