"""Experts that are kept: found, continued, extended, refused where they are damaged."""

import gc
import shutil
from collections import namedtuple
from dataclasses import replace

import filelock
import pytest
import torch
from methods.stepping import CPU, run_of
from torch import nn

from dsdistill.core.rng import Rng
from dsdistill.data import Normalization
from dsdistill.data.cache import cache_folder
from dsdistill.data.whitening import whiten
from dsdistill.engine import Job, Rehearsal, Shared
from dsdistill.engine.run import prepared_run
from dsdistill.errors import InvalidSetting, OutOfSpace, OutputConflict, Stopped
from dsdistill.experts import Experts, FlatTraining, PlainTraining, SmoothTraining, Trajectories
from dsdistill.experts import growth as growing
from dsdistill.experts import trajectories as module
from dsdistill.experts.trainer import Trainer
from dsdistill.networks import FlatNetwork, NetworkSpec, register_network

SMALL = NetworkSpec(width=4, depth=2)
PLAIN = PlainTraining(epochs=6, batch_size=10, lr=0.05)
SMOOTH = SmoothTraining(epochs=6, batch_size=10, ramp_epochs=3)  # v starts anew in epoch 5
FEW = Experts(count=2, training=PLAIN)


def stored(source, tmp_path, **more):
    return replace(run_of(source, **more), store=tmp_path)


def everything(trajectories):
    return torch.stack(
        [trajectories.snapshots(index, range(trajectories.epochs + 1)) for index in range(trajectories.count)]
    )


@pytest.fixture
def epochs(monkeypatch):
    """(experts, epoch) of every epoch that is trained."""
    made, epoch = [], Trainer.epoch

    def watched(self, experts, pace, **more):
        made.append(([expert.index for expert in experts], experts[0].epochs))
        epoch(self, experts, pace, **more)

    monkeypatch.setattr(Trainer, "epoch", watched)
    return made


# Snapshots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["stored", "in memory"])
def test_snapshots_are_those_before_training_and_after_each_epoch(kept, source, tmp_path):
    run = stored(source, tmp_path) if kept else run_of(source)
    made = Trajectories(run, FEW, SMALL, 3)
    assert (made.count, made.epochs) == (2, 3)
    for index in range(2):
        found = made.snapshots(index, range(4))
        generator = Rng(0).within("expert", index).at("network")
        built = FlatNetwork(SMALL.build(source.shape, 3, generator=generator, device=CPU))
        assert found.shape == (4, built.size)
        assert found.dtype == torch.float32
        assert torch.equal(found[0], built.vector())
        distances = torch.cdist(found[None], found[None])[0] + torch.eye(4)
        assert float(distances.min()) > 1e-3  # no two alias each other
        assert torch.equal(made.snapshots(index, [2, 0]), found[[2, 0]])
    assert not torch.equal(made.snapshots(0, [0]), made.snapshots(1, [0]))
    assert (made.folder is None) != kept
    assert repr(made) == f"Trajectories(2 experts of 3 epochs, in {made.folder or 'memory'})"
    assert list(tmp_path.iterdir()) == ([tmp_path / "experts"] if kept else [])


def test_the_network_is_ready_to_be_a_student(source):
    made = Trajectories(run_of(source), FEW, SMALL, 1)
    assert made.network.module.training
    assert not any(parameter.requires_grad for parameter in made.network.module.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *source.shape, generator=generator)
    assert made.network(made.snapshots(0, [1])[0], images).shape == (2, 3)


def test_batch_normalisation_takes_the_statistics_of_its_batch(source):
    run = run_of(source)
    made = Trajectories(run, FEW, replace(SMALL, norm="batch"), 1)
    theta = made.snapshots(0, [1])[0]
    images = torch.randn(6, *source.shape, generator=torch.Generator().manual_seed(0))
    training = made.network(theta, images)
    made.network.module.eval()
    assert torch.equal(made.network(theta, images), training)
    assert run.couples_batches
    assert not list(made.network.module.buffers())


def test_an_expert_or_epoch_that_is_not_there(source):
    made = Trajectories(run_of(source), FEW, SMALL, 2)
    for arguments in ((2, [0]), (-1, [0]), (0, [3]), (0, [-1]), (0, [])):
        with pytest.raises(InvalidSetting):
            made.snapshots(*arguments)
    with pytest.raises(InvalidSetting, match=r"at most 6, the epochs of PlainTraining"):
        Trajectories(run_of(source), FEW, SMALL, 7)


