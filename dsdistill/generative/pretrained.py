"""Pretrained diffusion models: DiT and Stable Diffusion as diffusers saves them, and DiT as its authors published it.

========================  ===================================================================================
a pipeline folder or id   model_index.json, vae/, scheduler/, and transformer/ (DiT), or unet/, text_encoder/
                          and tokenizer/ (Stable Diffusion)
a checkpoint file (.pt)   of a DiT by its authors; the autoencoder is a folder or id of its own
========================  ===================================================================================

Such models were trained on other images, perhaps on these, perhaps on their test split: sets say so in their notes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from dsdistill.core.config import validate
from dsdistill.data import ImageSource
from dsdistill.data.imagenet import wnids, worded
from dsdistill.errors import BadData, InvalidSetting
from dsdistill.generative.autoencoder import KL
from dsdistill.generative.denoiser import PREDICTIONS, ByClass, ByText, Denoiser, Schedule, without_dropped_labels
from dsdistill.generative.published import SCHEDULE, is_checkpoint, read_checkpoint
from dsdistill.generative.text import prompts_of, states_of
from dsdistill.generative.weights import Place, loaded, located
from dsdistill.networks import parameter_digest

_PIPELINES = {"DiTPipeline": "transformer", "StableDiffusionPipeline": "unet"}
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
_PART = ("config.json", *_WEIGHTS, "diffusion_pytorch_model.safetensors.index.json")
_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*",
    *(f"{folder}/{name}" for folder in ("transformer", "unet", "vae") for name in _PART),
)
_PIPELINE_FILES = (
    "model_index.json, scheduler/scheduler_config.json, and config.json and diffusion_pytorch_model.safetensors in "
    "vae/ and in transformer/ or unet/ (there also text_encoder/ and tokenizer/)"
)
_TWINS = {"crane": "crane bird", "maillot": "maillot tank suit"}
"""Names that ImageNet has twice, and what torchvision's list calls the second of each."""
_INSTEAD = "without weights small models are trained on the images themselves"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which pretrained models are loaded.

    Raises:
        InvalidSetting: a field has the wrong type or is out of range, or says nothing beside the others.
    """

    path: str
    """Folder or Hub id of a pipeline of diffusers (DiT, Stable Diffusion), or a DiT checkpoint of its authors (.pt)."""
    revision: str | None = None
    """Of a repository of the Hub: a commit."""
    autoencoder: str | None = None
    """Folder or Hub id of an AutoencoderKL; null for that of the pipeline. A checkpoint file needs one."""
    autoencoder_revision: str | None = None
    """Of its repository."""
    download: bool = False
    """Fetch from the Hub what is not in the local cache."""
    class_ids: tuple[Annotated[int, Ge(0)], ...] | None = None
    """The model's number of each class of the images, in their order, each once; null: ImageNet's are looked up."""
    side: Annotated[int, Ge(1)] | None = None
    """Pixels of the squares that are drawn; null: as the model was trained. Stable Diffusion takes others."""
    template: str = "{}"
    """Prompt of a class for Stable Diffusion, with {} for its name."""
    negative: str = ""
    """Its prompt for no class."""

    def __post_init__(self) -> None:
        ids: object = self.class_ids
        if isinstance(ids, list):
            object.__setattr__(self, "class_ids", tuple(ids))
        validate(self)
        twice = [one for one in self.class_ids or () if (self.class_ids or ()).count(one) > 1]
        if twice:
            raise InvalidSetting("Weights.class_ids", self.class_ids, f"each number once; {twice[0]} is there twice")
        if self.template.count("{}") != 1:
            raise InvalidSetting("Weights.template", self.template, "exactly one {}, where the name of the class goes")
        if is_checkpoint(self.path) and self.autoencoder is None:
            raise InvalidSetting("Weights.autoencoder", None, "a folder or id: a checkpoint of a DiT has none")
        if is_checkpoint(self.path) and self.revision is not None:
            raise InvalidSetting("Weights.revision", self.revision, "null: a checkpoint of a DiT is a file")
        if self.autoencoder is None and self.autoencoder_revision is not None:
            raise InvalidSetting("Weights.autoencoder_revision", self.autoencoder_revision, "null without autoencoder")


class Pretrained(NamedTuple):
    """What was loaded, on the CPU."""

    autoencoder: KL
    denoiser: Denoiser
    side: int
    told: str


class _Found(NamedTuple):
    """Where the parts are: ``part`` is the denoiser's folder, or "file"."""

    place: Place
    part: str
    autoencoder: Place
    autoencoder_part: str
    pipeline: Mapping[str, Any]
    """Its model_index.json."""


