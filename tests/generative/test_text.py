"""Where words come from: letters, and CLIP read from files in their real format."""

import json
import shutil
import sys

import pytest
import torch
from generative import pipelines

from dsdistill.data.imagenet import wnids
from dsdistill.errors import InvalidSetting, MissingExtra, MissingWeights
from dsdistill.generative.text import BEGIN, END, ByteText, byte_tokens, clip_states, prompts_of

NAMES = ["tench, Tinca tinca", "chain saw", "水"]


def letters(prompts, seed=0, **options):
    return ByteText(prompts, 16, generator=torch.Generator().manual_seed(seed), **options)


def test_prompts_put_the_name_into_the_template():
    assert prompts_of(["a", "{}"], "a photo of {}, {0}") == ("a photo of a, {0}", "a photo of {}, {0}")
    assert prompts_of(["a"]) == ("a",)


def test_ids_of_imagenet_are_put_into_words():
    assert prompts_of(["n01440764", "cat", "n02134084"], "a {}") == ("a tench", "a cat", "a ice bear")
    assert len(wnids()) == len(set(wnids())) == 1000
    assert list(wnids()) == sorted(wnids())


@pytest.mark.parametrize("template", ["", "photo", "{} or {}", "{0}"])
def test_a_template_has_exactly_one_place(template):
    with pytest.raises(InvalidSetting, match="exactly one"):
        prompts_of(["a"], template)


def test_bytes_between_begin_and_end_padded_with_end():
    tokens, ends = byte_tokens(["abc", "é"], 20)
    assert tokens.tolist() == [[BEGIN, 97, 98, 99, END], [BEGIN, 0xC3, 0xA9, END, END]]
    assert ends.tolist() == [4, 3]


def test_the_end_is_the_first_end_token():
    tokens, ends = byte_tokens([*NAMES, ""], 128)
    for row, end in zip(tokens.tolist(), ends.tolist(), strict=True):
        assert row.index(END) == end
    assert ends.tolist() == [len(name.encode()) + 1 for name in [*NAMES, ""]]


def test_what_is_cut_off_leaves_the_end():
    tokens, ends = byte_tokens(["abcdef", "b"], 5)
    assert tokens.tolist() == [[BEGIN, 97, 98, 99, END], [BEGIN, 98, END, END, END]]
    assert ends.tolist() == [4, 2]


def test_a_character_may_be_cut_in_two_and_any_text_has_bytes():
    tokens, _ = byte_tokens(["水水"], 6)
    assert tokens.tolist() == [[BEGIN, *"水".encode(), "水".encode()[0], END]]
    assert byte_tokens(["\udcff"], 9)[1].tolist() == [4]


def test_different_prompts_may_not_become_the_same():
    with pytest.raises(InvalidSetting, match="begin alike"):
        byte_tokens(["abcd", "abce"], 5)
    tokens, _ = byte_tokens(["crane", "crane"], 5)  # the same from the beginning: two classes of ImageNet
    assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.parametrize(
    ("prompts", "options"), [([], {}), (["a"], {"max_length": 2}), (["a"], {"layers": 0}), (["a"], {"width": 6})]
)
def test_arguments_out_of_range(prompts, options):
    with pytest.raises(InvalidSetting):
        ByteText(prompts, **{"width": 16, "generator": torch.Generator(), **options})


def test_shapes_and_the_states_of_some_classes():
    encoder = letters(NAMES)
    every = encoder()
    assert every.states.shape == (3, 20, 16)
    assert every.states.dtype == torch.float32
    assert every.ends.dtype == torch.int64
    some = encoder(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(some.states, every.states[[2, 0, 2]])
    assert some.ends.tolist() == every.ends[[2, 0, 2]].tolist()
    taken = every.of(torch.tensor([2, 0, 2]))
    assert torch.equal(taken.states, every.states[[2, 0, 2]])
    assert torch.equal(taken.ends, some.ends)


def test_vectors_are_the_states_at_the_ends():
    found = letters(NAMES)()
    by_hand = torch.stack([states[end] for states, end in zip(found.states, found.ends.tolist(), strict=True)])
    assert torch.equal(found.vectors(), by_hand)
    assert not torch.equal(found.vectors()[1], found.states[1, -1])  # padding is another token


def test_different_names_differ_and_order_of_letters_counts():
    vectors = letters(["cat", "act", "cap", "Cat"])().vectors()
    distances = torch.cdist(vectors, vectors) + torch.eye(4)
    assert distances.min() > 1e-2


def test_no_state_sees_what_is_behind_it():
    """A longer name of another class pads this one further, and changes nothing in it."""
    alone, beside = letters(["cat"]), letters(["cat", "a much longer name"])
    for part, own in zip(beside.parameters(), alone.parameters(), strict=True):
        part.data[: len(own)] = own.data  # all are as large but the positions, which are more
    assert beside().states.shape[1] == 20
    torch.testing.assert_close(beside().states[0, :5], alone().states[0])


def test_weights_are_of_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = letters(NAMES, 1), letters(NAMES, 1), letters(NAMES, 2)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.table.weight, other.table.weight)
    assert not torch.equal(first.positions, other.positions)


