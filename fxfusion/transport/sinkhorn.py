"""Soft couplings: entropic optimal transport.

With each row's potential solved for the columns', entropic transport is to maximise one smooth concave
function of the column potentials ``g``, the semi-dual

    sum_j b_j g_j - eps sum_i a_i log sum_j exp((g_j - C_ij) / eps).

Its gradient is the mass that the columns lack. A step of Sinkhorn's algorithm climbs it, scaled by the
diagonal of its Hessian: slowly where plans are nearly hard. Newton's method needs few steps there. Of few
units, or where plans are nearly hard, each is solved by factoring the Hessian; else by conjugate gradients,
whose steps are two products with the plan, what a step of Sinkhorn's algorithm takes beside its exponentials.
Where costs are large beside it, the regularisation is lowered in stages, each of which starts from the last.
"""

from __future__ import annotations

import math

import ot
import torch

from fxfusion.progress import LOG
from fxfusion.threads import one_thread
from fxfusion.transport.assignment import Masses

UNBALANCED_ITERATIONS = 10_000  # of one problem at a time
PRECISION = 1e-6
"""Mass that the columns of a plan may lack or have too much, of a total of one."""

_STAGE = 2.0  # factor between the regularisations of stages
_STAGE_PRECISION = 1e-2
_SOFT = 50.0  # largest cost over the regularisation, below which Newton's method needs no stages
_STEPS = 100  # of Newton's method, in a stage
_PRODUCTS = 500  # of conjugate gradients, in a step
_FEW = 128  # units: their curvature is factored at once
_FACTORED = 8  # a product per so many units: then gradients have cost what factoring would
_SHORTEST = 2.0**-30  # part of a step
_ASCENT = 1e-4  # part of what the slope promises
_ROUNDING = 1e-13  # of the semi-dual, relative
_DAMPING = 0.1


def sinkhorn(
    costs: torch.Tensor,
    regularisation: float,
    absolute: bool = False,
    relaxation: float | None = None,
    masses: Masses | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a batch of entropic transport problems.

    Each cost matrix is shifted and, unless ``absolute``, divided by its mean first, so that one
    regularisation means the same softness everywhere.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, target, source]``.
    regularisation : float
        Weight of the entropy, relative to the mean cost unless ``absolute``.
    absolute : bool
    relaxation : float, optional
        Price of mass that is not transported, in the same units: unbalanced transport.
    masses : tuple of torch.Tensor, optional
        Of the target's and the source's units, ``[batch, units]``; uniform by default.

    Returns
    -------
    plans : torch.Tensor
        ``[batch, target, source]``, with the masses as marginals unless unbalanced.
    values : torch.Tensor
        ``[batch]``: the transported cost in the units of ``costs``, per unit times the number of target
        units, so that a hard plan has the value of its assignment.

    Raises
    ------
    ValueError
        A cost is NaN or infinite, as SciPy says of assignments.

    References
    ----------
    Cuturi, Sinkhorn Distances, NeurIPS 2013. Brauer et al., A Sinkhorn-Newton Method for Entropic Optimal
    Transport, 2017. Chizat et al., Scaling Algorithms for Unbalanced Transport Problems, 2018, by POT.

    Examples
    --------
    >>> plans, _ = sinkhorn(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 0.05)
    >>> (plans * 2).round(decimals=3).tolist()
    [[[0.0, 1.0], [1.0, 0.0]]]
    """
    if not bool(costs.isfinite().all()):
        raise ValueError("costs are NaN or infinite: weights or activations overflow where they are squared")
    exact = costs.double()
    shifted = exact - exact.amin((-2, -1), keepdim=True)
    scale = shifted.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    if absolute:
        scale = torch.ones_like(scale)
    if relaxation is None:
        sides = [exact.new_full((len(exact), size), 1 / size) for size in exact.shape[1:]]
        if masses is not None:
            sides = [side.to(exact) for side in masses]
        with one_thread():
            plans = _balanced(shifted.div_(scale), regularisation, sides[0], sides[1])
    else:  # what costs nothing counts here: the cost itself, not shifted
        plans = _unbalanced(exact / scale, regularisation, relaxation, masses)
    values = torch.einsum("bts,bts->b", plans, exact) * costs.shape[-2]
    return plans.to(costs), values.to(costs)


def _balanced(
    costs: torch.Tensor, regularisation: float, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return plans whose rows have their masses, and whose columns have theirs within the precision."""
    potentials = torch.zeros_like(columns).masked_fill_(columns == 0, -torch.inf)
    softest = max(float(costs.amax()) / _SOFT, regularisation)
    stages = math.ceil(math.log(softest / regularisation, _STAGE)) + 1
    for left in reversed(range(stages)):
        precision = _STAGE_PRECISION if left else PRECISION
        plans = _ascend(costs, regularisation * _STAGE**left, rows, columns, potentials, precision)
    lack = float((columns - plans.sum(-2)).abs().sum(-1).max())
    if lack > 2 * PRECISION:
        LOG.warning("a soft coupling is not exact: columns lack %.1e of a mass of one", lack)
    return plans


