"""Hard couplings: the linear assignment problem."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment


def assign(costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a batch of linear assignment problems.

    With uniform marginals and equal sizes the optimum of optimal transport is a permutation
    (Birkhoff-von Neumann), so this is exact EMD.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, n, n]``; rows are target units, columns source units.

    Returns
    -------
    index : torch.Tensor
        int64 ``[batch, n]``: the source unit of each target unit.
    values : torch.Tensor
        ``[batch]``: the total cost of each assignment.

    References
    ----------
    Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016 (SciPy's solver).

    Examples
    --------
    >>> index, values = assign(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    >>> index.tolist(), values.tolist()
    ([[1, 0]], [0.0])
    """
    columns = [torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs.double().cpu().numpy()]
    index = torch.stack(columns)
    values = costs.gather(-1, index.unsqueeze(-1).to(costs.device)).squeeze(-1).sum(-1)
    return index, values
