"""DiT checkpoints as their authors published them (Peebles & Xie, arXiv 2212.09748), as transformers of diffusers.

Of two things the library's transformer differs from the authors': times are embedded with frequencies 10000^(-i/128),
not 10000^(-i/127), and norms have an epsilon of 1e-6, not 1e-5. A converted checkpoint gets both as it was trained.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdistill.core.rng import isolated_global_rng
from dsdistill.generative.weights import Place, first_line, not_finite

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
"""Noise levels that they were trained with."""
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_OTHER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def read_checkpoint(place: Place) -> Any:
    """A `DiTTransformer2DModel` of a checkpoint file; of the moving average of its weights, where it has one.

    Raises:
        MissingWeights: the file is damaged, holds more than tensors, or is of another network.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of who trained it: plain values
            found = torch.load(place.folder, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is no checkpoint: torch raises whatever its bytes lead to
        raise place.missing(first_line(error)) from error
    tensors = found.get("ema", found.get("model", found)) if isinstance(found, dict) else None
    try:
        if not isinstance(tensors, Mapping):
            raise TypeError("it holds no mapping of names to tensors")
        network = converted({name: tensor.float() for name, tensor in tensors.items()})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise place.missing(f"not a checkpoint of a DiT ({first_line(error)})") from error
    wrong = not_finite(network)
    if wrong:
        raise place.missing(f"it has {wrong}")
    return network.eval().requires_grad_(False)


def converted(tensors: Mapping[str, Tensor]) -> Any:
    """The transformer of a state of the authors' ``DiT``.

    Raises:
        KeyError, RuntimeError, ValueError: tensors are missing, unknown or of another shape.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    heads = 16 if width == 1152 else width // 64  # DiT-XL has heads of 72 numbers, the others of 64
    if not heads or width % heads:
        raise ValueError(f"no DiT has a width of {width}")
    with isolated_global_rng(torch.device("cpu")):  # weights are drawn before they are replaced
        network = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=len(tensors["final_layer.linear.bias"]) // patch**2,
            num_layers=depth,
            sample_size=round(tensors["pos_embed"].shape[1] ** 0.5) * patch,
            patch_size=patch,
            num_embeds_ada_norm=len(tensors["y_embedder.embedding_table.weight"]) - 1,
            norm_eps=1e-6,
        )
    positions = network.pos_embed.pos_embed
    if not torch.allclose(tensors["pos_embed"], positions, atol=1e-5):
        raise ValueError("its positions are not the sines and cosines of a DiT")
    network.load_state_dict(_renamed(tensors, depth))
    for part in network.modules():
        if hasattr(part, "downscale_freq_shift"):
            part.downscale_freq_shift = 0
    return network


def _renamed(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """As the library names them; it has the embeddings of times and classes in every block."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, kind = name.rsplit(".", 1) if "." in name else ("", name)
        if name == "pos_embed":
            continue
        if stem in _OTHER:
            made[f"{_OTHER[stem]}.{kind}"] = tensor
        elif stem in _EMBEDDED:
            blocks = range(depth)
            made |= {f"transformer_blocks.{block}.norm1.emb.{_EMBEDDED[stem]}.{kind}": tensor for block in blocks}
        else:
            _, block, inner = stem.split(".", 2)
            if inner == "attn.qkv":
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    made[f"transformer_blocks.{block}.attn1.to_{letter}.{kind}"] = part
            else:
                made[f"transformer_blocks.{block}.{_BLOCK[inner]}.{kind}"] = tensor
    return made


def is_checkpoint(where: str) -> bool:
    """Whether a name is that of a checkpoint file."""
    return Path(where).suffix in (".pt", ".pth")
