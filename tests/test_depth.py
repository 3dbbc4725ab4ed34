"""Parents of other depths: layers paired in order by what they compute."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfusion
from fxfusion.depth import Similarity, match_in_order, match_layers, needed_layers, shallow, unequal_stacks
from fxfusion.errors import ArchitectureMismatchError, InvalidWeightError, OptionError
from tests import zoo

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """Residual blocks between two layers."""

    def __init__(self, depth: int, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, width)
        self.layers = [Block(width) for _ in range(depth)]
        self.blocks = nn.ModuleList(self.layers)
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def with_idle_layers(shallow_one: Stack, idle: tuple[int, ...], depth: int) -> Stack:
    """Return a deeper network of the same function: the layers at ``idle`` add nothing."""
    deep = Stack(depth, seed=9)
    deep.first.load_state_dict(shallow_one.first.state_dict())
    deep.last.load_state_dict(shallow_one.last.state_dict())
    busy = iter(shallow_one.blocks)
    for place, block in enumerate(deep.layers):
        if place in idle:
            nn.init.zeros_(block.down.weight)
            nn.init.zeros_(block.down.bias)
        else:
            block.load_state_dict(next(busy).state_dict())
    return deep


def scrambled(model: Stack) -> Stack:
    """Return a twin with its units in other places."""
    twin = Stack(len(model.blocks))
    twin.load_state_dict(fxfusion.scramble(model, (X,)))
    return twin


@pytest.mark.parametrize("matching", ["outputs", "representations"])
@pytest.mark.parametrize("layers", ["keep", "drop"])
def test_a_deeper_twin_is_recovered(layers: str, matching: str) -> None:
    model = Stack(3)
    deep = scrambled(with_idle_layers(model, (1, 3), 5))
    options: dict[str, Any] = {"calibration": [X], "layers": layers, "layer_matching": matching}
    into_shallow = fxfusion.fuse([deep, model], (X,), **options)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(into_shallow.state_dict()[key], tensor, rtol=0, atol=1e-6)
    assert any("parent 0 takes part with layers 0, 2, 4" in note for note in into_shallow.report.notes)
    into_deep = fxfusion.fuse([model, deep], (X,), **options)
    torch.testing.assert_close(into_deep.module(X), model(X), rtol=1e-4, atol=1e-5)
    expected = deep if layers == "keep" else model
    loaded = Stack(len(expected.blocks))
    loaded.load_state_dict(into_deep.state_dict())
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)
    if layers == "keep":
        idle = deep.blocks[1].state_dict()
        assert all(torch.equal(loaded.blocks[1].state_dict()[key], tensor) for key, tensor in idle.items())


def test_transports_are_learned_from_the_whole_of_a_deeper_parent() -> None:
    """Not from what is left of it: its outputs, all its layers taking part, are averaged."""
    deep, model = Stack(4, 5).eval(), Stack(2).eval()
    batches = list(torch.randn(64, 5, generator=torch.Generator().manual_seed(4)).split(8))
    result = fxfusion.fuse([deep, model], (X,), calibration=batches, refine=30)
    with torch.no_grad():
        expected = (deep(batches[0]).softmax(-1) + model(batches[0]).softmax(-1)) / 2
        found = result.module(batches[0]).log_softmax(-1)  # the first batch judges
        distance = float((expected * (expected.log() - found)).sum(-1).mean())
    (told,) = (note for note in result.report.notes if "refined" in note)
    assert f"{distance:.4g} after" in told


def test_depth_and_width_may_both_differ() -> None:
    parents = [Stack(4, 0, 12), Stack(2, 1, 8), Stack(3, 2, 10)]
    for target, depth, width in ((0, 4, 12), (1, 2, 8), (2, 3, 10)):
        result = fxfusion.fuse(parents, (X,), target=target)
        Stack(depth, 3, width).load_state_dict(result.state_dict())
    dropped = fxfusion.fuse(parents, (X,), target=0, layers="drop", calibration=[X], flow=fxfusion.Flow())
    Stack(2, 3, 12).load_state_dict(dropped.state_dict())


def test_a_hugging_face_model_of_other_depth() -> None:
    parents = [zoo.small_vit(3, depth=3), zoo.small_vit(2, depth=2)]
    result = fxfusion.fuse(parents, kwargs={"pixel_values": IMAGES}, weights=[0, 1])
    parents[1].load_state_dict(result.state_dict())
    with torch.no_grad():
        expected = zoo.small_vit(2, depth=2)(pixel_values=IMAGES).logits
        torch.testing.assert_close(parents[1](pixel_values=IMAGES).logits, expected)


def test_parents_are_not_written() -> None:
    parents = [Stack(3), Stack(2, 1)]
    before = [{key: tensor.clone() for key, tensor in parent.state_dict().items()} for parent in parents]
    fxfusion.fuse(parents, (X,), calibration=[X])
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in parent.state_dict().items())
        assert not any(block._forward_hooks for block in parent.blocks)
    assert len(parents[0].blocks) == 3


def test_a_shallow_copy_shares_tensors_and_leaves_out_layers() -> None:
    deep = with_idle_layers(Stack(2), (0, 2), 4)
    copied = shallow(deep, {"blocks": (1, 3)})
    torch.testing.assert_close(copied(X), deep(X))
    assert copied.get_parameter("blocks.0.up.weight") is deep.get_parameter("blocks.1.up.weight")


@pytest.mark.parametrize("seed", range(3))
def test_the_layers_that_are_needed_are_those_whose_loss_shows_least(seed: int) -> None:
    """One layer to leave out: the search is exhaustive. Three: no single exchange that it made is better."""
    deep = Stack(5, seed).requires_grad_(False)
    expected = deep(X)

    def missed(copied: nn.Module) -> float:
        return float((copied(X) - expected).square().mean())

    alone = needed_layers(Stack(4), deep, ["blocks"], missed, ("", ""))["blocks"]
    choices = list(itertools.combinations(range(5), 4))
    assert alone == min(choices, key=lambda kept: missed(shallow(deep, {"blocks": kept})))
    fewer = needed_layers(Stack(2), deep, ["blocks"], missed, ("", ""))["blocks"]
    assert set(fewer) < set(alone)


def drawn(kinds: list[bool]) -> Stack:
    """Return a stack of two kinds of blocks: with a norm, and without."""
    model = Stack(len(kinds))
    for kind, block in zip(kinds, model.layers, strict=True):
        if not kind:
            block.add_module("norm", nn.Identity())
    return model


@given(st.lists(st.booleans(), max_size=6), st.lists(st.booleans(), max_size=4), st.integers(0, 9))
def test_layers_are_paired_with_their_kind(more: list[bool], fewer: list[bool], seed: int) -> None:
    """Whenever some choice of layers has the kinds of the shallower stack in order, one is found."""
    possible = [
        kept
        for kept in itertools.combinations(range(len(more)), len(fewer))
        if [more[position] for position in kept] == fewer
    ]
    draw = random.Random(seed)
    arguments = drawn(fewer), drawn(more), ["blocks"], lambda _: draw.random(), ("", "")
    if fewer and more and possible:
        assert needed_layers(*arguments)["blocks"] in possible
    elif fewer and more:
        with pytest.raises(ArchitectureMismatchError, match="cannot be paired"):
            needed_layers(*arguments)


# -- what cannot be paired ---------------------------------------------------------------------------


def test_layers_with_other_parameters_are_refused() -> None:
    parents = [Stack(2), Stack(3)]
    parents[0].layers[0].add_module("norm", nn.Identity())
    with pytest.raises(ArchitectureMismatchError, match="layers of blocks cannot be paired"):
        fxfusion.fuse(parents, (X,))


def test_bad_weights_and_options_are_found_before_any_work() -> None:
    parents = [Stack(2), Stack(3)]
    with pytest.raises(OptionError, match="layers"):
        fxfusion.fuse(parents, (X,), layers="all")
    with pytest.raises(OptionError, match="target"):
        fxfusion.fuse(parents, (X,), target=2)
    parents[1].layers[2].up.weight.data.fill_(torch.nan)
    with pytest.raises(InvalidWeightError, match=r"blocks.2.up.weight"):
        fxfusion.fuse(parents, (X,))


def test_other_classes_are_refused() -> None:
    with pytest.raises(ArchitectureMismatchError, match="different classes"):
        fxfusion.fuse([Stack(2), nn.ModuleDict({"blocks": nn.ModuleList([Block(8)])})], (X,))


# -- similarity and pairing ---------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 999))
def test_the_best_pairing_in_order_is_found(rows: int, more: int, seed: int) -> None:
    similarity = torch.rand(rows, rows + more, generator=torch.Generator().manual_seed(seed))
    found = match_in_order(similarity)
    best = max(
        itertools.combinations(range(rows + more), rows),
        key=lambda chosen: sum(float(similarity[row, column]) for row, column in enumerate(chosen)),
    )
    assert found == list(best)


def test_no_pairing_is_found_where_none_is_allowed() -> None:
    similarity = torch.tensor([[0.5, -torch.inf], [0.5, -torch.inf]])
    assert match_in_order(similarity) == []


def test_similarity_is_that_of_linear_kernels_and_blind_to_rotation() -> None:
    x, y = torch.randn(2, 30, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    similarity = Similarity(2, 1)
    similarity.update([x, y], [x @ rotation * 3])
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    torch.testing.assert_close(similarity.matrix[:, 0], torch.stack([torch.ones(()).double(), expected]))


def test_layers_are_paired_by_what_they_compute() -> None:
    model = Stack(3)
    deep = scrambled(with_idle_layers(model, (0, 2), 5))
    kept = match_layers(model, deep, ["blocks"], [((X,), {})], ("a", "b"))
    assert kept["blocks"][1:] == (3, 4)
    assert unequal_stacks([model, deep]) == ["blocks"]
    assert unequal_stacks([model, model]) == []
