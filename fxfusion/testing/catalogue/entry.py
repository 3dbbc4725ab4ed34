"""One model of a catalogue, and how its weights are made generic."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxfusion.certify import randomise
from fxfusion.errors import OptionError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_OTHERS = 7  # inputs drawn besides the given ones, for batch statistics
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
    that forgot them. Batch statistics are made random around those of the inputs, layer by layer, so that
    signals neither vanish nor explode on their way through: a deep network amplifies rounding if they do.

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

    def observe(norm: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Give a batch norm statistics near those of what arrives, however far upstream was moved."""
        samples = args[0].transpose(0, 1).flatten(1)
        mean, variance = samples.mean(1), samples.var(1, correction=0)
        norm.running_mean.copy_(mean + variance.sqrt() * normal(mean, 0.3))
        norm.running_var.copy_((variance * uniform(variance, 0.6, 1.6)).clamp(min=1e-3))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 and name.endswith(("weight", "gamma", "scale")):
                parameter.copy_(uniform(parameter, 0.5, 1.5))
            elif parameter.ndim <= 1 or not parameter.any():
                parameter.copy_(normal(parameter, 0.2))
        model.eval()
        hooks = [
            module.register_forward_pre_hook(observe)
            for module in model.modules()
            if isinstance(module, _BATCH_NORMS) and module.running_mean is not None
        ]
        if hooks:
            args, kwargs = _more(inputs, generator)
            model(*args, **kwargs)
        for hook in hooks:
            hook.remove()
    return model


def _more(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Return inputs followed by others of their kind: statistics of two samples fit no third."""
    others = [randomise(inputs, generator) for _ in range(_OTHERS)]

    def join(leaf: Any, *more: Any) -> Any:
        return torch.cat([leaf, *more]) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf

    joined: Inputs = pytree.tree_map(join, inputs, *others)
    return joined
