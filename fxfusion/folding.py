"""Folding: move the weights of norms into what reads the normalised tensor, where a rotation may follow.

A norm computes ``w * n + b``, and its readers ``V (w * n + b)``. With ``V' = V diag(w)`` and ``b' = b / w``
they compute the same from ``n + b'``, and ``n`` turns with the basis of the space: RMS normalisation for any
rotation, layer normalisation for those that fix the mean. The network keeps its class and its function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxfusion.plan import Fold, Plan

SMALLEST = 1e-6  # of the largest norm weight: by a smaller one no bias is divided


def can_fold(fold: Fold, state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a norm's bias can be divided by its weight."""
    if fold.bias is None:
        return True
    weight, bias = state[fold.weight].detach().abs(), state[fold.bias].detach()
    return bool(((weight > SMALLEST * weight.max()) | (bias == 0)).all())


def fold_norms(plan: Plan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights that compute the same, with norm weights of one.

    Parameters
    ----------
    plan : Plan
        Its ``folds`` say what goes where.
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses; not written.

    Returns
    -------
    dict of str to torch.Tensor
        What no fold touches is the given tensor itself.
    """
    folded = dict(state)
    for fold in plan.folds:
        weight = state[fold.weight].detach()
        wide = weight.double()
        folded[fold.weight] = torch.ones_like(weight)
        if fold.bias is not None:
            bias = state[fold.bias].detach()
            divided = torch.where(bias == 0, torch.zeros_like(wide), bias.double() / wide)
            folded[fold.bias] = divided.to(bias.dtype)
        for name, axis in fold.readers:
            reader = folded[name].detach().clone()
            for block in plan.layouts[name].blocks:
                view, dimension = block.view(reader), 0
                for index, part in enumerate(block.axes):
                    for factor in part.factors:
                        if index == axis and factor.space == fold.space:
                            shape = [1] * view.ndim
                            shape[dimension] = -1
                            view.copy_(view.double() * wide.reshape(shape))
                        dimension += 1
            folded[name] = reader
    return folded
