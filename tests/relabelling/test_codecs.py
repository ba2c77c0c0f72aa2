"""How logits are stored."""

import pytest
import torch

from dsdistill.errors import InvalidSetting, UnknownName
from dsdistill.relabelling import CODECS, EightBits, Float, TopK, get_codec
from dsdistill.training import Distillation


def logits(rows=6, classes=12, scale=4.0):
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", [*CODECS.values(), TopK(k=3), TopK(k=12), TopK(k=2, rest="renorm")], ids=repr)
def test_what_is_stored_is_as_laid_out_and_any_rows_can_be_read(codec):
    given = logits()
    stored = codec.encode(given)
    told = {name: (dtype, (6, numbers) if numbers else (6,)) for name, (dtype, numbers) in codec.layout(12).items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == told
    whole = codec.decode(stored, 12)
    assert (whole.dtype, whole.shape) == (torch.float32, (6, 12))
    rows = torch.tensor([4, 1])
    assert torch.equal(codec.decode({name: tensor[rows] for name, tensor in stored.items()}, 12), whole[rows])
    halves = [codec.encode(part) for part in given.split(3)]
    assert all(torch.equal(torch.cat([half[name] for half in halves]), stored[name]) for name in stored)


def test_floats_are_exact_or_rounded_once():
    given = logits()
    assert torch.equal(Float(32).decode(Float(32).encode(given), 12), given)
    assert torch.equal(Float(16).decode(Float(16).encode(given), 12), given.half().float())


def test_what_does_not_fit_half_precision_is_refused():
    with pytest.raises(InvalidSetting, match=r"codec = 'float16'.*7e\+04"):
        Float(16).encode(torch.tensor([[7e4, 0.0]]))
    assert Float(32).encode(torch.tensor([[7e4, 0.0]]))["logits"][0, 0] == 7e4


def test_eight_bits_are_off_by_half_a_step_at_most():
    given = torch.cat([logits(), torch.full((1, 12), 2.5), torch.arange(12.0)[None] * 255 / 11])
    made = EightBits().decode(EightBits().encode(given), 12)
    step = (given.amax(1) - given.amin(1)) / 255
    assert bool(((made - given).abs() <= step[:, None] / 2 * 1.001 + 1e-6).all())
    assert torch.equal(made[6], given[6])
    assert torch.equal(made[7], given[7].round())


def test_marginal_smoothing_shares_what_is_missing():
    top = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05], dtype=torch.float64)
    codec = TopK(k=5)
    stored = {"probabilities": top[None], "classes": torch.tensor([[7, 999, 0, 3, 40]], dtype=torch.int16)}
    probabilities = codec.probabilities(stored, 1000)[0]
    assert probabilities[[7, 999, 0, 3, 40]].tolist() == pytest.approx(top.tolist(), abs=1e-12)
    assert float(probabilities[1]) == pytest.approx(0.07 / 995, abs=1e-12) == pytest.approx(7.0352e-5, abs=1e-9)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)


def test_re_norm_leaves_nothing_for_the_others():
    codec = TopK(k=2, rest="renorm")
    given = torch.tensor([[0.5, 0.2, 0.3]]).log()
    made = codec.decode(codec.encode(given), 3)
    assert made.softmax(1)[0].tolist() == pytest.approx([0.625, 0, 0.375], abs=1e-3)
    student = torch.zeros(1, 3)
    for temperature in (1.0, 20.0, 100.0):  # and at no temperature is it NaN, or anything but nothing
        assert bool(torch.isfinite(Distillation(temperature=temperature).loss(student, made)))
        assert float((made / temperature).softmax(1)[0, 1]) == 0


@pytest.mark.parametrize("rest", ["smooth", "renorm"])
def test_all_classes_are_kept_as_they_are(rest):
    given = logits(classes=5, scale=1.0)
    codec = TopK(k=5, rest=rest)
    assert torch.allclose(codec.decode(codec.encode(given), 5).softmax(1), given.softmax(1), atol=1e-3)


def test_class_indices_are_integers_as_wide_as_needed():
    assert TopK(k=1).layout(2**15)["classes"] == (torch.int16, 1)
    assert TopK(k=1).layout(2**15 + 1)["classes"] == (torch.int32, 1)
    for width, best in ((2**15, 2**15 - 1), (40000, 39999), (3000, 2049)):  # half precision has no 2049
        given = torch.zeros(1, width)
        given[0, best] = 20
        made = TopK(k=1).encode(given)
        assert made["classes"].item() == best
        assert int(TopK(k=1).decode(made, width).argmax()) == best


def test_more_classes_than_there_are_cannot_be_kept():
    with pytest.raises(InvalidSetting, match=r"TopK.k = 10 .*at most 3"):
        TopK().layout(3)


def test_codecs_have_names():
    assert get_codec("uint8") == EightBits()
    assert get_codec(TopK(k=3)) == TopK(k=3)
    with pytest.raises(UnknownName, match="did you mean 'float16'"):
        get_codec("flaot16")
