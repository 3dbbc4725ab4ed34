"""Random elements of the inferred symmetry group, and their action on a model's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fxfusion.capture import Capture
from fxfusion.layout import Block, ParameterLayout
from fxfusion.plan import Plan, Role, Scaling, Space, Symmetry
from fxfusion.transport.map import (
    HardMap,
    Map,
    Maps,
    SignMap,
    SoftMap,
    apart,
    scope_dimensions,
    transport_tensor,
)
from fxfusion.transport.rotation import random_rotation, turned


def random_maps(plan: Plan, generator: torch.Generator) -> dict[str, Map]:
    """Draw an element of the symmetry group other than the identity, in every space.

    Parameters
    ----------
    plan : Plan
    generator : torch.Generator

    Returns
    -------
    dict of str to HardMap, SignMap or SoftMap
        One permutation, rotation or invertible map per space and, below outer spaces, per unit of those.
    """
    return {space.name: _random_map(plan, space, generator) for space in plan.spaces}


def _random_map(plan: Plan, space: Space, generator: torch.Generator) -> Map:
    if space.symmetry.rotates:
        return _random_rotations(plan, space, generator)
    if space.symmetry is Symmetry.SIGN:
        return _random_signs(plan, space, generator)
    return _random_permutations(plan, space, generator)


class Acted(Mapping[str, torch.Tensor]):
    """Weights moved by transports, each when it is asked for: for weights that are not in memory.

    Parameters
    ----------
    plan : Plan
    maps : mapping of str to HardMap or SoftMap
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    """

    def __init__(self, plan: Plan, maps: Maps, state: Mapping[str, torch.Tensor]) -> None:
        self.plan, self.maps, self.state = plan, maps, state

    def __getitem__(self, name: str) -> torch.Tensor:
        return act(self.plan.only({name}), self.maps, {name: self.state[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def random_element(
    plan: Plan, state: Mapping[str, torch.Tensor], generator: torch.Generator
) -> Mapping[str, torch.Tensor]:
    """Move weights by a random element of the symmetry group: :func:`random_maps`, then factors of units.

    Of weights that are not in memory (no ``dict``), each is moved when it is asked for.
    """
    maps = random_maps(plan, generator)
    if not isinstance(state, dict) and not plan.scalings:
        return Acted(plan, maps, state)
    moved = act(plan, maps, state)
    for scaling in plan.scalings:
        space = plan[scaling.space]
        if space.symmetry.scales:
            sizes = [*map(plan.scope_size, space.scope), space.size]
            moved = scale(plan, scaling, _factors(sizes, generator), moved)
    return moved


def _factors(sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Draw factors from a half to two."""
    return torch.exp2(2 * torch.rand(*sizes, generator=generator, dtype=torch.float64) - 1)


def _random_rotations(plan: Plan, space: Space, generator: torch.Generator) -> SoftMap:
    outer = [plan.scope_size(name) for name in space.scope]
    count = math.prod(outer)
    if space.symmetry is Symmetry.ROTARY:
        angles = 2 * math.pi * torch.rand(*outer, len(space.planes), generator=generator, dtype=torch.float64)
        drawn = apart(turned(angles, space.planes, space.size), len(outer))
        return SoftMap(space.scope, drawn, drawn)
    drawn = random_rotation(space.size, generator, space.symmetry is Symmetry.CENTRED, count)
    if space.symmetry is Symmetry.LINEAR:
        other = random_rotation(space.size, generator, count=count)
        drawn = drawn * _factors([count, 1, space.size], generator) @ other
        return invertible(space, drawn.reshape(*outer, space.size, space.size))
    drawn = apart(drawn.reshape(*outer, space.size, space.size), len(outer))
    return SoftMap(space.scope, drawn, drawn)