def check_weights(weights: Weights, source: ImageSource) -> None:
    """Look for the files, and for the classes where the model knows them by number; nothing large is read.

    Raises:
        MissingWeights: something is not there. BadData: the model does not know a class.
    """
    found = _found(weights)
    _refuse_idle(weights, found.part)
    if found.part == "transformer":
        config = _json(found.place, "transformer/config.json")
        class_ids(weights, source.classes, int(config.get("num_embeds_ada_norm") or 0), found.pipeline)


def _refuse_idle(weights: Weights, part: str) -> None:
    """Settings that say nothing to a model of this kind.

    Raises:
        InvalidSetting: for the first of them.
    """
    idle = {"class_ids": "which is told names"} if part == "unet" else {}
    if part != "unet":
        idle = dict.fromkeys(("template", "negative"), "which knows classes by number")
    for name, kind in idle.items():
        if getattr(weights, name) != getattr(Weights, name):
            raise InvalidSetting(f"Weights.{name}", getattr(weights, name), f"left out for a model {kind}")


def load_weights(weights: Weights, source: ImageSource) -> Pretrained:
    """Load them, whole and fitting each other.

    Raises:
        MissingWeights: something is not there, damaged, or of another make.
        MissingExtra: Stable Diffusion needs transformers.
        BadData: the model does not know a class. InvalidSetting: it cannot draw squares of that side.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    found = _found(weights)
    kind: dict[str, Any] = {"kind": "torch_dtype", "low_cpu_mem_usage": False}
    network: Any = loaded(found.autoencoder, AutoencoderKL.from_pretrained, found.autoencoder_part, **kind)
    if network.config.get("shift_factor") is not None:
        raise found.autoencoder.missing("its latents are shifted (shift_factor), as those of these denoisers are not")
    denoiser = _by_text(found, weights, source) if found.part == "unet" else _by_class(found, weights, source)
    autoencoder = KL(network, _side(found, weights, denoiser, network))
    if autoencoder.latent[0] != denoiser.channels:
        problem = f"its latents have {autoencoder.latent[0]} channels, the denoiser takes {denoiser.channels}"
        raise found.autoencoder.missing(problem)
    digests = denoiser.digest[:12], parameter_digest(network)[:12]
    apart = f" with the autoencoder of {found.autoencoder.tried}" if weights.autoencoder is not None else ""
    told = (
        f"drawn by the models of {found.place.tried}{apart} (digests {digests[0]}, {digests[1]}), which were trained "
        "on other images; these and those of the test split may be among them"
    )
    return Pretrained(autoencoder, denoiser, autoencoder.latent[1] * _factor(network), told)


def class_ids(weights: Weights, classes: Sequence[str], known: int, index: Mapping[str, Any]) -> tuple[int, ...]:
    """The model's number of each class.

    By ``class_ids``; else by WordNet id or name among the 1000 classes of ImageNet, or by the names in the pipeline's
    model_index.json (``id2label``). A name that is not there, or is that of several, is refused.

    Args:
        classes: names of those of the images.
        known: how many the model has.
        index: of the pipeline.

    Raises:
        InvalidSetting: ``class_ids`` are not one for each class, or beyond the model's.
        BadData: a class is unknown.
    """
    if known < len(classes):
        raise BadData(f"the model knows {known} classes, the images have {len(classes)}; take another model")
    if weights.class_ids is not None:
        given = weights.class_ids
        if len(given) != len(classes) or max(given) >= known:
            told = f"a number below {known} for each of the {len(classes)} classes, not {len(given)} up to {max(given)}"
            raise InvalidSetting("Weights.class_ids", given, told)
        return given
    table: dict[str, set[int]] = {}
    named = {int(number): str(words) for number, words in dict(index.get("id2label") or {}).items()}
    if known == len(wnids()):
        named = named or dict(enumerate(worded(wnids())))
        table = {wnid: {number} for number, wnid in enumerate(wnids())}
    for number, words in named.items():
        for word in {words, *words.split(",")}:
            table.setdefault(_plain(word), set()).add(number)
    for word, twin in _TWINS.items():
        if twin in table and word in table:
            table[word] |= table[twin]
    found = [table.get(name) or table.get(_plain(name)) or set() for name in classes]
    wrong = [
        f"{name!r}{' (several)' if ids else ''}" for name, ids in zip(classes, found, strict=True) if len(ids) != 1
    ]
    if wrong:
        raise BadData(
            f"the model knows {known} classes by number, and not which of them are {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}; give Weights.class_ids, a number for each class in the order "
            "of the images, or take a model that is told names (Stable Diffusion)"
        )
    return tuple(next(iter(ids)) for ids in found)


def _plain(word: str) -> str:
    return word.strip().replace("_", " ").lower()


def _found(weights: Weights) -> _Found:
    if is_checkpoint(weights.path):
        expected = "a checkpoint of a DiT, as DiT-XL-2-256x256.pt"
        place = Place("a DiT", weights.path, Path(weights.path).expanduser(), None, expected, _INSTEAD)
        if not place.folder.is_file():
            raise place.missing("no such file")
        part, index = "file", {}
    else:
        place = located(
            "a diffusion model",
            weights.path,
            _FILES,
            expected=_PIPELINE_FILES,
            instead=_INSTEAD,
            revision=weights.revision,
            download=weights.download,
        )
        index = _json(place, "model_index.json")
        part = _PIPELINES.get(str(index.get("_class_name")), "")
        if not part:
            raise place.missing(f"a {index.get('_class_name')}, which is none of {', '.join(_PIPELINES)}")
    if weights.autoencoder is None:
        return _Found(place, part, place, "vae", index)
    apart = located(
        "an autoencoder",
        weights.autoencoder,
        [*_PART, *(f"vae/{name}" for name in _PART)],
        expected="config.json and diffusion_pytorch_model.safetensors, in the folder or in vae/",
        instead=_INSTEAD,
        revision=weights.autoencoder_revision,
        download=weights.download,
    )
    return _Found(place, part, apart, "vae" if (apart.folder / "vae").is_dir() else "", index)


def _by_class(found: _Found, weights: Weights, source: ImageSource) -> ByClass:
    if found.part == "file":
        network, schedule = read_checkpoint(found.place), Schedule(SCHEDULE)
    else:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        make = DiTTransformer2DModel.from_pretrained
        network = loaded(found.place, make, found.part, "torch_dtype", low_cpu_mem_usage=False)
        schedule = _schedule(found.place)
    known = int(network.config.num_embeds_ada_norm)
    ids = class_ids(weights, source.classes, known, found.pipeline)
    without_dropped_labels(network)
    return ByClass(network, schedule, null=known, ids=torch.tensor(ids))


def _by_text(found: _Found, weights: Weights, source: ImageSource) -> ByText:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    make = UNet2DConditionModel.from_pretrained
    network: Any = loaded(found.place, make, found.part, "torch_dtype", low_cpu_mem_usage=False)
    prompts = [*prompts_of(source.classes, weights.template), weights.negative]
    states: Tensor = states_of(found.place, prompts, torch.device("cpu"), "text_encoder", "tokenizer").states
    wanted = network.config.cross_attention_dim
    if network.config.addition_embed_type is not None or states.shape[2] != wanted:
        raise found.place.missing(f"its denoiser takes more than states of {states.shape[2]} numbers of a prompt")
    return ByText(network, _schedule(found.place), states[:-1], states[-1])


def _schedule(place: Place) -> Schedule:
    config = _json(place, "scheduler/scheduler_config.json")
    # Flow matching has no betas, and no signal at all at its first level is nothing that samplers here divide by.
    if "beta_start" not in config or config.get("rescale_betas_zero_snr"):
        raise place.missing(f"its noise levels ({config.get('_class_name')}) are not those of a diffusion by betas")
    if config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise place.missing(f"it predicts {config['prediction_type']!r}, which is none of {', '.join(PREDICTIONS)}")
    return Schedule(config)


def _side(found: _Found, weights: Weights, denoiser: Denoiser, autoencoder: Any) -> int:
    config, factor = denoiser.network.config, _factor(autoencoder)
    trained = int(config.sample_size) * factor
    side = weights.side or trained
    step = factor * 2 ** (len(config.block_out_channels) - 1) if found.part == "unet" else trained
    if side % step or (found.part != "unet" and side != trained):
        told = f"a multiple of {step}" if found.part == "unet" else f"{trained}, as the model was trained, or null"
        raise InvalidSetting("Weights.side", side, told)
    return side


def _factor(autoencoder: Any) -> int:
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


def _json(place: Place, name: str) -> dict[str, Any]:
    try:
        told = json.loads((place.folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise place.missing(f"{name} is not there or damaged ({type(error).__name__})") from error
    if not isinstance(told, dict):
        raise place.missing(f"{name} is damaged")
    return told
