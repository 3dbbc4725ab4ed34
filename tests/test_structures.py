"""Attention and mixing as structure: what inference finds in each construct, certified.

Every model is a few lines around one construct. ``EXPECTED`` holds its free spaces by hand: the size of
each, and the sizes of the outer spaces below which it may differ from unit to unit. Residual streams have
12 units, heads are 3 (or what a class says), head_dim is 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxfusion
from fxfusion.testing import check_model
from tests.zoo import Attention, TalkingHeads, perturb

Found = list[tuple[int, tuple[int, ...]]]
RESIDUAL, HEADS = (12, ()), (3, ())
BELOW = (4, (3,))  # a head_dim that may differ from head to head


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 6)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


class GroupedQuery(Attention):
    """Six query heads read two key heads, repeated by expansion."""

    queries, groups = 6, 2

    def __init__(self, interleave: bool = False) -> None:
        super().__init__()
        self.interleave = interleave
        self.q = nn.Linear(12, self.queries * 4)
        self.k = nn.Linear(12, self.groups * 4)
        self.v = nn.Linear(12, self.groups * 4)
        self.out = nn.Linear(self.queries * 4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        repeats = self.queries // self.groups
        if self.interleave:
            k, v = (item.repeat_interleave(repeats, 1) for item in (k, v))
        else:
            k, v = (item[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for item in (k, v))
        return self.head(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))


class MultiQuery(GroupedQuery):
    """All query heads read one key head."""

    queries, groups = 3, 1


class PartlyRotary(Attention):
    """The first half of the query and key dimensions is rotated by position, the rest is not."""

    interleaved = False

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        turned, passed = x[..., :2], x[..., 2:]
        angle = torch.arange(x.shape[-2])[:, None].float() * torch.tensor([1.0, 0.1])[:1]
        half = turned[..., :1], turned[..., 1:]
        turned = turned * angle.cos() + torch.cat([-half[1], half[0]], -1) * angle.sin()
        return torch.cat([turned, passed], -1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().attend(self.rotate(q), self.rotate(k), v)


class InterleavedRotary(Attention):
    """Rotary positions in neighbouring pairs (GPT-J): every dimension has its place."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        angle = (torch.arange(x.shape[-2])[:, None].float() * torch.tensor([1.0, 0.1])).repeat_interleave(
            2, -1
        )
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * angle.cos() + turned * angle.sin()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().attend(self.rotate(q), self.rotate(k), v)


class BiasPerHead(Attention):
    """A learned table of scores per head, picked by relative position (Swin, T5)."""

    def __init__(self, rows_last: bool = False) -> None:
        super().__init__()
        self.rows_last = rows_last
        self.table = nn.Parameter(torch.randn(9, 3)) if not rows_last else nn.Parameter(torch.randn(3, 9))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(5)
        index = place[:, None] - place[None, :] + 4
        bias = self.table[:, index] if self.rows_last else self.table[index].permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class LinearSlopes(Attention):
    """ALiBi: a constant slope per head, which tells heads apart but not what lies below them."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(5).float()
        slopes = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
        scores = q @ k.transpose(-2, -1) / 2 - slopes * (place[:, None] - place[None, :]).abs()
        return scores.softmax(-1) @ v


class SlidingWindow(Attention):
    """Only neighbouring tokens are seen: a mask is no matter of units."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(5)
        near = (place[:, None] - place[None, :]).abs() < 2
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


class Latent(Attention):
    """DeepSeek: keys and values from one normalised latent, and a rotary key that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(12, 7 + 2)
        self.latent_norm = nn.RMSNorm(7)
        self.up = nn.Linear(7, 3 * (4 + 5))
        self.q = nn.Linear(12, 3 * (4 + 2))
        self.out = nn.Linear(3 * 5, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        y = self.norm(x)
        latent, turned_key = self.down(y).split([7, 2], -1)
        key, value = self.up(self.latent_norm(latent)).unflatten(-1, (3, 9)).transpose(1, 2).split([4, 5], -1)
        query, turned = self.q(y).unflatten(-1, (3, 6)).transpose(1, 2).split([4, 2], -1)
        angle = torch.arange(5)[:, None].float() * torch.tensor([1.0, 1.0])
        turned, turned_key = (
            item * angle.cos() + torch.cat([-item[..., 1:], item[..., :1]], -1) * angle.sin()
            for item in (turned, turned_key[:, None])
        )
        query = torch.cat([query, turned], -1)
        key = torch.cat([key, turned_key.expand(-1, 3, -1, -1)], -1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


class ShiftedWindows(Attention):
    """Swin: tokens on a grid, rolled, cut into windows, attended and put back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.new_zeros(2, 16, 6) + x[:, :1])
        y = self.norm(x).unflatten(1, (4, 4)).roll((-1, -1), (1, 2))
        y = y.reshape(2, 2, 2, 2, 2, 12).permute(0, 1, 3, 2, 4, 5).reshape(8, 4, 12)
        q, k, v = self.split(self.qkv(y))
        y = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        y = y.reshape(2, 2, 2, 2, 2, 12).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 12)
        return self.head(x + y.roll((1, 1), (1, 2)).flatten(1, 2))


class Cross(Attention):
    """Queries from one stream, keys and values from another of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(6, 10)
        self.q = nn.Linear(12, 12)
        self.kv = nn.Linear(10, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, x = self.memory(x.flip(1)), self.embed(x)
        q = self.q(x).unflatten(-1, (3, 4)).transpose(1, 2)
        k, v = self.kv(memory).reshape(2, 5, 2, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2)))


class ClassAttention(Attention):
    """CaiT: a learned token alone asks, and its layer scale is learned too."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        q, k, v = self.split(self.qkv(self.norm(x)))
        y = self.proj(self.attend(q[:, :, :1], k, v).transpose(1, 2).flatten(2))
        return self.head(x[:, :1] + self.scale * y)


