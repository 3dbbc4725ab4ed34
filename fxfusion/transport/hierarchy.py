"""Spaces below spaces, solved together: head_dim below heads, query heads below key heads.

How well head i of the target matches head j of the source is the optimal inner assignment between them.
So the inner problems are solved for every pair of outer units, and their values are the outer cost
(two-level matching; exact for the joint problem, since the inner problems are independent).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from fxfusion.errors import OptionError
from fxfusion.plan import Plan, Space, Symmetry
from fxfusion.transport.assignment import Masses, assign, assign_groups, auction, emd, partial
from fxfusion.transport.map import HardMap, Map, SignMap, SoftMap, apart, in_order
from fxfusion.transport.rotation import planar, procrustes
from fxfusion.transport.sinkhorn import sinkhorn


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """What solving a batch of problems gave.

    Attributes
    ----------
    index : torch.Tensor or None
        int64 ``[batch, target]``, for one-to-one couplings.
    plans : torch.Tensor or None
        ``[batch, target, source]``, for all others.
    values : torch.Tensor
        ``[batch]``: the costs.
    gap : float
        How far they are at most above the least, as a share of it.
    """

    index: torch.Tensor | None
    plans: torch.Tensor | None
    values: torch.Tensor
    gap: float = 0.0


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Which coupling to solve for: hard (``regularisation`` None) or soft.

    Attributes
    ----------
    regularisation : float or None
    absolute : bool
        Whether it is meant in units of the cost, not of the mean cost.
    relaxation : float or None
        Of a soft coupling: price of mass that is not transported, in the same units; None for balanced.
    widening : bool
        Soft only where the target has more units than the source, hard elsewhere.
    share : float
        Of a hard coupling: how much of the mass is transported, the cheapest. Units without a counterpart
        stay the target's.
    gap : float
        Of a hard coupling of equally many units, alike in mass: how far above the least cost it may be, as a
        share of that; how far it is at most is certified, and reported. 0, and all others, are exact.
    overrides : mapping of str to Coupling
        Other couplings for some spaces, by pattern of their names as in :mod:`fnmatch`. Spaces below others
        follow the outermost.

    Examples
    --------
    >>> Coupling(overrides={"*.mlp.*": Coupling(0.1)}).of("blocks.0.mlp.fc1.weight[0]").regularisation
    0.1
    """

    regularisation: float | None = None
    absolute: bool = False
    relaxation: float | None = None
    widening: bool = False
    share: float = 1.0
    gap: float = 0.0
    overrides: Mapping[str, Coupling] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise OptionError(f"share={self.share!r}: give a number above 0 and at most 1")
        if self.share < 1 and self.regularisation is not None:
            raise OptionError("share is of hard couplings: leave regularisation out")
        if not 0 <= self.gap < 1:
            raise OptionError(f"gap={self.gap!r}: give a number from 0 to below 1")
        if self.gap and (self.share < 1 or (self.regularisation is not None and not self.widening)):
            raise OptionError("gap is of assignments: leave share and regularisation out")

    def of(self, space: str) -> Coupling:
        """Return the coupling to solve for in a space."""
        # Names of spaces hold brackets, which are no patterns here.
        fitting = (
            item
            for pattern, item in self.overrides.items()
            if fnmatchcase(space, pattern.replace("[", "[[]"))
        )
        return next(fitting, self)

    def solve(self, costs: torch.Tensor, masses: Masses | None = None) -> Solved:
        """Solve a batch of problems.

        Parameters
        ----------
        costs : torch.Tensor
            ``[batch, target, source]``.
        masses : tuple of torch.Tensor, optional
            Of the target's and the source's units, ``[batch, units]``; uniform by default.

        Returns
        -------
        Solved
        """
        soft = not self.widening or costs.shape[-2] > costs.shape[-1]
        if self.regularisation is not None and soft:
            return Solved(None, *sinkhorn(costs, self.regularisation, self.absolute, self.relaxation, masses))
        if self.share < 1:
            return Solved(None, *partial(costs, self.share))
        if masses is not None:
            return Solved(None, *emd(costs, masses))
        if costs.shape[-2] != costs.shape[-1]:
            return Solved(None, *assign_groups(costs))
        if self.gap:
            index, values, gaps = auction(costs, self.gap)
            return Solved(index, None, values, float(gaps.max()))
        index, values = assign(costs)
        return Solved(index, None, values)


@dataclasses.dataclass(frozen=True)
class Tree:
    """A free space and all spaces below it.

    Attributes
    ----------
    root : Space
    members : tuple of Space
        The root and everything below it, outer spaces first.
    """

    root: Space
    members: tuple[Space, ...]

    @property
    def names(self) -> frozenset[str]:
        """Names of the members."""
        return frozenset(space.name for space in self.members)


