import json
from dataclasses import FrozenInstanceError, replace

import pytest

from dsdistill.augmentations import CutMix, Siamese
from dsdistill.core.config import from_dict, to_dict
from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.evaluation import EvaluationProtocol, get_protocol, list_protocols
from dsdistill.networks import NetworkSpec


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


def test_the_list_is_complete_and_any_case_will_do():
    assert list_protocols() == ["datadam", "datm", "dc", "dm", "dsa", "fyi", "idc", "mtt", "ncfm"]
    assert get_protocol("DSA") is get_protocol("dsa")
    with pytest.raises(
        UnknownName, match=r"unknown protocol 'dsaa'; did you mean 'dsa'\? Known: datadam, datm, dc, dm, dsa"
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
        ("optimizer", "adam"),
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
