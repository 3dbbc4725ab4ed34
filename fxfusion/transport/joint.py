"""Joint solving: one transport per space, from everything that touches it.

The cost of a space is the sum over all its writers and readers and, with calibration data, over all places
where it is observed, in common units (one minus a similarity). Weights can be compared only along axes that
are already aligned. So spaces are first solved from activations or, without, in an order in which each can
be compared through axes that are fixed or solved before; then block-coordinate sweeps solve one tree of
spaces at a time given all others, and keep what costs less, until none improves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fxfusion.plan import Plan, Symmetry
from fxfusion.progress import Progress, silent
from fxfusion.statistics import CrossMoments
from fxfusion.transport.cost import State, WeightCost, activation_cost
from fxfusion.transport.hierarchy import (
    Coupling,
    Shape,
    Solution,
    Tree,
    costs_of,
    identity,
    solve_tree,
    to_maps,
    trees,
)
from fxfusion.transport.map import BlockMaps, Map

MAXIMAL_SWEEPS = 30
_IMPROVEMENT = 1e-5  # of the cost of units that have nothing in common: a smaller one is rounding


@dataclasses.dataclass(eq=False)
class Alignment:
    """The transports of one parent into the target's basis.

    Attributes
    ----------
    maps : dict of str to HardMap or SoftMap
    before, after : dict of str to float
        Per space: ground cost, including the spaces below it, under the identity pairing and under the
        transport, summed over its units: about 1 per unit and source of evidence for units that have
        nothing in common, 0 for equal ones.
    sweeps : int
        Number of block-coordinate sweeps.
    local : dict of str to list of BlockMaps, or None
        Per parameter, one per block: transports that differ from parameter to parameter.
    """

    maps: dict[str, Map]
    before: dict[str, float]
    after: dict[str, float]
    sweeps: int = 0
    local: dict[str, list[BlockMaps]] | None = None


def align(
    plan: Plan,
    target: State,
    source: State,
    coupling: Coupling,
    moments: Mapping[str, Sequence[CrossMoments]] | None = None,
    progress: Progress = silent,
) -> Alignment:
    """Solve the transport of every space from one parent into the target's basis.

    Parameters
    ----------
    plan : Plan
    target, source : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    coupling : Coupling
        Hard or soft.
    moments : mapping of str to sequence of CrossMoments, optional
        Of activations, from :func:`fxfusion.statistics.collect`; without them weights alone are compared.
    progress : callable, optional

    Returns
    -------
    Alignment
    """
    if plan.rotates:
        # Weights cannot be compared along axes that may turn, in whatever order: permutations come first.
        begun = _align(_permuting(plan), target, source, coupling, moments, progress, None)
        return _align(plan, target, source, coupling, moments, progress, begun.solutions).alignment
    return _align(plan, target, source, coupling, moments, progress, None).alignment


def _permuting(plan: Plan) -> Plan:
    """Return a plan without rotations."""
    spaces = (dataclasses.replace(space, symmetry=Symmetry.PERMUTATION) for space in plan.spaces)
    return dataclasses.replace(plan, spaces=tuple(spaces))


def _align(
    plan: Plan,
    target: State,
    source: State,
    coupling: Coupling,
    moments: Mapping[str, Sequence[CrossMoments]] | None,
    progress: Progress,
    begun: Mapping[str, Solution] | None,
) -> _Solver:
    """Solve the transports of all spaces, from solutions found before if there are any."""
    solver = _Solver(plan, coupling, WeightCost(plan, target, source), moments or {})
    pending = trees(plan)
    order: list[Tree] = []
    while pending:
        tree = max(pending, key=solver.readiness)
        pending.remove(tree)
        order.append(tree)
        solver.start(tree, begun)
        progress("match", len(order), len(order) + len(pending))
    stale = {tree.root.name for tree in order} - solver.settled
    while stale and solver.alignment.sweeps < MAXIMAL_SWEEPS:
        for tree in order:
            if tree.root.name in stale:
                stale.remove(tree.root.name)
                if solver.improve(tree):
                    stale |= solver.neighbours[tree.root.name]
        solver.alignment.sweeps += 1
        progress("refine", solver.alignment.sweeps, MAXIMAL_SWEEPS)
    return solver


class _Solver:
    """The transports found so far, with the solutions (for all pairs of outer units) behind them."""

    def __init__(
        self,
        plan: Plan,
        coupling: Coupling,
        weights: WeightCost,
        moments: Mapping[str, Sequence[CrossMoments]],
    ) -> None:
        self.plan = plan
        self.coupling = coupling
        self.weights = weights
        self.observed = {
            tree.root.name: {
                space.name: activation_cost(plan, space, moments[space.name]) for space in tree.members
            }
            for tree in trees(plan)
            if moments and _is_seen(tree, moments)
        }
        holders = {tree.root.name: set(weights.parameters(tree)) for tree in trees(plan)}
        self.neighbours = {
            name: {other for other, theirs in holders.items() if held & theirs}
            for name, held in holders.items()
        }
        self.alignment = Alignment({}, {}, {})
        self.solutions: dict[str, Solution] = {}
        self.settled: set[str] = set()  # trees whose first solution took everything into account

    def readiness(self, tree: Tree) -> tuple[bool, int]:
        """Return how well a tree can be compared now: activations first, then the most anchored."""
        return tree.root.name in self.observed, self.weights.anchored(tree, frozenset(self.alignment.maps))

    def start(self, tree: Tree, begun: Mapping[str, Solution] | None = None) -> None:
        """Solve a tree for the first time, from what needs no unsolved space.

        If that is all there is, the next sweep would find the same costs: the tree is settled.
        """
        if begun is not None:
            self._accept(tree, {space.name: begun[space.name] for space in tree.members})
            return
        name, found = tree.root.name, self.alignment
        costs = self.observed.get(name)
        complete = costs is None and self.weights.complete(tree, frozenset(found.maps))
        if costs is None:
            costs = self.weights.costs(tree, found.maps, self.solutions, partial=True)
        solved = solve_tree(self.plan, tree, costs, self.coupling.of(name))
        self._accept(tree, solved)
        if complete:
            self.settled.add(name)
            found.before.update(costs_of(self.plan, tree, costs, identity(self.plan, tree)))
            found.after.update(costs_of(self.plan, tree, costs, solved))

    def improve(self, tree: Tree) -> bool:
        """Solve a tree anew given all other transports; keep the result if it costs less."""
        costs = self.weights.costs(tree, self.alignment.maps, self.solutions)
        for name, observed in self.observed.get(tree.root.name, {}).items():
            costs[name] += observed
        old = new = costs_of(self.plan, tree, costs, self.solutions)
        least = _IMPROVEMENT * sum(Shape.of(self.plan, space).units for space in tree.members)
        improved = False
        if old[tree.root.name] > least:  # costs are not negative: below, nothing is left to gain
            solved = solve_tree(self.plan, tree, costs, self.coupling.of(tree.root.name))
            new = costs_of(self.plan, tree, costs, solved)
            improved = new[tree.root.name] < old[tree.root.name] - least
        if improved:
            self._accept(tree, solved)
        self.alignment.before.update(costs_of(self.plan, tree, costs, identity(self.plan, tree)))
        self.alignment.after.update(new if improved else old)
        return improved

    def _accept(self, tree: Tree, solved: Mapping[str, Solution]) -> None:
        self.solutions.update(solved)
        self.alignment.maps.update(to_maps(self.plan, tree, solved))


def _is_seen(tree: Tree, moments: Mapping[str, Sequence[CrossMoments]]) -> bool:
    """Return whether every space of a tree, or a space below it, was observed."""
    return all(
        moments[space.name] or any(moments[below.name] for below in tree.members if space.name in below.scope)
        for space in tree.members
    )
