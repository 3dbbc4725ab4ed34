"""A fusion runs where the weights are: on a simulated second device, with the CPU's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fxfusion
from fxfusion.devices import chosen, device_of, onto
from fxfusion.errors import OptionError
from tests import zoo
from tests.simulated import AVAILABLE, moved, simulated

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch cannot simulate a device")

TOLERANCE = 1e-3  # attention is of other operators there, and solvers end where they may
X = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """An attention layer and a gated one behind norms, a convolution with statistics before them."""

    def __init__(self, hidden: int = 12, heads: int = 2, layers: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.enter, self.statistics = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(16),
                    "query": nn.Linear(16, 16),
                    "key": nn.Linear(16, 16),
                    "value": nn.Linear(16, 16),
                    "out": nn.Linear(16, 16),
                    "after": nn.LayerNorm(16),
                    "up": nn.Linear(16, hidden),
                    "down": nn.Linear(hidden, 16),
                }
            )
            for _ in range(layers)
        )
        self.leave = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.statistics(self.enter(x.mT))).mT
        for block in self.layers:
            layer: Any = block
            split = [
                layer[name](layer["norm"](x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            ]
            mixed = nn.functional.scaled_dot_product_attention(*split)
            x = x + layer["out"](mixed.transpose(1, 2).flatten(2))
            x = x + layer["down"](torch.relu(layer["up"](layer["after"](x))))
        return self.leave(x.mean(1))


def prepared(seed: int, **sizes: int) -> fx.GraphModule:
    torch.manual_seed(seed)
    model = Block(**sizes)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.statistics.running_mean = torch.randn(16)
    return fxfusion.prepare(model.eval(), (X[:4],))


DATA: dict[str, Any] = {"calibration": [X[:12], X[12:]]}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = {
    "weights": ({}, [{}, {}]),
    "activations": (DATA, [{}, {}]),
    "permutations, norms": ({**DATA, "method": "permutation", "repair": "norms"}, [{}, {}]),
    "largest, units": ({**DATA, "symmetry": "largest", "repair": "units"}, [{}, {}]),
    "learned": ({**DATA, "method": "learned", "refine": 2}, [{}, {}]),
    "auto": ({**DATA, "method": "auto", "refine": 1}, [{}, {}]),
    "soft": ({**DATA, "coupling": "soft"}, [{}, {}]),
    "partial": ({"coupling": fxfusion.Coupling(share=0.7)}, [{}, {}]),
    "unbalanced": ({"coupling": fxfusion.Coupling(0.1, relaxation=1.0)}, [{}, {}]),
    "within a gap": ({"coupling": fxfusion.Coupling(gap=0.2)}, [{}, {}]),
    "flow": ({**DATA, "flow": fxfusion.Flow(residual="weighted_matrix")}, [{}, {}]),
    "flow, published": ({**DATA, **fxfusion.reference()}, [{}, {}]),
    "importance": (
        {**DATA, "coupling": "soft", "flow": fxfusion.Flow(marginals="magnitude")},
        [{}, {}],
    ),
    "three": ({**DATA, "rounds": 1}, [{}, {}, {}]),
    "wider": (DATA, [{}, {"hidden": 20}]),
    "narrower": ({**DATA, "method": "permutation"}, [{"hidden": 20}, {}]),
}


DAILY = ("activations", "largest, units")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in DAILY else [pytest.mark.nightly]) for case in CASES],
)
def test_a_device_gives_what_the_cpu_gives(case: str) -> None:
    options, sizes = CASES[case]
    parents = [prepared(seed, **size) for seed, size in enumerate(sizes)]
    expected = fxfusion.fuse(parents, **options).state_dict()
    with simulated() as device:
        there = [moved(parent, device) for parent in parents]
        result = fxfusion.fuse(there, **options)
        found = result.state_dict()
        assert {tensor.device for tensor in found.values()} == {device}
        output = result.module(X[:4].to(device)).cpu()
        assert device_of(there[0].state_dict().values()) == device
    plain = onto(found, torch.device("cpu"))
    assert plain.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(plain[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "name", ["hf_vit", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gpt2", "llama", "t5"))]
)
def test_models_are_certified_and_measured_there(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    parents = [fxfusion.prepare(zoo.build(name, seed), args, kwargs) for seed in range(2)]
    with simulated() as device:
        there = [moved(parent, device) for parent in parents]
        for symmetry in ("permutation", "largest"):
            assert fxfusion.certify(there[0], symmetry=symmetry).ok
        fxfusion.scramble(there[0])


@pytest.mark.nightly
def test_a_line_is_measured_there() -> None:
    parents = [prepared(seed) for seed in range(2)]
    evaluation = [(X, torch.arange(24) % 3)]
    expected = fxfusion.barrier(parents, **DATA, evaluation=evaluation, points=3)
    with simulated() as device:
        there = [moved(parent, device) for parent in parents]
        found = fxfusion.barrier(there, **DATA, evaluation=evaluation, points=3)
    for curve, known in zip(found.curves, expected.curves, strict=True):
        assert curve.losses == pytest.approx(known.losses, rel=TOLERANCE)


def test_parents_on_two_devices_are_refused() -> None:
    parents = [prepared(seed) for seed in range(2)]
    refused = pytest.raises(OptionError, match=r"model 0 .* is on simulated:0, model 1 .* on cpu")
    with simulated() as device, refused:
        fxfusion.fuse([moved(parents[0], device), parents[1]])


def test_a_device_is_chosen_in_one_place() -> None:
    assert chosen("cpu") == torch.device("cpu")
    assert chosen("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(OptionError, match="no device"):
        chosen("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="not available"):
            chosen("cuda")
