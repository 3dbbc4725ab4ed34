"""One model of a catalogue, and how its weights are made generic."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fxfusion.errors import OptionError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model.

    Attributes
    ----------
    source, family, name : str
        The library, its module or task, and the model's name there.
    build : callable ``() -> torch.nn.Module``
        Makes it with random weights.
    inputs : callable ``(model) -> (args, kwargs)``
        Makes two samples of what it takes.
    """

    source: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]


def select(source: str, names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match any of the patterns, each of which must match some.

    Raises
    ------
    OptionError
        If a pattern matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise OptionError(f"no model of {source} matches {pattern!r}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def perturb(model: nn.Module, inputs: Inputs, seed: int = 0) -> nn.Module:
    """Make a fresh model generic, and put it into evaluation mode.

    A norm's weight of one, a bias or a table of zero and untouched batch statistics would hide a transport
    that forgot them. Batch statistics are first taken from the inputs themselves, then made random, so
    that signals neither vanish nor explode on their way through.

    Parameters
    ----------
    model : torch.nn.Module
        Written in place.
    inputs : tuple of tuple, dict
        What it takes.
    seed : int

    Returns
    -------
    torch.nn.Module
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (torch.rand(tensor.shape, generator=generator) * (high - low) + low).to(tensor.dtype)

    def normal(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 and name.endswith(("weight", "gamma", "scale")):
                parameter.copy_(uniform(parameter, 0.5, 1.5))
            elif parameter.ndim <= 1 or not parameter.any():
                parameter.copy_(normal(parameter, 0.2))
        model.eval()
        norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
        _observe(model, norms, inputs)
        for norm in norms:
            mean, variance = norm.running_mean, norm.running_var
            if mean is not None and variance is not None:
                mean.add_(variance.sqrt() * normal(mean, 0.3))
                variance.mul_(uniform(variance, 0.6, 1.6)).clamp_(min=1e-3)
    return model


def _observe(model: nn.Module, norms: Sequence[Any], inputs: Inputs) -> None:
    """Run once with batch norms alone in training mode, so that they hold the inputs' statistics."""
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        model(*inputs[0], **inputs[1])
    except ValueError:  # one value per channel has no variance: keep what is there
        pass
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
