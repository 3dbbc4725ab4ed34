"""Averages of state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def weighted_average(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], like: int
) -> dict[str, torch.Tensor]:
    """Return the weighted average of state dicts.

    Parameters
    ----------
    states : sequence of mapping
        Equal names and shapes.
    weights : sequence of float
        They sum to one.
    like : int
        Position of the state whose dtypes the result has, and whose integer tensors it takes.

    Returns
    -------
    dict of str to torch.Tensor
        New tensors; arithmetic is in float32 or wider. Infinite values, which all have alike, stay.
    """
    merged = {}
    for name, reference in states[like].items():
        if not reference.is_floating_point():
            merged[name] = reference
            continue
        wide = torch.promote_types(reference.dtype, torch.float32)
        total = torch.zeros_like(reference, dtype=wide)
        for state, weight in zip(states, weights, strict=True):
            total.add_(state[name].detach().to(wide), alpha=weight)
        merged[name] = torch.where(reference.isinf(), reference, total.to(reference.dtype))
    return merged
