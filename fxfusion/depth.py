"""Parents of other depths: which layer of the deeper one does what a layer of the shallower one does.

The deeper parent takes part with as many layers as the shallower one has, paired in order. Either those that
its outputs need most: one after the other, the layer is left out without which the network says most nearly
what it said. Or those that compute most nearly what the shallower one's layers do: linear centred kernel
alignment, from Gram matrices over samples, batch by batch.

References
----------
Kim et al., Shortened LLaMA: Depth Pruning for Large Language Models, 2024, arXiv 2402.02834 (layers ranked by
what leaving one out does to the outputs; here anew after each).
Kornblith, Norouzi, Lee and Hinton, Similarity of Neural Network Representations Revisited, ICML 2019.
Nguyen, Raghu and Kornblith, Do Wide and Deep Networks Learn the Same Things?, ICLR 2021, arXiv 2010.15327,
equations 2 and 3 (the estimate over batches).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxfusion.errors import ArchitectureMismatchError
from fxfusion.execution import flat_outputs

ROWS = 256  # samples or tokens of a batch at which layers are compared

Kept = dict[str, tuple[int, ...]]  # by path of a container: the layers that take part


def stacks_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the containers of a model whose children are all of one class, by path.

    Examples
    --------
    >>> list(stacks_of(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})))
    ['blocks']
    """
    found = {}
    for path, module in model.named_modules():
        children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if (
            children
            and len({type(child) for child in children}) == 1
            and next(children[0].parameters(), None) is not None
        ):
            found[path] = children
    return found


def unequal_stacks(models: Sequence[Any]) -> list[str]:
    """Return the paths of containers that hold differently many layers in different models."""
    if not all(isinstance(model, nn.Module) for model in models):
        return []
    stacks = [stacks_of(model) for model in models]
    shared = [path for path in stacks[0] if all(path in other for other in stacks)]
    unequal = [path for path in shared if len({len(other[path]) for other in stacks}) > 1]
    return [path for path in unequal if not any(path.startswith(f"{outer}.") for outer in unequal)]


def shallow(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of a model with some layers only, which shares its tensors.

    Parameters
    ----------
    model : torch.nn.Module
        It is not written.
    kept : mapping of str to sequence of int
        By path of a container, positions of the layers to keep.

    Returns
    -------
    torch.nn.Module

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    >>> shallow(model, {"": [0, 2]})(torch.ones(1, 2)).shape
    torch.Size([1, 1])
    """
    tensors = [*model.parameters(), *model.buffers()]
    reduced = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, positions in kept.items():
        container = reduced.get_submodule(path)
        children = list(container.children())
        container._modules = {str(place): children[position] for place, position in enumerate(positions)}
    return reduced


def restored(
    full: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor], kept: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Return a model's state dict with the layers that took part replaced.

    Examples
    --------
    >>> full = {"h.0.w": torch.zeros(1), "h.1.w": torch.zeros(1)}
    >>> restored(full, {"h.0.w": torch.ones(1)}, {"h": [1]})
    {'h.0.w': tensor([0.]), 'h.1.w': tensor([1.])}
    """
    return {**full, **{_original(name, kept): tensor for name, tensor in reduced.items()}}


def _original(name: str, kept: Mapping[str, Sequence[int]]) -> str:
    """Return the name that a parameter of a shallower copy has in the model itself."""
    for path, positions in kept.items():
        prefix = f"{path}." if path else ""
        if name.startswith(prefix):
            place, _, rest = name[len(prefix) :].partition(".")
            return f"{prefix}{positions[int(place)]}.{rest}"
    return name


@dataclasses.dataclass(eq=False)
class Similarity:
    """Linear centred kernel alignment between all layers of two networks, streamed.

    Parameters
    ----------
    left, right : int
        Numbers of layers.

    Examples
    --------
    >>> similarity = Similarity(1, 2)
    >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    >>> similarity.update([x], [2 * x @ torch.linalg.qr(torch.randn(3, 3))[0], x.square()])
    >>> bool(similarity.matrix[0, 0] > 0.999), bool(similarity.matrix[0, 1] < 0.9)
    (True, True)
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        self.cross = torch.zeros(self.left, self.right, dtype=torch.float64)
        self.own = (
            torch.zeros(self.left, dtype=torch.float64),
            torch.zeros(self.right, dtype=torch.float64),
        )

    def update(self, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
        """Add samples: one ``[rows, units]`` per layer, the same rows everywhere."""
        grams = [torch.stack([_gram(item).cpu() for item in side]) for side in (left, right)]
        self.cross += torch.einsum("iab,jab->ij", *grams)
        for total, gram in zip(self.own, grams, strict=True):
            total += gram.square().sum((1, 2))

    @property
    def matrix(self) -> torch.Tensor:
        """``[left, right]``, between 0 and 1."""
        scale = self.own[0].sqrt().unsqueeze(1) * self.own[1].sqrt().unsqueeze(0)
        return torch.where(scale > 0, self.cross / scale.clamp_min(1e-300), 0.0)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    centred = rows.double() - rows.double().mean(0)
    return centred @ centred.T


def match_in_order(similarity: torch.Tensor) -> list[int]:
    """Pair every row with a column, in order, so that the sum of similarities is largest.

    Parameters
    ----------
    similarity : torch.Tensor
        ``[rows, columns]``, no more rows than columns; minus infinity where a pair cannot be.

    Returns
    -------
    list of int
        Strictly ascending: the column of each row. Empty if there is no such pairing.

    Examples
    --------
    >>> match_in_order(torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.1, 0.7]]))
    [0, 2]
    """
    rows, columns = similarity.shape
    best = torch.full((rows + 1, columns + 1), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    for row in range(rows):
        for column in range(columns):
            paired = best[row, column] + similarity[row, column]
            best[row + 1, column + 1] = torch.maximum(best[row + 1, column], paired)
    if not best[rows, columns].isfinite():
        return []
    found = []
    column = columns
    for row in range(rows, 0, -1):
        while best[row, column] == best[row, column - 1]:
            column -= 1
        column -= 1
        found.append(column)
    return found[::-1]


def needed_layers(
    shallower: nn.Module,
    deeper: nn.Module,
    paths: Sequence[str],
    missed: Callable[[nn.Module], float],
    names: tuple[str, str],
) -> Kept:
    """Choose the layers of a network that its outputs need most, as many as a shallower one has.

    Parameters
    ----------
    shallower, deeper : torch.nn.Module
    paths : sequence of str
        Containers in which the deeper one may hold more layers.
    missed : callable of torch.nn.Module
        How far the outputs of a copy without some layers are from the deeper network's own.
    names : tuple of str
        Of both, for messages.

    Returns
    -------
    dict of str to tuple of int
        By path, one layer of the deeper for every layer of the shallower.

    Raises
    ------
    ArchitectureMismatchError
        As :func:`match_layers`.
    """
    stacks = [
        {path: [_names(layer) for layer in found] for path, found in stacks_of(model).items()}
        for model in (shallower, deeper)
    ]
    kept: Kept = {path: tuple(range(len(stacks[1][path]))) for path in paths}

    def fits(path: str, positions: Sequence[int]) -> bool:
        return _contains([stacks[1][path][position] for position in positions], stacks[0][path])

    for path in paths:
        if not fits(path, kept[path]):
            raise _unpaired(path, names, len(stacks[0][path]), len(kept[path]))
    while True:
        fewer = [
            {**kept, path: tuple(position for position in kept[path] if position != left_out)}
            for path in paths
            if len(kept[path]) > len(stacks[0][path])
            for left_out in kept[path]
        ]
        fewer = [found for found in fewer if all(fits(path, found[path]) for path in paths)]
        if not fewer:
            return kept
        kept = fewer[0] if len(fewer) == 1 else min(fewer, key=lambda found: missed(shallow(deeper, found)))


def _contains(items: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Return whether a sequence has another's items in order, perhaps with others between them."""
    rest = iter(items)
    return all(any(item == other for other in rest) for item in wanted)


