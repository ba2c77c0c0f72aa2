"""Tiny pretrained models with random weights, saved in the formats of real ones."""

import json
import math

import torch
from torch import nn

NAMES = {0: "tench, Tinca tinca", 1: "chain saw", 2: "crane", 3: "crane", 4: "class 1"}


def autoencoder(seed=0, latent_channels=4):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        )


def dit(folder, classes=5, **options):
    """A DiT for latents of 8 x 8, as its pipeline is saved."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = DiTTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "out_channels": 8,
                "num_layers": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": classes,
                **options,
            }
        )
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    DiTPipeline(network, autoencoder(), scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": NAMES}))
    return folder


def stable_diffusion(folder):
    """A U-Net for latents of 8 x 8 and prompts, as its pipeline is saved."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    text, tokenizer = clip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(autoencoder(), text, tokenizer, network, scheduler, **options)
    pipeline.save_pretrained(folder)
    return folder


def clip():
    """A random text encoder and the smallest tokenizer of CLIP: all bytes, no merges."""
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs = list(bytes_to_unicode().values())
    words = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPTextModel(config), tokenizer


class ReferenceDiT(nn.Module):
    """The transformer of Peebles & Xie as they name its parts, step by step."""

    def __init__(self, classes=3, grid=4, patch=2, channels=4, width=128, depth=2):
        super().__init__()
        self.patch, self.width, self.heads, self.out = patch, width, width // 64, 2 * channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(positions(grid // patch, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}),
                    "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
                }
            )
            for _ in range(depth)
        )
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch**2 * self.out),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, noisy, times, classes):
        count, _, grid, _ = noisy.shape
        tokens = self.x_embedder["proj"](noisy).flatten(2).transpose(1, 2) + self.pos_embed
        waves = times[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        told = self.t_embedder["mlp"](torch.cat([waves.cos(), waves.sin()], 1))
        told = told + self.y_embedder["embedding_table"](classes)
        for block in self.blocks:
            shift, scale, gate, shift2, scale2, gate2 = block["adaLN_modulation"](told)[:, None].chunk(6, 2)
            seen = self.normed(tokens) * (1 + scale) + shift
            tokens = tokens + gate * self.attention(block["attn"], seen)
            seen = self.normed(tokens) * (1 + scale2) + shift2
            inner = nn.functional.gelu(block["mlp"]["fc1"](seen), approximate="tanh")
            tokens = tokens + gate2 * block["mlp"]["fc2"](inner)
        shift, scale = self.final_layer["adaLN_modulation"](told)[:, None].chunk(2, 2)
        tokens = self.final_layer["linear"](self.normed(tokens) * (1 + scale) + shift)
        side = grid // self.patch
        result = torch.empty(count, self.out, grid, grid)
        for place in range(side**2):
            row, column = divmod(place, side)
            cut = tokens[:, place].view(count, self.patch, self.patch, self.out).permute(0, 3, 1, 2)
            rows = slice(row * self.patch, (row + 1) * self.patch)
            result[:, :, rows, column * self.patch : (column + 1) * self.patch] = cut
        return result

    def normed(self, tokens):
        return (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attention(self, part, tokens):
        count, number, width = tokens.shape
        query, key, value = part["qkv"](tokens).view(count, number, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        found = (query @ key.transpose(2, 3) / 8).softmax(3) @ value
        return part["proj"](found.transpose(1, 2).reshape(count, number, width))


def positions(side, width):
    """Sines and cosines of the column, then of the row."""
    speeds = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    parts = [wave(place.reshape(-1, 1) * speeds) for place in (columns, rows) for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, 1).float()
