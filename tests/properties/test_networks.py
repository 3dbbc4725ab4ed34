"""Random networks of real layers: what is inferred is true, and no space that must be there is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fxfusion
from fxfusion.errors import MissingDependencyError
from fxfusion.planning import make_plan
from fxfusion.rules import RULES, Context, Typed
from fxfusion.testing import Network, NetworkCheck, check_network, networks
from fxfusion.testing.network_attention import Attention
from fxfusion.testing.network_blocks import Concatenated, Residual, SplitOff, Twice
from fxfusion.testing.network_graph import Shape
from fxfusion.testing.network_layers import (
    Activation,
    ChannelShuffle,
    Convolution,
    Experts,
    Glu,
    HalvesMultiplied,
    HeadView,
    LayerScale,
    Linear,
    Norm,
    Ordered,
    PixelShuffle,
    Positions,
    Repeat,
    SqueezeExcite,
    TiedAutoencoder,
    TokenMixing,
    ToVector,
    ZeroPad,
)

FEW, MANY = 120, 10_000
SENSITIVE = 0.9  # of the networks with spaces, what half a group element must change
EXACT = 0.5  # of the networks, where exactly the spaces must be found that were counted on

VECTORS, TOKENS, IMAGES = Shape(3), Shape(3, (4,)), Shape(3, (4, 4), last=False)


def check_many(count: int, derandomize: bool) -> None:
    """Check drawn networks one by one, and all of them together for what no single one must show."""
    found: list[NetworkCheck] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def run(network: Network) -> None:
        result = check_network(network)
        assert result.ok, result
        found.append(result)

    run()
    moving = [result for result in found if result.spaces]
    assert len(moving) >= 0.7 * len(found), "too few networks have anything to permute"
    assert sum(result.sensitive for result in moving) >= SENSITIVE * len(moving)
    assert sum(result.spaces == result.expected for result in found) >= EXACT * len(found)


def test_networks() -> None:
    check_many(FEW, derandomize=True)


@pytest.mark.nightly
def test_many_networks() -> None:
    check_many(MANY, derandomize=False)


# -- networks made by hand: the account of free spaces is exact ---------------------------------------

MADE: dict[str, Network] = {
    "perceptron": Network(VECTORS, 4, (Activation("relu"), Linear(6), Activation("gelu"))),
    "residual": Network(VECTORS, 4, (Residual((Norm("layer", True), Linear(6), Linear(4))),)),
    "glu": Network(VECTORS, 4, (Glu(6, "glu"), Glu(3, "view"), Glu(4, "two layers"))),
    "halves": Network(VECTORS, 8, (HalvesMultiplied(), LayerScale("mul"))),
    "dense": Network(VECTORS, 4, (Concatenated((Linear(3),)), Concatenated((Linear(2),)))),
    "split": Network(VECTORS, 6, (SplitOff(2, (Linear(3),)), Norm("batch", True))),
    "twice": Network(VECTORS, 4, (Twice((Linear(4), Activation("tanh"))),)),
    "autoencoder": Network(VECTORS, 4, (TiedAutoencoder(3),)),
    "padding": Network(VECTORS, 4, (ZeroPad(0, 2), Residual((Linear(3), Linear(6))))),
    "scan": Network(VECTORS, 4, (Linear(3), Ordered("cumsum"))),
    "tied": Network(TOKENS, 4, (Residual((Linear(6), Linear(4))),), vocabulary=5, tied=True),
    "mixer": Network(TOKENS, 4, (Residual((TokenMixing(6),)), Positions(), ToVector("mean"))),
    "experts": Network(TOKENS, 4, (Experts(3, 4, 6),)),
    "grouped": Network(IMAGES, 6, (Convolution(4, groups=2), Norm("group", True, groups=2))),
    "depthwise": Network(IMAGES, 4, (Convolution(12, 3, groups=4),)),
    "shuffle": Network(IMAGES, 6, (Convolution(6, groups=2), ChannelShuffle(2), Convolution(6, groups=3))),
    "pixels": Network(IMAGES, 12, (PixelShuffle(), Convolution(5, 3), SqueezeExcite(4))),
    **{
        f"attention {packing}": Network(TOKENS, 4, (Attention(3, 1, 4, 4, 6, packing),))
        for packing in Attention.PACKINGS
        if packing != "grouped"
    },
    **{
        f"attention {extra}": Network(TOKENS, 4, (Attention(3, 1, 4, 5, 6, "separate", "matmul", extra),))
        for extra in Attention.EXTRAS
        if extra
    },
    **{
        f"grouped queries {scores}": Network(TOKENS, 4, (Attention(2, 3, 4, 5, 6, "separate", scores),))
        for scores in Attention.REPEATS
    },
    "multi query": Network(TOKENS, 4, (Attention(1, 3, 4, 5, 6, "chunks", "expand"),)),
    "cross attention": Network(TOKENS, 4, (Attention(3, 1, 4, 5, 6, "keys and values", cross=True),)),
}


def _convolution(width: int, groups: int, kernel: int = 1) -> Convolution:
    return Convolution(width, kernel, groups=groups, bias=False)


# Counterexamples of earlier days.
FOUND: dict[str, Network] = {
    "a unit has two factors of one space": Network(
        Shape(3, (6, 4), last=False), 8, (Residual((SqueezeExcite(8), ChannelShuffle(4))), Positions())
    ),
    "the mean over units of one case": Network(
        VECTORS, 12, (SplitOff(10, (Linear(12, bias=False),)), HeadView(11, "mean"))
    ),
    "a weight maps a tied space to itself": Network(
        TOKENS, 2, (Activation("relu"), Linear(2, bias=False, spelling="addmm")), vocabulary=5, tied=True
    ),
    "a norm's weight lies in two parts": Network(
        VECTORS,
        6,
        (
            Concatenated((TiedAutoencoder(3),)),
            LayerScale("add"),
            LayerScale("mul"),
            Linear(2, bias=False, spelling="matmul"),
        ),
    ),
    "a norm is read beside zeros": Network(
        TOKENS, 12, (ZeroPad(0, 3), HeadView(5, "norm"), Linear(4)), vocabulary=5
    ),
    "copies are units": Network(
        Shape(3, (6, 4), last=False),
        2,
        (Repeat(), Residual((ZeroPad(2, 2), ChannelShuffle(4), Convolution(4, 1, bias=False)))),
    ),
    "a tied weight writes what was repeated": Network(
        VECTORS,
        2,
        (
            Repeat(),
            TiedAutoencoder(2),
            Concatenated((Activation("relu"),)),
            Residual((Linear(2, bias=False), Linear(8, bias=False))),
        ),
    ),
    "a single unit is repeated twice over": Network(
        VECTORS, 2, (SplitOff(1, (Repeat(), Repeat(each=True))), TiedAutoencoder(2))
    ),
    "inference settles where copies are told apart and shuffled": Network(
        Shape(2, (5,), last=False),
        4,
        (
            Repeat(each=True),
            Concatenated((Repeat(),)),
            Residual((LayerScale("mul"), ChannelShuffle(6), _convolution(24, 1))),
        ),
    ),
    "inference settles after two shuffles": Network(
        IMAGES,
        6,
        (
            _convolution(6, 3),
            Activation("relu"),
            Concatenated((LayerScale("mul"),)),
            ChannelShuffle(2),
            ChannelShuffle(2),
            LayerScale("mul"),
        ),
    ),
    "what clashes is fixed up to the next common boundary": Network(
        TOKENS,
        2,
        (
            Linear(4, bias=False),
            ZeroPad(0, 2),
            Concatenated((HeadView(2, "norm"), Linear(2, bias=False))),
        ),
    ),
    "alternatives on one axis have names of their own": Network(
        IMAGES,
        4,
        (Convolution(8, groups=4, transposed=True), ChannelShuffle(2), Ordered("stride")),
    ),
    "groups are cut in halves, twice": Network(
        Shape(2, (5,), last=False),
        12,
        (
            Twice((_convolution(2, 2, 3), HalvesMultiplied(), Activation("relu"), _convolution(12, 1))),
            HalvesMultiplied(),
        ),
    ),
}


@pytest.mark.parametrize("name", list(FOUND))
def test_networks_found_at_random(name: str) -> None:
    assert check_network(FOUND[name]).ok


@pytest.mark.parametrize("name", list(MADE))
def test_made_networks(name: str) -> None:
    result = check_network(MADE[name])
    assert result.ok
    assert result.sensitive
    assert result.spaces == result.expected or name == "padding"  # weights that read zeros are free as well


@pytest.mark.parametrize("name", ["residual", "shuffle", "attention outermost", "grouped queries expand"])
def test_graph_is_the_one_that_export_captures(name: str) -> None:
    network = MADE[name]
    exported = fxfusion.plan(network.build(), network.inputs())
    direct = make_plan(network.captured()[0], frozenset({0}))
    assert sorted((space.size, len(space.scope)) for space in exported.spaces) == sorted(
        (space.size, len(space.scope)) for space in direct.spaces
    )


def test_module_computes_what_the_graph_computes() -> None:
    network = MADE["attention innermost"]
    capture, _, _ = network.captured()
    outputs = next(node for node in capture.module.graph.nodes if node.op == "output").args[0]
    assert torch.equal(network.build()(*network.inputs()), outputs[0].meta["val"])


# -- planted faults ---------------------------------------------------------------------------------


def counterexample() -> Network:
    """Return the smallest network that hypothesis finds to fail."""
    failing: list[Network] = []

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(max_layers=1))
    def run(network: Network) -> None:
        if not check_network(network).ok:
            failing.append(network)
            raise AssertionError

    with pytest.raises(AssertionError):
        run()
    return failing[-1]


def test_lost_space_is_reported_and_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def timid(context: Context, x: Typed, *_: Any) -> Typed:
        context.fix(x.axes[-1])
        return Typed(x.axes)

    monkeypatch.setitem(RULES, "relu", timid)
    network = counterexample()
    assert len(network.layers) == 1
    assert len(repr(network)) < 400


def test_merged_spaces_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RULES["linear"]

    def square(context: Context, x: Typed, weight: Typed, *more: Any) -> Any:
        if weight.shape == (6, 6):
            context.unify(*weight.axes)
        return plain(context, x, weight, *more)

    network = Network(VECTORS, 6, (Activation("relu"), Linear(6)))
    assert check_network(network).ok
    monkeypatch.setitem(RULES, "linear", square)
    result = check_network(network)
    assert result.error <= 1e-9
    assert not result.ok


# -- without hypothesis -----------------------------------------------------------------------------


def test_missing_hypothesis_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    strategies: list[Callable[[], Any]] = [networks, lambda: fxfusion.testing.operator_calls("relu")]
    for strategy in strategies:
        with pytest.raises(MissingDependencyError, match=r"fxfusion\[test\]"):
            strategy()


def test_kit_works_without_hypothesis() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; from fxfusion.testing import *\n"
    code += "check_network(Network())"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
