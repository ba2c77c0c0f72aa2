"""The rules on features, each against a slow version written from its formula."""

import itertools
import warnings

import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits

from dsdistill.errors import BadData, InvalidSetting, ShapeMismatch
from dsdistill.selection import (
    RULES,
    herding_indices,
    k_center_indices,
    k_means,
    k_means_indices,
    representative,
    representative_indices,
)

LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count, width=4, seed=0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def test_k_center_on_a_line():
    assert k_center_indices(LINE, 3, first=0).tolist() == [0, 3, 2]
    assert k_center_indices(LINE, 4).tolist() == [2, 3, 0, 1]  # the mean is 3.25


def test_herding_on_a_line():
    assert herding_indices(LINE, 3).tolist() == [2, 1, 3]  # the farthest in place of the nearest would give 3, 2, 1


@pytest.mark.parametrize("first", ["mean", 5])
def test_k_center_is_its_formula(first):
    points = rows(30)
    wanted = [int((points - points.mean(0)).norm(dim=1).argmin())] if first == "mean" else [first]
    while len(wanted) < 12:
        radius = [min(float((point - points[j]).norm()) for j in wanted) for point in points]
        wanted.append(radius.index(max(radius)))
    assert k_center_indices(points, 12, first=first).tolist() == wanted


def test_k_center_covers_within_twice_the_least_radius():
    for seed in range(5):
        points = rows(9, width=2, seed=seed)
        between = torch.cdist(points, points)
        least = min(float(between[list(three)].amin(0).max()) for three in itertools.combinations(range(9), 3))
        assert least <= float(between[k_center_indices(points, 3)].amin(0).max()) <= 2 * least


def test_k_center_begins_at_random_if_told_so():
    begun = {int(k_center_indices(LINE, 1, seeded(seed), first="random")) for seed in range(40)}
    assert begun == {0, 1, 2, 3}
    once, again = (k_center_indices(rows(30), 5, seeded(3), first="random") for _ in range(2))
    assert torch.equal(once, again)


def test_herding_is_its_formula():
    points = rows(25)
    wanted = []
    for k in range(1, 13):  # iCaRL's form: the mean of the k chosen is nearest to the mean of all
        gaps = {
            i: float((points.mean(0) - (points[i] + points[wanted].sum(0)) / k).norm())
            for i in range(25)
            if i not in wanted
        }
        wanted.append(min(gaps, key=gaps.get))
    assert herding_indices(points, 12).tolist() == wanted


def test_k_means_is_the_best_clustering_there_is():
    points = rows(9, width=2) / 4 + torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]).repeat(3, 1)
    best = min(
        (labels for labels in itertools.product(range(3), repeat=9) if len(set(labels)) == 3),
        key=lambda labels: sum(
            float((points[mask] - points[mask].mean(0)).square().sum())
            for mask in (torch.tensor(labels) == c for c in range(3))
        ),
    )
    centres = [points[torch.tensor(best) == c].mean(0) for c in range(3)]
    wanted = {int((points - centre).norm(dim=1).argmin()) for centre in centres}
    assert set(k_means_indices(points, 3, seeded()).tolist()) == wanted


def test_k_means_shows_the_largest_cluster_first():
    points = torch.tensor([[0.0], [100.0], [101.0], [102.0], [50.0], [51.0]])
    assert k_means_indices(points, 3, seeded())[[0, 2]].tolist() == [2, 0]


def test_a_row_nearest_to_two_centres_is_chosen_once(monkeypatch):
    monkeypatch.setattr(k_means, "k_means_centres", lambda *_: torch.tensor([[1.0], [1.1], [9.0]]))
    assert k_means_indices(LINE, 3, seeded()).tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [11, 12, 19, 20, 35, 40])
