"""Minimax: its two terms by hand and against a slow loop, memories, and what is trained."""

import pytest
import torch
from methods.cases import CASES

from dsdistill import synthesize
from dsdistill.core.rng import Rng
from dsdistill.generative.denoiser import small_transformer
from dsdistill.methods.minimax import Memories, tunable
from dsdistill.testing import toy_source

CPU = torch.device("cpu")


def test_the_toy_of_one_class():
    """x̂0 = (1, 0) beside memories (1, 0), (0, 1), (-1, 0): the least cosine is -1, the greatest 1."""
    memories = Memories(range(1), 64, 2, CPU)
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    memories.add(known, known, torch.zeros(3, dtype=torch.int64))
    real, drawn = memories.terms(torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    assert 0.002 * float(real) == pytest.approx(0.004)
    assert 0.008 * float(drawn) == pytest.approx(0.008)


def test_the_terms_are_those_of_loops_over_classes():
    generator = torch.Generator().manual_seed(0)
    memories, classes = Memories(range(4), 5, 6, CPU), torch.tensor([0, 2, 2, 1, 0, 2])
    stored, lists = torch.randn(9, 6, generator=generator), {label: [] for label in range(4)}
    earlier = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 3])  # class 1 has nothing yet, class 2 more than it holds
    others = torch.randn(9, 6, generator=generator)
    for number in range(0, 9, 3):
        part = slice(number, number + 3)
        memories.add(stored[part], others[part], earlier[part])
    for real, drawn, label in zip(stored, others, earlier.tolist(), strict=True):
        lists[label] = [*lists[label], (real, drawn)][-5:]
    predicted, weight = torch.randn(6, 6, generator=generator, requires_grad=True), torch.rand(6, generator=generator)

    def cosine(a, b):
        return torch.dot(a, b) / (a.norm() * b.norm())

    far, near = [], []
    for label in classes.unique().tolist():
        mine = [place for place in range(6) if classes[place] == label]
        pairs = [(place, pair) for place in mine for pair in lists[label]]
        far.append(max((weight[p] * (1 - cosine(predicted[p], one[0])) for p, one in pairs), default=torch.zeros(())))
        near.append(max((weight[p] * cosine(predicted[p], one[1]) for p, one in pairs), default=torch.zeros(())))
    real, drawn = memories.terms(predicted, classes, weight)
    torch.testing.assert_close(real, torch.stack(far).mean())
    torch.testing.assert_close(drawn, torch.stack(near).mean())
    (slope,) = torch.autograd.grad(real + drawn, predicted)
    assert torch.isfinite(slope).all()
    assert float(slope[3].abs().max()) == 0  # of the class without a memory


def test_what_is_trained_are_biases_and_class_tables():
    model = small_transformer((4, 4, 4), 3, 2, 2, 8, Rng(0))
    names = tunable(model)
    assert all(name.endswith(".bias") or "embedding_table" in name for name in names)
    assert sum("embedding_table" in name for name in names) == 2
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert biases == {name for name in names if "table" not in name}


def test_phases_begin_from_the_same_weights_and_draw_their_own_classes():
    """Two classes at once, of three: the third alone is as it is in a run whose phases are of one class."""
    source, method = toy_source(classes=3), CASES["Minimax"]
    images, targets = synthesize(method, source, device="cpu").tensors()
    plain, _ = synthesize(CASES["Diffusion"], source, device="cpu").tensors()
    assert images.shape == plain.shape
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(images, plain)
