"""Transports as values: how the units of one parent map to the units of the target.

A hard map is an index, a soft map a coupling; both act on one dimension of a block's view. A map below an
outer space (head_dim below heads) has one entry per unit of the outer space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from fxfusion.layout import Block, ParameterLayout
from fxfusion.plan import Gains


@dataclasses.dataclass(frozen=True, eq=False)
class HardMap:
    """An assignment.

    Attributes
    ----------
    scope : tuple of str
        Names of the outer spaces.
    index : torch.Tensor
        int64 ``[outer units of the target..., n]``: the source unit that each target unit takes.
    """

    scope: tuple[str, ...]
    index: torch.Tensor

    @property
    def moved(self) -> float:
        """Fraction of units that are not in their own place."""
        return float((self.index.cpu() != torch.arange(self.index.shape[-1])).double().mean())


@dataclasses.dataclass(frozen=True, eq=False)
class SoftMap:
    """A coupling, projected to a map for each side.

    Attributes
    ----------
    scope : tuple of str
        Names of the outer spaces.
    write : torch.Tensor
        ``[target outer, source outer, ..., target n, source n]``: rows sum to one. What a target unit
        writes is the average of the source units coupled with it (barycentric projection).
    read : torch.Tensor
        The same shape, columns sum to one: what a source unit gave is handed on to the target units
        coupled with it, so that unequal widths conserve mass.
    partial : bool
        Whether rows and columns may sum to less: what is missing stays the target's.
    """

    scope: tuple[str, ...]
    write: torch.Tensor
    read: torch.Tensor
    partial: bool = False

    @classmethod
    def from_coupling(
        cls, coupling: torch.Tensor, scope: tuple[str, ...] = (), partial: bool = False
    ) -> SoftMap:
        """Divide a coupling by its row marginals (write) and by its column marginals (read).

        Those of a ``partial`` one would be uniform if all its mass were transported.
        """
        if partial:
            return cls(scope, coupling * coupling.shape[-2], coupling * coupling.shape[-1], True)
        tiny = torch.finfo(coupling.dtype).tiny
        return cls(
            scope,
            coupling / coupling.sum(-1, keepdim=True).clamp_min(tiny),
            coupling / coupling.sum(-2, keepdim=True).clamp_min(tiny),
        )

    @property
    def moved(self) -> float:
        """One minus the mean mass that stays in place."""
        write = self.write
        for _ in self.scope:
            write = torch.diagonal(write, dim1=0, dim2=1).movedim(-1, -3) if write.ndim > 2 else write
        return 1.0 - float(torch.diagonal(write, dim1=-2, dim2=-1).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class SignMap:
    """Signs of units that were assigned one to one.

    Attributes
    ----------
    scope : tuple of str
        Names of the outer spaces, the last that of the units.
    signs : torch.Tensor
        int8 ``[units of the target..., 1]``: 1, or -1 where a unit takes its source with the other sign.
    """

    scope: tuple[str, ...]
    signs: torch.Tensor

    @property
    def moved(self) -> float:
        """Fraction of units that change their sign."""
        return float((self.signs < 0).double().mean())


Map = HardMap | SoftMap | SignMap
Maps = Mapping[str, Map]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMaps:
    """What acts on one block of a parameter: on axes that write, and on axes that only read."""

    writing: dict[str, Map] = dataclasses.field(default_factory=dict)
    reading: dict[str, Map] = dataclasses.field(default_factory=dict)


def transport_tensor(
    tensor: torch.Tensor,
    layout: ParameterLayout,
    maps: Maps,
    reading: frozenset[int] = frozenset(),
    into: ParameterLayout | None = None,
    gains: Gains | None = None,
    contrary: Sequence[frozenset[str]] = (),
) -> torch.Tensor:
    """Carry transports through a parameter.

    Parameters
    ----------
    tensor : torch.Tensor
        The source parent's parameter. It is not written.
    layout : ParameterLayout
        How spaces lie in it.
    maps : mapping of str to HardMap, SoftMap or SignMap
        By name of space; spaces without a map keep their units.
    reading : frozenset of int
        Axes that read their space: soft maps apply their reading side there.
    into : ParameterLayout, optional
        How they lie in the target's parameter, if that has other widths.
    gains : Gains, optional
        What the result is multiplied by.
    contrary : sequence of frozenset of str
        Per block, the spaces whose soft maps apply their other side there; none by default.

    Returns
    -------
    torch.Tensor
        A new tensor of the target's shape and the same dtype, or the tensor itself if no map touches it.

    Examples
    --------
    >>> from fxfusion.axes import Leaf
    >>> from fxfusion.layout import lay_out
    >>> layout = lay_out("b", (3,), [Leaf(3)], lambda leaf: "s")
    >>> transport_tensor(torch.tensor([1.0, 2.0, 3.0]), layout, {"s": HardMap((), torch.tensor([2, 0, 1]))})
    tensor([3., 1., 2.])
    """
    if not layout.spaces() & maps.keys():  # then no gain acts either
        return tensor
    into = into or layout
    result = tensor.new_empty(into.shape)
    exchanged = contrary or [frozenset[str]()] * len(layout.blocks)
    for block, place, turned in zip(layout.blocks, into.blocks, exchanged, strict=True):
        others = {name: _exchanged(maps[name]) for name in turned & maps.keys()}
        view = transport_block(block, block.view(tensor), {**maps, **others}, reading)
        factor = gains.of(layout, block, reading) if gains is not None else 1.0
        place.view(result).copy_(view if factor == 1.0 else view * factor)
    return result


def _exchanged(item: Map) -> Map:
    """Return a map whose sides have changed places."""
    if isinstance(item, SoftMap):
        return dataclasses.replace(item, write=item.read, read=item.write)
    return item


def in_order(target: int, source: int) -> torch.Tensor:
    """Return the coupling of as many units as there are, neighbours kept together: ``[target, source]``.

    Examples
    --------
    >>> in_order(2, 4)
    tensor([[0.2500, 0.2500, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.2500, 0.2500]], dtype=torch.float64)
    """
    wide = max(target, source)
    position = torch.arange(wide)
    coupling = torch.zeros(target, source, dtype=torch.float64)
    coupling[position * target // wide, position * source // wide] = 1.0 / wide
    return coupling


def apart(coupling: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``[n, ...]`` as ``[n, n, ...]``, for ``count`` leading axes: each unit goes with itself only.

    Examples
    --------
    >>> apart(torch.tensor([1.0, 2.0]), 1)
    tensor([[1., 0.],
            [0., 2.]])
    """
    for axis in range(count):
        coupling = torch.diag_embed(coupling.movedim(2 * axis, -1))
        coupling = coupling.movedim((-2, -1), (2 * axis, 2 * axis + 1))
    return coupling


