"""Hard couplings: the linear assignment problem."""

from __future__ import annotations

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment

Masses = tuple[torch.Tensor, torch.Tensor]
EMD_ITERATIONS = 10_000_000
_FINER = 4.0  # by which bids get smaller when an auction ends too far from the best
_LOST = 1e-6  # of the largest cost: bids below are lost in float32
_ROUNDS = 10_000  # of bidding, where hundreds are usual: then the exact solver takes over


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
    index = torch.stack([_assigned(cost) for cost in costs.double().cpu()]).to(costs.device)
    values = costs.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)
    return index, values


def _assigned(cost: torch.Tensor) -> torch.Tensor:
    """Return the column of every row of one matrix ``[n, n]``.

    What is taken from a whole column changes the total alike for every assignment. The least of each is a
    first dual solution: SciPy's shortest augmenting paths begin with zeros, and get much shorter from there
    (2 to 7 times faster at 1,536 units, most where some units are far larger than others).
    """
    return torch.from_numpy(linear_sum_assignment((cost - cost.amin(-2)).numpy())[1])


def auction(costs: torch.Tensor, gap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve a batch of linear assignment problems to within a gap, which is certified.

    Rows bid for columns: each, all at once, raises the price of its best by as much as that is better than
    the second best, and a little more. The last few rows, whose bids would go on for long, get the columns
    that are left, by an exact assignment. Prices are a dual solution, so that what they add up to is a lower
    bound on the cost of any assignment: as long as the one found is further above, bids get smaller.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, n, n]``, not negative; rows are target units, columns source units.
    gap : float
        How far above the least cost an assignment may be, as a share of that.

    Returns
    -------
    index : torch.Tensor
        int64 ``[batch, n]``: the source unit of each target unit.
    values : torch.Tensor
        ``[batch]``: the total cost of each assignment.
    gaps : torch.Tensor
        ``[batch]``: what is certified, the distance to the lower bound as a share of it; at most ``gap``.

    References
    ----------
    Bertsekas, The auction algorithm: a distributed relaxation method for the assignment problem, Annals of
    Operations Research 1988.

    Examples
    --------
    >>> index, values, gaps = auction(torch.tensor([[[1.0, 0.1], [0.1, 1.0]]]), gap=0.1)
    >>> index.tolist(), float(gaps) <= 0.1
    ([[1, 0]], True)
    """
    exact = costs.double().cpu()
    solved = [_auctioned(cost, gap) for cost in exact]
    index = torch.stack([found for found, _ in solved])
    values = exact.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)
    bounds = torch.tensor([bound for _, bound in solved], dtype=torch.float64)
    above = (values - bounds).clamp_min(0.0)
    gaps = torch.where(above > 0, above / bounds.abs().clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return index.to(costs.device), values.to(costs), gaps


def _auctioned(cost: torch.Tensor, gap: float) -> tuple[torch.Tensor, float]:
    """Return the column of every row of one matrix, and a lower bound on the cost of all assignments."""
    size, least = len(cost), cost.amin(-2)
    if size < 2:
        return torch.zeros(size, dtype=torch.int64), float(cost.sum())
    above = (cost - least).float()
    prices = torch.zeros(size)
    bound = _bound(cost, -least)
    step = gap * bound / size  # an auction whose bids are so small ends within the gap of the best
    while step > _LOST * float(above.max()):
        index = _bid(above, prices, step, int(0.5 * gap * size))
        if index is None:
            break
        paid = float(cost.gather(-1, index.unsqueeze(-1)).sum())
        bound = max(bound, _bound(cost, prices.double() - least))
        if paid - bound <= gap * bound:
            return index, bound
        step /= _FINER
    index = _assigned(cost)
    return index, float(cost.gather(-1, index.unsqueeze(-1)).sum())


def _bound(cost: torch.Tensor, prices: torch.Tensor) -> float:
    """Return what no assignment costs less than, by a price for every column."""
    return float((cost + prices).amin(-1).sum() - prices.sum())


def _bid(cost: torch.Tensor, prices: torch.Tensor, step: float, left: int) -> torch.Tensor | None:
    """Auction columns until at most some rows are left; return every row's column, and raise the prices.

    None if too many rows bid for the same columns for too long.
    """
    owner = torch.full_like(prices, -1, dtype=torch.int64)
    index = torch.full_like(owner, -1)
    rows, rounds = torch.arange(len(cost)), 0
    while len(rows) > left:
        if rounds == _ROUNDS:
            return None
        rounds += 1
        two, columns = torch.topk(cost[rows] + prices, 2, largest=False)
        bids, wanted = two[:, 1] - two[:, 0] + step, columns[:, 0]
        highest = torch.zeros_like(prices).scatter_reduce(0, wanted, bids, "amax")
        winning = bids == highest[wanted]
        winner = torch.full_like(owner, -1)
        winner[wanted[winning]] = rows[winning]
        sold = (winner >= 0).nonzero().squeeze(-1)
        before = owner[sold]
        index[before[before >= 0]] = -1
        owner[sold], index[winner[sold]] = winner[sold], sold
        prices[sold] += highest[sold]
        rows = (index < 0).nonzero().squeeze(-1)
    if len(rows):
        free = (owner < 0).nonzero().squeeze(-1)
        index[rows] = free[_assigned(cost[rows][:, free])]
    return index


def assign_groups(costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a batch of assignment problems between unequally many units.

    Every unit of the larger side goes with exactly one of the smaller, which gets as many as any other, one
    more or less. So a network is widened by copying units, which keeps its function, and narrowed by
    averaging groups.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, target, source]``.

    Returns
    -------
    plans : torch.Tensor
        ``[batch, target, source]``, all positive entries alike, summing to one.
    values : torch.Tensor
        ``[batch]``: the sum over target units of their mean cost.

    Examples
    --------
    >>> plans, values = assign_groups(torch.tensor([[[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]]))
    >>> plans.tolist(), values.tolist()
    ([[[0.25, 0.0, 0.25, 0.0], [0.0, 0.25, 0.0, 0.25]]], [0.0])
    """
    narrowing = costs.shape[-2] < costs.shape[-1]
    tall = (costs.mT if narrowing else costs).double().cpu()
    plans = torch.stack([_groups(cost) for cost in tall])
    plans = plans.mT if narrowing else plans
    rows = plans / plans.sum(-1, keepdim=True)
    values = (rows * costs.double().cpu()).sum((-2, -1))
    return plans.to(costs), values.to(costs)


