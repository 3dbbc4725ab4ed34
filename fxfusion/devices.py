"""Where tensors are: a fusion runs on the device of its parents' weights, whatever that is.

What is drawn at random is drawn on the CPU, so that every device gets the same. Exact and unbalanced
couplings are solved there, too. Everything else follows the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
import torch.utils._pytree as pytree

from fxfusion.errors import OptionError

Value = TypeVar("Value")


def chosen(name: str) -> torch.device:
    """Return the device of a name: ``auto`` is a GPU of CUDA if there is one, and else the CPU.

    Raises
    ------
    OptionError
        If there is no such device.

    Examples
    --------
    >>> chosen("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is no device: give auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(f"{name} is not available here, {count} GPUs are: give auto or cpu")
    return device


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device of the first tensor that has one, or else the CPU.

    Examples
    --------
    >>> device_of([torch.ones(2, device="meta"), torch.ones(2)])
    device(type='cpu')
    """
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def device_of_state(state: Mapping[str, torch.Tensor]) -> torch.device:
    """Return the device of weights; those in files are read onto the CPU.

    Examples
    --------
    >>> device_of_state({"weight": torch.ones(2)})
    device(type='cpu')
    """
    return device_of(state.values()) if isinstance(state, dict) else torch.device("cpu")


def onto(value: Value, device: torch.device) -> Value:
    """Move all tensors in nested tuples, lists and dicts to a device; those on meta have nothing to move.

    Examples
    --------
    >>> onto({"x": [torch.ones(2), 3]}, torch.device("cpu"))
    {'x': [tensor([1., 1.]), 3]}
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    return pytree.tree_map_only(torch.Tensor, moved, value)
