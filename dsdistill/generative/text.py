"""Where the words come from: token states of the prompts of all classes, for the fusion of EVLF (arXiv 2603.07476).

The paper takes the last hidden states of CLIP's text encoder (Radford et al., Learning Transferable Visual Models From
Natural Language Supervision, arXiv 2103.00020), e (T, D) for each prompt, and as the vector of a class the state at the
end of the text::

    t_y = e_y[first end-of-text token]

CLIP pads with the end-of-text token. The authors' code looks for the last such token and so finds padding, always
position 76; here it is the first. `clip_states` gives these states where a pretrained encoder is at hand, `ByteText`
stands in for it where there is none.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from dsdistill.core.rng import isolated_global_rng
from dsdistill.data.imagenet import worded
from dsdistill.errors import InvalidSetting, MissingExtra
from dsdistill.generative.weights import Place, first_line, loaded, located, quiet

BEGIN, END = 256, 257
"""Tokens of `ByteText` beside the 256 bytes."""
HEADS = 4
"""Of the attention of `ByteText`; its width is a multiple of it."""
_CLIP = "a CLIP text encoder"
_LEAST_WORDS = 512  # every vocabulary of CLIP has each byte twice: inside a word and at its end
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_OTHER_PARTS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class TextStates(NamedTuple):
    """Token states of K prompts."""

    states: Tensor
    """(K, T, D), float32."""
    ends: Tensor
    """(K,) int64, on the same device: position of the first end-of-text token of each prompt."""

    def vectors(self) -> Tensor:
        """(K, D): the state of each prompt at its end."""
        return self.states[torch.arange(len(self.states), device=self.ends.device), self.ends]

    def of(self, classes: Tensor) -> "TextStates":
        """The states of some prompts, (B,) int64 on any device, in that order."""
        return TextStates(*(part[classes.to(part.device)] for part in self))


def prompts_of(classes: Sequence[str], template: str = "{}") -> tuple[str, ...]:
    """The prompt of each class: its name in the place of ``{}``, and for a WordNet id of ImageNet what that means.

    Raises:
        InvalidSetting: the template has no such place, or several.
    """
    if template.count("{}") != 1:
        raise InvalidSetting("template", template, "it needs exactly one {}, where the name of the class goes")
    return tuple(template.replace("{}", name) for name in worded(classes))


class ByteText(nn.Module):
    """A small encoder of prompts that is trained together with what uses it; the default without pretrained weights.

    It has no knowledge of language: it tells names apart by their letters. That "tabby" and "tiger cat" are both cats
    is nothing it could know, and similar spelling makes similar states before training. Equal prompts stay equal.

    A prompt is the bytes of its UTF-8 text between a begin and an end token, padded with the end token to the longest
    of all prompts. Bytes beyond ``max_length`` tokens are cut off, the end token stays. Pre-norm transformer layers are
    causal, as in CLIP: the state of a token depends on nothing behind it, and so not on the padding.

    Attributes:
        tokens: (K, T) int64. ends: (K,) int64, the first end token of each prompt.

    Args:
        prompts: of all classes, in their order.
        width: D of the states; a multiple of `HEADS`.
        layers: of the transformer.
        max_length: most tokens of a prompt, begin and end among them.
        generator: gives the initial weights.

    Raises:
        InvalidSetting: no prompts, an argument out of range, or different prompts that are the same once cut.
    """

    tokens: Tensor
    ends: Tensor

    def __init__(
        self,
        prompts: Sequence[str],
        width: int = 128,
        *,
        layers: int = 2,
        max_length: int = 128,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if width < 1 or width % HEADS:
            raise InvalidSetting("width", width, f"a multiple of {HEADS}, the heads of its attention")
        if layers < 1:
            raise InvalidSetting("layers", layers, "at least 1")
        tokens, ends = byte_tokens(prompts, max_length)
        self.register_buffer("tokens", tokens)
        self.register_buffer("ends", ends)
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        # Always on the CPU, so that weights do not depend on the device; modules know no generator.
        with isolated_global_rng(torch.device("cpu")):
            torch.default_generator.manual_seed(seed)
            self.table = nn.Embedding(256 + 2, width)
            self.positions = nn.Parameter(torch.randn(tokens.shape[1], width))
            self.layers = nn.ModuleList(_CausalLayer(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width)

    def forward(self, classes: Tensor | None = None) -> TextStates:
        """States of all prompts, or of those of some classes, (B,) int64 on any device, in that order."""
        tokens, ends = self.tokens, self.ends
        if classes is not None:
            chosen = classes.to(tokens.device)
            tokens, ends = tokens[chosen], ends[chosen]
        states = self.table(tokens) + self.positions
        for layer in self.layers:
            states = layer(states)
        return TextStates(self.norm(states), ends)


class _CausalLayer(nn.Module):
    """x + attention(norm x), then x + MLP(norm x); no token sees one behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(states)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.joined(seen.transpose(1, 2).flatten(2))
        more: Tensor = self.narrow(gelu(self.wide(self.norm2(states))))
        return states + more


