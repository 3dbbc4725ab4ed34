"""Balanced weights: of all that compute the same, those of the least sum of squares.

Factors of units, and invertible maps of head dimensions, leave a network as many weights as it likes to
compute one function with. Two parents are compared after each has gone to the one place that is marked out:
there, what writes a unit weighs as much as what reads it. Weights of the least norm on an orbit are unique up
to rotations (Kempf and Ness 1979), which alignment finds.

For an invertible map ``M`` with Gram matrices ``G`` of where it acts and ``H`` of where its inverse does, the
sum of squares ``tr(M G M') + tr(M'^-1 H M^-1)`` is least for ``M'M = G^-1/2 (G^1/2 H G^1/2)^1/2 G^-1/2``, the
geometric mean of ``G^-1`` and ``H``; for the factor of a unit, ``s^4 = h / g``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fxfusion.plan import Plan, Scaling, Symmetry
from fxfusion.symmetry import act, invertible, scale, scaled_rows

State = Mapping[str, torch.Tensor]

SWEEPS = 50
TOLERANCE = 1e-10  # of the logarithm of a factor, between two sweeps
LARGEST = 1e8  # condition number of a Gram matrix, and ratio of factors, above which nothing is balanced
_NEWTON = 30


def balanced(plan: Plan, state: State) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Find the weights of the least sum of squares that compute the same.

    Parameters
    ----------
    plan : Plan
        Its ``scalings`` say what may be scaled, and where.
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses; not written.

    Returns
    -------
    state : dict of str to torch.Tensor
        What no factor reaches is the given tensor itself. Units that nothing writes, or nothing reads, and
        head dimensions without full rank stay as they are.
    factors : tuple of torch.Tensor
        What was applied, for each of the plan's scalings: ``[outer..., n]``, or maps ``[outer..., n, n]``.
    """
    wide = _wide(plan, state)
    factors: list[torch.Tensor | None] = [None] * len(plan.scalings)
    for _ in range(SWEEPS):
        moved = 0.0
        for index, scaling in enumerate(plan.scalings):
            known = factors[index]
            if plan[scaling.space].symmetry is Symmetry.LINEAR:
                found, change = _best_map(plan, scaling, wide)
                factors[index] = found if known is None else found @ known
            else:
                found, change = _best_factors(plan, scaling, wide)
                factors[index] = found if known is None else found * known
            wide = _applied(plan, scaling, found, wide)
            moved = max(moved, change)
        if moved < TOLERANCE:
            break
    return _narrow(state, wide), tuple(factor for factor in factors if factor is not None)


def unbalanced(plan: Plan, state: State, factors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take factors back: the inverse of what :func:`balanced` applied.

    Parameters
    ----------
    plan, state
        As for :func:`balanced`.
    factors : sequence of torch.Tensor
        As it returns them, of these weights or of others: equal factors for all parents commute with
        averages.

    Returns
    -------
    dict of str to torch.Tensor
    """
    wide = _wide(plan, state)
    for scaling, factor in zip(plan.scalings, factors, strict=True):
        linear = plan[scaling.space].symmetry is Symmetry.LINEAR
        wide = _applied(plan, scaling, torch.linalg.inv(factor) if linear else 1 / factor, wide)
    return _narrow(state, wide)


def _wide(plan: Plan, state: State) -> dict[str, torch.Tensor]:
    """Return what factors reach, in double precision."""
    touched = {name for scaling in plan.scalings for name, _, _ in scaling.exponents}
    return {name: state[name].detach().double() for name in touched}


def _narrow(state: State, wide: State) -> dict[str, torch.Tensor]:
    return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in wide.items()}}


def _applied(plan: Plan, scaling: Scaling, factor: torch.Tensor, state: State) -> dict[str, torch.Tensor]:
    """Scale the units of a space, or map its dimensions."""
    space = plan[scaling.space]
    if space.symmetry is not Symmetry.LINEAR:
        return scale(plan, scaling, factor, state)
    touched = {name for name, _, _ in scaling.exponents}
    maps = {space.name: invertible(space, factor)}
    return {**state, **act(plan.only(touched), maps, {name: state[name] for name in touched})}


def _best_factors(plan: Plan, scaling: Scaling, state: State) -> tuple[torch.Tensor, float]:
    """Return every unit's best factor, and the largest logarithm."""
    squares = _summed(plan, scaling, state, lambda rows: rows.square().sum(-1))
    weighed = torch.stack(list(squares.values()), -1)  # [outer..., n, exponents]
    exponents = weighed.new_tensor(list(squares))
    written = (weighed * (exponents > 0)).sum(-1)
    read = (weighed * (exponents < 0)).sum(-1)
    alive = torch.minimum(written, read) * LARGEST > torch.maximum(written, read)
    logarithm = weighed.new_zeros(weighed.shape[:-1])
    for _ in range(_NEWTON):  # convex, and quadratic near its end
        terms = weighed * torch.exp(2 * exponents * logarithm.unsqueeze(-1))
        slope, bend = (terms * exponents).sum(-1), 2 * (terms * exponents.square()).sum(-1)
        step = torch.where(alive, slope / bend, 0.0).clamp(-1.0, 1.0)
        logarithm = logarithm - step
        if not step.numel() or float(step.abs().max()) < TOLERANCE:
            break
    change = float(logarithm.abs().max()) if logarithm.numel() else 0.0
    return logarithm.exp(), change


def _best_map(plan: Plan, scaling: Scaling, state: State) -> tuple[torch.Tensor, float]:
    """Return the best map of head dimensions, and how far it is from none."""
    grams = _summed(plan, scaling, state, lambda rows: rows @ rows.mT)
    itself, inverse = grams[1.0], grams[-1.0]
    eye = torch.eye(itself.shape[-1], dtype=torch.float64, device=itself.device)
    if max(map(_condition, (itself, inverse))) > LARGEST:
        return eye.expand_as(itself), 0.0
    root = _power(itself, 0.5)
    inner = root @ inverse @ root
    back = _power(itself, -0.5)
    square = back @ _power((inner + inner.mT) / 2, 0.5) @ back
    found = _power((square + square.mT) / 2, 0.5)
    return found, float((found - eye).abs().max())


def _condition(gram: torch.Tensor) -> float:
    values = torch.linalg.eigvalsh(gram)
    least = float(values[..., 0].min())
    return math.inf if least <= 0 else float((values[..., -1] / values[..., 0]).max())


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Return a power of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).pow(exponent).unsqueeze(-2)) @ vectors.mT


def _summed(
    plan: Plan, scaling: Scaling, state: State, measure: Callable[[torch.Tensor], torch.Tensor]
) -> dict[float, torch.Tensor]:
    """Return by exponent the sum of what is measured of the units' weights ``[outer..., n, others]``."""
    lead = len(plan[scaling.space].scope) + 1
    found: dict[float, torch.Tensor] = {}
    for exponent, rows in scaled_rows(plan, scaling, state):
        part = measure(rows.reshape(*rows.shape[:lead], -1))
        found[exponent] = found[exponent] + part if exponent in found else part
    return found
