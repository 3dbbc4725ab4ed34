"""What an operator rule may do: the few primitives through which it touches the union-find."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fxfusion import notation
from fxfusion.axes import Axis, Constant, Leaf, Reason, atoms_of, concatenation, product
from fxfusion.unify import Unifier


@dataclasses.dataclass(frozen=True, eq=False)
class Typed:
    """A tensor as rules see it: the types of its axes, and no numbers.

    Attributes
    ----------
    axes : tuple of Axis
        One type per axis.
    parameter : str
        The fully qualified name, if the tensor is a parameter or buffer itself.
    origins : frozenset of str
        Names of the parameters from which alone it is computed; empty if an input takes part.
    value : torch.Tensor or None
        Its numbers, if it depends on neither parameters nor inputs and is small.
    boolean : bool
        Whether it is a mask: indexing by it selects, where integers gather.
    """

    axes: tuple[Axis, ...]
    parameter: str = ""
    origins: frozenset[str] = frozenset()
    value: torch.Tensor | None = None
    boolean: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A parameter axis met by an operator: contracted over (read) or kept (written)."""

    operand: Typed
    axis: int
    contracted: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """One operator moved information along ``mixed`` axes separately for each unit of ``kept`` axes."""

    kept: tuple[Axis, ...]
    mixed: tuple[Axis, ...]


@dataclasses.dataclass
class Records:
    """What rules report besides types; replaced at every sweep."""

    uses: list[Use] = dataclasses.field(default_factory=list)
    mixes: list[Mix] = dataclasses.field(default_factory=list)


class Context:
    """The primitives of operator rules, bound to the graph node that is being typed.

    Attributes
    ----------
    unifier : Unifier
        The union-find; rules use it through this class only.
    shapes : list of tuple of int
        Shapes of the node's tensor outputs.
    records : Records
        Uses of parameters and mixes seen in this sweep.
    """

    def __init__(self) -> None:
        self.node, self.operator, self.source = "", "", ""
        self.shapes: list[tuple[int, ...]] = []
        self.records = Records()
        self.unifier = Unifier(self.reason)
        self._memory: dict[tuple[str, int, int], Leaf] = {}
        self._count = 0

    def enter(self, node: str, operator: str, source: str, shapes: list[tuple[int, ...]]) -> None:
        """Turn to a node: what is fixed or created from here on is on its account."""
        self.node, self.operator, self.source, self.shapes = node, operator, source, shapes
        self._count = 0

    def reason(self, kind: str, message: str, because: Reason | None = None) -> Reason:
        """Return a reason that names the current node."""
        return Reason(kind, self.node, self.operator, self.source, message, because)

    # -- new axes -------------------------------------------------------------------------------

    def leaf(self, size: int) -> Axis:
        """Return the space that this node makes: the same one at every sweep."""
        self._count += 1
        key = (self.node, self._count, size)
        if key not in self._memory:
            self._memory[key] = self.unifier.leaf(size)
        return self._memory[key]

    def fixed(self, size: int, message: str = "positions along it have a meaning") -> Axis:
        """Return an axis on which only the identity acts."""
        return Constant(1) if size == 1 else self.unifier.leaf(size, self.reason("order", message))

    def fixed_like(self, shape: Sequence[int]) -> list[Axis]:
        """Return one fixed axis per size."""
        return [self.fixed(size) for size in shape]

    # -- primitives -----------------------------------------------------------------------------

    def unify(self, left: Axis, right: Axis) -> Axis:
        """Make two axes enumerate the same units."""
        return self.unifier.unify(left, right)

    def fix(self, *axes: Axis, message: str = "positions along it have a meaning") -> None:
        """Let only the identity act on some axes."""
        for axis in axes:
            self.unifier.fix(axis, "order", message)

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """Return the types of a row-major view."""
        return self.unifier.regroup(axes, sizes)

    def narrow(self, x: Typed, axis: int, start: int, stop: int) -> list[Axis]:
        """Return the types of ``x[..., start:stop, ...]``."""
        return self.unifier.narrow(x.axes, axis, start, stop)

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """Return the concatenation of axes; an axis of size one becomes a summand of its own."""
        return concatenation(self.leaf(1) if axis.size == 1 and not atoms_of(axis) else axis for axis in axes)

    def flatten(self, axes: Sequence[Axis]) -> Axis:
        """Return the row-major product of axes."""
        return product(axes)

    def mix(self, kept: Sequence[Axis], mixed: Sequence[Axis]) -> None:
        """Say that the operator treats ``mixed`` axes as sets, separately for each unit of ``kept``.

        Softmax, normalisation and symmetric reductions do; so does every contraction.
        """
        self.records.mixes.append(Mix(tuple(kept), tuple(mixed)))

    def broadcast(self, *operands: Typed | None) -> Typed:
        """Unify the axes of element-wise operands, aligned on the right; return the result's type."""
        tensors = [operand for operand in operands if operand is not None]
        rank = max(tensor.rank for tensor in tensors)
        activation = any(not tensor.origins and tensor.value is None for tensor in tensors)
        axes: list[Axis] = [Constant(1)] * rank
        for tensor in tensors:
            for index, axis in enumerate(tensor.axes, start=rank - tensor.rank):
                axes[index] = self._join(axes[index], axis)
            if activation and tensor.origins:
                self.kept(tensor)
        return Typed(tuple(axes))

    def _join(self, left: Axis, right: Axis) -> Axis:
        if left.size == right.size:
            return self.unify(left, right)
        return right if left.size == 1 else left

    def kept(self, operand: Typed, axes: Sequence[int] | None = None) -> None:
        """Record that an operator writes through a parameter's axes (all of them by default)."""
        for axis in range(operand.rank) if axes is None else axes:
            self.records.uses.append(Use(operand, axis, contracted=False))

    def einsum(self, text: str, *operands: Typed) -> Typed:
        """Unify axes of equal label; return the type of the contraction's result.

        Parameters
        ----------
        text : str
            In the notation of :mod:`fxfusion.notation`, such as ``"... i, o i -> ... o"``.
        *operands : Typed
            One per operand of the notation. An axis of size one broadcasts.
        """
        contraction = notation.expand(notation.parse(text), tuple(operand.rank for operand in operands))
        types: dict[str, Axis] = {}
        for operand, labels in zip(operands, contraction.operands, strict=True):
            for label, axis in zip(labels, operand.axes, strict=True):
                types[label] = self._join(types.get(label, Constant(1)), axis)
        self._record(contraction, operands)
        return Typed(tuple(types[label] for label in contraction.result))

    def _record(self, contraction: notation.Contraction, operands: Sequence[Typed]) -> None:
        result = set(contraction.result)
        for operand, labels in zip(operands, contraction.operands, strict=True):
            mixed = [axis for label, axis in zip(labels, operand.axes, strict=True) if label not in result]
            if mixed:
                kept = [axis for label, axis in zip(labels, operand.axes, strict=True) if label in result]
                self.mix(kept, mixed)
            if operand.origins:
                for index, label in enumerate(labels):
                    self.records.uses.append(Use(operand, index, label not in result))