def test_representative_rows_are_shares_of_ten_clusters(count):
    """Each centre in turn takes its nearest row that is left: equal shares, the remainder to the largest clusters."""
    points = rows(40)
    found = KMeans(10, n_init=1, random_state=int(torch.randint(2**31 - 1, (), generator=seeded(5)))).fit(
        points.numpy()
    )
    sizes = [int((found.labels_ == c).sum()) for c in range(10)]
    order = sorted(range(10), key=lambda c: -sizes[c])
    shares = {c: count // 10 + (place < count % 10) for place, c in enumerate(order)}
    left, wanted = set(range(40)), []
    for turn in range(max(shares.values())):  # best first: every cluster is shown before one is shown twice
        for c in order:
            if turn < shares[c]:
                centre = torch.from_numpy(found.cluster_centers_[c])
                wanted.append(min(left, key=lambda i: float((points[i] - centre).norm())))
                left.remove(wanted[-1])
    assert representative_indices(points, count, seeded(5)).tolist() == wanted


@pytest.mark.parametrize("count", [1, 3, 10])
def test_few_representative_rows_are_those_of_k_means(count):
    points = rows(40)
    assert torch.equal(representative_indices(points, count, seeded()), k_means_indices(points, count, seeded()))


def test_a_representative_row_may_lie_in_another_cluster(monkeypatch):
    monkeypatch.setattr(representative, "k_means_centres", lambda *_: torch.tensor([[0.0], [9.0]]))
    assert representative_indices(LINE, 4, seeded()).tolist() == [0, 3, 1, 2]


def test_k_means_draws_from_the_generator_alone():
    points = rows(60, width=8)
    state = torch.get_rng_state()
    made = {tuple(k_means_indices(points, 10, seeded(seed)).tolist()) for seed in range(4)}
    assert torch.equal(torch.get_rng_state(), state)
    assert len(made) > 1
    assert tuple(k_means_indices(points, 10, seeded(0)).tolist()) in made


def test_k_means_runs_in_one_thread_that_of_blas_included(monkeypatch):
    fit, threads = KMeans.fit, []

    def noted(self, rows):
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return fit(self, rows)

    monkeypatch.setattr(KMeans, "fit", noted)
    with threadpool_limits(limits=2):
        assert {pool["user_api"] for pool in threadpool_info() if pool["num_threads"] == 2} == {"blas", "openmp"}
        k_means_indices(rows(20), 3, seeded())
        assert 2 in [pool["num_threads"] for pool in threadpool_info()]
    assert set(threads) == {1}


@pytest.mark.parametrize("rule", RULES)
def test_all_different_however_alike_the_rows(rule):
    copies = torch.tensor([[1.0, 2.0]]).repeat(6, 1)
    copies[4] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 3, 6):
            assert len(set(RULES[rule](copies, count, seeded()).tolist())) == count


@pytest.mark.parametrize("rule", ["kcenter", "herding"])
def test_fewer_are_the_first_of_more(rule):
    points = rows(40)
    assert torch.equal(RULES[rule](points, 20, seeded())[:7], RULES[rule](points, 7, seeded()))


@pytest.mark.parametrize("rule", RULES)
def test_features_far_from_the_origin_are_told_apart(rule):
    points = rows(40, width=3)
    far = (points * 16).round() / 16 + 2048  # exact in float32, though squares are not
    assert torch.equal(RULES[rule](far.float(), 8, seeded()), RULES[rule](far, 8, seeded()))


@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_chosen_from_is_refused(rule):
    with pytest.raises(InvalidSetting, match=r"count = 5 is not valid: at most 4"):
        RULES[rule](LINE, 5, seeded())
    with pytest.raises(InvalidSetting, match="at least 1"):
        RULES[rule](LINE, 0, seeded())
    with pytest.raises(ShapeMismatch):
        RULES[rule](LINE[:, 0], 1, seeded())
    with pytest.raises(BadData, match="diverged"):
        RULES[rule](torch.tensor([[0.0], [torch.nan]]), 1, seeded())


@pytest.mark.parametrize("first", ["median", 4, -1])
def test_an_unknown_beginning_is_refused(first):
    with pytest.raises(InvalidSetting, match="first = "):
        k_center_indices(LINE, 2, first=first)


def test_a_random_beginning_needs_a_generator():
    with pytest.raises(InvalidSetting, match="generator"):
        k_center_indices(LINE, 2, first="random")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_chooses_what_a_cpu_does(rule):
    points = rows(300, width=64)
    chosen = RULES[rule](points.cuda(), 20, seeded())
    assert chosen.device.type == "cuda"
    assert torch.equal(chosen.cpu(), RULES[rule](points, 20, seeded()))
