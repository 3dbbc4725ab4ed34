"""Teach fxfusion an operator of one's own.

    python examples/add_an_operator.py

An operator without a rule freezes what it touches. A rule says in types what the operator does; the test
below it holds the rule against the operator itself.
"""

from __future__ import annotations

import torch
from torch import nn

import fxfusion
from fxfusion.rules import Context, Typed, rule
from fxfusion.testing import check_model, check_rule


@torch.library.custom_op("mylib::soft_gate", mutates_args=())
def soft_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Squash every channel and scale it by its gate."""
    return gate * x / (1 + x.abs())


@soft_gate.register_fake
def _(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Network(nn.Module):
    """A hidden layer that uses the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Linear(3, 8), nn.Parameter(torch.rand(8)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return two outputs per sample."""
        return self.second(soft_gate(self.first(x), self.gate))


def add_rule() -> None:
    """Register the rule: element by element, so aligned axes hold the same units."""

    @rule("mylib::soft_gate")
    def _(context: Context, x: Typed, gate: Typed) -> Typed:
        return context.broadcast(x, gate)


def test_rule() -> None:
    """Hold the rule against the operator, and the plan of the network against the network."""
    report = check_rule(torch.ops.mylib.soft_gate.default, (torch.randn(4, 3), torch.randn(3)))
    assert report.ok, report.false_claims
    assert not report.missed
    assert check_model(Network(), (torch.randn(4, 3),)).ok


def describe(title: str) -> None:
    """Print what is found in the network."""
    plan = fxfusion.plan(Network(), (torch.randn(4, 3),))
    print(f"{title}: {len(plan.spaces)} free spaces, {plan.covered:.0%} of the parameters covered")
    for limit in plan.limits:
        print(f"  {limit.operator}: {limit.reason}")


def main() -> None:
    """Show the plan without and with the rule."""
    describe("without a rule")
    add_rule()
    test_rule()
    describe("with the rule")


if __name__ == "__main__":
    main()
