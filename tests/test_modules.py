"""Every module of torch.nn that keeps its channels lets them be permuted, and none is without a rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.plan import Plan

CHANNELS = 8
ACTIVATIONS = [
    "ELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardtanh",
    "Hardswish",
    "LeakyReLU",
    "LogSigmoid",
    "ReLU",
    "ReLU6",
    "RReLU",
    "SELU",
    "CELU",
    "GELU",
    "Sigmoid",
    "SiLU",
    "Mish",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Identity",
    "Dropout",
    "AlphaDropout",
    "FeatureAlphaDropout",
]


def certified(model: nn.Module, *args: torch.Tensor) -> Plan:
    prepared = fxfusion.prepare(model, args)
    certificate = fxfusion.certify(prepared)
    assert certificate.ok
    assert certificate.moved > 0.5
    plan = fxfusion.plan(prepared)
    assert not plan.limits
    return plan


class Chain(nn.Module):
    """A layer, modules whose results add up where shapes allow, and a layer."""

    def __init__(self, before: nn.Module, modules: list[nn.Module], after: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = before, nn.ModuleList(modules), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        results = [module(x) for module in self.inner]
        total = x.flatten(2).mean(2)
        for result in results:
            first = result[0] if isinstance(result, tuple) else result
            total = total + first.flatten(2).square().mean(2)
        return self.after(total)


def test_activations() -> None:
    modules = [getattr(nn, name)() for name in ACTIVATIONS]
    modules += [nn.Threshold(0.1, 0.2), nn.PReLU(CHANNELS), nn.Softmax(1), nn.Softmin(1), nn.LogSoftmax(1)]
    modules += [nn.GroupNorm(1, CHANNELS), nn.Softmax(2)]
    model = Chain(nn.Conv1d(6, CHANNELS, 1), modules, nn.Linear(CHANNELS, 5))
    assert [space.size for space in certified(model, torch.randn(2, 6, 4)).spaces] == [CHANNELS]


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_images(spatial: int) -> None:
    def made(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        module: nn.Module = getattr(nn, f"{name}{spatial}d")(*args, **kwargs)
        return module

    modes = [
        ("nearest", "linear"),
        ("nearest", "bilinear", "bicubic", "area"),
        ("nearest", "trilinear", "area"),
    ]
    modules = [
        made("Conv", CHANNELS, CHANNELS, 3, groups=CHANNELS),
        made("ConvTranspose", CHANNELS, CHANNELS, 3, groups=CHANNELS),
        made("MaxPool", 2),
        made("MaxPool", 2, return_indices=True),
        made("AvgPool", 2),
        made("AdaptiveAvgPool", 2),
        made("AdaptiveMaxPool", 2),
        made("LPPool", 2, 2),
        made("BatchNorm", CHANNELS),
        made("InstanceNorm", CHANNELS, affine=True),
        made("Dropout"),
        made("ReflectionPad", 1),
        made("ReplicationPad", 1),
        made("ZeroPad", 1),
        made("CircularPad", 1),
        made("ConstantPad", 1, 0.5),
        *(nn.Upsample(scale_factor=2, mode=mode) for mode in (*modes[spatial - 1], "nearest-exact")),
    ]
    convolution = getattr(nn, f"Conv{spatial}d")
    model = Chain(convolution(6, CHANNELS, 1), modules, nn.Linear(CHANNELS, 5))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.randn(CHANNELS)
    spaces = certified(model, torch.randn(2, 6, *[4] * spatial)).spaces
    assert [space.size for space in spaces] == [CHANNELS]


def test_channels_that_move_into_positions_and_back() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 8, 1), nn.PixelShuffle(2), nn.GELU(), nn.PixelUnshuffle(2), nn.ChannelShuffle(2),
        nn.Conv2d(8, 5, 1),
    )  # fmt: skip
    assert certified(model, torch.randn(2, 6, 4, 4)).spaces
    windows = nn.Sequential(
        nn.Conv2d(6, 8, 1), nn.Unfold(2, stride=2), nn.Fold((4, 4), 2, stride=2), nn.Conv2d(8, 5, 1)
    )
    assert [space.size for space in certified(windows, torch.randn(2, 6, 4, 4)).spaces] == [8]


class Mixer(nn.Module):
    """A global filter in the frequencies of an image, as GFNet has it, with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.randn(4, 3, 8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frequencies = torch.fft.rfft2(self.before(x), dim=(1, 2), norm="ortho") * torch.view_as_complex(
            self.weight
        )
        return self.after(torch.fft.irfft2(frequencies, s=(4, 4), dim=(1, 2), norm="ortho"))


def test_fourier_transforms_of_other_axes() -> None:
    plan = certified(Mixer(), torch.randn(2, 4, 4, 6))
    assert [space.size for space in plan.spaces] == [8]
    assert plan.layouts["weight"].spaces()


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "biases of key and value": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 7, "vdim": 9, "batch_first": True},
}


class Attend(nn.Module):
    """Multi-head attention between two layers; keys and values are padded."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 5)
        self.keys, self.values = nn.Linear(6, options.get("kdim", 8)), nn.Linear(6, options.get("vdim", 8))
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = torch.arange(4).expand(4, 4) > 2
        query, key, value = self.before(x), self.keys(x), self.values(x)
        attended, weights = self.attention(query, key, value, key_padding_mask=padding)
        return self.after(attended) + weights.sum()


@pytest.mark.parametrize("name", ATTENTION)
def test_multi_head_attention(name: str) -> None:
    sizes = [space.size for space in certified(Attend(**ATTENTION[name]), torch.randn(4, 4, 6)).spaces]
    assert 2 in sizes  # heads
    assert sizes.count(4) >= 2  # query with key, and value


def test_transformer() -> None:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 5)
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            source = self.before(x)
            mask = nn.Transformer.generate_square_subsequent_mask(4)
            return self.after(self.transformer(source, source, tgt_mask=mask, tgt_is_causal=True))

    sizes = [space.size for space in certified(Translate(), torch.randn(3, 4, 6)).spaces]
    assert sizes.count(16) == 2
    assert sizes.count(2) == 3  # heads: of the encoder, and of the decoder twice
