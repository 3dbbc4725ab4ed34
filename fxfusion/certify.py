"""Certification: a random element of the inferred symmetry group must leave the function unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from fxfusion.capture import Capture
from fxfusion.execution import Program
from fxfusion.folding import fold_norms
from fxfusion.plan import Plan
from fxfusion.symmetry import random_element

TOLERANCE = 1e-9  # relative, in float64


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The outcome of certification.

    Attributes
    ----------
    ok : bool
        Whether the function stayed the same to the tolerance, on both inputs.
    max_relative_error : float
        Largest difference of an output element, relative to the output's largest element.
    moved : float
        Fraction of parameter elements that changed.
    tolerance : float
        What ``ok`` was judged by.
    rounding : float or None
        Where not ``ok``: how much the function changes when weights change in their last place. If that is
        more than the tolerance, the network amplifies rounding, and nothing can be said of the plan.
    """

    ok: bool
    max_relative_error: float
    moved: float
    tolerance: float = TOLERANCE
    rounding: float | None = None


def certify_plan(
    capture: Capture,
    plan: Plan,
    state: Mapping[str, torch.Tensor],
    outputs: frozenset[int],
    seed: int = 0,
    samples: int | None = None,
    diagnose: bool = True,
) -> Certificate:
    """Certify a plan on one set of weights, in float64.

    Weights are widened one by one where they are used, so that memory holds the two sets as they are stored.

    Parameters
    ----------
    capture, plan
        The model and the plan to certify.
    state : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    outputs : frozenset of int
        Flat positions of the outputs that must be kept.
    seed : int
        Draws the group element and the second input.
    samples : int, optional
        How many samples of the example are run; all by default.
    diagnose : bool
        Where the function changes, find out whether rounding alone would do the same.

    Returns
    -------
    Certificate
    """
    generator = torch.Generator().manual_seed(seed)
    twin = random_element(plan, _turnable(plan, state), generator)
    program = Program(capture, double=True)
    example = first_samples(capture, samples)
    inputs = example, randomise(example, generator)

    def change(other: Mapping[str, torch.Tensor]) -> float:
        """Return the largest relative change of an output under other weights."""
        worst = 0.0
        for args, kwargs in inputs:
            original, changed = program.run([state, other], args, kwargs)
            worst = max(worst, *(_difference(original[index], changed[index]) for index in outputs))
        return worst

    worst = change(twin)
    rounding = change(_rounded(state, generator)) if worst > TOLERANCE and diagnose else None
    total = sum(state[name].numel() for name in plan.layouts)
    differing = sum(int((state[name] != twin[name]).sum()) for name in plan.layouts)
    return Certificate(worst <= TOLERANCE, worst, differing / total if total else 0.0, rounding=rounding)


def _turnable(plan: Plan, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return weights on which rotations and factors may act: norms folded, widened since both round."""
    if not plan.rotates and not plan.scalings:
        return state
    wide = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    return fold_norms(plan, wide)


def _rounded(state: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return weights that differ in the last place."""
    moved = {}
    for name, tensor in state.items():
        wide = tensor.detach().double() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point():
            noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
            wide = wide * (1 + torch.finfo(torch.float64).eps * noise.to(wide.device))
        moved[name] = wide
    return moved


def first_samples(capture: Capture, samples: int | None) -> Any:
    """Return the example's args and kwargs cut to a few samples, where they share a batch that may vary."""
    example = (capture.args, capture.kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    series = all(tensor.ndim < 2 for tensor in tensors)  # a list of samples, each of some length
    if samples is None or not capture.dynamic or len(sizes) != 1 or series:
        return example
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[:samples], example)


def _difference(left: Any, right: Any) -> float:
    if not isinstance(left, torch.Tensor):
        return 0.0
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    if not left.is_floating_point():
        return float((left != right).any())
    missing = left.isnan()
    if not torch.equal(missing, right.isnan()) or missing.all():
        return float("inf")
    left, right = left[~missing], right[~missing]
    same = left == right  # infinities of the same sign
    scale = left[left.isfinite()].abs().max() if left.isfinite().any() else torch.tensor(1.0)
    difference = (left - right).abs().masked_fill(same, 0.0).max()
    return float(difference / scale.clamp_min(torch.finfo(left.dtype).tiny))


def randomise(inputs: Any, generator: torch.Generator) -> Any:
    """Return other inputs of the same kind: floats drawn anew, integers drawn from the values they have.

    Masks (at most two different values) and inputs that are no tensors stay.
    """

    def redraw(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.cpu()
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            return drawn.to(tensor.dtype) * tensor.std() + tensor.mean() if tensor.numel() > 1 else drawn
        values = tensor.unique()
        if values.numel() <= 2:
            return tensor
        picks = torch.randint(values.numel(), tensor.shape, generator=generator)
        return values[picks]

    return pytree.tree_map_only(torch.Tensor, redraw, inputs)
