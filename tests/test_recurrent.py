"""Recurrent networks: certified as whole models, and every layer and direction has units of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxfusion

X = torch.randn(3, 4, 6)
lstm = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="PyTorch before 2.13 gives the states of an LSTM wrong shapes when it exports",
)


class Read(nn.Module):
    """A layer before, a recurrent one, and a layer that reads what is picked from its results."""

    def __init__(self, layer: nn.Module, width: int, pick: Callable[[Any], torch.Tensor], start: Any = None):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(6, 8), layer, nn.Linear(width, 5)
        self.pick, self.start = pick, start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = () if self.start is None else (self.start(x),)
        return self.after(self.pick(self.layer(self.before(x), *states)))


def sizes(model: nn.Module, *args: Any) -> list[int]:
    """Return the sizes of a model's spaces, and certify that they are what they say."""
    prepared = fxfusion.prepare(model, args)
    plan, certificate = fxfusion.plan(prepared), fxfusion.certify(prepared)
    assert certificate.ok
    assert not plan.limits
    return [space.size for space in plan.spaces]


def outputs(results: Any) -> torch.Tensor:
    return results[0]


@pytest.mark.parametrize(
    ("kind", "options", "width", "expected"),
    [
        pytest.param(nn.LSTM, {}, 7, [8, 7], marks=lstm),
        pytest.param(nn.LSTM, {"num_layers": 2, "bias": False}, 7, [8, 7, 7], marks=lstm),
        pytest.param(nn.LSTM, {"num_layers": 2, "bidirectional": True}, 14, [8, 7, 7, 7, 7], marks=lstm),
        (nn.GRU, {"num_layers": 2}, 7, [8, 7, 7]),
        (nn.GRU, {"bidirectional": True, "batch_first": True, "bias": False}, 14, [8, 7, 7]),
        (nn.RNN, {"bidirectional": True, "batch_first": True}, 14, [8, 7, 7]),
    ],
)
def test_layers_and_directions(kind: Any, options: dict[str, Any], width: int, expected: list[int]) -> None:
    assert sizes(Read(kind(8, 7, **options), width, outputs), X) == expected


def test_relu_recurrence() -> None:
    assert sizes(Read(nn.RNN(8, 7, nonlinearity="relu"), 7, outputs), X) == [8, 7]


@lstm
def test_projected_outputs_have_units_of_their_own() -> None:
    layer = nn.LSTM(8, 7, num_layers=2, proj_size=3)
    assert sizes(Read(layer, 3, outputs), X) == [8, 7, 3, 7, 3]


@pytest.mark.parametrize("kind", [pytest.param(nn.LSTM, marks=lstm), nn.GRU])
def test_last_states_of_every_layer_keep_their_units(kind: Any) -> None:
    def last(results: Any) -> torch.Tensor:
        states = results[1][0] if isinstance(results[1], tuple) else results[1]
        return states[-1] + 0.1 * states[1]

    layer = kind(8, 7, num_layers=3, batch_first=True)
    assert sizes(Read(layer, 7, last), X) == [8, 7, 7]  # the second and the third layer meet in the sum


def test_states_that_are_used_as_one_tensor_share_their_units() -> None:
    def all_layers(results: Any) -> torch.Tensor:
        return results[1].sum(0)

    assert sizes(Read(nn.GRU(8, 7, num_layers=2), 7, all_layers), X) == [8, 7]


@lstm
def test_given_initial_states_are_permuted_too() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer, self.after = nn.Linear(6, 8), nn.LSTM(8, 7), nn.Linear(7, 5)
            self.output = nn.Parameter(torch.randn(1, 1, 7))
            self.cell = nn.Parameter(torch.randn(1, 1, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states = [state.expand(1, x.shape[1], 7).contiguous() for state in (self.output, self.cell)]
            return self.after(self.layer(self.before(x), tuple(states))[0])

    model = Started()
    assert sorted(sizes(model, X)) == [7, 8]
    held = {name for name, layout in fxfusion.plan(model, (X,)).layouts.items() if layout.spaces()}
    assert {"output", "cell", "layer.weight_hh_l0"} <= held


def test_initial_states_that_are_inputs_fix_the_units() -> None:
    class Fed(Read):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.after(self.layer(self.before(x), state)[0])

    model = Fed(nn.GRU(8, 7), 7, outputs)
    assert sizes(model, X, torch.randn(1, 4, 7)) == [8]


def test_time_of_a_positional_parameter_does_not_tell_units_apart() -> None:
    """What is added per time step to channels in the batch's place must move alike at every step."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer, self.after = nn.Linear(6, 8), nn.GRU(1, 3), nn.Linear(8, 5)
            self.position = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.before(x) + self.position
            run, _ = self.layer(y.permute(1, 0, 2).reshape(4, -1, 1))
            return self.after(run.sum(-1).reshape(4, -1, 8))

    assert sizes(Channels(), X) == [8, 3]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(kind: Any) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.cell, self.after = nn.Linear(6, 8), kind(8, 7), nn.Linear(7, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = None
            for step in self.before(x).unbind(1):
                state = self.cell(step, state)
            assert state is not None
            return self.after(state[0] if isinstance(state, tuple) else state)

    assert sizes(Loop(), X) == [8, 7]
