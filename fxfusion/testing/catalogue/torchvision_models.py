"""torchvision: every classification model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from fxfusion.testing.catalogue.entry import Entry, Inputs, select

IMAGE = 64  # of convolutional networks, which take any size: the rules do not depend on it
IMAGES = {"vit": 224, "swin": 224, "maxvit": 224, "inception": 96, "alexnet": 96}  # by start of the name
_SLOW_INITIALISATION = ("googlenet", "inception_v3")


def torchvision_entries(patterns: Sequence[str] = ()) -> list[Entry]:
    """Return the classification models, or those whose name matches a pattern."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [
        Entry("torchvision", "classification", name, functools.partial(_build, name), _inputs_of(name))
        for name in (select("torchvision", names, patterns) if patterns else names)
    ]


def _build(name: str) -> nn.Module:
    import torchvision

    options = {"init_weights": False} if name in _SLOW_INITIALISATION else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _inputs_of(name: str) -> functools.partial[Inputs]:
    size = next((size for start, size in IMAGES.items() if name.startswith(start)), IMAGE)
    return functools.partial(_inputs, size)


def _inputs(size: int, model: nn.Module) -> Inputs:
    return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),), {}
