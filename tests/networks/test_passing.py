import pytest
import torch
from torch import nn

from dsdistill.networks import ConvNet
from dsdistill.networks.passing import pass_rows, takes_batch_statistics

CPU = torch.device("cpu")


def watched(seen):
    def function(rows):
        seen.append(rows)
        assert not torch.is_grad_enabled()
        return torch.stack([rows, rows * rows], 1)

    return function


@pytest.mark.parametrize("seed", [None, 0])
def test_each_row_has_its_result_at_its_place(seed):
    seen: list[torch.Tensor] = []
    mixed = None if seed is None else torch.Generator().manual_seed(seed)
    found = pass_rows(watched(seen), 11, 5, CPU, mixed)
    rows = torch.arange(11)
    assert torch.equal(found, torch.stack([rows, rows * rows], 1))
    wanted = rows if seed is None else torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(seen), wanted)
    # A single image has no statistics to speak of: when mixed, a rest is spread over the others.
    assert [len(part) for part in seen] == ([5, 5, 1] if seed is None else [4, 4, 3])


def test_when_the_result_depends_on_the_batch():
    assert takes_batch_statistics(ConvNet((3, 8, 8), 2, width=4, norm="batch"))
    assert not takes_batch_statistics(ConvNet((3, 8, 8), 2, width=4, norm="batch").eval())
    assert not takes_batch_statistics(ConvNet((3, 8, 8), 2, width=4))
    assert takes_batch_statistics(nn.BatchNorm2d(3, track_running_stats=False).eval())
