"""Soft couplings: entropic optimal transport."""

from __future__ import annotations

import ot
import torch

ITERATIONS = 1000
PRECISION = 1e-6


def sinkhorn(
    costs: torch.Tensor, regularisation: float, absolute: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a batch of entropic transport problems with uniform marginals.

    Each cost matrix is shifted and, unless ``absolute``, divided by its mean first, so that one
    regularisation means the same softness everywhere.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, target, source]``.
    regularisation : float
        Weight of the entropy, relative to the mean cost unless ``absolute``.
    absolute : bool

    Returns
    -------
    plans : torch.Tensor
        ``[batch, target, source]``, rows sum to ``1 / target``.
    values : torch.Tensor
        ``[batch]``: the transported cost in the units of ``costs``, per unit times the number of target
        units, so that a hard plan has the value of its assignment.

    References
    ----------
    Cuturi, Sinkhorn Distances, NeurIPS 2013; solved in the log domain by POT.

    Examples
    --------
    >>> plans, _ = sinkhorn(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 0.05)
    >>> (plans * 2).round(decimals=3).tolist()
    [[[0.0, 1.0], [1.0, 0.0]]]
    """
    exact = costs.double().cpu()
    shifted = exact - exact.amin((-2, -1), keepdim=True)
    scale = shifted.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    if absolute:
        scale = torch.ones_like(scale)
    # In NumPy: thousands of tiny steps, on which torch's thread pool costs more than it gains.
    solved = ot.solve_batch(
        (shifted / scale).numpy(),
        reg=regularisation,
        max_iter=ITERATIONS,
        tol=PRECISION,
        method="log_sinkhorn",
    )
    plans = torch.from_numpy(solved.plan)
    values = (plans * exact).sum((-2, -1)) * costs.shape[-2]
    return plans.to(costs), values.to(costs)