def byte_tokens(prompts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Tokens (K, T) int64 of prompts, T at most ``max_length``, and the position (K,) of the first end of each.

    Raises:
        InvalidSetting: there are no prompts, ``max_length`` is below 3, or it makes different prompts the same.
    """
    if not prompts:
        raise InvalidSetting("prompts", prompts, "at least one")
    if max_length < 3:
        raise InvalidSetting("max_length", max_length, "at least 3: the begin, the end, and a letter")
    # A lone surrogate, which file names can have, is no UTF-8: it gets bytes too instead of an error.
    written = [tuple(prompt.encode("utf-8", "surrogatepass")[: max_length - 2]) for prompt in prompts]
    if len(set(written)) < len(set(prompts)):
        raise InvalidSetting("max_length", max_length, "enough tokens to tell the prompts apart: some begin alike")
    longest = max(map(len, written)) + 2
    rows = [[BEGIN, *letters] + [END] * (longest - 1 - len(letters)) for letters in written]
    return torch.tensor(rows), torch.tensor([len(letters) + 1 for letters in written])


def clip_states(
    where: str | Path,
    prompts: Sequence[str],
    *,
    revision: str | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> TextStates:
    """States of prompts by a frozen, pretrained CLIP text encoder: what comes out of its last layer, after its norm.

    Args:
        where: a local folder or an id of the Hugging Face Hub, with the files of CLIP itself or with ``text_encoder/``
            and ``tokenizer/`` as diffusers lays them out. Weights are read from safetensors only, never from pickles.
        prompts: of all classes; each is cut to the positions that the model has (77), its end token is kept.
        revision: of the id: a commit.
        download: let files be fetched that are not in the local cache of the Hub.
        device: where the states are made, and stay.

    Returns:
        States (K, T, D) with T the positions of the model.

    Raises:
        InvalidSetting: there are no prompts.
        MissingExtra: transformers is not installed.
        MissingWeights: files are missing, incomplete, of another make, or hold numbers that are not finite.
    """
    if not prompts:
        raise InvalidSetting("prompts", prompts, "at least one")
    place = clip_place(where, revision=revision, download=download)
    parts = ("text_encoder", "tokenizer") if (place.folder / "text_encoder").is_dir() else ("", "")
    return states_of(place, prompts, torch.device(device), *parts)


def clip_place(where: str | Path, *, revision: str | None = None, download: bool = False) -> Place:
    """The folder of a CLIP text encoder; arguments and errors as of `clip_states`."""
    files = [f"{folder}{name}" for folder in ("", "text_encoder/", "tokenizer/") for name in _FILES]
    expected = (
        "config.json, model.safetensors and tokenizer.json (or vocab.json and merges.txt), in one folder or in "
        "text_encoder/ and tokenizer/"
    )
    instead = "with text=None letters are learned instead"
    return located(_CLIP, where, files, expected=expected, instead=instead, revision=revision, download=download)


def states_of(place: Place, prompts: Sequence[str], device: torch.device, model: str, tokenizer: str) -> TextStates:
    """States of prompts by the encoder in a folder of a place, with the tokenizer in another.

    Raises:
        MissingExtra: transformers is not installed.
        MissingWeights: files are missing, incomplete, of another make, or hold numbers that are not finite.
    """
    try:
        library = import_module("transformers")
    except ImportError as error:
        raise MissingExtra("transformers", "text", _CLIP) from error
    network = loaded(place, library.CLIPTextModel.from_pretrained, model, "dtype", _OTHER_PARTS)
    length = int(network.config.max_position_embeddings)
    if not (place.folder / tokenizer).is_dir():
        raise place.missing(f"it has no folder {tokenizer}/")
    with quiet():
        try:
            reader = library.CLIPTokenizer.from_pretrained(
                str(place.folder / tokenizer), model_max_length=length, local_files_only=True
            )
        except Exception as error:  # absent, truncated: each has an error of its own
            raise place.missing(f"{tokenizer or 'its tokenizer'}: {first_line(error)}") from error
        tokens, ends = _clip_tokens(reader, list(prompts), length, place)
    network.to(device)
    with torch.no_grad():
        parts = [network(input_ids=part).last_hidden_state for part in torch.split(tokens.to(device), 64)]
    states = torch.cat(parts).float()
    if not bool(states.isfinite().all()):
        raise place.missing("its weights give states that are not finite")
    return TextStates(states, ends.to(device))


def _clip_tokens(tokenizer: Any, prompts: list[str], length: int, place: Place) -> tuple[Tensor, Tensor]:
    """Tokens (K, length) and their first ends (K,).

    Without its files the tokenizer comes up with a vocabulary of its two special tokens, in which all words are the
    same, and says nothing: for an id that is not in the cache too.
    """
    if len(tokenizer) < _LEAST_WORDS:
        raise place.missing(f"the tokenizer knows {len(tokenizer)} tokens: its files are not there")
    told = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = told["input_ids"]
    is_end = tokens == tokenizer.eos_token_id
    ends = is_end.int().argmax(1)
    if not bool((ends == told["attention_mask"].sum(1) - 1).all()):  # unknown words become the end token as well
        raise place.missing("the tokenizer does not know some of the letters, or a prompt contains its end token")
    return tokens, ends
