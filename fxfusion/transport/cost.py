"""Ground costs: how far a unit of the target is from a unit of the source.

Weights
    Half the mean squared distance between everything that a unit writes and reads, both parents'
    parameters scaled to unit root mean square and the source's other axes carried by the transports
    found so far: one minus a cosine similarity over all incidences of the space. Up to that scale, the
    objective of weight matching (Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023).
Activations
    One minus the correlation of two units over calibration samples, averaged over the places where the
    space is observed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from fxfusion.devices import device_of_state
from fxfusion.layout import Block
from fxfusion.plan import Plan, Space, Symmetry
from fxfusion.statistics import CrossMoments
from fxfusion.symmetry import reading_axes
from fxfusion.transport.coupled import Square
from fxfusion.transport.hierarchy import Ground, Shape, Solution, Tree, pairs
from fxfusion.transport.map import Maps, innermost, laid_out, scope_dimensions, transport_block

State = Mapping[str, torch.Tensor]

MEMORY = 2**30


def activation_cost(
    plan: Plan, space: Space, moments: Sequence[CrossMoments], device: torch.device | None = None
) -> Ground:
    """Return the cost of a space from calibration moments.

    Parameters
    ----------
    plan : Plan
    space : Space
    moments : sequence of CrossMoments
        One per observation, ``[fixed, outer * n, outer * n]``.
    device : torch.device, optional
        Where they are.

    Returns
    -------
    Ground
        Where units may turn, of covariances in place of correlations: single units have no scale there.
    """
    shape = Shape.of(plan, space)
    total = Ground.zeros(shape, device)
    for item in moments:
        total += observed_cost(item, space, shape)
    return total * (1.0 / max(len(moments), 1))


def observed_cost(moments: CrossMoments, space: Space, shape: Shape) -> Ground:
    """Return the cost of a space from what was observed at one place."""
    if space.symmetry is Symmetry.SIGN:
        products = pairs(moments.correlation, shape)
        return Ground(-products, torch.ones_like(products[..., 0, 0]))
    if space.symmetry.rotates:
        return _turning_cost(moments, shape)
    return Ground(pairs(1.0 - moments.correlation, shape))


def _turning_cost(moments: CrossMoments, shape: Shape) -> Ground:
    """Half the squared distance of two sets of units, at a mean square of one per unit."""
    sides = [
        square.reshape(shape.fixed, outer, -1).sum(-1)
        for square, outer in (
            (moments.square_target, shape.outer),
            (moments.square_source, shape.source_outer),
        )
    ]
    scales = [
        (side.mean(-1, keepdim=True) / shape.size).clamp_min(torch.finfo(side.dtype).tiny) for side in sides
    ]
    scale = (scales[0] * scales[1]).sqrt().unsqueeze(-1)
    matrix = -pairs(moments.cross, shape) / scale[..., None, None]
    lengths = [side / norm for side, norm in zip(sides, scales, strict=True)]
    return Ground(matrix, 0.5 * (lengths[0].unsqueeze(-1) + lengths[1].unsqueeze(-2)))


@dataclasses.dataclass(eq=False)
class WeightCost:
    """Costs of a tree's spaces from weights.

    Parameters
    ----------
    plan : Plan
    target, source : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    memory : int
        Bytes of parameters in float32 that are kept rather than read and widened anew.
    """

    plan: Plan
    target: State
    source: State
    memory: int = MEMORY

    def __post_init__(self) -> None:
        self.device = device_of_state(self.target)
        self._reading = reading_axes(self.plan)
        self._scopes = {space.name: space.scope for space in self.plan.spaces}
        self._holders: dict[str, list[str]] = {}
        for name, layout in self.plan.layouts.items():
            for space in layout.spaces():
                self._holders.setdefault(space, []).append(name)
        self._known: OrderedDict[tuple[int, str], _Comparable | None] = OrderedDict()
        self._held = 0  # bytes of them

    def parameters(self, tree: Tree) -> list[str]:
        """Return the parameters that hold a space of the tree, in the plan's order."""
        found = {name for space in tree.names for name in self._holders.get(space, ())}
        return [name for name in self.plan.layouts if name in found]

    def anchored(self, tree: Tree, solved: frozenset[str]) -> int:
        """Return how many elements per unit can be compared when only some spaces are solved."""
        return sum(
            block.volume // tree.root.size
            for name in self.parameters(tree)
            for block in self.plan.layouts[name].blocks
            if tree.names & {factor.space for factor in block.factors}
            and not self._unsolved(block, tree, solved)
        )

    def complete(self, tree: Tree, solved: frozenset[str]) -> bool:
        """Return whether the costs of a tree can be had in full before it is solved itself."""
        return all(
            not self._unsolved(block, tree, solved)
            and sum(space in tree.names for space, _, _ in innermost(block, self._scopes)) < 2
            for name in self.parameters(tree)
            for block in self.plan.layouts[name].blocks
        )

    def _unsolved(self, block: Block, tree: Tree, solved: frozenset[str]) -> list[int]:
        return [
            dimension
            for dimension, factor in enumerate(block.factors)
            if factor.space in self._scopes and factor.space not in tree.names and factor.space not in solved
        ]

    def costs(
        self,
        tree: Tree,
        maps: Maps,
        solutions: Mapping[str, Solution],
        partial: bool = False,
        squares: bool = True,
    ) -> dict[str, Ground]:
        """Return the cost of every space of a tree.

        Parameters
        ----------
        tree : Tree
        maps : mapping
            Transports found so far; an axis of a space without one is compared by its sorted values,
            which no permutation changes.
        solutions : mapping
            Solutions found so far of the tree's own spaces.
        partial : bool
            Leave out what holds an unsolved space, where anything else is left.
        squares : bool
            Compare what :meth:`squares` returns, too, along one axis at a time.

        Returns
        -------
        dict of str to Ground
        """
        shapes = {space.name: Shape.of(self.plan, space) for space in tree.members}
        total = {name: _Distances(shape, self.device) for name, shape in shapes.items()}
        turning = {space.name for space in tree.members if space.symmetry.turns}
        skip = partial and self.anchored(tree, frozenset(maps)) > 0
        for name in self.parameters(tree):
            left, right = self._comparable(0, name), self._comparable(1, name)
            if left is None or right is None:
                continue
            scales = left.scale, right.scale
            others = self.plan.source.layouts[name].blocks
            for block, other in zip(self.plan.layouts[name].blocks, others, strict=True):
                if skip and self._unsolved(block, tree, frozenset(maps)):
                    continue
                if not squares and self._twice(block, tree) is not None:
                    continue
                carried = transport_block(
                    other,
                    other.view(right.value),
                    maps,
                    self._reading.get(name, frozenset()),
                    skip=tree.names,
                )
                for space, dimension, scope in innermost(block, self._scopes):
                    if space in tree.names:
                        place = _Place(block, dimension, scope, shapes[space], scales)
                        views = block.view(left.value), carried
                        self._compare(total[space], place, tree, *views, maps, solutions)
        scale = 0.5 / self._features(tree, shapes)
        return {name: found.ground(scale, name in turning) for name, found in total.items()}

    def squares(self, tree: Tree, maps: Maps) -> tuple[list[Square], float]:
        """Return the parameters that hold the root of a tree on two axes, and their squared lengths.

        Their inner products are in units of cost: with both, half the squared distance along either axis.
        """
        held = {
            name: [self._twice(block, tree) for block in self.plan.layouts[name].blocks]
            for name in self.parameters(tree)
        }
        shapes = {space.name: Shape.of(self.plan, space) for space in tree.members}
        root, found, lengths = shapes[tree.root.name], [], 0.0
        if tree.root.scope or root.size != root.source_size or not any(map(any, held.values())):
            return [], 0.0
        scale = 2.0 / self._features(tree, shapes)
        for name in (name for name, places in held.items() if any(places)):  # others are not read
            left, right = self._comparable(0, name), self._comparable(1, name)
            blocks = zip(self.plan.layouts[name].blocks, self.plan.source.layouts[name].blocks, strict=True)
            for (block, other), twice in zip(blocks, held[name], strict=True):
                if twice is None or left is None or right is None:
                    continue
                reading = self._reading.get(name, frozenset())
                carried = transport_block(other, other.view(right.value), maps, reading, skip=tree.names)
                sides = []
                for view, factor in ((block.view(left.value), left.scale), (carried, right.scale)):
                    units = view.movedim(twice.dimensions, (0, 1)).reshape(root.size, root.size, -1)
                    sides.append(units.double() * (factor * math.sqrt(scale)))
                found.append(Square(sides[0], sides[1], twice.signed))
                lengths += 0.5 * sum(float(side.square().sum()) for side in sides)
        return found, lengths

    def _twice(self, block: Block, tree: Tree) -> _Twice | None:
        """Return where a block holds the root of a tree on two axes, if signs act on both or on none."""
        places = [index for index, factor in enumerate(block.factors) if factor.space == tree.root.name]
        below = tree.names - {tree.root.name}
        signs = [factor.space for factor in block.factors if factor.space in below]
        alike = len(signs) in (0, 2) and len(set(signs)) < 2
        return _Twice((places[0], places[1]), bool(signs)) if len(places) == 2 and alike else None

    def _features(self, tree: Tree, shapes: Mapping[str, Shape]) -> float:
        """Return the mean number of weights by which an innermost unit of a tree is compared."""
        volume, compared = 0, set()
        for name in self.parameters(tree):
            for block in self.plan.layouts[name].blocks:
                found = [space for space, _, _ in innermost(block, self._scopes) if space in tree.names]
                volume += block.volume * len(found)
                compared.update(found)
        return volume / sum(shapes[name].units for name in compared)

    def _comparable(self, side: int, name: str) -> _Comparable | None:
        """Return a parameter in float32, a vector centred, and its scale; None if constant.

        As many as fit into a bounded memory are kept, the latest.
        """
        key = (side, name)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        value = (self.source if side else self.target)[name].detach().float().contiguous()
        if value.ndim == 1:
            value = value - value.mean()
        size = float(torch.linalg.vector_norm(value)) / math.sqrt(value.numel())
        found = _Comparable(value, 1.0 / size) if size > 1e-7 else None
        self._known[key] = found
        self._held += 0 if found is None else found.value.nbytes
        while self._held > self.memory and len(self._known) > 1:
            _, dropped = self._known.popitem(last=False)
            self._held -= 0 if dropped is None else dropped.value.nbytes
        return found

    def _compare(
        self,
        total: _Distances,
        place: _Place,
        tree: Tree,
        left: torch.Tensor,
        right: torch.Tensor,
        maps: Maps,
        solutions: Mapping[str, Solution],
    ) -> None:
        """Add the distances at a place."""
        siblings, unknown = [], []
        for dimension, factor in enumerate(place.block.factors):
            if dimension in place.leading or factor.space not in self._scopes:
                continue
            if factor.space not in tree.names:
                if factor.space not in maps:
                    unknown.append(dimension)
            elif self._is_sibling(place, dimension) and factor.space in solutions:
                siblings.append((dimension, factor.space))
            elif dimension not in self._outer_of_siblings(place.block, tree):
                unknown.append(dimension)
        if not siblings:
            total.add(place, left, right, unknown)
            return
        # Beside other spaces of the tree, whose map differs with the pair of outer units.
        for unit in range(place.shape.outer):
            moved = right
            for dimension, space in siblings:
                scope = scope_dimensions(place.block, dimension, self._scopes[space])
                moved = _apply_row(moved, dimension, scope, solutions[space], unit)
            total.add(place, place.row(left, unit), moved, unknown, unit)

    def _is_sibling(self, place: _Place, dimension: int) -> bool:
        """Return whether a dimension's space lies below exactly the outer units of the compared one."""
        scope = self._scopes[place.block.factors[dimension].space]
        return scope_dimensions(place.block, dimension, scope) == list(place.scope)

    def _outer_of_siblings(self, block: Block, tree: Tree) -> set[int]:
        return {
            outer
            for dimension, factor in enumerate(block.factors)
            if factor.space in tree.names
            for outer in scope_dimensions(block, dimension, self._scopes[factor.space])
        }


