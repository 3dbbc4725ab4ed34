"""Small models on which the tests run: named builders of the same model in any number of random instances.

``MODELS`` are the architectures that fxfusion promises to handle; ``ADVERSARIAL`` are plain torch modules,
each built around one construct that inference could get wrong. Normalisation weights, biases, layer scales
and batch statistics are random: a zero or a one there would hide a transport that forgot them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

import fxfusion
from fxfusion.passes.normalize import Normalize
from fxfusion.passes.propagate import Propagate
from fxfusion.state import FusionState, state_of

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Zoo:
    """How to make one model: ``build()`` an instance, ``inputs(batch)`` to call it with."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Args, Kwargs]]


@dataclasses.dataclass(frozen=True)
class Gold:
    """What inference must find, at least: free spaces, how many nest, sum of sizes, covered fraction."""

    spaces: int
    wreath: int
    hidden: int
    covered: float


def perturb(model: nn.Module) -> nn.Module:
    """Make every vector and every zero tensor of a model random, and put it into evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 and name.endswith(("weight", "gamma", "scale")):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif parameter.ndim <= 1 or not parameter.any():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a random instance of a model, always the same for one seed."""
    torch.manual_seed(seed)
    return perturb({**MODELS, **ADVERSARIAL}[name].build())


def inputs(name: str, batch: int = 2, seed: int = 0) -> tuple[Args, Kwargs]:
    """Return inputs of a model, always the same for one seed."""
    torch.manual_seed(1000 + seed)
    return {**MODELS, **ADVERSARIAL}[name].inputs(batch)


@functools.cache
def planned(name: str) -> FusionState:
    """Return capture and plan of a model with its weights of seed 0; made once, as capture is slow."""
    args, kwargs = inputs(name)
    module = fxfusion.prepare(build(name), args, kwargs)
    return state_of(PassManager([Normalize(), Propagate()])(module).graph_module, "plan", "Propagate")


def outputs_of(model: Callable[..., Any], args: Args, kwargs: Kwargs) -> torch.Tensor:
    """Return the main output of a model."""
    with torch.no_grad():
        output = model(*args, **kwargs)
    if isinstance(output, torch.Tensor):
        return output
    found = output["logits"] if "logits" in output else output[0]
    assert isinstance(found, torch.Tensor)
    return found


# -- architectures ------------------------------------------------------------------------------


def _timm(name: str) -> Zoo:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10)

    return Zoo(make, lambda batch: ((torch.randn(batch, 3, 224, 224),), {}))


def _transformer(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        found = getattr(transformers, config)(**options)
        return getattr(transformers, model)(found)

    return make


def _ids(batch: int, length: int = 12) -> torch.Tensor:
    return torch.randint(5, 100, (batch, length))


def _encoder(batch: int) -> tuple[Args, Kwargs]:
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[-1, -3:] = 0
    return (), {"input_ids": _ids(batch), "attention_mask": mask}


def _decoder(batch: int) -> tuple[Args, Kwargs]:
    return (), {"input_ids": _ids(batch), "use_cache": False}


def _encoder_decoder(batch: int) -> tuple[Args, Kwargs]:
    return (), {"input_ids": _ids(batch), "decoder_input_ids": _ids(batch, 7), "use_cache": False}


_BERT_LIKE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}

MODELS: dict[str, Zoo] = {
    "resnet18": _timm("resnet18"),
    "resnet26": _timm("resnet26"),
    "mobilenetv3_small_050": _timm("mobilenetv3_small_050"),
    "regnetx_002": _timm("regnetx_002"),
    "convnext_atto": _timm("convnext_atto"),
    "vit_tiny_patch16_224": _timm("vit_tiny_patch16_224"),
    "swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224"),
    "mixer_s32_224": _timm("mixer_s32_224"),
    "hf_vit": Zoo(
        _transformer(
            "ViTForImageClassification",
            "ViTConfig",
            **_BERT_LIKE,
            image_size=32,
            patch_size=8,
            num_labels=10,
        ),
        lambda batch: ((), {"pixel_values": torch.randn(batch, 3, 32, 32)}),
    ),
    "bert": Zoo(
        _transformer(
            "BertForMaskedLM", "BertConfig", **_BERT_LIKE, vocab_size=128, max_position_embeddings=128
        ),
        _encoder,
    ),
    "distilbert": Zoo(
        _transformer(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            dim=64,
            hidden_dim=128,
            n_layers=2,
            n_heads=4,
            vocab_size=128,
            max_position_embeddings=128,
        ),
        _encoder,
    ),
    "gpt2": Zoo(
        _transformer(
            "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=128
        ),
        _decoder,
    ),
    "opt": Zoo(
        _transformer(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=128,
            max_position_embeddings=128,
        ),
        _decoder,
    ),
    "llama": Zoo(
        _transformer(
            "LlamaForCausalLM",
            "LlamaConfig",
            **_BERT_LIKE,
            num_key_value_heads=2,
            vocab_size=128,
            max_position_embeddings=128,
        ),
        _decoder,
    ),
    "t5": Zoo(
        _transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            vocab_size=128,
            decoder_start_token_id=0,
        ),
        _encoder_decoder,
    ),
}

