"""Hold the plan of a whole model against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxfusion.capture import Model
from fxfusion.certify import Certificate
from fxfusion.pipeline import certify


def check_model(
    model: Model, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, seed: int = 0
) -> Certificate:
    """Assert that a random symmetric twin of a model computes the same, and is not the model itself.

    Parameters
    ----------
    model : torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram
    args, kwargs : sequence, mapping
        Example inputs.
    seed : int
        Draws the twin.

    Returns
    -------
    Certificate

    Raises
    ------
    AssertionError
        If the function changed, or nothing in the model may be permuted.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> check_model(model, (torch.randn(2, 4),)).ok
    True
    """
    certificate = certify(model, args, kwargs, seed)
    assert certificate.ok, f"the function changed by {certificate.max_relative_error:.2g}: {certificate}"
    assert certificate.moved > 0, f"no unit of the model may be permuted: {certificate}"
    return certificate