def _apply_row(
    view: torch.Tensor, dimension: int, scope: Sequence[int], solution: Solution, unit: int
) -> torch.Tensor:
    """Move a sibling's units as if every source outer unit were matched to the target's ``unit``."""
    table = solution.index if solution.index is not None else solution.plan
    assert table is not None
    row = table[:, unit]  # [fixed, source outer, n(, n)]
    outer = [view.shape[place] for place in scope]
    row = row.reshape(*outer, *row.shape[2:])
    if solution.index is not None:
        return torch.take_along_dim(view, laid_out(row, [*scope, dimension], view.ndim), dimension)
    if not solution.rotation:
        row = row / row.sum(-1, keepdim=True)
    labels = list(range(view.ndim))
    result = [view.ndim if place == dimension else place for place in labels]
    return torch.einsum(view, labels, row.to(view.dtype), [*scope, view.ndim, dimension], result)


@dataclasses.dataclass(frozen=True)
class _Twice:
    """The two dimensions of a block that hold one space, and whether signs of its units act there."""

    dimensions: tuple[int, int]
    signed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Comparable:
    """A parameter, and what brings it to unit root mean square."""

    value: torch.Tensor
    scale: float


class _Distances:
    """Squared distances between units, summed over places, in place: matrices of units are large.

    Inner products and squared lengths are kept apart until the end.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.products = torch.zeros(shape.cost, dtype=torch.float64, device=device)
        self.target = torch.zeros(shape.cost[:4], dtype=torch.float64, device=device)
        self.source = torch.zeros(shape.cost[:3] + shape.cost[4:5], dtype=torch.float64, device=device)

    def add(
        self,
        place: _Place,
        left: torch.Tensor,
        right: torch.Tensor,
        unknown: Sequence[int],
        unit: int | None = None,
    ) -> None:
        """Add those at a place; with a ``unit``, of this outer unit of the target alone."""
        shape, (scale, other) = place.shape, place.scales
        rows = slice(None) if unit is None else slice(unit, unit + 1)
        a = place.features(left, unknown, shape.outer if unit is None else 1, shape.size)
        b = place.features(right, unknown, shape.source_outer, shape.source_size)
        if unknown:
            b = _resampled(b, a.shape[-1], math.prod(right.shape[axis] for axis in unknown))
        cross = torch.matmul(a.flatten(1, 2), b.flatten(1, 2).mT)
        cross = pairs(cross, dataclasses.replace(shape, outer=a.shape[1]))
        self.products[:, rows].add_(cross, alpha=scale * other)
        for total, features, factor, dimension in ((self.target, a, scale, 2), (self.source, b, other, 1)):
            lengths = torch.linalg.vector_norm(features, dim=-1).double().mul_(factor).square_()
            total[:, rows].add_(lengths.unsqueeze(dimension))

    def ground(self, factor: float, turning: bool) -> Ground:
        """Return the cost in other units; of units that may turn, lengths are told apart."""
        matrix = self.products.mul_(-2.0 * factor)
        target, source = self.target * factor, self.source * factor
        if turning:
            return Ground(matrix, target.sum(-1) + source.sum(-1))
        return Ground(matrix.add_(target.unsqueeze(-1)).add_(source.unsqueeze(-2)))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in a block a space is compared."""

    block: Block
    dimension: int
    scope: Sequence[int]
    shape: Shape
    scales: tuple[float, float]  # that bring the target's and the source's parameter to unit scale

    @property
    def leading(self) -> list[int]:
        return [*self.scope, self.dimension]

    def row(self, view: torch.Tensor, unit: int) -> torch.Tensor:
        """Return the target's view confined to one flat free outer unit."""
        free, count = [], 1
        for place in reversed(self.scope):
            if count < self.shape.outer:
                free.append(place)
                count *= view.shape[place]
        for place in free:  # innermost first
            unit, remainder = divmod(unit, view.shape[place])
            view = view.narrow(place, remainder, 1)
        return view

    def features(self, view: torch.Tensor, unknown: Sequence[int], outer: int, size: int) -> torch.Tensor:
        """Return ``[fixed, outer, n, features]``, values along unknown axes sorted."""
        known = [axis for axis in range(view.ndim) if axis not in self.leading and axis not in unknown]
        view = view.permute(*self.leading, *known, *unknown)
        lead = len(self.leading)
        if unknown:
            view = view.flatten(view.ndim - len(unknown)).sort(-1).values
        return view.reshape(self.shape.fixed, outer, size, math.prod(view.shape[lead:]))


def _resampled(features: torch.Tensor, wanted: int, length: int) -> torch.Tensor:
    """Return features ``[..., known * length]``, the sorted values last, with ``wanted`` in all.

    Values in ascending order are quantiles, which can be read off at other levels where widths differ.
    """
    return resample(features.unflatten(-1, (-1, length)), wanted // (features.shape[-1] // length)).flatten(
        -2
    )


def resample(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return sorted values ``[..., n]`` interpolated to ``[..., count]``.

    Examples
    --------
    >>> resample(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2)
    tensor([[0.5000, 2.5000]])
    """
    if values.shape[-1] == count:
        return values
    flat = values.reshape(1, -1, values.shape[-1])
    return torch.nn.functional.interpolate(flat, count, mode="linear").reshape(*values.shape[:-1], count)
