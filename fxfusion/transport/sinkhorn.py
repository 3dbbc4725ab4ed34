"""Soft couplings: entropic optimal transport."""

from __future__ import annotations

import ot
import torch

from fxfusion.threads import one_thread
from fxfusion.transport.assignment import Masses

ITERATIONS = 1000
UNBALANCED_ITERATIONS = 10_000  # of one problem at a time, which converge more slowly
PRECISION = 1e-6


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

    References
    ----------
    Cuturi, Sinkhorn Distances, NeurIPS 2013; solved in the log domain by POT. Chizat et al., Scaling
    Algorithms for Unbalanced Transport Problems, 2018.

    Examples
    --------
    >>> plans, _ = sinkhorn(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 0.05)
    >>> (plans * 2).round(decimals=3).tolist()
    [[[0.0, 1.0], [1.0, 0.0]]]
    """
    exact = costs.double()
    shifted = exact - exact.amin((-2, -1), keepdim=True)
    scale = shifted.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    if absolute:
        scale = torch.ones_like(scale)
    if relaxation is None:
        with one_thread():
            plans = ot.solve_batch(
                shifted / scale,
                reg=regularisation,
                a=None if masses is None else masses[0].to(exact),
                b=None if masses is None else masses[1].to(exact),
                max_iter=ITERATIONS,
                tol=PRECISION,
                method="log_sinkhorn",
            ).plan
    else:  # what costs nothing counts here: the cost itself, not shifted
        weights = None if masses is None else [side.double().cpu().numpy() for side in masses]
        plans = torch.stack(
            [
                torch.from_numpy(
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
                )
                for number, cost in enumerate((exact / scale).cpu().numpy())
            ]
        ).to(exact)
    values = (plans * exact).sum((-2, -1)) * costs.shape[-2]
    return plans.to(costs), values.to(costs)