GOLD: dict[str, Gold] = {
    "resnet18": Gold(12, 0, 2880, 1.0),
    "resnet26": Gold(21, 0, 7744, 1.0),
    "mobilenetv3_small_050": Gold(26, 0, 3072, 1.0),
    "regnetx_002": Gold(44, 26, 1248, 1.0),
    "convnext_atto": Gold(16, 0, 7960, 1.0),
    "vit_tiny_patch16_224": Gold(49, 24, 10980, 1.0),
    "swin_tiny_patch4_window7_224": Gold(52, 24, 20010, 1.0),
    "mixer_s32_224": Gold(17, 0, 18944, 1.0),
    "hf_vit": Gold(9, 4, 392, 0.9999),
    "bert": Gold(9, 4, 392, 0.9985),
    "distilbert": Gold(9, 4, 392, 0.9985),
    "gpt2": Gold(9, 4, 648, 1.0),
    "opt": Gold(9, 4, 392, 1.0),
    "llama": Gold(9, 4, 360, 1.0),
    "t5": Gold(21, 12, 784, 1.0),
}


# -- adversarial modules ------------------------------------------------------------------------


def _tokens(batch: int) -> tuple[Args, Kwargs]:
    return (torch.randn(batch, 5, 6),), {}


def _vectors(batch: int) -> tuple[Args, Kwargs]:
    return (torch.randn(batch, 6),), {}


def _images(batch: int) -> tuple[Args, Kwargs]:
    return (torch.randn(batch, 3, 8, 8),), {}


class Attention(nn.Module):
    """A residual attention block between two projections; subclasses change one thing each.

    Residual 12, 3 heads of 4.
    """

    width, heads, dimension = 12, 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, self.width)
        self.norm = nn.LayerNorm(self.width)
        self.qkv = nn.Linear(self.width, 3 * self.heads * self.dimension)
        self.proj = nn.Linear(self.heads * self.dimension, self.width)
        self.head = nn.Linear(self.width, 3)

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, ``[batch, heads, tokens, dimension]`` each."""
        shape = (packed.shape[0], packed.shape[1], self.heads, self.dimension)
        return tuple(part.reshape(shape).transpose(1, 2) for part in packed.chunk(3, dim=-1))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = self.split(self.qkv(self.norm(x)))
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)


class PackedOuter(Attention):
    """Packed as (3, heads, dimension): a view tells queries, keys and values apart."""

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = (packed.shape[0], packed.shape[1], 3, self.heads, self.dimension)
        return packed.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)


class PackedInner(Attention):
    """Packed per head, as (heads, 3 * dimension)."""

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = (packed.shape[0], packed.shape[1], self.heads, 3 * self.dimension)
        return packed.reshape(shape).transpose(1, 2).chunk(3, dim=-1)


class TalkingHeads(Attention):
    """Heads mixed before and after the softmax (CaiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(self.heads, self.heads)
        self.after = nn.Linear(self.heads, self.heads)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-2, -1) / 2).permute(0, 2, 3, 1)
        scores = self.before(scores).softmax(-2)
        return self.after(scores).permute(0, 3, 1, 2) @ v


class HeadNorm(Attention):
    """Queries and keys normalised per head by weights that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(self.dimension)
        self.k_norm = nn.LayerNorm(self.dimension)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().attend(self.q_norm(q), self.k_norm(k), v)


class SharedOverHeads(Attention):
    """One [dimension] parameter added to the values of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(self.dimension))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().attend(q, k, v + self.offset)


