"""The fusion of EVLF: its module, its losses, its training."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from dsdistill.core.config import from_dict, to_dict
from dsdistill.core.rng import Rng
from dsdistill.errors import BadData, Diverged, InvalidSetting, MissingWeights, ShapeMismatch
from dsdistill.generative.fusing import Projector, Trained, closeness_weight, multi_positive_nce, train_fusion
from dsdistill.generative.fusion import Fusion, FusionModule

GRIDS = [(4, 8, 8), (16, 8, 8), (4, 32, 32)]
SHAPE = (4, 4, 4)
NAMES = ["red", "green", "blue"]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(residual=False, grid=(4, 3), seed=0, **options):
    """A fusion in float64, without dropout, whose residual, if it has one, is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = FusionModule(2, grid, 6, width=8, heads=2, residual=residual, **options).double().eval()
        if residual:
            nn.init.normal_(module.leave.weight)
    return module


def inputs(grid=(4, 3), batch=3, words=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, *grid, generator=generator, dtype=torch.float64)
    return latents, torch.randn(batch, words, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", GRIDS)
def test_the_residual_preset_begins_as_the_identity(shape):
    latents, texts = torch.randn(2, *shape), torch.randn(2, 7, 12)
    module = FusionModule(shape[0], shape[1:], 12, width=32)
    assert torch.equal(module(latents, texts), latents)  # while training, with dropout, as well
    module(latents, texts).pow(2).sum().backward()
    moved = {name for name, parameter in module.named_parameters() if parameter.grad.any()}
    assert moved == {"leave.weight", "leave.bias"}


@pytest.mark.parametrize("shape", GRIDS)
def test_the_authors_preset_keeps_shapes_and_replaces_latents(shape):
    latents, texts = torch.randn(2, *shape), torch.randn(2, 7, 12)
    module = FusionModule(shape[0], shape[1:], 12, width=32, residual=False)
    fused = module(latents, texts)
    assert fused.shape == latents.shape
    assert (fused - latents).abs().mean() > 0.1
    fused.pow(2).sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_parameter_counts_of_the_authors():
    def made(side, layers=2):
        return count(FusionModule(4, (side, side), 768, layers=layers, residual=False))

    assert made(32) == 1_515_524
    assert made(64) == 2_301_956
    assert made(32, layers=4) == 2_569_732
    assert count(Projector(4, 768)) == 792_896


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_against_a_module_made_of_pytorchs_attention(residual, refresh):
    """Written from the description, with `nn.MultiheadAttention` and loops."""
    module, (latents, texts) = small(residual, refresh=refresh), inputs()
    weights = module.state_dict()
    begun = torch.einsum("bchw,dc->bhwd", latents, weights["enter.weight"][:, :, 0, 0]) + weights["enter.bias"]
    tokens = begun.reshape(3, 12, 8) + weights["positions"]
    words = texts @ weights["text.weight"].T + weights["text.bias"]
    seen = torch.cat([tokens, words], 1)
    for layer in module.layers:
        attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
        own = {"in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias}
        own |= {"out_proj.weight": layer.joined.weight, "out_proj.bias": layer.joined.bias}
        attention.load_state_dict(own)
        seen = torch.cat([tokens, words], 1) if refresh else seen
        tokens = layer.norm1(tokens + attention(tokens, seen, seen)[0])
        hidden = (tokens @ layer.mlp[0].weight.T + layer.mlp[0].bias).clamp_min(0)
        tokens = layer.norm2(tokens + hidden @ layer.mlp[3].weight.T + layer.mlp[3].bias)
    result = tokens @ weights["leave.weight"][:, :, 0, 0].T + weights["leave.bias"]
    expected = result.reshape(3, 4, 3, 2).permute(0, 3, 1, 2) + (latents if residual else 0)
    torch.testing.assert_close(module(latents, texts), expected)


def test_initial_weights_spread_as_those_of_pytorchs_attention():
    module, theirs = FusionModule(4, (4, 4), 16, residual=False), nn.MultiheadAttention(256, 4)
    layer = module.requires_grad_(False).layers[0]
    theirs.requires_grad_(False)
    assert float(layer.qkv.weight.std()) == pytest.approx(float(theirs.in_proj_weight.std()), rel=0.02)
    assert float(layer.joined.weight.std()) == pytest.approx(float(theirs.out_proj.weight.std()), rel=0.02)
    assert not layer.qkv.bias.any()
    assert not layer.joined.bias.any()


def test_refreshed_keys_differ_from_the_second_layer_on():
    for layers, same in ((1, True), (2, False)):
        kept, fresh = (small(layers=layers, refresh=refresh) for refresh in (False, True))
        assert torch.allclose(kept(*inputs()), fresh(*inputs())) is same


def test_the_order_of_words_does_not_matter_and_their_presence_does():
    module, (latents, texts) = small(), inputs()
    fused = module(latents, texts)
    assert (module(latents, texts[:, [4, 2, 0, 1, 3]]) - fused).abs().max() < 1e-12
    assert (module(latents, torch.zeros_like(texts)) - fused).abs().max() > 1e-3
    assert (module(latents, texts.roll(1, 0)) - fused).abs().max() > 1e-3


def test_heads_divide_the_width():
    with pytest.raises(InvalidSetting, match="divisor of the width, 8"):
        FusionModule(2, (4, 3), 6, width=8, heads=3)


def test_dropout_only_while_training():
    module, (latents, texts) = small(dropout=0.5), inputs()
    assert torch.equal(module(latents, texts), module(latents, texts))
    module.train()
    assert not torch.equal(module(latents, texts), module(latents, texts))
    for part in module.modules():  # of the attention alone: what is left when the MLPs drop nothing
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    assert not torch.equal(module(latents, texts), module(latents, texts))


def test_another_grid_is_interpolated_or_refused():
    latents, texts = inputs((6, 5))
    with pytest.raises(ShapeMismatch, match=r"\(B, 2, 4, 3\), the grid that the fusion was made for"):
        small(residual=False)(latents, texts)
    module, larger = small(residual=True), small(residual=True, grid=(6, 5))
    state = module.state_dict()
    table = state["positions"].reshape(1, 4, 3, 8).permute(0, 3, 1, 2)
    state["positions"] = interpolate(table, (6, 5), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 30, 8)
    larger.load_state_dict(state)
    torch.testing.assert_close(module(latents, texts), larger(latents, texts))


def test_the_same_number_of_places_in_another_shape_is_another_grid():
    latents, texts = inputs((3, 4))
    with pytest.raises(ShapeMismatch):
        small(residual=False)(latents, texts)


@pytest.mark.parametrize(
    ("latents", "texts"), [((3, 1, 4, 3), (3, 5, 6)), ((2, 4, 3), (2, 5, 6)), ((3, 2, 4, 3), (3, 5, 7)),
                           ((3, 2, 4, 3), (1, 5, 6)), ((3, 2, 4, 3), (3, 6))]
)  # fmt: skip
def test_other_shapes_are_refused(latents, texts):
    with pytest.raises(ShapeMismatch):
        small()(torch.zeros(latents).double(), torch.zeros(texts).double())


@pytest.mark.parametrize("grid", [(32, 32), (28, 20), (8, 8), (4, 4), (3, 3), (2, 5), (1, 1)])
def test_the_projector_pools_as_adaptive_pooling_does(grid):
    side = min(grid)
    projector = Projector(4, 10, side).double()
    latents = torch.randn(2, 4, *grid, dtype=torch.float64)
    size = min(4, side)
    assert projector.conv.kernel_size == projector.conv.stride == (size, size)
    maps = adaptive_avg_pool2d(projector.conv(latents), 4).flatten(1)
    torch.testing.assert_close(projector(latents), projector.norm(projector.map(maps)))


def slow_nce(images, texts, classes, temperature):
    def one(first, second):
        total = 0.0
        for place, label in enumerate(classes):
            scores = [
                math.exp(float(first[place] @ other) / float(first[place].norm() * other.norm()) / temperature)
                for other in second
            ]
            right = [score / sum(scores) for score, own in zip(scores, classes, strict=True) if own == label]
            total -= math.log(sum(right) / len(right))
        return total / len(classes)

    return (one(images, texts) + one(texts, images)) / 2


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_contrastive_loss_against_loops(temperature):
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    classes = [0, 1, 0, 2, 2, 0, 3]
    found = multi_positive_nce(images, texts, torch.tensor(classes), temperature)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(slow_nce(images, texts, classes, temperature), rel=1e-12)


def test_limits_of_the_contrastive_loss():
    same, apart, pairs = torch.ones(8, 6), torch.eye(8), torch.eye(4).repeat_interleave(2, 0)
    labels, twice = torch.arange(8), torch.arange(4).repeat_interleave(2)
    for classes in (labels, twice, torch.zeros(8, dtype=torch.long)):
        assert float(multi_positive_nce(same, same, classes, 0.07)) == pytest.approx(math.log(8), abs=1e-6)
    aligned = multi_positive_nce(apart.double(), 3 * apart.double(), labels, 0.07)
    assert float(aligned) == pytest.approx(4.37e-6, rel=1e-2)
    assert float(multi_positive_nce(apart, apart, labels, 0.07)) == pytest.approx(4.37e-6, abs=6e-7)  # float32
    assert float(multi_positive_nce(pairs, pairs, twice, 0.07)) == pytest.approx(math.log(2), abs=1e-5)


def test_the_contrastive_loss_counts_half_precision_in_single():
    features = torch.eye(8, dtype=torch.float16)
    assert multi_positive_nce(features, features, torch.arange(8), 0.07).dtype == torch.float32


def test_the_gradient_of_the_contrastive_loss():
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda pair: multi_positive_nce(pair[0], pair[1], classes, 0.3), both)


def test_the_weight_of_closeness_rises_over_half_of_the_steps():
    horizon = 100  # of 200 steps
    found = [closeness_weight(round(share * horizon), 200, 0.05, 1.0) for share in (0, 0.5, 1, 1.5)]
    assert found == pytest.approx([0.05, 0.525, 1.0, 1.0])
    assert closeness_weight(1, 3, 0.0, 1.0) == pytest.approx(2 / 3)
    assert closeness_weight(0, 1, 0.2, 1.0) == 0.2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heads", 3),
        ("text_width", 6),
        ("closeness", (-0.1, 1.0)),
        ("closeness", (1.0,)),
        ("template", "a photo"),
        ("revision", "0123"),
        ("download", True),
        ("drop_text", 1.5),
        ("text_dropout", 1.0),
        ("temperature", 0.0),
        ("steps", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InvalidSetting, match=f"Fusion.{name}"):
        Fusion(**{name: value})


def test_settings_survive_json():
    settings = Fusion(text="somewhere", revision="0123", closeness=(0, 2))
    assert settings.closeness == (0.0, 2.0)
    assert all(type(weight) is float for weight in settings.closeness)
    assert from_dict(Fusion, to_dict(settings)) == settings


TARGETS = torch.arange(3).repeat_interleave(12)
QUICK = Fusion(width=32, layers=1, text_width=16, steps=120, batch_size=12, lr=3e-3, lr_projector=3e-3, lr_text=3e-3)


def toy():
    """Latents of three classes, which differ in their mean by as much as they are spread."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, *SHAPE, generator=generator)
    return means[TARGETS] + torch.randn(len(TARGETS), *SHAPE, generator=generator)


LATENTS = toy()


def train(settings=QUICK, seed=0, **options):
    called = {"fetch": lambda rows, generator: LATENTS[rows], "targets": TARGETS, "classes": NAMES}
    called |= {"grid_shape": SHAPE, "settings": settings, "rng": Rng(seed), "device": "cpu", **options}
    return train_fusion(**called)


def test_training_aligns_and_stays_close():
    told = []
    trained = train(watch=lambda step, metrics: told.append((step, metrics)))
    assert [step for step, _ in told] == list(range(QUICK.steps))
    contrastive, closeness = (torch.stack([m[name] for _, m in told]) for name in ("contrastive", "closeness"))
    assert not any(value.requires_grad for _, metrics in told for value in metrics.values())
    assert contrastive[:6].mean() > 1.8
    # log 12 without any alignment; log 4, of the four or so of each class in a batch, were it perfect.
    assert contrastive[-6:].mean() < 1.55
    assert closeness[-6:].mean() < 0.2 * LATENTS.var()
    for name, values in (("contrastive", contrastive), ("closeness", closeness)):
        assert trained.losses[name] == pytest.approx((float(values[:6].mean()), float(values[-6:].mean())))
    step, metrics = told[70]
    weight = closeness_weight(step, QUICK.steps, *QUICK.closeness)
    expected = QUICK.alignment * metrics["contrastive"] + weight * metrics["closeness"]
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_authors_preset_learns_to_stay_close():
    settings = Fusion(**{**to_fields(QUICK), "residual": False, "closeness": (1.0, 1.0), "steps": 100})
    first, last = train(settings).losses["closeness"]
    assert last < 0.5 * first


def to_fields(settings):
    return {name: value for name, value in to_dict(settings).items() if name != "type"} | {"closeness": (0.05, 1.0)}


def few(steps=4, **changed):
    return Fusion(**{**to_fields(QUICK), "steps": steps, **changed})


def same(one, other):
    first, second = one.state(), other.state()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_same_seed_gives_the_same_bits_and_no_one_notices():
    before = torch.get_rng_state()
    trained = train(few())
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert same(trained, train(few()))
    assert not same(trained, train(few(), seed=1))


def test_what_is_trained_is_frozen_and_ready():
    trained = train(few())
    assert not trained.fusion.training
    assert not any(parameter.requires_grad for parameter in trained.fusion.parameters())
    assert trained.texts.states.shape == (3, len("green") + 2, 16)
    assert not trained.texts.states.requires_grad
    assert trained.texts.ends.tolist() == [4, 6, 5]


def test_fusing_takes_the_prompt_of_each_class():
    trained = train(few(10))
    classes = torch.tensor([2, 0, 2])
    fused = trained.fuse(LATENTS[:3], classes)
    assert torch.equal(fused, trained.fusion(LATENTS[:3], trained.texts.states[classes]))
    assert torch.equal(fused, trained.fuse(LATENTS[:3], classes))
    assert not torch.equal(fused, trained.fuse(LATENTS[:3], torch.tensor([1, 0, 2])))
    assert not torch.equal(fused, LATENTS[:3])
    assert trained.fuse(LATENTS[:3].half(), classes).dtype == torch.float16


@pytest.mark.parametrize("settings", [few(), few(residual=False, refresh=True, layers=2)])
def test_it_is_the_same_after_it_was_kept(settings):
    trained = train(settings)
    back = Trained.restore(trained.state(), SHAPE, settings)
    assert same(trained, back)
    assert back.losses == trained.losses
    assert not back.fusion.training
    classes = TARGETS[:5]
    assert torch.equal(back.fuse(LATENTS[:5], classes), trained.fuse(LATENTS[:5], classes))


@pytest.mark.parametrize("name", ["states", "losses", "fusion.positions", "fusion.layers.0.qkv.weight"])
def test_what_was_kept_in_part_is_refused(name):
    state = train(few(1)).state()
    del state[name]
    with pytest.raises(BadData, match="not of a fusion"):
        Trained.restore(state, SHAPE, few(1))


def test_what_was_kept_of_other_settings_is_refused():
    state = train(few(1)).state()
    for shape, settings in ((SHAPE, few(1, width=16)), ((4, 8, 4), few(1)), (SHAPE, few(1, layers=2))):
        with pytest.raises(BadData, match="not of a fusion"):
            Trained.restore(state, shape, settings)


def test_rows_are_epochs_of_permutations():
    seen = []

    def fetch(rows, generator):
        seen.append((rows, torch.rand(3, generator=generator)))
        return LATENTS[rows]

    train(few(5, batch_size=12), fetch=fetch)
    rows = [row for row, _ in seen]
    assert all(row.device.type == "cpu" and len(row) == 12 for row in rows)
    assert torch.cat(rows[:3]).sort().values.tolist() == list(range(36))
    assert len(set(torch.cat(rows[3:]).tolist())) == 24
    assert not torch.equal(rows[0], rows[3])
    assert not torch.equal(seen[0][1], seen[1][1])  # what fetch draws is another thing at every step
    seen.clear()
    train(few(2, batch_size=100), fetch=fetch)
    assert [len(row) for row, _ in seen] == [36, 36]


def spied(monkeypatch, settings):
    """Text states as the fusion sees them, and the clean ones of the same step."""
    seen, forward = [], FusionModule.forward

    def spy(self, latents, texts):
        seen.append(texts.detach().clone())
        return forward(self, latents, texts)

    monkeypatch.setattr(FusionModule, "forward", spy)
    trained = train(settings)
    return trained, torch.stack(seen)


def test_text_is_dropped_for_whole_batches(monkeypatch):
    _, seen = spied(monkeypatch, few(60, drop_text=0.2, batch_size=6))
    gone = (seen == 0).flatten(1).all(1)
    assert 4 <= int(gone.sum()) <= 24
    assert (seen[~gone] != 0).flatten(2).any(2).all()  # never for a part of a batch


def test_text_is_thinned_and_blurred(monkeypatch):
    settings = few(1, drop_text=0.0, text_dropout=0.25, text_noise=0.0, batch_size=36)
    _, seen = spied(monkeypatch, settings)
    _, clean = spied(monkeypatch, few(1, drop_text=0.0, text_dropout=0.0, text_noise=0.0, batch_size=36))
    kept = seen != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(seen[kept], clean[kept] / 0.75)
    _, noisy = spied(monkeypatch, few(1, drop_text=0.0, text_dropout=0.0, text_noise=0.5, batch_size=36))
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.05)


def test_dropped_text_is_still_what_latents_align_with():
    """The target of the contrastive loss is clean: it falls although the fusion never sees a word."""
    first, last = train(few(60, drop_text=1.0)).losses["contrastive"]
    assert last < first - 0.3


def test_each_part_has_a_step_size_of_its_own(monkeypatch):
    groups = []

    class Spy(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            groups.extend(self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    trained = train(few(1, lr=1e-3, lr_projector=2e-3, lr_text=3e-3, weight_decay=0.5))
    assert [group["lr"] for group in groups] == [1e-3, 2e-3, 3e-3]
    assert [group["weight_decay"] for group in groups] == [0.5] * 3
    assert sum(part.numel() for part in groups[0]["params"]) == count(trained.fusion)


def test_the_gradient_of_all_parts_together_is_clipped(monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *arguments):
        grads = [part.grad for group in self.param_groups for part in group["params"]]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(few(3, clip=1e-3))
    assert [float(norm) for norm in norms] == pytest.approx([1e-3] * 3, rel=1e-3)


def test_whoever_watches_may_stop_it():
    class EnoughError(Exception):
        pass

    def watch(step, metrics):
        if step == 1:
            raise EnoughError

    before = torch.get_rng_state()
    with pytest.raises(EnoughError):
        train(watch=watch)
    assert torch.equal(before, torch.get_rng_state())


def test_what_it_cannot_learn_from():
    with pytest.raises(BadData, match="at least one image"):
        train(targets=TARGETS[:0])
    with pytest.raises(BadData, match="3 classes"):
        train(targets=TARGETS + 1)
    with pytest.raises(ShapeMismatch, match="fetched latents"):
        train(fetch=lambda rows, generator: LATENTS[rows, :2])
    with pytest.raises(Diverged, match="iteration 0"):
        train(few(2), fetch=lambda rows, generator: LATENTS[rows] * torch.nan)


def test_a_text_encoder_that_is_not_there(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(MissingWeights):
        train(few(1, text=str(tmp_path), text_width=128))


def test_frozen_text_comes_from_the_prompts(monkeypatch):
    asked = []

    def states(where, prompts, **options):
        asked.append((where, prompts, options))
        from dsdistill.generative.text import TextStates

        generator = torch.Generator().manual_seed(0)
        return TextStates(torch.randn(3, 9, 20, generator=generator), torch.tensor([2, 3, 4]))

    monkeypatch.setattr("dsdistill.generative.fusing.clip_states", states)
    settings = few(3, text="a/clip", text_width=128, template="a photo of {}", revision="01", download=True)
    trained = train(settings)
    prompts = ("a photo of red", "a photo of green", "a photo of blue")
    assert asked == [("a/clip", prompts, {"revision": "01", "download": True, "device": torch.device("cpu")})]
    assert torch.equal(trained.texts.states, states(*asked[0][:2]).states)
    assert trained.fusion.text.in_features == 20
    assert same(trained, Trained.restore(trained.state(), SHAPE, settings))
