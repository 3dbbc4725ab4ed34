"""Networks without weights of their own: built, captured and planned, and never filled.

Their parameters are reserved, not written: an operating system gives such memory when it is first touched.
Unlike a network on the meta device, buffers that a class computes (rotary frequencies, masks) are real, so
that its graph runs as soon as weights are handed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let parameters be registered without memory, so that initialising them is no work."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose parameters are reserved but never written.

    Parameters
    ----------
    build : callable
        Returns the network.

    Returns
    -------
    torch.nn.Module
        In evaluation mode; ties are kept, buffers are as the class makes them.

    Examples
    --------
    >>> model = hollow(lambda: nn.Linear(3, 2))
    >>> model.weight.shape, model.weight.device.type
    (torch.Size([2, 3]), 'cpu')
    """
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        torch.manual_seed(0)
        model = build()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _reserved(parameter)
            module._parameters[name] = made[id(parameter)]
    return model.eval()


def _reserved(parameter: Any) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
