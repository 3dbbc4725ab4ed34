"""How spaces lie in a tensor: dense blocks, each a row-major grid of space units.

A concatenated axis splits a tensor into blocks; within a block every axis is a product of factors, each
the units of one space or a fixed stretch. A block is a strided view of the tensor, so a transport acts on
one dimension of a view and nothing is ever searched for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fxfusion.axes import Axis, Case, Leaf, Product, Sum, atoms_of, leaves_of, parts_of, resolve


@dataclasses.dataclass(frozen=True)
class Factor:
    """One dimension of a block.

    Attributes
    ----------
    space : str
        Name of the space whose units it enumerates; empty for a fixed stretch.
    size : int
        Number of units.
    stride : int
        Distance between neighbouring units along the tensor's axis.
    """

    space: str
    size: int
    stride: int


@dataclasses.dataclass(frozen=True)
class AxisBlock:
    """The stretch of one tensor axis that a block covers: where it starts, and its factors."""

    offset: int
    factors: tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """A dense block of a tensor: one :class:`AxisBlock` per axis."""

    axes: tuple[AxisBlock, ...]

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of all axes, in order: the dimensions of :meth:`view`."""
        return tuple(factor for axis in self.axes for factor in axis.factors)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(factor.size for factor in self.factors)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the block of a tensor as a view with one dimension per factor."""
        offset = tensor.storage_offset()
        sizes, strides = [], []
        for axis, stride in zip(self.axes, tensor.stride(), strict=True):
            offset += axis.offset * stride
            sizes += [factor.size for factor in axis.factors]
            strides += [factor.stride * stride for factor in axis.factors]
        return tensor.as_strided(sizes, strides, offset)


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """How spaces lie in one parameter or statistics buffer.

    Attributes
    ----------
    name : str
        Fully qualified name.
    shape : tuple of int
    blocks : tuple of Block
        They tile the tensor.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    def spaces(self) -> frozenset[str]:
        """Return the names of the spaces that the tensor holds."""
        return frozenset(self.first_axes)

    @functools.cached_property
    def first_axes(self) -> dict[str, int]:
        """The first axis that holds each space, by name: found once, of however many blocks."""
        found: dict[str, int] = {}
        for block in self.blocks:
            for axis, part in enumerate(block.axes):
                for factor in part.factors:
                    if factor.space:
                        found.setdefault(factor.space, axis)
        return found


@dataclasses.dataclass(frozen=True)
class ActivationBlock:
    """A block of an activation, whose batch and sequence lengths are known only when it runs.

    Attributes
    ----------
    axes : tuple of AxisBlock or None
        None for an axis that holds no space: it enumerates samples, however many.
    sizes : tuple of int
        Sizes of the axes at which it was inferred.
    """

    axes: tuple[AxisBlock | None, ...]
    sizes: tuple[int, ...]

    def bind(self, shape: Sequence[int]) -> Block:
        """Return the block for an activation of a given shape."""
        return Block(
            tuple(
                AxisBlock(0, (Factor("", actual, 1),)) if part is None else _scale(part, actual, size)
                for part, actual, size in zip(self.axes, shape, self.sizes, strict=True)
            )
        )


