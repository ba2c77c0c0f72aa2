"""Where the words come from: token states of the prompts of all classes, for the fusion of EVLF (arXiv 2603.07476).

The paper takes the last hidden states of CLIP's text encoder (Radford et al., Learning Transferable Visual Models From
Natural Language Supervision, arXiv 2103.00020), e (T, D) for each prompt, and as the vector of a class the state at the
end of the text::

    t_y = e_y[first end-of-text token]

CLIP pads with the end-of-text token. The authors' code looks for the last such token and so finds padding, always
position 76; here it is the first. `clip_states` gives these states where a pretrained encoder is at hand, `ByteText`
stands in for it where there is none.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from dsdistill.core.rng import isolated_global_rng, seed_global
from dsdistill.errors import InvalidSetting, MissingExtra, MissingWeights

BEGIN, END = 256, 257
"""Tokens of `ByteText` beside the 256 bytes."""
HEADS = 4
"""Of the attention of `ByteText`; its width is a multiple of it."""
_CLIP = "a CLIP text encoder"
_LEAST_WORDS = 512  # every vocabulary of CLIP has each byte twice: inside a word and at its end
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
    """The prompt of each class: its name in the place of ``{}``.

    Raises:
        InvalidSetting: the template has no such place, or several.
    """
    if template.count("{}") != 1:
        raise InvalidSetting("template", template, "it needs exactly one {}, where the name of the class goes")
    return tuple(template.replace("{}", name) for name in classes)


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
    resolved = torch.device(device)
    with _quiet(), isolated_global_rng(torch.device("cpu")):  # libraries draw weights before they read them
        seed_global(0, torch.device("cpu"))
        model, tokenizer = _load(where, revision, download)
    length = int(model.config.max_position_embeddings)
    tokens, ends = _clip_tokens(tokenizer, list(prompts), length, lambda why: _missing(where, revision, download, why))
    model.to(resolved).eval().requires_grad_(False)
    with torch.no_grad():
        parts = [model(input_ids=part).last_hidden_state for part in torch.split(tokens.to(resolved), 64)]
    states = torch.cat(parts).float()
    if not bool(states.isfinite().all()):
        raise _missing(where, revision, download, "its weights give states that are not finite")
    return TextStates(states, ends.to(resolved))


def _load(where: str | Path, revision: str | None, download: bool) -> tuple[Any, Any]:
    """Model and tokenizer of the first layout that is there. Errors as in `clip_states`."""
    try:
        library = import_module("transformers")
    except ImportError as error:
        raise MissingExtra("transformers", "text", _CLIP) from error
    folder = Path(where).expanduser()
    local = folder.is_dir()
    layouts = [("", ""), ("text_encoder", "tokenizer")]
    if local:
        layouts = [layouts[(folder / "text_encoder").is_dir()]]
    common: dict[str, Any] = {"local_files_only": local or not download}
    if not local:
        common["revision"] = revision
    problems = []
    for of_model, of_tokenizer in layouts:
        name = str(folder) if local else str(where)
        try:
            model, told = library.CLIPTextModel.from_pretrained(
                name,
                subfolder=of_model,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                **common,
            )
            positions = model.config.max_position_embeddings
            tokenizer = library.CLIPTokenizer.from_pretrained(
                name, subfolder=of_tokenizer, model_max_length=positions, **common
            )
        except Exception as error:  # absent, offline, truncated, of another shape: each has an error of its own
            problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        wrong = _not_whole(told)
        if wrong:
            raise _missing(where, revision, download, wrong)
        return model, tokenizer
    raise _missing(where, revision, download, problems[0])


def _not_whole(told: dict[str, Any]) -> str:
    """What is wrong with loaded weights, of which the library only warns; nothing if they are whole."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(map(str, told.get(kind, ())))
        if kind == "unexpected_keys":  # the other half of CLIP, and a table that older versions saved
            keys = [key for key in keys if not key.startswith(_OTHER_PARTS) and not key.endswith("position_ids")]
        if keys:
            return f"{len(keys)} {kind.replace('_', ' ')}, {keys[0]} first"
    return ""


def _clip_tokens(tokenizer: Any, prompts: list[str], length: int, missing: Any) -> tuple[Tensor, Tensor]:
    """Tokens (K, length) and their first ends (K,); ``missing`` makes an error of a reason.

    Without its files the tokenizer comes up with a vocabulary of its two special tokens, in which all words are the
    same, and says nothing: for an id that is not in the cache too.
    """
    if len(tokenizer) < _LEAST_WORDS:
        raise missing(f"the tokenizer knows {len(tokenizer)} tokens: its files are not there")
    told = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = told["input_ids"]
    is_end = tokens == tokenizer.eos_token_id
    ends = is_end.int().argmax(1)
    if not bool((ends == told["attention_mask"].sum(1) - 1).all()):  # unknown words become the end token as well
        raise missing("the tokenizer does not know some of the letters, or a prompt contains its end token")
    return tokens, ends


def _missing(where: str | Path, revision: str | None, download: bool, problem: str) -> MissingWeights:
    tried = f"{str(where)!r}{f' at {revision}' if revision else ''}"
    expected = (
        f"{problem}; expected are config.json, model.safetensors and tokenizer.json (or vocab.json and merges.txt), "
        "in one folder or in text_encoder/ and tokenizer/"
    )
    allowed = "" if download else "nothing was downloaded: that needs download=True; "
    return MissingWeights(_CLIP, tried, expected, f"{allowed}with text=None letters are learned instead")


@contextmanager
def _quiet() -> Iterator[None]:
    """No tables of the library about weights: what matters of them is raised."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
