"""Joint solving: one transport per space, from everything that touches it.

The cost of a space is the sum over all its writers and readers and, with calibration data, over all places
where it is observed, in common units (one minus a similarity). Weights can be compared only along axes that
are already aligned. So spaces are first solved from activations or, without, in an order in which each can
be compared through axes that are fixed or solved before; then block-coordinate sweeps solve one tree of
spaces at a time given all others, and keep what costs less, until none improves. Trees that share no
parameter are shared out among processes, if there are several.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence

import torch

from fxfusion.plan import Plan, Symmetry
from fxfusion.processes import current
from fxfusion.progress import Progress, silent
from fxfusion.statistics import CrossMoments
from fxfusion.transport.cost import MEMORY, State, WeightCost
from fxfusion.transport.coupled import Quadratic, Square
from fxfusion.transport.hierarchy import (
    Coupling,
    Ground,
    Shape,
    Solution,
    Tree,
    costs_in_place,
    costs_of,
    solve_tree,
    to_maps,
    trees,
)
from fxfusion.transport.map import BlockMaps, Map
from fxfusion.transport.observed import observed_costs

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
    mixed : dict of str to (str, list of BlockMaps)
        Per parameter another one, and what carries that, block by block: it is added.
    solving : float
        Seconds that the solver took in this process; the rest of aligning is comparing.
    gaps : dict of str to float
        Per space whose assignments are not exact: how far above the least cost they are at most, as a share.
    """

    maps: dict[str, Map]
    before: dict[str, float]
    after: dict[str, float]
    sweeps: int = 0
    local: dict[str, list[BlockMaps]] | None = None
    mixed: dict[str, tuple[str, list[BlockMaps]]] = dataclasses.field(default_factory=dict)
    solving: float = 0.0
    gaps: dict[str, float] = dataclasses.field(default_factory=dict)