def _random_signs(plan: Plan, space: Space, generator: torch.Generator) -> SignMap:
    outer = [plan.scope_size(name) for name in space.scope]
    drawn = torch.randint(2, (*outer, 1), generator=generator, dtype=torch.int8)
    # All alike, they would leave alone whatever holds two axes of a space, or is no odd place at all.
    drawn.select(-2, 0).fill_(0)
    drawn.select(-2, -1).fill_(1)
    return SignMap(space.scope, 1 - 2 * drawn)


def invertible(space: Space, matrices: torch.Tensor) -> SoftMap:
    """Return invertible matrices ``[outer..., n, n]`` as a transport, which reads by their inverses."""
    inverse = torch.linalg.inv(matrices).mT
    count = len(space.scope)
    return SoftMap(space.scope, apart(matrices, count), apart(inverse, count))


def _random_permutations(plan: Plan, space: Space, generator: torch.Generator) -> HardMap:
    outer = [plan.scope_size(name) for name in space.scope]
    count = int(torch.tensor(outer).prod()) if outer else 1
    identity = torch.arange(space.size)
    rows = []
    for _ in range(count):
        # Of two units, every other draw is the identity, which would certify nothing.
        drawn = torch.randperm(space.size, generator=generator)
        while torch.equal(drawn, identity):
            drawn = torch.randperm(space.size, generator=generator)
        rows.append(drawn)
    return HardMap(space.scope, torch.stack(rows).reshape(*outer, space.size))


def reading_axes(plan: Plan) -> dict[str, frozenset[int]]:
    """Return for every parameter the axes that only read their space."""
    found: dict[str, set[int]] = {}
    for space in plan.spaces:
        for incidence in space.incidences:
            if incidence.role is Role.READS:
                found.setdefault(incidence.parameter, set()).add(incidence.axis)
    return {name: frozenset(axes) for name, axes in found.items()}