def _scale(part: AxisBlock, actual: int, size: int) -> AxisBlock:
    """Stretch the leading fixed factor (a batch folded into a head axis) to the actual size."""
    first = part.factors[0]
    if actual == size or first.space:
        return part
    stretched = dataclasses.replace(first, size=first.size * actual // size)
    return AxisBlock(part.offset, (stretched, *part.factors[1:]))


class _Piece(NamedTuple):
    """A block of one axis before the cases of several axes are matched.

    ``chosen`` holds the leaves of the summands that the block lies in; ``required`` one entry per case: the
    leaves of the summand of the alternative taken, and those of all summands of the case.
    """

    offset: int
    factors: tuple[tuple[Leaf | None, int, int], ...]
    chosen: frozenset[Leaf]
    required: tuple[tuple[frozenset[Leaf], frozenset[Leaf]], ...]


def _pieces(axis: Axis, stride: int) -> list[_Piece]:
    axis = resolve(axis)
    if isinstance(axis, Product):
        return _product_pieces(axis, stride)
    if isinstance(axis, Sum):
        found, start = [], 0
        for part in parts_of(axis):
            atoms = atoms_of(part)
            for piece in _pieces(part, stride):
                chosen = piece.chosen | atoms if piece.chosen else atoms
                found.append(_Piece(piece.offset + start * stride, piece.factors, chosen, piece.required))
            start += part.size
        return found
    if isinstance(axis, Case):
        every = frozenset[Leaf]().union(*(atoms_of(key) for key in axis.keys))
        return [
            piece._replace(required=(*piece.required, (atoms_of(key), every)))
            for key, alternative in zip(axis.keys, axis.alternatives, strict=True)
            for piece in _pieces(alternative, stride)
        ]
    leaf = axis if isinstance(axis, Leaf) else None
    return [_Piece(0, ((leaf, axis.size, stride),) if axis.size != 1 else (), frozenset(), ())]


def _product_pieces(axis: Product, stride: int) -> list[_Piece]:
    strides = []
    for factor in reversed(axis.factors):
        strides.append(stride)
        stride *= factor.size
    choices = [_pieces(factor, step) for factor, step in zip(axis.factors, reversed(strides), strict=True)]
    return [_merge(combination) for combination in itertools.product(*choices) if _consistent(combination)]


def _merge(pieces: Sequence[_Piece]) -> _Piece:
    return _Piece(
        sum(piece.offset for piece in pieces),
        tuple(factor for piece in pieces for factor in piece.factors),
        frozenset[Leaf]().union(*(piece.chosen for piece in pieces)),
        tuple(required for piece in pieces for required in piece.required),
    )


def _consistent(pieces: Sequence[_Piece], complete: bool = False) -> bool:
    """Return whether every case chose the alternative of a summand that is chosen too.

    A case whose summands lie in another axis can be judged only when the combination is ``complete``.
    """
    if not any(piece.required for piece in pieces):
        return True
    chosen = frozenset[Leaf]().union(*(piece.chosen for piece in pieces))
    return all(
        required & chosen or not (every & chosen or complete)
        for piece in pieces
        for required, every in piece.required
    )


def tensor_blocks(axes: Sequence[Axis]) -> Iterator[tuple[_Piece, ...]]:
    """Yield the blocks of a tensor with these axes, as one piece per axis with the leaves themselves."""
    yield from _matching([_pieces(axis, 1) for axis in axes])


def leaf_blocks(
    axes: Sequence[Axis], counts: Callable[[Leaf], bool]
) -> Iterator[tuple[tuple[Leaf, ...], ...]]:
    """Yield what blocks a tensor has, as the leaves that count in each axis; blocks that look alike once.

    A tensor put together from many slices has as many blocks as slices, and often of one and the same kind.
    """
    kinds: list[dict[Any, _Piece]] = []
    for axis in axes:
        kinds.append({})
        for piece in _pieces(axis, 1):
            counted = tuple(factor for factor in piece.factors if factor[0] is not None and counts(factor[0]))
            kept = piece._replace(factors=counted)
            kinds[-1].setdefault((tuple(leaf for leaf, _, _ in counted), kept.chosen, kept.required), kept)
    if not any(piece.required for pieces in kinds for piece in pieces.values()):
        kinds = [{key[0]: piece for key, piece in pieces.items()} for pieces in kinds]
    for combination in _matching([list(pieces.values()) for pieces in kinds]):
        yield tuple(tuple(leaf for leaf, _, _ in piece.factors if leaf) for piece in combination)


def _matching(choices: Sequence[Sequence[_Piece]]) -> Iterator[tuple[_Piece, ...]]:
    """Yield every choice of one piece per axis whose cases agree."""
    needs_match = any(piece.required for pieces in choices for piece in pieces)
    for combination in itertools.product(*choices):
        if not needs_match or _consistent(combination, complete=True):
            yield combination


def lay_out(
    name: str, shape: Sequence[int], axes: Sequence[Axis], space_of: Callable[[Leaf], str]
) -> ParameterLayout:
    """Return how spaces lie in a tensor.

    Parameters
    ----------
    name : str
    shape : sequence of int
    axes : sequence of Axis
        One settled type per axis.
    space_of : callable
        Name of the space of a leaf, or an empty string where only the identity may act.

    Returns
    -------
    ParameterLayout

    Examples
    --------
    >>> from fxfusion.axes import Product
    >>> heads, dimension = Leaf(4), Leaf(16)
    >>> layout = lay_out("w", (64,), [Product((heads, dimension))], lambda leaf: f"s{leaf.size}")
    >>> [(factor.space, factor.stride) for factor in layout.blocks[0].factors]
    [('s4', 16), ('s16', 1)]
    """
    blocks = []
    for pieces in tensor_blocks(axes):
        blocks.append(Block(tuple(_axis_block(piece, space_of) for piece in pieces)))
    return ParameterLayout(name, tuple(shape), tuple(blocks))


def activation_blocks(axes: Sequence[Axis], space_of: Callable[[Leaf], str]) -> list[ActivationBlock]:
    """Return the blocks of an activation that hold spaces.

    Parameters
    ----------
    axes : sequence of Axis
    space_of : callable
        Name of the space of a leaf, or an empty string.

    Returns
    -------
    list of ActivationBlock
        Empty where a dependence on a summand reaches across axes: such a tensor is not observed.
    """
    sizes = tuple(axis.size for axis in axes)
    choices: list[list[AxisBlock | None]] = []
    for axis in axes:
        if not any(map(space_of, leaves_of(axis))):
            choices.append([None])
            continue
        pieces = [piece for piece in _pieces(axis, 1) if _consistent([piece])]
        named = [piece for piece in pieces if any(leaf and space_of(leaf) for leaf, _, _ in piece.factors)]
        if any(piece.required and not piece.chosen for piece in named):
            return []
        choices.append([_axis_block(piece, space_of) for piece in named] or [None])
    if all(choice == [None] for choice in choices):
        return []
    return [ActivationBlock(tuple(combination), sizes) for combination in itertools.product(*choices)]


def _axis_block(piece: _Piece, space_of: Callable[[Leaf], str]) -> AxisBlock:
    return AxisBlock(
        piece.offset,
        tuple(Factor(space_of(leaf) if leaf else "", size, stride) for leaf, size, stride in piece.factors),
    )