def _ascend(
    costs: torch.Tensor,
    regularisation: float,
    rows: torch.Tensor,
    columns: torch.Tensor,
    potentials: torch.Tensor,
    precision: float,
) -> torch.Tensor:
    """Move potentials to the maximum of the semi-dual, in place, and return their plans."""
    plans, heights = _plans(costs, regularisation, rows, columns, potentials)
    lengths = torch.ones_like(heights)
    for _ in range(_STEPS):
        lack = columns - plans.sum(-2)
        going = torch.nonzero((lack.abs().sum(-1) > precision) & (lengths > _SHORTEST))[:, 0]
        if not len(going):
            return plans
        lack = lack[going]
        steps = regularisation * _newton(_picked(plans, going), rows[going], columns[going], lack)
        slopes = (steps * lack).sum(-1)
        lengths[going] = (2 * lengths[going]).clamp_max_(1.0)
        while len(going):
            moved = potentials[going] + lengths[going, None] * steps
            found, reached = _plans(_picked(costs, going), regularisation, rows[going], columns[going], moved)
            enough = heights[going] + _ASCENT * lengths[going] * slopes - _ROUNDING * heights[going].abs()
            good = reached >= enough
            arrived = going[good]
            heights[arrived], potentials[arrived] = reached[good], moved[good]
            if len(arrived) == len(plans):
                plans = found
            else:
                plans[arrived] = found[good]
            lengths[going[~good]] /= 2
            left = ~good & (lengths[going] > _SHORTEST)
            going, steps, slopes = going[left], steps[left], slopes[left]
    return plans


def _picked(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return some of a batch; without a copy if it is all."""
    return values if len(index) == len(values) else values[index]


def _plans(
    costs: torch.Tensor,
    regularisation: float,
    rows: torch.Tensor,
    columns: torch.Tensor,
    potentials: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return plans whose rows have their masses, and the semi-dual."""
    plans = torch.sub(potentials[:, None] / regularisation, costs, alpha=1 / regularisation)
    top = plans.amax(-1, keepdim=True)
    sums = plans.sub_(top).exp_().sum(-1, keepdim=True)
    plans.mul_(rows[..., None] / sums)
    soft = regularisation * (top + sums.log())[..., 0]
    held = torch.where(columns > 0, columns * potentials, 0.0)
    return plans, held.sum(-1) - (rows * soft).sum(-1)


def _newton(
    plans: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, lack: torch.Tensor
) -> torch.Tensor:
    """Return the change of the potentials, over the regularisation, that the semi-dual's curvature asks for.

    The curvature is ``diag(held) - plan^T diag(1 / rows) plan``, where ``held`` is what columns have, damped
    in proportion to what is lacking, which bounds the step and leaves convergence quadratic.
    """
    size = lack.abs().sum(-1, keepdim=True)
    held = columns - lack + _DAMPING * size * columns
    share = torch.where(rows > 0, 1 / rows, 0.0)
    units = columns.shape[-1]
    if units > _FEW:
        products = min(units // _FACTORED, _PRODUCTS)
        found, solved = _by_gradients(plans, share, held, lack, products)
        if solved or products == _PRODUCTS:
            return found
    curvature = torch.bmm((plans * -share[..., None]).mT, plans)
    curvature.diagonal(dim1=-2, dim2=-1).add_(torch.where(held > 0, held, 1.0))
    factors, failures = torch.linalg.cholesky_ex(curvature)
    found = torch.cholesky_solve(lack[..., None], factors)[..., 0]
    return torch.where(failures[:, None] > 0, torch.where(held > 0, lack / held, 0.0), found)


def _by_gradients(
    plans: torch.Tensor, share: torch.Tensor, held: torch.Tensor, lack: torch.Tensor, products: int
) -> tuple[torch.Tensor, bool]:
    """Return Newton's step by so many products with the plan, or what is found by then: is it solved?"""
    inverse = torch.where(held > 0, 1 / held, 0.0)
    found, residual = torch.zeros_like(lack), lack.clone()
    scaled = inverse * residual
    direction, power = scaled, (residual * scaled).sum(-1, keepdim=True)
    wanted = power * lack.abs().sum(-1, keepdim=True).clamp_max(0.01)
    for _ in range(products):
        sent = torch.bmm(plans, direction[..., None])[..., 0] * share
        curved = held * direction - torch.bmm(sent[:, None], plans)[:, 0]
        curvature = (direction * curved).sum(-1, keepdim=True)
        length = torch.where((power > wanted) & (curvature > 0), power / curvature, 0.0)
        found += length * direction
        residual -= length * curved
        scaled = inverse * residual
        before, power = power, (residual * scaled).sum(-1, keepdim=True)
        if not bool(((power > wanted) & (curvature > 0)).any()):
            return found, True
        direction = scaled + torch.where(before > 0, power / before, 0.0) * direction
    return found, False


def _unbalanced(
    costs: torch.Tensor, regularisation: float, relaxation: float, masses: Masses | None
) -> torch.Tensor:
    """Return plans that may leave mass where it is, at a price, by POT."""
    weights = None if masses is None else [side.double().cpu().numpy() for side in masses]
    plans = [
        ot.unbalanced.sinkhorn_unbalanced(
            [] if weights is None else weights[0][number],
            [] if weights is None else weights[1][number],
            cost,
            regularisation,
            relaxation,
            method="sinkhorn_stabilized",
            numItermax=UNBALANCED_ITERATIONS,
            stopThr=PRECISION,
        )
        for number, cost in enumerate(costs.cpu().numpy())
    ]
    return torch.stack([torch.from_numpy(plan) for plan in plans]).to(costs)
