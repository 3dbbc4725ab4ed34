"""A second device, simulated on the CPU: tensors on it are real, but refuse to meet those of the CPU.

What computes on it without an error, and gives the same, has every tensor where it belongs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from fxfusion.devices import onto
from fxfusion.state import KEY, attach

NAME = "simulated"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this PyTorch can be given a backend that is written in Python."""
MIXED = {"aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
"""Operators that take tensors of two devices, as on a GPU: copies, and indices on the CPU."""


class Simulated(torch.Tensor):
    """A tensor whose memory is that of ``held``, on the CPU, and whose device is another one."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Simulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """Return the values, as a tensor of any device does."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes on the simulated device what is asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        asked = device is not None and torch.device(device).type == NAME
        there = any(isinstance(item, Simulated) for item in pytree.tree_leaves((args, kwargs)))
        return _run(func, args, kwargs) if asked or there else func(*args, **kwargs)


class _Values(TorchFunctionMode):
    """Makes tensors of Python's numbers, which no other mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], Simulated):
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name
    device = kwargs.get("device")
    to_cpu = device is not None and torch.device(device).type == "cpu"
    moves = name == "aten::_to_copy"
    tensors = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    strangers = [item for item in tensors if not isinstance(item, Simulated) and item.ndim]
    if strangers and not moves and name not in MIXED:
        raise RuntimeError(f"{name}: tensors on two devices, {NAME} and {strangers[0].device}")
    if name == "aten::_fused_sdp_choice":
        return 0  # by operators of which each device has its own
    plain_args, plain = pytree.tree_map_only(Simulated, lambda item: item.held, (args, kwargs))
    if device is not None:
        plain["device"] = torch.device("cpu")
    if name == "aten::view":
        func = torch.ops.aten.reshape.default  # attention leaves another layout than on the CPU
    found = func(*plain_args, **plain)
    if to_cpu and moves:
        return found
    if name == "aten::copy_":
        return args[0]
    written = {id(item.held): item for item in tensors if isinstance(item, Simulated)}

    def wrapped(item: torch.Tensor) -> torch.Tensor:
        return written[id(item)] if id(item) in written else Simulated(item)

    return pytree.tree_map_only(torch.Tensor, wrapped, found)


@functools.cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME)


@contextlib.contextmanager
def simulated() -> Iterator[torch.device]:
    """Let there be a second device."""
    _register()
    with _Factories(), _Values():
        yield torch.device(NAME, 0)


def moved(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Return a prepared module whose tensors are all on a device, as capturing a model there makes it."""
    capture = module.meta[KEY].capture
    module = copy.deepcopy(module)
    for owner in module.modules():
        for name, value in list(vars(owner).items()):
            if isinstance(value, torch.Tensor):
                setattr(owner, name, value.to(device))
    module.to(device)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
    args, kwargs = onto((capture.args, capture.kwargs), device)
    return attach(dataclasses.replace(capture, module=module, args=args, kwargs=kwargs))