def test_biases_before_a_norm_do_not_move_and_filters_grow(source):
    """The norm takes biases off again, and makes the loss independent of the length of a filter."""
    made = Trajectories(run_of(source), Experts(count=1, training=PLAIN), SMALL, 6)
    rows = [made.network.split(theta.double()) for theta in made.snapshots(0, range(7))]
    names = [name for name, _ in made.network.module.named_parameters()]
    for place, name in enumerate(names):
        start, end = rows[0][place], rows[-1][place]
        moved = float((end - start).norm() / start.norm().clamp_min(1e-12))
        if name.endswith("conv.bias"):
            assert moved < 1e-6
        elif name.endswith("conv.weight"):
            assert moved > 1e-3
            lengths = torch.stack([row[place].flatten(1).norm(dim=1) for row in rows])
            assert bool((lengths[1:] - lengths[:-1] > -1e-7).all())


def test_half_precision_rounds_and_does_nothing_else(source, tmp_path):
    whole = Trajectories(stored(source, tmp_path), Experts(count=1, training=SMOOTH), SMALL, 4)
    half = Experts(count=1, training=SMOOTH, precision="float16")
    rounded = Trajectories(stored(source, tmp_path), half, SMALL, 4)
    assert torch.equal(everything(rounded), everything(whole).half().float())
    sizes = [sum(path.stat().st_size for path in made.folder.glob("expert*")) for made in (rounded, whole)]
    assert sizes[0] < sizes[1]
    Trajectories(stored(source, tmp_path), half, SMALL, 2)
    extended = Trajectories(stored(source, tmp_path), half, SMALL, 6)
    straight = Trajectories(run_of(source), half, SMALL, 6)
    assert torch.equal(everything(extended), everything(straight))  # trained on from what was not rounded


# Found, continued, extended ---------------------------------------------------------------------------------


def test_runs_share_experts(source, tmp_path, epochs, caplog):
    caplog.set_level("INFO")
    first = Trajectories.of(stored(source, tmp_path), FEW, SMALL, 3)
    assert epochs == [([0], 0), ([0], 1), ([0], 2), ([1], 0), ([1], 1), ([1], 2)]
    (told,) = [record.message for record in caplog.records if "to be trained" in record.message]
    assert told.startswith(
        "2 experts are to be trained on the real images up to epoch 3 (PlainTraining): 0.0 MiB more in "
    )
    assert any("experts take about" in record.message for record in caplog.records)
    assert [record.message for record in caplog.records][-2:] == ["trained: 1 of 2", "trained: 2 of 2"]
    epochs.clear()
    other = Trajectories.of(stored(source, tmp_path, seed=5, chunk=3).scoped(Job("1", (1,))), FEW, SMALL, 3)
    assert epochs == []
    assert torch.equal(everything(first), everything(other))
    more = Trajectories.of(stored(source, tmp_path), replace(FEW, count=3), SMALL, 3)
    assert epochs == [([2], 0), ([2], 1), ([2], 2)]
    assert more.folder == first.folder


def test_a_run_asks_once(source, tmp_path, epochs):
    run = run_of(source)
    made = Trajectories.of(run, FEW, SMALL, 3)
    assert Trajectories.of(run.scoped(Job("1", (1,))), FEW, SMALL, 2) is made
    assert len(epochs) == 6
    assert Trajectories.of(run, FEW, SMALL, 4).epochs == 4
    gc.collect()
    before = len(module._made)
    del run, made
    gc.collect()
    assert len(module._made) == before - 1