class Einsum(Attention):
    """Attention written in einsum, its projections as three-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(12, 3, 4)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(3, 4, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = (torch.einsum("btd,dhe->bhte", self.norm(x), weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bhqe,bhke->bhqk", q, k).softmax(-1)
        return self.head(x + torch.einsum("bhqk,bhke,hed->bqd", scores, v, self.o))


class InterleavedGlu(nn.Module):
    """Gate and value are every other unit of one projection (gpt-oss)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(F.silu(y[..., ::2]) * y[..., 1::2])


class SeparateGlu(nn.Module):
    """Gate and value have a projection each (Llama)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class TorchGlu(InterleavedGlu):
    """``torch.nn.functional.glu``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.glu(self.up(x)))


class PixelShuffle(nn.Module):
    """Channels become positions: the place within a pixel block is fixed, what it belongs to is not."""

    def __init__(self, inverse: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.shuffle = nn.PixelUnshuffle(2) if inverse else nn.PixelShuffle(2)
        self.second = nn.Conv2d(32 if inverse else 2, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.shuffle(self.first(x).relu()))


class PatchMerging(nn.Module):
    """Swin: four neighbours' channels side by side, normalised and projected."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.reduce = nn.Linear(3, 5), nn.LayerNorm(20), nn.Linear(20, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x.movedim(1, -1)).relu()
        parts = [y[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return self.head(self.reduce(self.norm(torch.cat(parts, -1))).relu())


class WeightStandardised(nn.Module):
    """A convolution whose filters are standardised before use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.first.weight
        mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
        y = F.conv2d(x, (weight - mean) / (variance + 1e-5).sqrt() * self.gain, self.first.bias)
        return self.second(y.relu())


class SpatialGating(nn.Module):
    """gMLP: half of the units gate the other half after a projection over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(8), nn.Linear(8, 3)
        self.over_tokens = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(x).chunk(2, -1)
        gate = self.over_tokens(self.norm(gate).transpose(1, 2)).transpose(1, 2)
        return self.down(value * gate)


class LinearAttention(Attention):
    """Keys and values are contracted over tokens first: both head dimensions stay visible."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class ChannelAttention(Attention):
    """XCiT: scores between units, not tokens."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        return (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)) / math.sqrt(4)


ATTENTION: Found = [RESIDUAL, HEADS, BELOW, BELOW]
ROTARY: Found = [RESIDUAL, HEADS, BELOW]

EXPECTED: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], Found]] = {
    "grouped query, expanded": (GroupedQuery, tokens, [RESIDUAL, (2, ()), (3, (2,)), (4, (2,)), (4, (2,))]),
    "grouped query, repeated": (
        lambda: GroupedQuery(interleave=True),
        tokens,
        [RESIDUAL, (2, ()), (3, (2,)), (4, (2,)), (4, (2,))],
    ),
    "multi-query": (MultiQuery, tokens, [RESIDUAL, HEADS, (4, ()), (4, ())]),
    "rotary, in part": (PartlyRotary, tokens, [RESIDUAL, HEADS, BELOW, (2, (3,))]),
    "rotary, interleaved": (InterleavedRotary, tokens, ROTARY),
    "bias per head, rows first": (BiasPerHead, tokens, ATTENTION),
    "bias per head, heads first": (lambda: BiasPerHead(rows_last=True), tokens, ATTENTION),
    "linear slopes": (LinearSlopes, tokens, [RESIDUAL, BELOW, BELOW]),
    "sliding window": (SlidingWindow, tokens, ATTENTION),
    "latent": (Latent, tokens, [RESIDUAL, HEADS, (7, ()), BELOW, (5, (3,))]),
    "shifted windows": (ShiftedWindows, tokens, ATTENTION),
    "cross": (Cross, tokens, [*ATTENTION, (10, ())]),
    "class": (ClassAttention, tokens, ATTENTION),
    "talking heads": (TalkingHeads, tokens, [RESIDUAL, HEADS, HEADS, HEADS, (4, (3,)), (4, (3,))]),
    "einsum": (Einsum, tokens, ATTENTION),
    "linear attention": (LinearAttention, tokens, ATTENTION),
    "channel attention": (ChannelAttention, tokens, ATTENTION),
    "GLU, interleaved": (InterleavedGlu, tokens, [(8, ())]),
    "GLU, separate": (SeparateGlu, tokens, [(8, ())]),
    "GLU, torch": (TorchGlu, tokens, [(8, ())]),
    "pixel shuffle": (PixelShuffle, images, [(2, ())]),
    "pixel unshuffle": (lambda: PixelShuffle(inverse=True), images, [(8, ())]),
    "patch merging": (PatchMerging, images, [(5, ()), (7, ())]),
    "weight standardisation": (WeightStandardised, images, [(8, ())]),
    "spatial gating": (SpatialGating, tokens, [(8, ())]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_structure(name: str) -> None:
    make, inputs, expected = EXPECTED[name]
    torch.manual_seed(0)
    model, x = perturb(make()), inputs()
    prepared = fxfusion.prepare(model, (x,))
    plan = fxfusion.plan(prepared)
    sizes = {space.name: space.size for space in (*plan.spaces, *plan.fixed)}
    found = [(space.size, tuple(sizes[outer] for outer in space.scope)) for space in plan.spaces]
    assert sorted(found) == sorted(expected)
    assert check_model(prepared).max_relative_error < 1e-12