def align(
    plan: Plan,
    target: State,
    source: State,
    coupling: Coupling,
    moments: Mapping[str, Sequence[CrossMoments]] | None = None,
    progress: Progress = silent,
    observed: Mapping[str, Ground] | None = None,
    memory: int = MEMORY,
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
    observed : mapping of str to Ground, optional
        Costs of activations by space, where moments were not kept; for plans without rotations.
    memory : int
        As for :class:`fxfusion.transport.cost.WeightCost`.

    Returns
    -------
    Alignment
    """
    weights = functools.partial(WeightCost, target=target, source=source, memory=memory)
    if plan.rotates:
        assert observed is None, "permutations and rotations are solved by different costs"
        # Weights cannot be compared along axes that may turn, in whatever order: permutations come first.
        first = _permuting(plan)
        costs = observed_costs(first, moments or {})
        begun = _align(first, coupling, weights(first), costs, progress, None)
        costs = observed_costs(plan, moments or {})
        return _align(plan, coupling, weights(plan), costs, progress, begun.solutions).alignment
    if observed is None:
        observed = observed_costs(plan, moments or {})
    return _align(plan, coupling, weights(plan), observed, progress, None).alignment


def _permuting(plan: Plan) -> Plan:
    """Return a plan without rotations, but those of pairs, whose dimensions may not be permuted."""
    spaces = (
        dataclasses.replace(space, symmetry=Symmetry.PERMUTATION)
        if space.symmetry.rotates and space.symmetry is not Symmetry.ROTARY
        else space
        for space in plan.spaces
    )
    return dataclasses.replace(plan, spaces=tuple(spaces))


def _align(
    plan: Plan,
    coupling: Coupling,
    weights: WeightCost,
    observed: Mapping[str, Ground],
    progress: Progress,
    begun: Mapping[str, Solution] | None,
) -> _Solver:
    """Solve the transports of all spaces, from solutions found before if there are any."""
    solver = _Solver(plan, coupling, weights, observed)
    generations, done, processes = solver.generations(), 0, current()
    for trees_now in generations:
        started = processes.share(
            functools.partial(solver.started, begun=begun), trees_now, _sizes(plan, trees_now)
        )
        for tree, found in zip(trees_now, started, strict=True):
            solver.take(tree, found)
        done += len(trees_now)
        progress("match", done, len(solver.neighbours))
    stale = set(solver.neighbours) - solver.settled
    while stale and solver.alignment.sweeps < MAXIMAL_SWEEPS:
        for trees_now in generations:
            due = [tree for tree in trees_now if tree.root.name in stale]
            improved = processes.share(solver.improved, due, _sizes(plan, due))
            for tree, found in zip(due, improved, strict=True):
                stale.remove(tree.root.name)
                if solver.take(tree, found):
                    stale |= solver.neighbours[tree.root.name]
        solver.alignment.sweeps += 1
        progress("refine", solver.alignment.sweeps, MAXIMAL_SWEEPS)
    return solver


def _sizes(plan: Plan, some: Sequence[Tree]) -> list[float]:
    """Return how long trees take to solve, in some unit: an assignment takes the cube of its units."""
    return [sum(float(Shape.of(plan, space).units) ** 3 for space in tree.members) for tree in some]


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What solving a tree of spaces gave.

    Attributes
    ----------
    solutions : dict of str to Solution, or None
        None where nothing was gained over those before.
    before, after : dict of str to float
        Costs per space, as of :class:`Alignment`; empty where they are not known in full.
    """

    solutions: Mapping[str, Solution] | None
    before: Mapping[str, float]
    after: Mapping[str, float]


class _Solver:
    """The transports found so far, with the solutions (for all pairs of outer units) behind them."""

    def __init__(
        self,
        plan: Plan,
        coupling: Coupling,
        weights: WeightCost,
        observed: Mapping[str, Ground],
    ) -> None:
        self.plan = plan
        self.coupling = coupling
        self.weights = weights
        self.observed = observed
        holders = {tree.root.name: set(weights.parameters(tree)) for tree in trees(plan)}
        self.neighbours = {
            name: {other for other, theirs in holders.items() if held & theirs}
            for name, held in holders.items()
        }
        self.alignment = Alignment({}, {}, {})
        self.solutions: dict[str, Solution] = {}
        self.settled: set[str] = set()  # trees whose first solution took everything into account

    def generations(self) -> list[list[Tree]]:
        """Return the trees in the order of solving; those of one generation share no parameter.

        Next comes what can be compared best given what came before: by activations, then the most anchored.
        A tree's costs depend on its neighbours alone, so that a generation can be solved in any order, or at
        once, with the same result as one tree after the other.
        """
        pending, solved = trees(self.plan), frozenset[str]()
        born: dict[str, int] = {}
        generations: list[list[Tree]] = []

        def readiness(tree: Tree) -> tuple[bool, int]:
            return tree.root.name in self.observed, self.weights.anchored(tree, solved)

        while pending:
            tree = max(pending, key=readiness)
            pending.remove(tree)
            solved |= tree.names
            before = [born[name] for name in self.neighbours[tree.root.name] if name in born]
            born[tree.root.name] = generation = max(before, default=-1) + 1
            if generation == len(generations):
                generations.append([])
            generations[generation].append(tree)
        return generations

    def started(self, tree: Tree, begun: Mapping[str, Solution] | None = None) -> _Found:
        """Solve a tree for the first time, from what needs no unsolved space.

        If that is all there is, the next sweep would find the same costs: they are known in full.
        """
        if begun is not None:
            return _Found({space.name: begun[space.name] for space in tree.members}, {}, {})
        name, maps = tree.root.name, self.alignment.maps
        seen = name in self.observed
        complete = not seen and self.weights.complete(tree, frozenset(maps))
        costs = (
            {space.name: self.observed[space.name] for space in tree.members}
            if seen
            else self.weights.costs(tree, maps, self.solutions, partial=True)
        )
        solved = self._solve(tree, costs)
        if not complete:
            return _Found(solved, {}, {})
        before = costs_in_place(self.plan, tree, costs)
        return _Found(solved, before, costs_of(self.plan, tree, costs, solved))

    def improved(self, tree: Tree) -> _Found:
        """Solve a tree anew given all other transports; there are solutions if they cost less."""
        squares, lengths = self._squares(tree)
        costs = self.weights.costs(tree, self.alignment.maps, self.solutions, squares=not squares)
        if tree.root.name in self.observed:
            for space in tree.members:
                costs[space.name] += self.observed[space.name]
        if squares:
            return self._coupled(tree, costs, squares, lengths)
        old = new = costs_of(self.plan, tree, costs, self.solutions)
        least = _IMPROVEMENT * sum(Shape.of(self.plan, space).units for space in tree.members)
        improved = False
        if old[tree.root.name] > least:  # costs are not negative: below, nothing is left to gain
            solved = self._solve(tree, costs)
            new = costs_of(self.plan, tree, costs, solved)
            improved = new[tree.root.name] < old[tree.root.name] - least
        before = costs_in_place(self.plan, tree, costs)
        return _Found(solved, before, new) if improved else _Found(None, before, old)

    def _squares(self, tree: Tree) -> tuple[list[Square], float]:
        """Return what holds a tree's units on two axes, where they are assigned one to one."""
        coupling = self.coupling.of(tree.root.name)
        hard = coupling.regularisation is None and coupling.share == 1
        assigned = self.solutions[tree.root.name].index is not None
        unsigned = [space for space in tree.members[1:] if space.symmetry is not Symmetry.SIGN]
        if not (hard and assigned) or unsigned or len(tree.members) > 2:
            return [], 0.0
        return self.weights.squares(tree, self.alignment.maps)

    def _coupled(
        self, tree: Tree, costs: Mapping[str, Ground], squares: Sequence[Square], lengths: float
    ) -> _Found:
        """Solve a tree whose units some parameter holds on two axes, by the Frank-Wolfe method."""
        root, *signs = (space.name for space in tree.members)
        shape = Shape.of(self.plan, tree.root)
        plain = costs[root].matrix.reshape(shape.size, shape.size)
        signed = torch.zeros_like(plain)
        for name in signs:
            plain = plain + torch.as_tensor(costs[name].offset).reshape(shape.size, -1)
            signed = costs[name].matrix.reshape(shape.size, shape.size)
        problem = Quadratic(plain, signed, squares, bool(signs))
        index = self.solutions[root].index
        assert index is not None
        index = index.reshape(-1)
        chosen = torch.ones_like(plain[0])
        for name in signs:
            known = self.solutions[name].plan
            assert known is not None
            chosen = known.reshape(shape.size, -1).gather(1, index.unsqueeze(1)).squeeze(1).sign()
        start = time.perf_counter()
        found = problem.solve(index, chosen)
        self.alignment.solving += time.perf_counter() - start
        own = torch.arange(shape.size, device=index.device)
        below = dict.fromkeys(signs, 0.0)  # what signs cost is in their units' cost
        before = {root: problem.value(own, torch.ones_like(plain[0])) + lengths, **below}
        old, new = problem.value(index, chosen) + lengths, found.value + lengths
        if new >= old - _IMPROVEMENT * shape.size:
            return _Found(None, before, {root: old, **below})
        solved = {root: Solution(found.index.reshape(shape.cost[:4]), None, plain.new_zeros(1, 1, 1))}
        for name in signs:
            table = found.signs.unsqueeze(1).expand(-1, shape.size).reshape(1, shape.size, shape.size, 1, 1)
            solved[name] = Solution(None, table, torch.zeros_like(table[..., 0, 0]), rotation=True)
        return _Found(solved, before, {root: new, **below})

    def _solve(self, tree: Tree, costs: Mapping[str, Ground]) -> dict[str, Solution]:
        start = time.perf_counter()
        solved = solve_tree(self.plan, tree, costs, self.coupling.of(tree.root.name))
        self.alignment.solving += time.perf_counter() - start
        return solved

    def take(self, tree: Tree, found: _Found) -> bool:
        """Enter what was found; return whether transports changed."""
        self.alignment.before.update(found.before)
        self.alignment.after.update(found.after)
        if found.before:
            self.settled.add(tree.root.name)
        if found.solutions is None:
            return False
        self.solutions.update(found.solutions)
        self.alignment.gaps.update({name: item.gap for name, item in found.solutions.items() if item.gap})
        self.alignment.maps.update(to_maps(self.plan, tree, found.solutions))
        return True