def match_layers(
    shallower: nn.Module,
    deeper: nn.Module,
    paths: Sequence[str],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    names: tuple[str, str],
) -> Kept:
    """Choose the layers of the deeper of two networks that compute most nearly what the shallower's do.

    Parameters
    ----------
    shallower, deeper : torch.nn.Module
    paths : sequence of str
        Containers in which the deeper one may hold more layers.
    batches : iterable of (args, kwargs)
        Inputs of both.
    names : tuple of str
        Of both, for messages.

    Returns
    -------
    dict of str to tuple of int
        By path, one layer of the deeper for every layer of the shallower.

    Raises
    ------
    ArchitectureMismatchError
        If the layers of a container cannot be paired: a layer may only be paired with one that has
        parameters of the same names.
    """
    stacks = [stacks_of(model) for model in (shallower, deeper)]
    seen = {path: Similarity(len(stacks[0][path]), len(stacks[1][path])) for path in paths}
    for args, kwargs in batches:
        found = [_record(model, paths, args, kwargs) for model in (shallower, deeper)]
        for path, similarity in seen.items():
            similarity.update(found[0][path], found[1][path])
    kept: Kept = {}
    for path, similarity in seen.items():
        alike = [[_names(left) == _names(right) for right in stacks[1][path]] for left in stacks[0][path]]
        allowed = similarity.matrix.masked_fill(~torch.tensor(alike), -torch.inf)
        chosen = match_in_order(allowed) if allowed.shape[0] <= allowed.shape[1] else []
        if not chosen:
            raise _unpaired(path, names, *allowed.shape)
        kept[path] = tuple(chosen)
    return kept


def _unpaired(path: str, names: tuple[str, str], fewer: int, more: int) -> ArchitectureMismatchError:
    return ArchitectureMismatchError(
        f"the layers of {path} cannot be paired: {names[1]} has {more}, {names[0]} {fewer}, and not every "
        "one has a counterpart with the same parameters"
    )


def _names(layer: nn.Module) -> list[tuple[str, int]]:
    return [(name, tensor.ndim) for name, tensor in layer.state_dict().items()]


def _record(
    model: nn.Module, paths: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, list[torch.Tensor]]:
    """Return what every layer of some containers computes, as ``[rows, units]``."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    hooks = []
    for path in paths:
        for layer in model.get_submodule(path).children():
            hooks.append(
                layer.register_forward_hook(lambda *call, path=path: found[path].append(_rows(call[2])))
            )
    try:
        flat_outputs(model, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rows(output: Any) -> torch.Tensor:
    """Return a layer's output as tokens times units; of images, whose layout is not known, as samples."""
    tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
    flat = tensor.flatten(1) if tensor.ndim > 3 else tensor.reshape(-1, tensor.shape[-1])
    step = max(flat.shape[0] // ROWS, 1)
    return flat[::step][:ROWS].float()
