"""Random elements of the inferred symmetry group, and their action on a model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fxfusion.capture import Capture
from fxfusion.plan import Plan, Role, Space, Symmetry
from fxfusion.transport.map import HardMap, Map, Maps, SoftMap, apart, transport_tensor
from fxfusion.transport.rotation import random_rotation


def random_maps(plan: Plan, generator: torch.Generator) -> dict[str, Map]:
    """Draw an element of the symmetry group other than the identity, in every space.

    Parameters
    ----------
    plan : Plan
    generator : torch.Generator

    Returns
    -------
    dict of str to HardMap or SoftMap
        One permutation or rotation per space and, below outer spaces, per unit of those.
    """
    return {
        space.name: (
            _random_rotations(plan, space, generator)
            if space.symmetry.rotates
            else _random_permutations(plan, space, generator)
        )
        for space in plan.spaces
    }


def _random_rotations(plan: Plan, space: Space, generator: torch.Generator) -> SoftMap:
    outer = [plan.scope_size(name) for name in space.scope]
    drawn = random_rotation(space.size, generator, space.symmetry is Symmetry.CENTRED, math.prod(outer))
    turned = apart(drawn.reshape(*outer, space.size, space.size), len(outer))
    return SoftMap(space.scope, turned, turned)


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
    moved = dict(state)
    for name, layout in plan.layouts.items():
        moved[name] = transport_tensor(
            state[name].detach(),
            plan.source.layouts[name],
            maps,
            reading.get(name, frozenset()),
            layout,
            plan.gains,
        )
    return moved


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
    filled = dict(moved)
    for name, layout in plan.layouts.items():
        if not layout.spaces() & missing:
            continue
        # What arrives of ones, if every axis takes the average of its sources: how much was transported.
        shape = plan.source.layouts[name].shape
        arrived = transport_tensor(
            torch.ones(shape, dtype=torch.float64), plan.source.layouts[name], maps, into=layout
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
