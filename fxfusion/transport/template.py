"""A network of a third width to begin with, when no parent has the widths that are wanted.

The units of the result are then the support points of a barycenter, as many as are wanted. They are found in
turns: every parent is aligned with the network of the last turn, and the average of what that gives is the
next (for hard couplings, balanced k-means over units). The first one holds units of the first parent that
differ as much as possible by their weights (farthest-first traversal), or copies of them.

References
----------
Cuturi and Doucet, Fast Computation of Wasserstein Barycenters, ICML 2014, arXiv 1310.4375, algorithm 2.
Gonzalez, Clustering to Minimize the Maximum Intercluster Distance, 1985 (farthest-first traversal).
"""

from __future__ import annotations

import torch

from fxfusion.plan import Plan
from fxfusion.symmetry import act
from fxfusion.transport.cost import State, WeightCost
from fxfusion.transport.hierarchy import (
    Coupling,
    Ground,
    Shape,
    Tree,
    identity,
    solve_tree,
    spread,
    to_maps,
    trees,
    with_children,
)
from fxfusion.transport.map import Map, SoftMap


def first_template(plan: Plan, anchor: State) -> dict[str, torch.Tensor]:
    """Return weights of the target's widths, made of a parent's units.

    Parameters
    ----------
    plan : Plan
        Pairs the target with the parent.
    anchor : mapping of str to torch.Tensor
        The parent's weights by the names that the graph uses.

    Returns
    -------
    dict of str to torch.Tensor
    """
    own = plan.source
    costs = WeightCost(own, anchor, anchor)
    inside: dict[str, Map] = {}  # every unit with itself
    for tree in trees(own):
        inside.update(to_maps(own, tree, identity(own, tree, costs.device)))
    maps: dict[str, Map] = {}
    for tree in trees(own):
        distances = costs.costs(tree, inside, identity(own, tree, costs.device))
        maps.update(_picked(plan, tree, distances))
    return act(plan, maps, anchor)


def _picked(plan: Plan, tree: Tree, distances: dict[str, Ground]) -> dict[str, Map]:
    """Return the maps that take, of every space of a tree, the units that differ most."""
    own = plan.source
    fixed = {space.name for space in plan.fixed}
    solved = solve_tree(own, tree, distances, Coupling())
    maps: dict[str, Map] = {}
    for space in tree.members:
        shape = Shape.of(plan, plan[space.name])
        total = with_children(own, tree, space, distances[space.name], solved).matrix
        index = torch.stack(
            [
                torch.stack(
                    [
                        farthest_first(total[place, outer, outer], shape.size)
                        for outer in range(shape.source_outer)
                    ]
                )
                for place in range(shape.fixed)
            ]
        )
        taken = torch.nn.functional.one_hot(index, shape.source_size).to(total)  # [fixed, source outer, n, n]
        sides = [[side.scope_size(name) for name in space.scope] for side in (plan, own)]
        view = spread(
            taken.unsqueeze(1).expand(*shape.cost), sides[0], sides[1], len(fixed & set(space.scope))
        )
        # What was left out is made up for where units are read; copies share.
        more = max(shape.source_size / shape.size, 1.0)
        maps[space.name] = SoftMap(space.scope, view, view * more / view.sum(-2, keepdim=True).clamp_min(1.0))
    return maps


def farthest_first(distances: torch.Tensor, count: int) -> torch.Tensor:
    """Return units that differ most, in ascending order; all of them and copies, if more are wanted.

    Parameters
    ----------
    distances : torch.Tensor
        ``[n, n]``.
    count : int

    Returns
    -------
    torch.Tensor
        int64 ``[count]``.

    Examples
    --------
    >>> line = torch.tensor([0.0, 0.1, 5.0, 5.2, 9.0])
    >>> farthest_first((line[:, None] - line[None]).abs(), 3)
    tensor([0, 2, 4])
    """
    size = distances.shape[0]
    if count >= size:
        return torch.arange(count) * size // count
    chosen = [int(distances.sum(-1).argmax())]
    nearest = distances[chosen[0]].clone()
    for _ in range(count - 1):
        nearest[chosen[-1]] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return torch.tensor(sorted(chosen))