def transport_block(
    block: Block,
    view: torch.Tensor,
    maps: Maps,
    reading: frozenset[int] = frozenset(),
    skip: frozenset[str] = frozenset(),
    reads: Maps | None = None,
) -> torch.Tensor:
    """Carry transports through the view of one block, spaces in ``skip`` excepted.

    Axes that only read take the maps of ``reads``, if there are any, in place of ``maps``.
    """
    dimensions = []
    for dimension, factor in enumerate(block.factors):
        side = maps if reads is None or axis_of(block, dimension) not in reading else reads
        if factor.space in side and factor.space not in skip:
            dimensions.append((dimension, side[factor.space]))
    for dimension, item in sorted(dimensions, key=lambda pair: len(pair[1].scope)):
        if isinstance(item, HardMap):
            view = _gather(view, dimension, item.index, scope_dimensions(block, dimension, item.scope))
        elif isinstance(item, SignMap):  # those of the units' new places
            places = [*scope_dimensions(block, dimension, item.scope), dimension]
            view = view * laid_out(item.signs.to(view), places, view.ndim)
    soft = [(dimension, item) for dimension, item in dimensions if isinstance(item, SoftMap)]
    return _contract(block, view, soft, reading) if soft else view


def axis_of(block: Block, dimension: int) -> int:
    """Return the tensor axis to which a dimension of a block's view belongs."""
    for axis, part in enumerate(block.axes):
        if dimension < len(part.factors):
            return axis
        dimension -= len(part.factors)
    raise IndexError(dimension)


def scope_dimensions(block: Block, dimension: int, scope: Sequence[str]) -> list[int]:
    """Return the dimension of each outer space that goes with an inner one: in its own axis if there."""
    own = axis_of(block, dimension)
    found = []
    for name in scope:
        places = [place for place, factor in enumerate(block.factors) if factor.space == name]
        found.append(next((place for place in places if axis_of(block, place) == own), places[0]))
    return found


def innermost(block: Block, scopes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, int, list[int]]]:
    """Yield space, dimension and outer dimensions of the spaces below which the block holds no other.

    Parameters
    ----------
    block : Block
    scopes : mapping of str to sequence of str
        Outer spaces of every free space.
    """
    found = [
        (factor.space, dimension, scope_dimensions(block, dimension, scopes[factor.space]))
        for dimension, factor in enumerate(block.factors)
        if factor.space in scopes
    ]
    outer = {dimension for _, _, scope in found for dimension in scope}
    yield from (item for item in found if item[1] not in outer)


def _gather(view: torch.Tensor, dimension: int, index: torch.Tensor, scope: Sequence[int]) -> torch.Tensor:
    index = index.to(view.device)
    if not scope:
        return view.index_select(dimension, index)
    return torch.take_along_dim(view, laid_out(index, [*scope, dimension], view.ndim), dimension)


def laid_out(values: torch.Tensor, places: Sequence[int], count: int) -> torch.Tensor:
    """Return a tensor as one of ``count`` dimensions: its own at the given places, the others of size one."""
    order = sorted(range(len(places)), key=places.__getitem__)
    shape = [1] * count
    for place, size in zip(places, values.shape, strict=True):
        shape[place] = size
    return values.permute(order).reshape(shape)


def _contract(
    block: Block, view: torch.Tensor, soft: Sequence[tuple[int, SoftMap]], reading: frozenset[int]
) -> torch.Tensor:
    """Apply soft maps, an outer space together with all that lies below it."""
    pending = dict(soft)
    if view.dtype in (torch.float16, torch.bfloat16):
        view = view.float()
    for dimension, item in soft:
        if item.scope and any(place in pending for place in scope_dimensions(block, dimension, item.scope)):
            continue
        group = {dimension: item}
        for other, below in soft:
            if below.scope and dimension in scope_dimensions(block, other, below.scope):
                group[other] = below
        view = _contract_group(block, view, group, reading)
    return view


def _contract_group(
    block: Block, view: torch.Tensor, group: Mapping[int, SoftMap], reading: frozenset[int]
) -> torch.Tensor:
    source = list(range(view.ndim))
    target = [view.ndim + dimension if dimension in group else dimension for dimension in source]
    operands: list[object] = []
    for dimension, item in sorted(group.items(), key=lambda pair: len(pair[1].scope)):
        labels = []
        for outer in scope_dimensions(block, dimension, item.scope):
            labels += [target[outer], source[outer]]
        side = item.read if axis_of(block, dimension) in reading else item.write
        operands += [side.to(view), [*labels, target[dimension], source[dimension]]]
    operands += [view, source, target]
    return torch.einsum(*operands)
