"""Running a network in stages: only one stage's weights are in memory at a time.

A graph is cut where little is alive, all batches go through one stage, and what the next one needs of them is
kept: in memory up to a limit, beyond it in files.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch import fx

from fxfusion.capture import Capture
from fxfusion.errors import MemoryLimitError
from fxfusion.execution import Live

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """How much memory calibration may take, and where the rest goes.

    Attributes
    ----------
    bytes : int
        Three eighths are for the weights and statistics of a stage, two for activations between stages, the
        rest for what is at work.
    directory : Path
        An existing one, for what does not fit.
    """

    bytes: int
    directory: Path

    @property
    def stage(self) -> int:
        """Bytes for the weights and statistics of a stage."""
        return self.bytes * 3 // 8

    @property
    def kept(self) -> int:
        """Bytes for activations between stages."""
        return self.bytes // 4


def used(capture: Capture, nodes: Sequence[fx.Node]) -> list[str]:
    """Return the names of the weights that nodes take, each once."""
    targets = (str(item.target) for node in nodes for item in node.all_input_nodes if item.op == "get_attr")
    names = (capture.aliases.get(target, target) for target in targets)
    return list(dict.fromkeys(name for name in names if name in capture.parameters))


def stages(capture: Capture, weights: Mapping[str, int], held: Mapping[str, int], limit: int) -> list[slice]:
    """Cut a graph into stages that hold few bytes each.

    Parameters
    ----------
    capture : Capture
    weights : mapping of str to int
        Bytes of each weight.
    held : mapping of str to int
        By name of a node: bytes of what is gathered there.
    limit : int
        Bytes of a stage.

    Returns
    -------
    list of slice
        Of the graph's nodes, one per stage. A stage ends where least is alive among the places where at least
        half of what it may hold is used.

    Raises
    ------
    MemoryLimitError
        If a single node needs more.

    Examples
    --------
    >>> from fxfusion.capture import capture
    >>> layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(4)]
    >>> found = capture(torch.nn.Sequential(*layers), (torch.ones(2, 8),))
    >>> len(stages(found, dict.fromkeys(found.parameters, 256), {}, 512))
    2
    """
    nodes = list(capture.module.graph.nodes)
    alive = _alive(nodes)
    found, start = [], 0
    while start < len(nodes):
        total, names, ends = 0, set[str](), []
        for place in range(start, len(nodes)):
            fresh = set(used(capture, [nodes[place]])) - names
            total += sum(weights[name] for name in fresh) + held.get(nodes[place].name, 0)
            if total > limit:
                break
            names |= fresh
            ends.append((total, place + 1))
        if not ends:
            raise MemoryLimitError(
                f"{capture.name}: {nodes[start].name} alone takes {total / 1e6:,.1f} MB for the parents' "
                f"weights and statistics, and a memory limit leaves {limit / 1e6:,.1f} MB: raise it"
            )
        most, stop = ends[-1]
        if stop < len(nodes):
            full = [end for filled, end in ends if 2 * filled >= most]
            stop = min(reversed(full), key=lambda end: alive[end - 1])
        found.append(slice(start, stop))
        start = stop
    return found


def _alive(nodes: Sequence[fx.Node]) -> list[int]:
    """Return after every node how many bytes later ones need, in the shapes of the example."""
    place = {node: index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node in nodes:
        if node.op not in ("get_attr", "output") and node.users:
            size = sum(
                leaf.numel() * leaf.itemsize
                for leaf in pytree.tree_leaves(node.meta.get("val"))
                if isinstance(leaf, torch.Tensor)
            )
            change[place[node]] += size
            change[max(place[user] for user in node.users)] -= size
    alive, total = [], 0
    for difference in change[:-1]:
        total += difference
        alive.append(total)
    return alive


class Shelf:
    """Batches between two stages, by number.

    Parameters
    ----------
    directory : Path
        For those that do not fit into memory; files are removed when they are taken.
    limit : int
        Bytes in memory.

    Examples
    --------
    >>> import tempfile
    >>> shelf = Shelf(Path(tempfile.mkdtemp()), limit=0)
    >>> shelf.put(0, [Live({}, ())])
    >>> shelf.take(0)
    [Live(shared={}, own=())]
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._held = 0
        self._kept: dict[int, list[Live]] = {}
        self._written: dict[int, tuple[list[Any], pytree.TreeSpec]] = {}

    def put(self, number: int, lives: list[Live]) -> None:
        """Keep a batch: its values in every graph."""
        leaves, spec = pytree.tree_flatten([(live.shared, live.own) for live in lives])
        leaves = [_own(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        size = _bytes(leaves)
        if self._held + size <= self._limit:
            self._held += size
            self._kept[number] = _lives(leaves, spec)
            return
        tensors = {str(place): leaf for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        rest = [_shell(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        save_file(_as_bytes(tensors), self._file(number))
        self._written[number] = rest, spec

    def take(self, number: int) -> list[Live]:
        """Return a batch, which is not kept any longer."""
        if number in self._kept:
            lives = self._kept.pop(number)
            self._held -= _bytes(pytree.tree_leaves([(live.shared, live.own) for live in lives]))
            return lives
        leaves, spec = self._written.pop(number)
        for name, stored in load_file(self._file(number)).items():
            shell = leaves[int(name)]
            found = torch.empty_strided(shell.shape, shell.stride(), dtype=shell.dtype)
            leaves[int(name)] = found.copy_(stored.view(shell.dtype).squeeze(-1))
        self._file(number).unlink()
        return _lives(leaves, spec)

    def _file(self, number: int) -> Path:
        return self._directory / f"batch-{number}.safetensors"


def give_back_freed() -> None:
    """Let the C library return large blocks to the system as soon as they are freed, for the whole process.

    GNU's learns from the first one that is freed to keep such blocks, whose remains grow from stage to stage.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        adjust(_MMAP_THRESHOLD, 2**20)


def _lives(leaves: list[Any], spec: pytree.TreeSpec) -> list[Live]:
    return [Live(shared, own) for shared, own in pytree.tree_unflatten(leaves, spec)]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that keeps no more in memory than it shows."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _shell(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without memory, of the same strides: operators may rely on them."""
    return torch.empty_like(tensor, device="meta")


def _as_bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as they can be stored: bytes, as not every kind of number can be, none in two places."""
    found, known = {}, set[int]()
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        dense = dense.clone() if dense.data_ptr() in known else dense
        known.add(dense.data_ptr())
        found[name] = dense.unsqueeze(-1).view(torch.uint8)
    return found


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