@pytest.mark.parametrize(
    "training", [PLAIN, SMOOTH, FlatTraining(epochs=6, batch_size=10)], ids=lambda t: type(t).__name__
)
def test_interrupted_experts_continue_to_the_same_bits(training, source, tmp_path, epochs):
    experts = Experts(count=2, training=training)
    whole = everything(Trajectories(run_of(source), experts, SMALL, 6))
    epochs.clear()
    for stop in (3, 4, 2, 1):
        asked = []

        def give_way(asked=asked, stop=stop):
            asked.append(None)
            if len(asked) == stop + 2:  # it is asked before the wait for the lock and before each expert, too
                raise Stopped(15, 0, tmp_path)

        with pytest.raises(Stopped):
            Trajectories(replace(stored(source, tmp_path), shared=Shared(give_way=give_way)), experts, SMALL, 6)
    made = Trajectories(stored(source, tmp_path), experts, SMALL, 6)
    assert torch.equal(everything(made), whole)
    assert sorted(epochs) == [([index], epoch) for index in range(2) for epoch in range(6)]  # none was made twice


class Noisy(nn.Module):
    """Draws from the global generator."""

    def __init__(self, shape, classes):
        super().__init__()
        self.linear = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, images):
        return self.linear(images.flatten(1) + torch.randn(1))


