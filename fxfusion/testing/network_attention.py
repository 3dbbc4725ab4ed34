"""Attention in drawn networks: the many ways to pack, to repeat and to write it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxfusion.testing.choices import Choices
from fxfusion.testing.network_graph import Flow, NetworkGraph, Shape
from fxfusion.testing.network_layers import EPSILON, WIDTHS, Layer, linear

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Attention(Layer):
    """Attention in one of the many ways to pack and to write it.

    Attributes
    ----------
    heads, group : int
        Key heads, and query heads per key head.
    key, value : int
        Size of a query and key, and of a value.
    width : int
        Channels of the output.
    packing : str
        How the weights of queries, keys and values lie together.
    scores : str
        How scores are computed, and how key heads are repeated.
    extra : str
        What is done to queries and keys, or added to the scores.
    cross : bool
        Keys and values come from the network's second input.
    """

    heads: int = 2
    group: int = 1
    key: int = 2
    value: int = 2
    width: int = 2
    packing: str = "separate"
    scores: str = "sdpa"
    extra: str = ""
    cross: bool = False

    PACKINGS: ClassVar[tuple[str, ...]] = (
        "separate",
        "chunks",
        "outermost",
        "innermost",
        "interleaved",
        "keys and values",
        "grouped",
    )
    SCORES: ClassVar[tuple[str, ...]] = ("sdpa", "matmul", "bmm", "einsum", "cosine")
    REPEATS: ClassVar[tuple[str, ...]] = ("interleave", "expand", "enable_gqa", "grouped query")
    EXTRAS: ClassVar[tuple[str, ...]] = (
        "",
        "rms",
        "layer",
        "table",
        "alibi",
        "causal",
        "rotary",
        "talking",
        "mask",
        "flat norm",
    )

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        return shape.last and len(shape.positions) == 1

    @classmethod
    def draw(cls, choices: Choices, shape: Shape) -> Attention:
        packing = choices.of(cls.PACKINGS)
        cross = packing in ("separate", "keys and values") and choices.flag()
        equal = packing in ("outermost", "interleaved", "grouped")
        plain = packing in ("outermost", "innermost", "interleaved")
        key = choices.of((2, 3, 4, 1))
        group = 1 if plain else choices.of((1, 2, 3))
        return cls(
            heads=choices.of((2, 3, 4, 1)),
            group=group,
            key=key,
            value=key if equal else choices.of((2, 3, 4, 1)),
            width=choices.of(WIDTHS),
            packing=packing,
            scores=choices.of(cls.SCORES if group == 1 else cls.REPEATS),
            extra=choices.of(cls.EXTRAS),
            cross=cross,
        )

    def result(self, shape: Shape) -> Shape:
        return shape.wide(self.width)

    def apply(self, net: NetworkGraph, flow: Flow) -> Flow:
        queries, keys, values = self._project(net, flow)
        queries, keys = self._prepare(net, queries, "q"), self._prepare(net, keys, "k")
        mixed = self._attend(net, queries, keys, values)
        flat = net.call(aten.flatten.using_ints, net.call(aten.transpose.int, mixed, 1, 2), 2)
        self._account(net)
        return Flow(
            linear(net, flat, "proj", self.width), self.result(flow.shape), net.stream("width", self.width)
        )

    def _account(self, net: NetworkGraph) -> None:
        """Count heads, query heads per key head, and the two head dimensions."""
        known = [("heads", self.heads), ("key", self.key), ("value", self.value), ("group", self.group)]
        spaces = {name: net.space(name, size) for name, size in known}
        if self.extra == "talking" and self.group == 1 and self.scores == "matmul":
            net.space("heads before", self.heads)
            if self.packing not in ("innermost", "interleaved"):  # there the heads of q, k and v are one axis
                net.space("heads after", self.heads)
        lost = {"alibi": ["heads", "group"], "rotary": ["key"] if self.key > 1 else []}.get(self.extra, [])
        if self.packing == "grouped":  # one head axis for q, k and v: not followed
            lost = list(spaces)
        for name in lost:
            spaces[name].lose()

    # -- projections ----------------------------------------------------------------------------

    def _project(self, net: NetworkGraph, flow: Flow) -> list[fx.Node]:
        x, source = flow.node, self._source(net, flow)
        query, key, value = (
            self.heads * self.group * self.key, self.heads * self.key, self.heads * self.value,
        )  # fmt: skip
        if self.packing == "separate":
            flat = [
                linear(net, x, "q", query),
                linear(net, source, "k", key),
                linear(net, source, "v", value),
            ]
            return self._in_heads(net, flat)
        if self.packing == "keys and values":
            both = net.call(
                aten.split_with_sizes.default, linear(net, source, "kv", key + value), [key, value], -1
            )
            return self._in_heads(net, [linear(net, x, "q", query), *net.items(both)])
        packed = linear(net, x, "qkv", query + key + value)
        if self.packing == "chunks":
            parts = net.call(aten.split_with_sizes.default, packed, [query, key, value], -1)
            return self._in_heads(net, net.items(parts))
        return self._unpack(net, packed)

    def _source(self, net: NetworkGraph, flow: Flow) -> fx.Node:
        return net.memory if self.cross else flow.node

    def _in_heads(self, net: NetworkGraph, flat: list[fx.Node]) -> list[fx.Node]:
        counts = (self.heads * self.group, self.heads, self.heads)
        return [self._split(net, item, count) for item, count in zip(flat, counts, strict=True)]

    @staticmethod
    def _split(net: NetworkGraph, flat: fx.Node, count: int) -> fx.Node:
        batch, length, size = flat.meta["val"].shape
        return net.call(
            aten.transpose.int, net.call(aten.view.default, flat, [batch, length, count, size // count]), 1, 2
        )

    def _unpack(self, net: NetworkGraph, packed: fx.Node) -> list[fx.Node]:
        batch, length, _ = packed.meta["val"].shape
        if self.packing == "outermost":
            view = net.call(aten.view.default, packed, [batch, length, 3, self.heads, self.key])
            return net.items(net.call(aten.unbind.int, net.call(aten.permute.default, view, [2, 0, 3, 1, 4])))
        if self.packing == "interleaved":
            view = net.call(aten.view.default, packed, [batch, length, self.heads, self.key, 3])
            turned = net.call(aten.transpose.int, view, 1, 2)
            return [net.call(aten.select.int, turned, -1, index) for index in range(3)]
        if self.packing == "innermost":
            size = 2 * self.key + self.value
            view = net.call(aten.view.default, packed, [batch, length, self.heads, size])
            turned = net.call(aten.transpose.int, view, 1, 2)
            sizes = [self.key, self.key, self.value]
            return net.items(net.call(aten.split_with_sizes.default, turned, sizes, -1))
        view = net.call(aten.view.default, packed, [batch, length, self.heads, self.group + 2, self.key])
        queries = net.call(aten.slice.Tensor, view, 3, 0, self.group)
        queries = net.call(aten.flatten.using_ints, queries, 2, 3)
        others = [net.call(aten.select.int, view, 3, self.group + index) for index in range(2)]
        return [net.call(aten.transpose.int, item, 1, 2) for item in [queries, *others]]

    # -- scores ---------------------------------------------------------------------------------

    def _prepare(self, net: NetworkGraph, x: fx.Node, role: str) -> fx.Node:
        """Normalise or rotate queries or keys, ``[batch, heads, length, key]``."""
        _, heads, length, size = x.meta["val"].shape
        if self.extra == "rms":
            return net.call(
                aten.rms_norm.default, x, [size], net.parameter(f"{role}_norm", size, like="scale"), EPSILON
            )
        if self.extra == "layer":
            weight = net.parameter(f"{role}_norm", size, like="scale")
            return net.call(aten.layer_norm.default, x, [size], weight, None, EPSILON)
        if self.extra == "flat norm":  # over all heads at once
            flat = net.call(aten.flatten.using_ints, net.call(aten.transpose.int, x, 1, 2), 2)
            weight = net.parameter(f"{role}_norm", heads * size, like="scale")
            return self._split(
                net, net.call(aten.rms_norm.default, flat, [heads * size], weight, EPSILON), heads
            )
        if self.extra == "rotary" and size % 2 == 0:
            return self._rotate(net, x, length, size)
        return x

    @staticmethod
    def _rotate(net: NetworkGraph, x: fx.Node, length: int, size: int) -> fx.Node:
        frequencies = 2.0 ** -torch.arange(size // 2, dtype=torch.float64)
        angles = torch.arange(1, length + 1)[:, None] * torch.cat([frequencies, frequencies])
        halves = net.items(net.call(aten.chunk.default, x, 2, -1))
        turned = net.call(aten.cat.default, [net.call(aten.neg.default, halves[1]), halves[0]], -1)
        cosine = net.call(aten.mul.Tensor, x, net.constant(f"cos{length}", angles.cos()))
        return net.call(
            aten.add.Tensor,
            cosine,
            net.call(aten.mul.Tensor, turned, net.constant(f"sin{length}", angles.sin())),
        )

    def _attend(self, net: NetworkGraph, queries: fx.Node, keys: fx.Node, values: fx.Node) -> fx.Node:
        _, heads, length, _ = queries.meta["val"].shape
        bias = self._bias(net, heads, length, keys.meta["val"].shape[2])
        if self.group > 1:
            if self.scores == "grouped query":
                return self._grouped(net, queries, keys, values, bias)
            if self.scores == "enable_gqa":
                operator = aten.scaled_dot_product_attention.default
                return net.call(operator, queries, keys, values, bias, enable_gqa=True)
            keys, values = self._repeated(net, keys), self._repeated(net, values)
        if self.group > 1 or self.scores == "sdpa":
            causal = self.extra == "causal" and bias is None
            operator = aten.scaled_dot_product_attention.default
            return net.call(operator, queries, keys, values, bias, 0.0, causal)
        return self._by_hand(net, queries, keys, values, bias)

    def _repeated(self, net: NetworkGraph, x: fx.Node) -> fx.Node:
        if self.scores == "interleave":
            return net.call(aten.repeat_interleave.self_int, x, self.group, 1)
        batch, heads, length, size = x.meta["val"].shape
        single = net.call(aten.unsqueeze.default, x, 2)
        grown = net.call(aten.expand.default, single, [batch, heads, self.group, length, size])
        return net.call(aten.reshape.default, grown, [batch, heads * self.group, length, size])

    def _grouped(
        self, net: NetworkGraph, queries: fx.Node, keys: fx.Node, values: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        batch, _, length, size = queries.meta["val"].shape
        split = net.call(aten.view.default, queries, [batch, self.heads, self.group, length, size])
        turned = net.call(aten.transpose.int, net.call(aten.unsqueeze.default, keys, 2), -2, -1)
        scores = net.call(aten.matmul.default, split, turned)
        if bias is not None and bias.meta["val"].ndim == 3:
            bias = net.call(aten.view.default, bias, [self.heads, self.group, *bias.meta["val"].shape[1:]])
        if bias is not None:
            scores = net.call(aten.add.Tensor, scores, bias)
        weights = net.call(aten.softmax.int, scores, -1)
        mixed = net.call(aten.matmul.default, weights, net.call(aten.unsqueeze.default, values, 2))
        return net.call(aten.flatten.using_ints, mixed, 1, 2)

    def _by_hand(
        self, net: NetworkGraph, queries: fx.Node, keys: fx.Node, values: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        batch, heads, _, _ = queries.meta["val"].shape
        if self.scores == "cosine":
            queries, keys = self._unit(net, queries), self._unit(net, keys)
        if self.scores == "bmm":
            queries, keys, values = (
                net.call(aten.flatten.using_ints, item, 0, 1) for item in (queries, keys, values)
            )
            scores = net.call(aten.bmm.default, queries, net.call(aten.transpose.int, keys, 1, 2))
            scores = net.call(aten.unflatten.int, scores, 0, [batch, heads])
        elif self.scores == "einsum":
            scores = net.call(aten.einsum.default, "bhqd,bhkd->bhqk", [queries, keys])
        else:
            scores = net.call(aten.matmul.default, queries, net.call(aten.transpose.int, keys, -2, -1))
        if self.extra == "talking" and self.scores == "matmul":
            scores = self._talk(net, scores, "before")
        if bias is not None:
            scores = net.call(aten.add.Tensor, scores, bias)
        weights = net.call(aten.softmax.int, scores, -1)
        if self.extra == "talking" and self.scores == "matmul":
            weights = self._talk(net, weights, "after")
        if self.scores == "bmm":
            mixed = net.call(aten.bmm.default, net.call(aten.flatten.using_ints, weights, 0, 1), values)
            return net.call(aten.unflatten.int, mixed, 0, [batch, heads])
        return net.call(aten.matmul.default, weights, values)

    @staticmethod
    def _unit(net: NetworkGraph, x: fx.Node) -> fx.Node:
        length = net.call(aten.linalg_vector_norm.default, x, 2, [-1], True)
        return net.call(aten.div.Tensor, x, net.call(aten.clamp_min.default, length, EPSILON))

    def _talk(self, net: NetworkGraph, scores: fx.Node, name: str) -> fx.Node:
        turned = net.call(aten.permute.default, scores, [0, 2, 3, 1])
        return net.call(aten.permute.default, linear(net, turned, name, self.heads), [0, 3, 1, 2])

    def _bias(self, net: NetworkGraph, heads: int, length: int, others: int) -> fx.Node | None:
        """Return what is added to the scores, ``[heads or nothing, length, others]``."""
        if self.extra == "table":
            distance = torch.arange(length)[:, None] - torch.arange(others) + others - 1
            table = net.parameter("table", length + others - 1, heads, like="bias")
            picked = net.call(aten.index.Tensor, table, [net.constant("distance", distance)])
            return net.call(aten.permute.default, picked, [2, 0, 1])
        distance = torch.arange(length)[:, None] - torch.arange(others)
        if self.extra == "alibi":
            slopes = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)
            return net.constant("slopes", -slopes[:, None, None] * distance.abs())
        if self.extra == "mask" or (self.extra == "causal" and (self.scores != "sdpa" or length != others)):
            hidden = torch.zeros(length, others, dtype=torch.float64).masked_fill(distance < 0, -torch.inf)
            return net.constant("mask", hidden)
        return None
