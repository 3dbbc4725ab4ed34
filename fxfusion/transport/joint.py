"""Joint solving: one transport per space, from everything that touches it.

From activations one solve per space suffices: its cost does not depend on other transports. From weights it
does, so spaces are first solved in an order in which each can be compared through axes that are fixed or
already solved, then block-coordinate sweeps improve one space at a time until none improves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fxfusion.plan import Plan
from fxfusion.progress import Progress, silent
from fxfusion.statistics import CrossMoments
from fxfusion.transport.cost import State, WeightCost, activation_cost
from fxfusion.transport.hierarchy import (
    Coupling,
    Solution,
    Tree,
    costs_of,
    identity,
    solve_tree,
    to_maps,
    trees,
)
from fxfusion.transport.map import Map

MAXIMAL_SWEEPS = 30
_IMPROVEMENT = 1e-9  # relative: a smaller one is rounding


@dataclasses.dataclass(eq=False)
class Alignment:
    """The transports of one parent into the target's basis.

    Attributes
    ----------
    maps : dict of str to HardMap or SoftMap
    before, after : dict of str to float
        Per space: ground cost, including the spaces below it, under the identity pairing and under the
        transport; squared distances for weights, sums of one minus correlation for activations.
    sweeps : int
        Number of block-coordinate sweeps (0 from activations).
    """

    maps: dict[str, Map]
    before: dict[str, float]
    after: dict[str, float]
    sweeps: int = 0


def align_activations(
    plan: Plan,
    moments: Mapping[str, Sequence[CrossMoments]],
    coupling: Coupling,
    target: State,
    source: State,
) -> Alignment:
    """Solve every space from calibration moments.

    A tree of spaces that no activation shows (a table that only parameters meet) is solved from weights,
    after the others.

    Parameters
    ----------
    plan : Plan
    moments : mapping of str to sequence of CrossMoments
        From :func:`fxfusion.statistics.collect`.
    coupling : Coupling
    target, source : mapping of str to torch.Tensor
        Weights by the names that the graph uses.

    Returns
    -------
    Alignment
    """
    solver = _Solver(plan, coupling)
    weights = WeightCost(plan, target, source)
    unseen = [tree for tree in trees(plan) if not _is_seen(tree, moments)]
    for tree in [*(tree for tree in trees(plan) if _is_seen(tree, moments)), *unseen]:
        if tree in unseen:
            costs = weights.costs(tree, solver.alignment.maps, solver.solutions)
        else:
            costs = {space.name: activation_cost(plan, space, moments[space.name]) for space in tree.members}
        solver.accept(tree, solve_tree(plan, tree, costs, coupling))
        solver.record(tree, costs)
    return solver.alignment


def _is_seen(tree: Tree, moments: Mapping[str, Sequence[CrossMoments]]) -> bool:
    """Return whether every space of a tree, or a space below it, was observed."""
    return all(
        moments[space.name] or any(moments[below.name] for below in tree.members if space.name in below.scope)
        for space in tree.members
    )


def align_weights(
    plan: Plan, target: State, source: State, coupling: Coupling, progress: Progress = silent
) -> Alignment:
    """Solve every space from weights.

    Parameters
    ----------
    plan : Plan
    target, source : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    coupling : Coupling
    progress : callable, optional

    Returns
    -------
    Alignment
    """
    weights = WeightCost(plan, target, source)
    solver = _Solver(plan, coupling)
    pending = trees(plan)
    order: list[Tree] = []
    while pending:
        solved = frozenset(solver.alignment.maps)
        tree = max(pending, key=lambda item: weights.anchored(item, solved))
        pending.remove(tree)
        order.append(tree)
        costs = weights.costs(tree, solver.alignment.maps, solver.solutions, partial=True)
        solver.accept(tree, solve_tree(plan, tree, costs, coupling))
        progress("match", len(order), len(order) + len(pending))
    for sweep in range(1, MAXIMAL_SWEEPS + 1):
        improved = [solver.improve(weights, tree) for tree in order]
        solver.alignment.sweeps = sweep
        progress("refine", sweep, MAXIMAL_SWEEPS)
        if not any(improved):
            break
    return solver.alignment


class _Solver:
    """The transports found so far, with the solutions (for all pairs of outer units) behind them."""

    def __init__(self, plan: Plan, coupling: Coupling) -> None:
        self.plan = plan
        self.coupling = coupling
        self.alignment = Alignment({}, {}, {})
        self.solutions: dict[str, Solution] = {}

    def accept(self, tree: Tree, solved: Mapping[str, Solution]) -> None:
        self.solutions.update(solved)
        self.alignment.maps.update(to_maps(self.plan, tree, solved))

    def improve(self, weights: WeightCost, tree: Tree) -> bool:
        """Solve a tree anew given all other transports; keep the result if it costs less."""
        costs = weights.costs(tree, self.alignment.maps, self.solutions)
        solved = solve_tree(self.plan, tree, costs, self.coupling)
        old, new = (
            costs_of(self.plan, tree, costs, item)[tree.root.name] for item in (self.solutions, solved)
        )
        improved = new < old - _IMPROVEMENT * abs(old)
        if improved:
            self.accept(tree, solved)
        self.record(tree, costs)
        return improved

    def record(self, tree: Tree, costs: Mapping[str, torch.Tensor]) -> None:
        """Note what each space costs, before and after."""
        self.alignment.before.update(costs_of(self.plan, tree, costs, identity(self.plan, tree)))
        self.alignment.after.update(costs_of(self.plan, tree, costs, self.solutions))