def trees(plan: Plan) -> list[Tree]:
    """Group a plan's spaces into trees of nested spaces, in the plan's order."""
    fixed = {space.name for space in plan.fixed}
    roots = [space for space in plan.spaces if not set(space.scope) - fixed]
    return [
        Tree(
            root,
            (root, *sorted((s for s in plan.spaces if root.name in s.scope), key=lambda s: len(s.scope))),
        )
        for root in roots
    ]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions of a space's cost: fixed outer units, and free outer and own units of both sides."""

    fixed: int
    outer: int
    size: int
    source_outer: int
    source_size: int

    @classmethod
    def of(cls, plan: Plan, space: Space) -> Shape:
        """Return the dimensions for a space of a plan."""
        fixed = {item.name for item in plan.fixed}
        free = [name for name in space.scope if name not in fixed]
        return cls(
            math.prod(plan.scope_size(name) for name in space.scope if name in fixed),
            math.prod(map(plan.scope_size, free)),
            space.size,
            math.prod(map(plan.source.scope_size, free)),
            plan.source.scope_size(space.name),
        )

    @property
    def units(self) -> int:
        """Number of the target's units, over all outer units."""
        return self.fixed * self.outer * self.size

    @property
    def source_units(self) -> int:
        """Number of the source's units, over all outer units."""
        return self.fixed * self.source_outer * self.source_size

    @property
    def cost(self) -> tuple[int, int, int, int, int]:
        """``[fixed, target outer, source outer, target units, source units]``."""
        return self.fixed, self.outer, self.source_outer, self.size, self.source_size


@dataclasses.dataclass(frozen=True, eq=False)
class Ground:
    """The ground cost of a space.

    Attributes
    ----------
    matrix : torch.Tensor
        float64, of shape :attr:`Shape.cost`; its inner product with a transport, of rows that sum to one, is
        what that costs.
    offset : torch.Tensor or float
        ``[fixed, target outer, source outer]``: what any transport costs besides. Where units may turn, the
        lengths of their features are here, and the matrix is of inner products alone.
    """

    matrix: torch.Tensor
    offset: torch.Tensor | float = 0.0

    def __add__(self, other: Ground) -> Ground:
        """Return the cost by both kinds of evidence."""
        return Ground(self.matrix + other.matrix, self.offset + other.offset)

    def __mul__(self, factor: float) -> Ground:
        """Return the cost in other units."""
        return Ground(self.matrix * factor, self.offset * factor)

    @classmethod
    def zeros(cls, shape: Shape, device: torch.device | None = None) -> Ground:
        """Return the cost without evidence."""
        return cls(torch.zeros(shape.cost, dtype=torch.float64, device=device))


@dataclasses.dataclass(eq=False)
class Solution:
    """A solved space: its plan for every pair of outer units.

    Attributes
    ----------
    index : torch.Tensor or None
        Hard: int64 ``[fixed, target outer, source outer, target units]``.
    plan : torch.Tensor or None
        Soft: ``[fixed, target outer, source outer, target units, source units]``.
    values : torch.Tensor
        ``[fixed, target outer, source outer]``: the optimal cost of each pair.
    partial : bool
        Whether some mass stays where it is.
    rotation : bool
        Whether the plan is an orthogonal map.
    gap : float
        How far the cost is at most above the least, as a share of it.
    """

    index: torch.Tensor | None
    plan: torch.Tensor | None
    values: torch.Tensor
    partial: bool = False
    rotation: bool = False
    gap: float = 0.0

    def widened(self, size: int) -> Solution:
        """Return the solution with a plan in place of an index into ``size`` source units."""
        if self.index is None:
            return self
        return Solution(None, torch.nn.functional.one_hot(self.index, size).double() / size, self.values)