def act(plan: Plan, maps: Maps, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Carry transports through all parameters and statistics buffers.

    Parameters
    ----------
    plan : Plan
    maps : mapping of str to HardMap or SoftMap
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses; not written.

    Returns
    -------
    dict of str to torch.Tensor
        The transported weights. What no map touches is the given tensor itself.
    """
    reading = reading_axes(plan)
    contrary = _contrary_blocks(plan, reading)
    moved = dict(state)
    for name, layout in plan.layouts.items():
        moved[name] = transport_tensor(
            state[name].detach(),
            plan.source.layouts[name],
            maps,
            reading.get(name, frozenset()),
            layout,
            plan.gains,
            contrary.get(name, ()),
        )
    return moved


def output_carrier(
    plan: Plan, maps: Maps, node: str, weight: str
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what carries the output of a layer into the target's basis, as :func:`act` carries the layer.

    Parameters
    ----------
    plan : Plan
    maps : mapping of str to HardMap or SoftMap
    node : str
        Name of the layer's node.
    weight : str
        Name of its weight.

    Returns
    -------
    callable or None
        None where a part of the output belongs to no space.
    """
    into, given = plan.activations.get(node), plan.source.activations.get(node)
    if into is None or given is None:
        return (lambda output: output) if into is given else None
    sizes = given[0].sizes
    if sum(block.bind(sizes).volume for block in given) != math.prod(sizes):
        return None

    def carry(output: torch.Tensor) -> torch.Tensor:
        ratios = zip(output.shape, into[0].sizes, sizes, into[0].axes, strict=True)
        shape = [actual if axis is None else actual * wanted // had for actual, wanted, had, axis in ratios]
        before = ParameterLayout(
            weight, tuple(output.shape), tuple(item.bind(output.shape) for item in given)
        )
        after = ParameterLayout(weight, tuple(shape), tuple(item.bind(shape) for item in into))
        return transport_tensor(output, before, maps, into=after, gains=plan.gains)

    return carry


def _place_dimension(block: Block, space: str, axis: int, offset: int) -> int | None:
    """Return which dimension of a block's view enumerates a space at a place; None if it lies elsewhere."""
    if block.axes[axis].offset != offset:
        return None
    first = sum(len(part.factors) for part in block.axes[:axis])
    names = [factor.space for factor in block.axes[axis].factors]
    return first + names.index(space) if space in names else None


def _contrary_blocks(
    plan: Plan, reading: Mapping[str, frozenset[int]]
) -> dict[str, tuple[frozenset[str], ...]]:
    """Return of every block of a parameter the spaces of which it takes the other side.

    What writes a space takes a map, what reads it the inverse; but of queries and keys, which both write,
    one takes the inverse.
    """
    found: dict[str, list[set[str]]] = {}
    for scaling in plan.scalings:
        if plan[scaling.space].symmetry is not Symmetry.LINEAR:
            continue
        for (name, axis, offset), exponent in scaling.exponents.items():
            if name not in plan.layouts or (exponent > 0) == (axis not in reading.get(name, ())):
                continue
            blocks = plan.layouts[name].blocks
            sets = found.setdefault(name, [set() for _ in blocks])
            for block, spaces in zip(blocks, sets, strict=True):
                if _place_dimension(block, scaling.space, axis, offset) is not None:
                    spaces.add(scaling.space)
    return {name: tuple(map(frozenset, sets)) for name, sets in found.items()}


def scale(
    plan: Plan, scaling: Scaling, factors: torch.Tensor, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Multiply the units of a space by factors, each place by its power of them.

    Parameters
    ----------
    plan : Plan
    scaling : Scaling
    factors : torch.Tensor
        ``[outer units..., n]``, positive.
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses; not written.

    Returns
    -------
    dict of str to torch.Tensor
        What no factor reaches is the given tensor itself.
    """
    moved = dict(state)
    for name in dict.fromkeys(name for name, _, _ in scaling.exponents):
        moved[name] = state[name].detach().clone()
    for exponent, rows in scaled_rows(plan, scaling, moved):
        power = factors.pow(exponent).to(rows)
        rows.mul_(power.reshape(*power.shape, *[1] * (rows.ndim - power.ndim)))
    return moved


def scaled_rows(
    plan: Plan, scaling: Scaling, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield of every place its exponent, and its weights as a view ``[outer units..., n, others...]``."""
    space = plan[scaling.space]
    for (name, axis, offset), exponent in scaling.exponents.items():
        for block in plan.layouts[name].blocks:
            dimension = _place_dimension(block, space.name, axis, offset)
            if dimension is not None:
                leading = [*scope_dimensions(block, dimension, space.scope), dimension]
                yield exponent, block.view(state[name]).movedim(leading, list(range(len(leading))))


def fill(
    plan: Plan, maps: Maps, moved: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fill up with the target's weights what partial transports left where it was.

    Parameters
    ----------
    plan : Plan
    maps : mapping of str to HardMap or SoftMap
    moved : mapping of str to torch.Tensor
        The transported weights.
    target : mapping of str to torch.Tensor
        The target's.

    Returns
    -------
    dict of str to torch.Tensor
        ``moved`` itself where all mass was transported.
    """
    missing = {name for name, item in maps.items() if isinstance(item, SoftMap) and item.partial}
    signs = {space.name for space in plan.spaces if space.symmetry is Symmetry.SIGN}
    shares = {name: item for name, item in maps.items() if name not in signs}
    filled = dict(moved)
    for name, layout in plan.layouts.items():
        if not layout.spaces() & missing:
            continue
        # What arrives of ones, if every axis takes the average of its sources: how much was transported.
        shape = plan.source.layouts[name].shape
        arrived = transport_tensor(
            target[name].new_ones(shape, dtype=torch.float64), plan.source.layouts[name], shares, into=layout
        )
        own = (1.0 - arrived) * target[name].detach().double()
        filled[name] = (moved[name].double() + own).to(moved[name].dtype)
    return filled


def complete(
    capture: Capture, typed: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a full state dict: transported tensors under all their names, the rest as it was."""
    full = {name: tensor.detach() for name, tensor in state.items()}
    full.update(typed)
    for alias, name in capture.aliases.items():
        if alias in full:
            full[alias] = full[name]
    return full