class Rotary(Attention):
    """Queries and keys rotated by position: a table that varies along head_dim fixes it."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = self.dimension // 2
        frequencies = 10.0 ** -torch.arange(half, dtype=torch.float32)
        angles = torch.arange(x.shape[-2])[:, None] * torch.cat([frequencies, frequencies])
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angles.cos() + turned * angles.sin()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().attend(self.rotate(q), self.rotate(k), v)


class Masked(Attention):
    """Fused attention under a boolean mask made from the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self_visible = torch.eye(x.shape[1], dtype=torch.bool)
        mask = (x[..., 0] > -1.0)[:, None, None, :] | self_visible
        x = self.embed(x)
        q, k, v = self.split(self.qkv(self.norm(x)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + self.proj(mixed.transpose(1, 2).flatten(2)))


class SoftmaxOverHeads(nn.Module):
    """A softmax over the outer factor: what it mixes the inner units may not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).unflatten(-1, (3, 4)).softmax(-2).flatten(-2))


class Glu(nn.Module):
    """Two halves of one axis are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.first(x).chunk(2, dim=-1)
        return self.second(gate.sigmoid() * value)


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.squeeze = nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = self.squeeze(self.embed(x)).relu()
        return self.head((code @ self.squeeze.weight + self.shift).relu())


class SharedModule(nn.Module):
    """One layer is used twice: what it writes is what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).relu()
        return self.head(self.middle(self.middle(x).relu()).relu())


class DenseBlock(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.third = nn.Conv2d(9, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(15)
        self.head = nn.Linear(15, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x).relu()
        second = torch.cat([first, self.second(first).relu()], dim=1)
        third = torch.cat([second, self.third(second).relu()], dim=1)
        return self.head(self.norm(third).relu().mean((2, 3)))


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a transposition of (groups, channels) between them (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.first = nn.Conv2d(6, 12, 1, groups=3)
        self.second = nn.Conv2d(12, 8, 3, groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x).relu()).relu()
        x = x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
        return self.head(self.second(x).relu().mean((2, 3)))


class GroupedConvolution(nn.Module):
    """Depthwise, then grouped with a multiplier, then pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.pointwise = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.depthwise(self.stem(x).relu())).relu()
        x = self.pointwise(self.grouped(x).relu()).relu()
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate computed from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class Cumsum(nn.Module):
    """A scan gives the units of one hidden layer an order; the other stays free."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu().cumsum(-1)).relu())


class PositionsAndPadding(nn.Module):
    """A class token, learned positions, and a shortcut whose channels are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 6, 8))
        self.norm = nn.LayerNorm(8)
        self.wider = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1) + self.positions
        x = F.pad(x, (0, 4)) + self.wider(self.norm(x)).relu()
        return self.head(x[:, 0] + x.mean(1))


class Perceptron(nn.Module):
    """Hidden layers of 8 and 7 with batch normalisation; shows the second on request."""

    def __init__(self, show: bool = False) -> None:
        super().__init__()
        self.show = show
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.second(self.norm(self.first(x)).relu()).relu()
        logits = self.head(hidden)
        return {"scores": logits, "hidden": hidden} if self.show else logits


class Convolution1d(nn.Module):
    """A sequence of signals."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.GroupNorm(1, 8)
        self.second = nn.Conv1d(8, 7, 3, stride=2)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x.transpose(1, 2))).relu()
        return self.head(F.max_pool1d(self.second(x).relu(), 2).mean(-1))


class GroupNorm(nn.Module):
    """Channels normalised in groups: they may differ from group to group, and groups may change places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).relu().mean((2, 3)))


ADVERSARIAL: dict[str, Zoo] = {
    "packed_chunks": Zoo(Attention, _tokens),
    "packed_outer": Zoo(PackedOuter, _tokens),
    "packed_inner": Zoo(PackedInner, _tokens),
    "talking_heads": Zoo(TalkingHeads, _tokens),
    "head_norm": Zoo(HeadNorm, _tokens),
    "shared_over_heads": Zoo(SharedOverHeads, _tokens),
    "rotary": Zoo(Rotary, _tokens),
    "masked": Zoo(Masked, _tokens),
    "softmax_over_heads": Zoo(SoftmaxOverHeads, _tokens),
    "glu": Zoo(Glu, _vectors),
    "tied_autoencoder": Zoo(TiedAutoencoder, _vectors),
    "shared_module": Zoo(SharedModule, _vectors),
    "dense_block": Zoo(DenseBlock, _images),
    "channel_shuffle": Zoo(ChannelShuffle, _images),
    "grouped_convolution": Zoo(GroupedConvolution, _images),
    "squeeze_excite": Zoo(SqueezeExcite, _images),
    "cumsum": Zoo(Cumsum, _vectors),
    "positions_and_padding": Zoo(PositionsAndPadding, _tokens),
    "perceptron": Zoo(Perceptron, _vectors),
    "perceptron_showing": Zoo(lambda: Perceptron(show=True), _vectors),
    "convolution1d": Zoo(Convolution1d, _tokens),
    "group_norm": Zoo(GroupNorm, _images),
}


def small_vit(seed: int, hidden: int = 12, depth: int = 1) -> nn.Module:
    """Return a vision transformer for images ``[batch, 1, 8, 8]`` and three classes."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=hidden,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    model: nn.Module = transformers.ViTForImageClassification(config).eval()
    return model


def saved_llama(folder: Path, seed: int, vocabulary: int = 23, width: int = 16, layers: int = 1) -> Path:
    """Write a small language model with grouped queries, and return its directory."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / str(seed))
    return folder / str(seed)