def solve_tree(
    plan: Plan,
    tree: Tree,
    costs: Mapping[str, Ground],
    coupling: Coupling,
    masses: Mapping[str, Masses] | None = None,
) -> dict[str, Solution]:
    """Solve a tree of spaces, innermost first.

    Parameters
    ----------
    plan : Plan
    tree : Tree
    costs : mapping of str to Ground
        Per space.
    coupling : Coupling
    masses : mapping of str to tuple of torch.Tensor, optional
        Per space, of the target's and the source's units, ``[fixed, outer * units]``; uniform by default.

    Returns
    -------
    dict of str to Solution
    """
    solved: dict[str, Solution] = {}
    for space in reversed(tree.members):
        shape = Shape.of(plan, space)
        cost = with_children(plan, tree, space, costs[space.name], solved)
        if space.symmetry.turns:
            if space.symmetry is Symmetry.ROTARY:
                turned, gained = planar(-cost.matrix, space.planes)
            else:
                turned, gained = procrustes(-cost.matrix, space.symmetry is Symmetry.CENTRED)
            solved[space.name] = Solution(None, turned, cost.offset - gained, rotation=True)
            continue
        flat = cost.matrix.reshape(-1, shape.size, shape.source_size)
        given = (masses or {}).get(space.name)
        found = coupling.solve(flat, None if given is None else _paired(given, shape))
        solved[space.name] = Solution(
            None if found.index is None else found.index.reshape(shape.cost[:4]),
            None if found.plans is None else found.plans.reshape(shape.cost),
            found.values.reshape(shape.cost[:3]) + cost.offset,
            coupling.share < 1,
            gap=found.gap,
        )
    signs = {space.name for space in tree.members if space.symmetry is Symmetry.SIGN}
    # Where one space is not one-to-one, none of its tree is; signs follow their units.
    if any(solved[name].index is None for name in solved.keys() - signs):
        return {space.name: solved[space.name].widened(space.size) for space in tree.members}
    return solved


def with_children(
    plan: Plan, tree: Tree, space: Space, cost: Ground, solved: Mapping[str, Solution]
) -> Ground:
    """Return a space's cost plus what the spaces right below it cost for every pair of its units."""
    total = cost.matrix.clone()
    for child in tree.members:
        if child.scope and child.scope[-1] == space.name:
            total += _child_values(plan, space, child, solved[child.name])
    return Ground(total, cost.offset)


def _paired(masses: Masses, shape: Shape) -> Masses:
    """Return the masses of the units within every pair of outer units, each set summing to one."""
    target = masses[0].reshape(shape.fixed, shape.outer, shape.size)
    source = masses[1].reshape(shape.fixed, shape.source_outer, shape.source_size)
    target = target.unsqueeze(2).expand(*shape.cost[:3], shape.size).reshape(-1, shape.size)
    source = source.unsqueeze(1).expand(*shape.cost[:3], shape.source_size).reshape(-1, shape.source_size)
    return target / target.sum(-1, keepdim=True), source / source.sum(-1, keepdim=True)


def _child_values(plan: Plan, parent: Space, child: Space, solution: Solution) -> torch.Tensor:
    """Return a child's optimal costs as a cost of the parent, fixed units that only it has summed out."""
    shape = Shape.of(plan, parent)
    values = solution.values.reshape(shape.fixed, -1, *solution.values.shape[1:]).sum(1)
    return pairs(values, shape)