def test_every_weight_learns():
    encoder = letters(NAMES)
    encoder().vectors().pow(3).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a random text encoder and the smallest tokenizer of CLIP: all bytes, no merges."""
    pytest.importorskip("transformers")
    model, tokenizer = pipelines.clip()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(clip, tmp_path):
    return shutil.copytree(clip, tmp_path / "clip")


def edit(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_clip_states_are_the_last_hidden_states(clip):
    from transformers import CLIPTextModel

    found = clip_states(clip, ["ab c", "x" * 200], device="cpu")
    assert found.states.shape == (2, 77, 16)
    assert found.states.dtype == torch.float32
    assert not found.states.requires_grad
    # "ab" is a, b at the end of a word; then c at the end of a word. Cut at 77, with the end kept.
    assert found.ends.tolist() == [4, 76]
    vocabulary = json.loads((clip / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [512, vocabulary["a"], vocabulary["b</w>"], vocabulary["c</w>"], *[513] * 73]
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip, local_files_only=True).eval()(torch.tensor([ids]))[0]
    torch.testing.assert_close(found.states[:1], expected)
    # The state at the first end is not that of padding, which the authors' code takes.
    assert (found.vectors()[0] - found.states[0, -1]).abs().max() > 1e-2


def test_clip_leaves_the_global_generators_alone(clip):
    before = torch.get_rng_state()
    clip_states(clip, ["a"])
    assert torch.equal(before, torch.get_rng_state())


def test_clip_as_diffusers_lays_it_out(clip, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    for path in clip.iterdir():
        shutil.copy(path, tmp_path / ("tokenizer" if "tokenizer" in path.name else "text_encoder"))
    assert torch.equal(clip_states(str(tmp_path), ["a b"]).states, clip_states(clip, ["a b"]).states)


def test_clip_with_the_files_that_older_versions_wrote(clip, copy):
    """vocab.json and merges.txt, keys under text_model, the image half of CLIP beside the text half."""
    told = json.loads((copy / "tokenizer.json").read_text())["model"]
    for path in copy.glob("tokenizer*"):
        path.unlink()
    (copy / "vocab.json").write_text(json.dumps(told["vocab"]))
    (copy / "merges.txt").write_text("#version: 0.2\n")

    def change(tensors):
        for name in list(tensors):
            tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["vision_model.class_embedding"] = torch.zeros(3)
        tensors["logit_scale"] = torch.zeros(())

    edit(copy, change)
    assert torch.equal(clip_states(copy, ["a b"]).states, clip_states(clip, ["a b"]).states)


def refused(where, reason, prompts=("a",), **options):
    with pytest.raises(MissingWeights, match=reason) as caught:
        clip_states(where, list(prompts), **options)
    assert str(where) in caught.value.tried
    assert "model.safetensors" in caught.value.expected
    return caught.value


def test_a_folder_that_is_not_there(tmp_path):
    error = refused(tmp_path / "nothing", "no such folder")
    assert "download" not in error.allowed  # nothing that could be fetched is called so
    assert "text=None" in error.allowed


def test_an_id_that_is_not_in_the_cache_is_not_asked_for(clip, monkeypatch):
    import socket

    def no_network(*arguments):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    error = refused("nobody/no-such-encoder", "at 0123abc", revision="0123abc")
    assert "AssertionError" not in str(error)
    assert "setting download (true)" in error.allowed


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "safetensors")


def test_pickled_weights_are_not_read(copy):
    from safetensors.torch import load_file

    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(copy, "safetensors")


def test_truncated_weights(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    refused(copy, "SafetensorError")


def test_incomplete_weights(copy):
    edit(copy, lambda tensors: tensors.pop(next(name for name in tensors if "fc1.weight" in name)))
    refused(copy, "1 missing keys.*fc1.weight")


def test_weights_with_more_in_them(copy):
    edit(copy, lambda tensors: tensors.update({"adapter.weight": torch.zeros(2)}))
    refused(copy, "1 unexpected keys.*adapter.weight")


def test_weights_of_another_shape(copy):
    edit(copy, lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3)}))
    refused(copy, "RuntimeError|mismatched")


def test_weights_that_are_not_finite(copy):
    edit(copy, lambda tensors: next(part for name, part in tensors.items() if "final" in name).fill_(torch.nan))
    refused(copy, "not finite")


def test_a_tokenizer_without_its_files_knows_two_words(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    refused(copy, "the tokenizer knows|OSError")


def test_a_vocabulary_that_lacks_letters(copy):
    path = copy / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["zzz</w>"] = vocabulary.pop("q</w>")
    path.write_text(json.dumps(told))
    clip_states(copy, ["abc"])
    refused(copy, "does not know", ["abc", "iraq"])


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"dsdistill\[text\]") as caught:
        clip_states(tmp_path, ["a"])
    assert (caught.value.package, caught.value.extra) == ("transformers", "text")


def test_clip_wants_prompts(tmp_path):
    with pytest.raises(InvalidSetting, match="at least one"):
        clip_states(tmp_path, [])
