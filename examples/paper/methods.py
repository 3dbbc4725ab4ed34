"""What is compared with fusion: averages, ensembles, truncation, and training from where they end."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tasks import Size, Task
from torch import nn

import fxfusion


def loaded(like: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a network with other weights."""
    copied = copy.deepcopy(like)
    copied.load_state_dict(state)
    return copied.eval()


def average(models: Sequence[nn.Module]) -> nn.Module:
    """Return the vanilla average of networks of one size."""
    states = [model.state_dict() for model in models]
    return loaded(
        models[0],
        {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]},
    )


def fuse(
    task: Task,
    models: Sequence[nn.Module],
    like: nn.Module,
    samples: int = 200,
    features: str = "activations",
    batch: int = 100,
    **options: Any,
) -> nn.Module:
    """Return the fusion of networks as an instance of the class, of the size of ``like``."""
    weighed = "flow" in options and options["flow"].weighted
    calibrated = features == "activations" or "repair" in options or weighed
    learning = options.get("refine")
    labelled = learning is not None and learning.labels > 0
    seen = task.calibration(samples, labelled, batch) if calibrated else None
    result = fxfusion.fuse(models, kwargs=task.example(), calibration=seen, features=features, **options)
    return loaded(like, result.state_dict())


def truncated(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a network cut to the widths of another: its first units (heads, channels) of every axis."""
    state = model.state_dict()
    return loaded(
        like,
        {
            name: state[name][tuple(slice(0, size) for size in tensor.shape)]
            for name, tensor in like.state_dict().items()
        },
    )


def padded(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a network put into a wider one, whose other units are as they were initialised."""
    state = {name: tensor.clone() for name, tensor in like.state_dict().items()}
    for name, tensor in model.state_dict().items():
        state[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    return loaded(like, state)


def first_layers(model: nn.Module, like: nn.Module, path: str) -> nn.Module:
    """Return a network of the depth of another: its first layers."""
    depth = len(list(like.get_submodule(path).children()))
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{path}.") or int(name[len(path) + 1 :].partition(".")[0]) < depth
    }
    return loaded(like, kept)


def mixed(left: nn.Module, right: nn.Module, share: float) -> nn.Module:
    """Return a network on the line between two: ``(1 - share) * left + share * right``."""
    return moved(left, [right], [share])


def moved(origin: nn.Module, others: Sequence[nn.Module], shares: Sequence[float]) -> nn.Module:
    """Return a network in the plane through several: ``origin + sum of share * (other - origin)``."""
    base = origin.state_dict()
    states: list[Mapping[str, torch.Tensor]] = [other.state_dict() for other in others]
    return loaded(
        origin,
        {
            name: tensor
            + sum(share * (state[name] - tensor) for share, state in zip(shares, states, strict=True))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in base.items()
        },
    )


def halved(size: Size) -> Size:
    """Return a size of half the width, heads and hidden units."""
    return Size(size.width // 2, size.heads // 2, size.hidden // 2, size.depth)