def _groups(cost: torch.Tensor) -> torch.Tensor:
    """Return the coupling for one cost matrix ``[many, few]``."""
    many, few = cost.shape
    least, more = divmod(many, few)
    # Every column stands `least` times, and once more if it may have one more: those that go without are
    # taken by rows that cost nothing there, and nowhere else.
    columns = cost.repeat(1, least + bool(more))
    rows = torch.full((columns.shape[1] - many, columns.shape[1]), float(cost.abs().max()) * many + 1.0).to(
        cost
    )
    rows[:, few * least :] = 0.0
    index = _assigned(torch.cat([columns, rows]))[:many] % few
    return torch.nn.functional.one_hot(index, few).double() / many


def partial(costs: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a batch of transport problems in which only a share of the mass is moved, the cheapest.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, target, source]``; all units weigh alike.
    share : float
        Between 0 and 1.

    Returns
    -------
    plans : torch.Tensor
        ``[batch, target, source]``, summing to ``share``.
    values : torch.Tensor
        ``[batch]``: the transported cost times the number of target units, as of :func:`assign`.

    References
    ----------
    Chapel, Alaya and Gasso, Partial Optimal Transport with Applications on Positive-Unlabeled Learning,
    NeurIPS 2020 (POT's solver).

    Examples
    --------
    >>> plans, _ = partial(torch.tensor([[[0.0, 9.0], [9.0, 5.0]]]), 0.5)
    >>> plans.tolist()
    [[[0.5, 0.0], [0.0, 0.0]]]
    """
    exact = costs.double().cpu()
    target, source = (np.full(size, 1.0 / size) for size in costs.shape[-2:])
    solved = [
        torch.from_numpy(ot.partial.partial_wasserstein(target, source, cost, m=share))
        for cost in exact.numpy()
    ]
    plans = torch.stack(solved)
    values = (plans * exact).sum((-2, -1)) * costs.shape[-2]
    return plans.to(costs), values.to(costs)


def emd(costs: torch.Tensor, masses: Masses) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a batch of transport problems exactly, for units of unequal mass.

    Parameters
    ----------
    costs : torch.Tensor
        ``[batch, target, source]``.
    masses : tuple of torch.Tensor
        Of the target's and the source's units, ``[batch, units]``, each row summing to one.

    Returns
    -------
    plans : torch.Tensor
        ``[batch, target, source]``, with the masses as marginals.
    values : torch.Tensor
        ``[batch]``: the transported cost times the number of target units, as of :func:`assign`.

    References
    ----------
    Bonneel et al., Displacement Interpolation Using Lagrangian Mass Transport, 2011 (POT's solver).

    Examples
    --------
    >>> masses = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]])
    >>> plans, _ = emd(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), masses)
    >>> plans.tolist()
    [[[0.25, 0.5], [0.0, 0.25]]]
    """
    exact = costs.double().cpu()
    target, source = (side.double().cpu().numpy() for side in masses)
    solved = [
        torch.from_numpy(ot.emd(a, b, cost, numItermax=EMD_ITERATIONS))
        for a, b, cost in zip(target, source, exact.numpy(), strict=True)
    ]
    plans = torch.stack(solved)
    values = (plans * exact).sum((-2, -1)) * costs.shape[-2]
    return plans.to(costs), values.to(costs)