def pairs(matrix: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Reshape ``[fixed, outer * n, outer * n]`` to pairs of outer units times pairs of units."""
    sides = shape.outer, shape.size, shape.source_outer, shape.source_size
    return matrix.reshape(shape.fixed, *sides).permute(0, 1, 3, 2, 4)


def to_maps(plan: Plan, tree: Tree, solved: Mapping[str, Solution]) -> dict[str, Map]:
    """Return the transports of a solved tree: of the pairs of outer units, those that were matched."""
    maps: dict[str, Map] = {}
    for space in tree.members:
        solution = solved[space.name]
        fixed = {item.name for item in plan.fixed}
        sizes = [plan.scope_size(name) for name in space.scope]
        above = maps.get(space.scope[-1]) if space.scope else None
        if space.symmetry is Symmetry.SIGN and isinstance(above, HardMap):
            picked = torch.ones(sizes)
            if solution.plan is not None:
                matched = _matched_outer(plan, space, maps, solution.plan.device)
                picked = solution.plan.flatten(2).gather(2, matched.unsqueeze(-1)).sign()
            maps[space.name] = SignMap(space.scope, picked.to(torch.int8).reshape(*sizes, 1))
            continue
        if solution.plan is not None:
            others = [plan.source.scope_size(name) for name in space.scope]
            coupling = spread(solution.plan, sizes, others, len(fixed & set(space.scope)))
            maps[space.name] = (
                SoftMap(space.scope, coupling, coupling)
                if solution.rotation
                else SoftMap.from_coupling(coupling, space.scope, solution.partial)
            )
            continue
        assert solution.index is not None
        # [fixed, outer]: the source outer unit of each target one
        matched = _matched_outer(plan, space, maps, solution.index.device)
        picked = solution.index.gather(
            2, matched[:, :, None, None].expand(-1, -1, 1, solution.index.shape[-1])
        ).squeeze(2)
        maps[space.name] = HardMap(space.scope, picked.reshape(*sizes, space.size))
    return maps


def _matched_outer(plan: Plan, space: Space, maps: Mapping[str, Map], device: torch.device) -> torch.Tensor:
    """Return which flat source outer unit each flat target outer unit takes: ``[fixed, outer]``."""
    shape = Shape.of(plan, space)
    found = [maps[name] for name in space.scope if name in maps]
    flat = torch.zeros(shape.fixed, 1, dtype=torch.int64, device=device)
    for item in found:
        assert isinstance(item, HardMap)
        index = item.index.reshape(-1, *flat.shape[1:2], item.index.shape[-1])
        index = index.repeat_interleave(shape.fixed // index.shape[0], 0)
        flat = (flat.unsqueeze(-1) * index.shape[-1] + index).flatten(1)
    return flat


def spread(coupling: torch.Tensor, target: Sequence[int], source: Sequence[int], fixed: int) -> torch.Tensor:
    """Reshape ``[fixed, outer, outer, n, n]`` to target and source dimensions per outer space.

    Parameters
    ----------
    coupling : torch.Tensor
    target, source : sequence of int
        Sizes of the outer spaces on both sides, the fixed ones first.
    fixed : int
        Number of fixed outer spaces.
    """
    count = len(target) - fixed
    view = coupling.reshape(*target, *source[fixed:], *coupling.shape[-2:])
    order = [fixed + index + side * count for index in range(count) for side in (0, 1)]
    view = view.permute(*range(fixed), *order, -2, -1)
    return apart(view, fixed)  # a fixed unit couples with itself only


def identity(plan: Plan, tree: Tree, device: torch.device | None = None) -> dict[str, Solution]:
    """Return the solution that leaves every unit in its place; of unequal sizes, in its order."""
    solved = {}
    for space in tree.members:
        shape = Shape.of(plan, space)
        values = torch.zeros(shape.cost[:3], device=device)
        if shape.size == shape.source_size:
            index = torch.arange(space.size, device=device).expand(*shape.cost[:4])
            solved[space.name] = Solution(index, None, values)
        else:
            coupling = in_order(shape.size, shape.source_size).to(device).expand(shape.cost)
            solved[space.name] = Solution(None, coupling, values)
    return solved


def costs_of(
    plan: Plan, tree: Tree, costs: Mapping[str, Ground], solved: Mapping[str, Solution]
) -> dict[str, float]:
    """Return what a tree's solution costs, per space and with the spaces below it.

    Outer pairs are weighted by how far they are matched, so that soft solutions have a cost too.

    Parameters
    ----------
    plan : Plan
    tree : Tree
    costs : mapping of str to Ground
        Per space.
    solved : mapping of str to Solution

    Returns
    -------
    dict of str to float
        By name of space; the root's is the whole tree's cost.
    """
    own: dict[str, float] = {}
    matched: dict[str, torch.Tensor] = {}  # weight of each pair of units: [fixed, outer * n, outer * n]
    for space in tree.members:
        shape = Shape.of(plan, space)
        parent = matched.get(space.scope[-1]) if space.scope else None
        weight = costs[space.name].matrix.new_ones(shape.cost[:3])
        if parent is not None:
            weight = parent.repeat_interleave(shape.fixed // parent.shape[0], 0)
        ground, solution = costs[space.name], solved[space.name]
        has_children = any(item.scope[-1:] == (space.name,) for item in tree.members)
        if solution.index is not None and not has_children:  # a table of all pairs may be large
            paid = ground.matrix.gather(-1, solution.index.unsqueeze(-1)).squeeze(-1).sum(-1)
            own[space.name] = float((weight * (paid + ground.offset)).sum())
            continue
        weights = weight[..., None, None] * _rows(solution, shape.source_size)
        own[space.name] = float((weights * ground.matrix).sum() + (weight * ground.offset).sum())
        wide = shape.outer * shape.size, shape.source_outer * shape.source_size
        matched[space.name] = weights.permute(0, 1, 3, 2, 4).reshape(shape.fixed, *wide)
    return {
        space.name: own[space.name] + sum(own[item.name] for item in tree.members if space.name in item.scope)
        for space in tree.members
    }


def costs_in_place(plan: Plan, tree: Tree, costs: Mapping[str, Ground]) -> dict[str, float]:
    """Return what a tree costs whose units all stay in their places, per space as :func:`costs_of`."""
    device = costs[tree.root.name].matrix.device
    return costs_of(plan, tree, costs, identity(plan, tree, device))


def _rows(solution: Solution, size: int) -> torch.Tensor:
    """Return a solution's plans, over ``size`` source units, with rows that sum to one."""
    if solution.index is not None:
        return torch.nn.functional.one_hot(solution.index, size).double()
    assert solution.plan is not None
    plan = solution.plan.double()
    if solution.rotation:
        return plan
    return plan * plan.shape[-2] if solution.partial else plan / plan.sum(-1, keepdim=True)
