import pytest
import torch
from experts.schools import SPECS, untrained
from torch import nn

from dsdistill.core import storage
from dsdistill.errors import BadArtifact, BadData, InvalidSetting
from dsdistill.experts import Committee, Teachers, by_batch
from dsdistill.networks import NetworkSpec
from dsdistill.testing import toy_source

# Published priors of CV-DD, in percent.
CIFAR100 = {"R18": 64.0, "R50": 60.6}
TINY = {"R18": 46.5, "R50": 28.3}
IMAGENET = {"R18": 56.4, "R50": 42.3, "SV2": 52.5, "MBV2": 44.2, "D121": 40.6}


@pytest.fixture(scope="module")
def source():
    return toy_source()


@pytest.fixture(scope="module")
def committee(source):
    return Committee([untrained(source, spec, seed) for seed, spec in enumerate(SPECS)])


def images_of(source):
    return source.gather(torch.arange(0, len(source), 5))


def test_logits_are_averaged_not_probabilities(source):
    class Says(nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    members = [
        untrained(source, network=Says(*told), name=name) for name, told in (("a", (2.0, 0, 0)), ("b", (0, 4.0, 0)))
    ]
    found = Committee(members).logits(images_of(source)).softmax(1)
    torch.testing.assert_close(found[0], torch.tensor([0.2447, 0.6652, 0.0900]), atol=5e-5, rtol=0)


def test_weights_multiply_logits(source, committee):
    images, weights = images_of(source), torch.tensor([0.5, 0.3, 0.2])
    expected = sum(share * one.network(images) for share, one in zip(weights, committee, strict=True))
    torch.testing.assert_close(committee.logits(images, weights), expected)
    equal = sum(one.network(images) for one in committee) / 3
    torch.testing.assert_close(committee.logits(images), equal)


@pytest.mark.parametrize(
    ("priors", "temperature", "expected"),
    [
        (CIFAR100, 5.0, {"R18": 0.6637, "R50": 0.3363}),
        (TINY, 5.0, {"R18": 0.9744, "R50": 0.0256}),
        (IMAGENET, 10.0, {"R18": 0.4128, "R50": 0.1008, "SV2": 0.2795, "MBV2": 0.1219, "D121": 0.0850}),
        ({"R18": 61.0}, 5.0, {"R18": 1.0}),
        ({"R18": 61.0, "R50": 61.0}, 5.0, {"R18": 0.5, "R50": 0.5}),
    ],
)
def test_a_vote_by_prior_performance(source, priors, temperature, expected):
    members = [untrained(source, name=name, performance=value) for name, value in priors.items()]
    found = Committee(members).weights(temperature)
    assert dict(zip(priors, found.tolist(), strict=True)) == pytest.approx(expected, abs=5e-5)
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)


def test_unknown_priors_are_named(source):
    members = [untrained(source, name="a", performance=60.0), untrained(source, name="b")]
    with pytest.raises(InvalidSetting, match="unknown for b: measure it"):
        Committee(members).weights(5.0)


def test_batch_statistics_are_those_of_each_part_and_nothing_is_remembered(source, committee):
    images = images_of(source)
    before = {name: tensor.clone() for name, tensor in committee[0].network.state_dict().items()}
    found = committee.logits(images, batch_statistics=True, parts=2)
    halves = []
    for half in torch.tensor_split(images, 2):
        told = []
        for teacher in committee:
            network = NetworkSpec.build(
                teacher.spec, source.shape, 3, generator=torch.Generator().manual_seed(0), device="cpu"
            )
            network.load_state_dict(teacher.network.state_dict())
            told.append(network.train()(half))
        halves.append(sum(told) / 3)
    torch.testing.assert_close(found, torch.cat(halves).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, committee.logits(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in committee[0].network.state_dict().items())
    assert not any(part.training for part in committee[0].network.modules())


def test_dropout_stays_silent_by_batch(source):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3)).eval()
    images = images_of(source)
    with by_batch(network):
        assert torch.equal(network(images), network(images))
        assert network[0].training
        assert not network[2].training
    assert not network[0].training


def test_a_committee_is_loaded_from_a_folder_of_folders_or_a_single_one(source, committee, tmp_path):
    for teacher in committee:
        teacher.save(tmp_path / teacher.name)
    loaded = Committee.load(tmp_path)
    assert [one.digest for one in loaded] == [one.digest for one in committee]
    assert [one.name for one in Committee.load(tmp_path / committee[1].name)] == [committee[1].name]
    with pytest.raises(BadArtifact, match="holds no teacher"):
        Committee.load(tmp_path / "nothing")


def test_members_have_the_order_in_which_they_were_trained(source, committee, tmp_path):
    for teacher in committee:
        teacher.save(tmp_path / teacher.name)
    names = [committee[2].name, committee[0].name]
    storage.write_json(tmp_path / "committee.json", names)
    assert [one.name for one in Committee.load(tmp_path)] == [*names, committee[1].name]
    (tmp_path / "committee.json").write_text("{}")
    with pytest.raises(BadArtifact, match="is no list of names"):
        Committee.load(tmp_path)


def test_half_a_committee_is_refused(source, committee, tmp_path):
    committee[0].save(tmp_path / committee[0].name)
    storage.write_json(tmp_path / "committee.json", [committee[0].name, committee[1].name])
    with pytest.raises(BadArtifact, match=f"without {committee[1].name}, whose training is not finished"):
        Committee.load(tmp_path)
    assert len(Committee.load(tmp_path / committee[0].name)) == 1


def test_every_member_is_checked(source, committee):
    committee.check(source)
    with pytest.raises(BadData, match="other classes"):
        Committee([*committee, untrained(source, name="x", classes=("a", "b", "c"))]).check(source)


@pytest.mark.parametrize("networks", [(), (SPECS[0], SPECS[0])])
def test_settings_that_name_no_committee_are_refused(networks):
    with pytest.raises(InvalidSetting, match=r"Teachers\.networks"):
        Teachers(networks=networks)


def test_members_need_names_of_their_own(source):
    with pytest.raises(InvalidSetting, match="a name of its own"):
        Committee([untrained(source), untrained(source)])


def test_settings_survive_json():
    from dsdistill.core.config import from_dict, to_dict

    teachers = Teachers(networks=SPECS, seed=3)
    assert from_dict(Teachers, to_dict(teachers)) == teachers
