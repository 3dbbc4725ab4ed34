"""What an operator rule may do: the few primitives through which it touches the union-find."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fxfusion import notation
from fxfusion.axes import (
    Axis,
    Constant,
    Leaf,
    Reason,
    Route,
    atoms_of,
    concatenation,
    is_free,
    leaves_of,
    product,
    resolve,
)
from fxfusion.unify import Unifier


@dataclasses.dataclass(frozen=True, eq=False)
class Meaning:
    """What the values of a tensor say about the units of an axis.

    Attributes
    ----------
    kind : {"index", "count", "offset"}
        Each value is the number of a unit; or the tensor counts, for each unit, how often an index names it;
        or it holds the cumulative sums of such counts.
    axis : Axis
        The axis whose units are meant.
    key : str
        Names the index tensor: two with one key hold the same values at the same places.
    bag : str
        Names the values whatever their order; for counts, those of the index tensor that was counted.
    bijective : bool
        Whether every unit occurs exactly once.
    """

    kind: str
    axis: Axis
    key: str
    bag: str
    bijective: bool = False


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
    whole : bool
        Whether its numbers are integers, among which equal ones are to be expected.
    meaning : Meaning or None
        What its values say about the units of an axis.
    """

    axes: tuple[Axis, ...]
    parameter: str = ""
    origins: frozenset[str] = frozenset()
    value: torch.Tensor | None = None
    boolean: bool = False
    whole: bool = False
    meaning: Meaning | None = None

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
    """What rules report besides types; replaced at every sweep.

    ``inner`` holds the types of tensors that exist only inside of a decomposed operator, and of the one-hot
    tensors that indices stand for. ``products`` holds the axes over which products of activations are summed.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    mixes: list[Mix] = dataclasses.field(default_factory=list)
    inner: list[tuple[Axis, ...]] = dataclasses.field(default_factory=list)
    products: list[Axis] = dataclasses.field(default_factory=list)


class Context:
    """The primitives of operator rules, bound to the graph node that is being typed.

    Attributes
    ----------
    unifier : Unifier
        The union-find; rules use it through this class only.
    shapes : list of tuple of int
        Shapes of the node's tensor outputs.
    dtypes : list of torch.dtype
        Their data types.
    records : Records
        Uses of parameters and mixes seen in this sweep.
    """

    def __init__(self) -> None:
        self.node, self.operator, self.source, self._place = "", "", "", ""
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.records = Records()
        self.unifier = Unifier(self.reason)
        self._memory: dict[tuple[str, int, int], Leaf] = {}
        self._routed: dict[tuple[str, tuple[int, ...]], list[Leaf]] = {}
        self._orders: dict[Leaf, tuple[tuple[Axis, ...], tuple[str, str, str]]] = {}
        self._count = 0

    def enter(
        self, node: str, operator: str, source: str, shapes: list[tuple[int, ...]], place: str = ""
    ) -> None:
        """Turn to a node: what is fixed or created from here on is on its account.

        ``place`` tells apart the operators that a decomposed node is made of.
        """
        self.node, self.operator, self.source, self.shapes = node, operator, source, shapes
        self._place = place or node
        self._count = 0

    def reason(self, kind: str, message: str, because: Reason | None = None) -> Reason:
        """Return a reason that names the current node."""
        return Reason(kind, self.node, self.operator, self.source, message, because)

    # -- new axes -------------------------------------------------------------------------------

    def leaf(self, size: int) -> Axis:
        """Return the space that this node makes: the same one at every sweep."""
        self._count += 1
        key = (self._place, self._count, size)
        if key not in self._memory:
            self._memory[key] = self.unifier.leaf(size)
        return self._memory[key]

    def fixed(self, size: int, message: str = "positions along it have a meaning") -> Axis:
        """Return an axis on which only the identity acts: the same one at every sweep, so that all settle."""
        if size == 1:
            return Constant(1)
        leaf = self.leaf(size)
        self.unifier.fix(leaf, "order", message)
        return leaf

    def fixed_like(self, shape: Sequence[int]) -> list[Axis]:
        """Return one fixed axis per size."""
        return [self.fixed(size) for size in shape]

    # -- axes ordered and chosen by the data -----------------------------------------------------

    @property
    def place(self) -> str:
        """Names the operator being typed, those that a decomposed node is made of apart."""
        return self._place

    def ordered_by(self, size: int, causes: Sequence[Axis], route: Route | None = None) -> Axis:
        """Return an axis whose order the data decide, and with them the order of the units of ``causes``.

        Permuting those permutes it in some way, the same for all tensors that hold it. So it is a free
        space; but if anything fixes it or tells it apart, the causes are fixed (:meth:`settle_orders`).
        """
        if size == 1:
            return Constant(1)
        self._count += 1
        key = (self._place, self._count, size)
        if key not in self._memory:
            self._memory[key] = self.unifier.leaf(size)
            self._memory[key].route = route
        leaf = self._memory[key]
        self._orders[leaf] = (tuple(causes), (self.node, self.operator, self.source))
        return leaf

    @property
    def ordered(self) -> frozenset[Axis]:
        """The axes made by :meth:`ordered_by`: along them, two runs may differ in order."""
        return frozenset(resolve(leaf) for leaf in self._orders)

    def routed(self, x: Typed) -> tuple[Axis, ...] | None:
        """Return the axes of an index tensor such that each place keeps in mind which unit it picks.

        Returns None where they cannot: the axes must be fixed ones, or ordered by that very index.
        """
        assert x.meaning is not None
        kept = [axis for axis in map(resolve, x.axes) if axis.size > 1 and not isinstance(axis, Constant)]
        routes = [leaf.route for axis in kept for leaf in leaves_of(axis) if leaf.route]
        if len(kept) == 1 and routes and routes[0].key == x.meaning.key and routes[0].rank == 1:
            return x.axes
        if not kept or routes or any(is_free(axis) for axis in kept):
            return None
        key = (x.meaning.key, tuple(axis.size for axis in kept))
        if key not in self._routed:
            route = Route(x.meaning.axis, x.meaning.key, rank=len(kept))
            self._routed[key] = []
            for axis in kept:
                leaf = self.unifier.leaf(axis.size, self.reason("order", "its units are tokens"))
                leaf.route = route
                self._routed[key].append(leaf)
        leaves = iter(self._routed[key])
        return tuple(next(leaves) if resolve(axis) in kept else axis for axis in x.axes)

    def settle_orders(self, parameters: Mapping[str, Sequence[Axis]]) -> None:
        """Fix the causes of every order of the data that something has fixed or told apart."""
        held = {leaf for axes in parameters.values() for axis in axes for leaf in leaves_of(axis)}
        pending = dict(self._orders)
        while True:
            broken = [
                leaf
                for leaf in pending
                if resolve(leaf) is not leaf or leaf.fixed is not None or leaf in held
            ]
            if not broken:
                return
            for leaf in broken:
                causes, (self.node, self.operator, self.source) = pending.pop(leaf)
                because = next((item.fixed for item in leaves_of(leaf) if item.fixed), None)
                message = (
                    "the data are put in an order that follows it, and places in that order have a meaning"
                )
                for axis in (leaf, *causes):
                    self.unifier.fix(axis, "order", message, because)

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

    def stack_apart(self, tensors: Sequence[Typed]) -> Typed:
        """Stack along a new first axis; each tensor keeps its own types, which do not unify."""
        if len(tensors) == 1:
            return Typed((Constant(1), *tensors[0].axes))
        keys = [self.leaf(1) for _ in tensors]
        several = zip(*(tensor.axes for tensor in tensors), strict=True)
        return Typed((concatenation(keys), *(self.unifier.keyed(keys, axes) for axes in several)))

    def collapse(self, axis: Axis) -> None:
        """Say that an axis does not differ from summand to summand of another."""
        self.unifier.collapse(axis)

    def flatten(self, axes: Sequence[Axis]) -> Axis:
        """Return the row-major product of axes."""
        return product(axes)

    def mix(self, kept: Sequence[Axis], mixed: Sequence[Axis]) -> None:
        """Say that the operator treats ``mixed`` axes as sets, separately for each unit of ``kept``.

        Softmax, normalisation and symmetric reductions do; so does every contraction. A kept axis cannot
        depend on the summands of a mixed one: they meet, unit by unit.
        """
        self.unifier.seal(kept)
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
            first, second = _is_token(left), _is_token(right)
            if first is not None and second is not None and first != second:
                return left if first else right  # of the two, the one that knows where its units go
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
        held: set[str] = set()  # by an activation before
        for number, (operand, labels) in enumerate(zip(operands, contraction.operands, strict=True)):
            axes = dict(zip(labels, operand.axes, strict=True))
            others = [set(item) for place, item in enumerate(contraction.operands) if place != number]
            mixed: dict[frozenset[str], list[Axis]] = {}
            for label in (item for item in axes if item not in result):
                # What another operand holds without this label keeps its place while it is summed over.
                beside = result.union(*(item for item in others if label not in item))
                mixed.setdefault(frozenset(axes.keys() & beside - {label}), []).append(axes[label])
            for kept, summed in mixed.items():
                self.mix([axes[label] for label in axes if label in kept], summed)
            if operand.origins:
                for index, label in enumerate(labels):
                    self.records.uses.append(Use(operand, index, label not in result))
            elif operand.value is None:
                self.records.products += [axes[label] for label in axes if label in held - result]
                held |= axes.keys()


def _is_token(axis: Axis) -> bool | None:
    """Return whether a fixed axis keeps in mind which units its own are routed to; None if it is free."""
    axis = resolve(axis)
    if isinstance(axis, Leaf) and axis.fixed:
        return axis.route is not None
    return None if isinstance(axis, Constant) or is_free(axis) else False