def test_a_network_that_draws_continues_to_the_same_bits(source, tmp_path):
    register_network("noisy", Noisy)
    experts, spec, before = Experts(count=1, training=PLAIN), NetworkSpec("noisy"), torch.get_rng_state()
    whole = everything(Trajectories(run_of(source), experts, spec, 3))
    Trajectories(stored(source, tmp_path), experts, spec, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(everything(Trajectories(stored(source, tmp_path), experts, spec, 3)), whole)
    torch.set_rng_state(before)


def test_an_interrupt_within_an_epoch_loses_that_epoch(source, tmp_path, monkeypatch):
    gather, calls = type(source).gather, []

    def interrupted(self, rows):
        calls.append(None)
        if len(calls) == 4 * 2 + 3:
            raise KeyboardInterrupt
        return gather(self, rows)

    monkeypatch.setattr(type(source), "gather", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trajectories(stored(source, tmp_path), FEW, SMALL, 6)
    made = Trajectories(stored(source, tmp_path), FEW, SMALL, 6)
    assert len(calls) == 4 * 12 + 3
    assert torch.equal(everything(made), everything(Trajectories(run_of(source), FEW, SMALL, 6)))


def test_few_epochs_are_extended_and_many_serve_who_wants_few(source, tmp_path, epochs):
    few = Trajectories(stored(source, tmp_path), FEW, SMALL, 2)
    start = everything(few)
    epochs.clear()
    more = Trajectories(stored(source, tmp_path), FEW, SMALL, 5)
    assert epochs == [([index], epoch) for index in range(2) for epoch in (2, 3, 4)]
    assert torch.equal(everything(more), everything(Trajectories(run_of(source), FEW, SMALL, 5)))
    assert torch.equal(everything(few), start)  # who looks at the short ones is not disturbed
    epochs.clear()
    assert torch.equal(everything(Trajectories(stored(source, tmp_path), FEW, SMALL, 3)), everything(more)[:, :4])
    assert epochs == []


def test_experts_of_unequal_progress_are_not_stacked(source, tmp_path, epochs):
    experts = replace(FEW, together=3)
    Trajectories(stored(source, tmp_path), replace(experts, count=1), SMALL, 2)
    epochs.clear()
    made = Trajectories(stored(source, tmp_path), replace(experts, count=4), SMALL, 3)
    assert epochs == [([0], 2), ([1, 2, 3], 0), ([1, 2, 3], 1), ([1, 2, 3], 2)]
    alone = Trajectories(run_of(source), replace(FEW, count=4), SMALL, 3)
    torch.testing.assert_close(everything(made), everything(alone), rtol=1e-5, atol=1e-6)


def test_experts_are_kept_while_they_grow(source, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "_KEEP_SECONDS", -1.0)
    written = []
    keep = module.FolderShelf.keep
    monkeypatch.setattr(
        module.FolderShelf, "keep", lambda self, expert: (written.append(expert.epochs), keep(self, expert))
    )
    Trajectories(stored(source, tmp_path), replace(FEW, count=1), SMALL, 4)
    assert written == [1, 2, 3, 4]
    written.clear()
    monkeypatch.setattr(growing, "_KEEP_SECONDS", 60.0)
    Trajectories(stored(source, tmp_path), replace(FEW, count=1), SMALL, 6)
    assert written == [6]


def test_what_experts_are_is_in_their_folder_s_name(source, tmp_path):
    def folder(experts=FEW, spec=SMALL, images=source, **more):
        return Trajectories(replace(stored(images, tmp_path, **more), shared=fake), experts, spec, 1).folder.name

    fake = Shared(rehearsal=Rehearsal())  # nothing is trained
    same = [
        folder(),
        folder(seed=3),
        folder(replace(FEW, count=7)),
        folder(replace(FEW, together=2)),
        folder(replace(FEW, compiled=True)),
        folder(replace(FEW, training=replace(PLAIN, epochs=50))),
    ]
    assert len(set(same)) == 1
    white = source.normalized_by(Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
    others = [
        folder(replace(FEW, seed=1)),
        folder(replace(FEW, precision="float16")),
        folder(replace(FEW, training=replace(PLAIN, lr=0.04))),
        folder(replace(FEW, training=FlatTraining(epochs=6, batch_size=10, lr=0.05))),
        folder(replace(FEW, training=SMOOTH)),
        folder(replace(FEW, training=replace(SMOOTH, epochs=7))),  # when its step size drops
        folder(spec=replace(SMALL, activation="swish")),
        folder(images=white),
        folder(images=source.with_mirror_safe(False)),
        folder(images=source.subset(range(35))),
    ]
    assert len({same[0], *others}) == 1 + len(others)
    fitted = whiten(source)
    zca = fitted.normalization.zca
    # As another machine, or another number of threads, would have it.
    rounded = replace(zca, transform=zca.transform.nextafter(torch.tensor(9.0)))
    again = fitted.normalized_by(replace(fitted.normalization, zca=rounded))
    assert fitted.normalization != again.normalization
    assert folder(images=again) == folder(images=fitted)
    assert len({folder(images=fitted), folder(images=whiten(source, 0.2)), *same, *others}) == 3 + len(others)
    assert not list(tmp_path.iterdir())


# Several processes ------------------------------------------------------------------------------------------


def test_of_two_that_want_the_same_one_waits_and_finds_it(source, tmp_path, epochs, monkeypatch, caplog):
    caplog.set_level("INFO")
    there = Trajectories(stored(source, tmp_path / "other"), FEW, SMALL, 2)
    folder = tmp_path / "mine" / "experts" / there.folder.name
    folder.mkdir(parents=True)
    epochs.clear()
    lock, asked = filelock.FileLock(folder / "lock"), []
    lock.acquire()

    def give_way():
        asked.append(None)
        if len(asked) == 3:  # the other process is done
            for path in there.folder.glob("expert*"):
                shutil.copy(path, folder)
            lock.release()

    monkeypatch.setattr("dsdistill.experts.shelf._ASK_SECONDS", 0.01)
    run = replace(stored(source, tmp_path / "mine"), shared=Shared(give_way=give_way))
    made = Trajectories(run, FEW, SMALL, 2)
    assert epochs == []
    assert torch.equal(everything(made), everything(there))
    assert sum("waiting for it" in record.message for record in caplog.records) == 1
    assert not filelock.FileLock(folder / "lock").is_locked


def test_who_waits_can_be_stopped(source, tmp_path, monkeypatch):
    folder = Trajectories(stored(source, tmp_path), replace(FEW, count=1), SMALL, 1).folder
    monkeypatch.setattr("dsdistill.experts.shelf._ASK_SECONDS", 0.01)
    asked = []

    def give_way():
        asked.append(None)
        if len(asked) == 3:
            raise Stopped(15, 0, tmp_path)

    with filelock.FileLock(folder / "lock"), pytest.raises(Stopped):
        Trajectories(replace(stored(source, tmp_path), shared=Shared(give_way=give_way)), FEW, SMALL, 1)


def test_what_is_complete_is_read_without_a_lock(source, tmp_path):
    made = Trajectories(stored(source, tmp_path), FEW, SMALL, 1)
    with filelock.FileLock(made.folder / "lock"):
        assert torch.equal(everything(Trajectories(stored(source, tmp_path), FEW, SMALL, 1)), everything(made))


# Trouble ----------------------------------------------------------------------------------------------------


def test_a_diverging_expert_is_named_with_its_step_size(source, tmp_path):
    wild = Experts(count=1, training=replace(PLAIN, lr=1e20))
    with pytest.raises(InvalidSetting, match=r"PlainTraining.lr = 1e\+20 .*expert 0 diverged in epoch 1"):
        Trajectories(stored(source, tmp_path), wild, replace(SMALL, norm="none"), 4)
    assert not list(tmp_path.rglob("expert-*"))


def test_space_is_asked_for_before_any_training(source, tmp_path, monkeypatch, epochs):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("dsdistill.core.storage.shutil.disk_usage", lambda _: usage(1, 1, 10_000))
    with pytest.raises(OutOfSpace):
        Trajectories(stored(source, tmp_path), FEW, SMALL, 6)
    assert epochs == []


def test_a_store_that_is_a_file(source, tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(OutputConflict):
        Trajectories(stored(source, tmp_path / "store"), FEW, SMALL, 1)


def test_a_network_that_cannot_be_stacked_is_refused_with_the_mend(source):
    class Looks(nn.Module):
        def __init__(self, shape, classes):
            super().__init__()
            self.linear = nn.Linear(shape[0] * shape[1] * shape[2], classes)

        def forward(self, images):
            logits = self.linear(images.flatten(1))
            return logits if float(logits.detach().sum()) < 1e9 else -logits

    register_network("looks", Looks)
    spec = NetworkSpec("looks")
    with pytest.raises(InvalidSetting, match=r"Experts.together = 2 .*1 trains experts one by one"):
        Trajectories(run_of(source), replace(FEW, together=2), spec, 1)
    assert Trajectories(run_of(source), FEW, spec, 1).epochs == 1


# Rehearsals and the engine ----------------------------------------------------------------------------------


def rehearsed(source, tmp_path, experts=FEW, epochs=6):
    rehearsal = Rehearsal()
    run = replace(stored(source, tmp_path), shared=Shared(rehearsal=rehearsal))
    return Trajectories(run, experts, SMALL, epochs), rehearsal


def test_a_rehearsal_writes_nothing_and_makes_few_steps(source, tmp_path, monkeypatch):
    steps = []
    direction = PlainTraining.direction
    monkeypatch.setattr(PlainTraining, "direction", lambda *some: (steps.append(None), direction(*some))[1])
    clock = iter([10.0, 16.0])  # three steps take six seconds
    monkeypatch.setattr("dsdistill.experts.trainer.time.perf_counter", lambda: next(clock))
    made, rehearsal = rehearsed(source, tmp_path, Experts(count=5, training=PLAIN))
    assert len(steps) == 4
    assert not list(tmp_path.iterdir())
    assert rehearsal.seconds == pytest.approx(2.0 * (5 * 6 * 4 - 4))
    assert rehearsal.stored == 5 * made.network.size * 4 * (7 + 1)
    for index in (0, 4):
        found = made.snapshots(index, [0, 1, 3])
        assert float((found[1] - found[0]).norm()) > 1e-4
        torch.testing.assert_close(found[2] - found[0], 3 * (found[1] - found[0]))


def test_a_rehearsal_counts_what_is_there_as_found(source, tmp_path):
    whole = Trajectories(stored(source, tmp_path), FEW, SMALL, 6)
    made, rehearsal = rehearsed(source, tmp_path)
    assert (rehearsal.seconds, rehearsal.stored) == (0, 0)
    assert torch.equal(everything(made), everything(whole))
    more, rehearsal = rehearsed(source, tmp_path, replace(FEW, count=3))
    assert rehearsal.seconds > 0
    assert rehearsal.stored == more.network.size * 4 * (7 + 1)
    assert torch.equal(more.snapshots(1, [6]), whole.snapshots(1, [6]))
    assert float((more.snapshots(2, [1]) - more.snapshots(2, [0])).norm()) > 0


def test_a_training_as_short_as_its_rehearsal_leaves_nothing_out(source, tmp_path):
    few = Experts(count=1, training=replace(PLAIN, batch_size=36))
    _, rehearsal = rehearsed(source, tmp_path, few, epochs=3)
    assert rehearsal.seconds == 0


def test_the_engine_names_the_store(source, method, tmp_path):
    def store(**more):
        return prepared_run(method, source, seed=0, device="cpu", chunk=None, **more).store

    assert store() == cache_folder()
    assert store(store=str(tmp_path)) == tmp_path
    assert run_of(source).store is None
