"""What inference found, as plain data: spaces, where they touch parameters, and what stayed fixed."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import networkx as nx

from fxfusion.explain import AxisExplanation, Evidence, Frozen
from fxfusion.layout import ActivationBlock, Block, ParameterLayout


class Symmetry(enum.Enum):
    """The group that may act on a space without changing the network's function."""

    FIXED = "fixed"
    PERMUTATION = "permutation"
    SCALED = "permutation, positive scale"
    """Permutations, and a positive factor per unit."""
    SIGNED = "permutation, sign"
    """Permutations, and a sign per unit (a space of its own, below the units)."""
    MONOMIAL = "permutation, scale"
    """Permutations, a positive factor per unit, and a sign per unit."""
    SIGN = "sign"
    """The sign of one unit, in a space of one dimension below it."""
    ROTARY = "rotations of pairs"
    """A rotation of every pair of dimensions, which positions turn by pairs, too."""
    CENTRED = "orthogonal, mean fixed"
    """Rotations and reflections that leave alone the mean of the units."""
    ORTHOGONAL = "orthogonal"
    """All rotations and reflections."""
    LINEAR = "general linear"
    """All invertible maps."""

    @property
    def scales(self) -> bool:
        """Whether the group holds positive factors of single units."""
        return self in (Symmetry.SCALED, Symmetry.MONOMIAL)

    @property
    def rotates(self) -> bool:
        """Whether the group holds rotations, other than signs of single units."""
        return self in (Symmetry.ROTARY, Symmetry.CENTRED, Symmetry.ORTHOGONAL, Symmetry.LINEAR)

    @property
    def turns(self) -> bool:
        """Whether its transports are orthogonal maps, a sign being one of one dimension."""
        return self.rotates or self is Symmetry.SIGN


class Role(enum.Enum):
    """What a parameter axis does with the space that it holds."""

    WRITES = "writes"
    READS = "reads"
    BOTH = "writes and reads"


@dataclasses.dataclass(frozen=True)
class Incidence:
    """One place where a space meets a parameter.

    Attributes
    ----------
    parameter : str
        Fully qualified name.
    axis : int
        Axis of the parameter.
    block : int
        Which block of the axis (see :class:`fxfusion.layout.Block`): 0 for an axis that is not a
        concatenation; 0, 1, 2 for the queries, keys and values of a packed projection.
    factor : int
        Which factor of the block's row-major product: 0 the heads, 1 the head dimension of a head axis.
    role : Role
        Whether the parameter writes the space (its output) or reads it (contracts over it).
    """

    parameter: str
    axis: int
    block: int
    factor: int
    role: Role

    def __str__(self) -> str:
        place = f"{self.parameter}[{self.axis}]"
        return place if self.block == self.factor == 0 else f"{place}.{self.block}.{self.factor}"


@dataclasses.dataclass(frozen=True)
class Space:
    """A set of interchangeable units: a residual stream, the heads of a layer, a hidden layer.

    Attributes
    ----------
    name : str
        The first incidence, by which a space is found again in another parent.
    size : int
        Number of units.
    symmetry : Symmetry
        The group that may act on the units.
    incidences : tuple of Incidence
        Every place where the space meets a parameter.
    scope : tuple of str
        Names of the outer spaces, outermost first, whose every unit may move this space's units
        differently (head_dim below heads). Empty for a space that moves as a whole.
    planes : tuple of (int, int)
        Of rotations of pairs: the pairs.
    """

    name: str
    size: int
    symmetry: Symmetry
    incidences: tuple[Incidence, ...]
    scope: tuple[str, ...] = ()
    planes: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """A part of a graph that turns pairs of dimensions.

    Attributes
    ----------
    source, result : str
        Names of the nodes before it, and of its last; both of one shape.
    inner : frozenset of str
        Names of the nodes in between, and of the last; nobody else reads them.
    planes : tuple of (int, int)
        The pairs, of the last axis.
    varying : tuple of int
        Other axes along which the angles vary.
    """

    source: str
    result: str
    inner: frozenset[str]
    planes: tuple[tuple[int, int], ...]
    varying: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A norm whose weight can go into what reads the normalised tensor.

    Attributes
    ----------
    weight : str
        The norm's weight, which becomes one.
    bias : str or None
        Its bias, which is divided by the weight.
    readers : tuple of (str, int)
        Parameters that are multiplied by the weight, and the axis along which.
    space : str
        Name of the normalised space.
    """

    weight: str
    bias: str | None
    readers: tuple[tuple[str, int], ...]
    space: str


Place = tuple[str, int, int]
"""A parameter, its axis, and where on the axis a block of units begins."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One way to scale the units of a space (see :mod:`fxfusion.scaling`).

    Attributes
    ----------
    space : str
        Name of the space.
    exponents : mapping of Place to float
        To what power a unit's factor multiplies there: 1 where it is written, -1 where it is read. Where an
        invertible map acts, it acts itself for 1, its inverse for -1. Other places stay.
    """

    space: str
    exponents: Mapping[Place, float]


@dataclasses.dataclass(frozen=True)
class Limit:
    """Something that inference had to fix, and why.

    Attributes
    ----------
    node : str
        The graph node at which it happened.
    operator : str
        The operator, such as ``aten.cumsum.default``.
    reason : str
        One sentence.
    source : str
        ``file:line`` in the model's own code, or empty.
    parameters : tuple of str
        Parameters with an axis that is fixed for this reason.
    """

    node: str
    operator: str
    reason: str
    source: str
    parameters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Gains:
    """What weights are multiplied by so that sums over other numbers of units keep their size.

    Attributes
    ----------
    spaces : dict of str to float
        Wherever the units of a space are written.
    parameters : dict of str to float
        A whole parameter.
    """

    spaces: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def of(self, layout: ParameterLayout, block: Block, reading: frozenset[int]) -> float:
        """Return what a block of a parameter is multiplied by, given its axes that only read."""
        written = (
            self.spaces.get(factor.space, 1.0)
            for axis, part in enumerate(block.axes)
            for factor in part.factors
            if axis not in reading
        )
        return self.parameters.get(layout.name, 1.0) * math.prod(written)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The result of :func:`fxfusion.plan`.

    Attributes
    ----------
    spaces : tuple of Space
        The free spaces, in the order in which parameters first hold them.
    fixed : tuple of Space
        Fixed spaces below which a free one may differ from unit to unit (experts picked by a router).
    covered : float
        Fraction of the parameter elements that the graph reads with at least one free axis, in [0, 1].
    limits : tuple of Limit
        What was fixed and why, except model inputs and outputs.
    graph : networkx.MultiDiGraph
        The alignment flow graph (see :mod:`fxfusion.flow`).
    layouts : dict of str to ParameterLayout
        How the spaces lie in every parameter and statistics buffer.
    activations : dict of str to list of ActivationBlock
        How the spaces lie in the output of every graph node that holds any.
    evidence : Evidence
        What :meth:`explain` and :attr:`frozen` are made of.
    products : frozenset of str
        The spaces over which products of two activations are summed: dimensions of queries and keys.
    folds : tuple of Fold
        Norms whose weights must be folded before a space may turn (:mod:`fxfusion.folding`).
    scalings : tuple of Scaling
        How units may be scaled; of a space of invertible maps, where the inverse acts.
    outputs : frozenset of int
        Flat positions of the outputs that are kept.
    rotary : tuple of Rotary
        Parts of the graph that turn pairs of dimensions.
    """

    spaces: tuple[Space, ...]
    fixed: tuple[Space, ...]
    covered: float
    limits: tuple[Limit, ...]
    graph: nx.MultiDiGraph
    layouts: dict[str, ParameterLayout] = dataclasses.field(repr=False)
    activations: dict[str, list[ActivationBlock]] = dataclasses.field(repr=False)
    evidence: Evidence = dataclasses.field(default_factory=Evidence, repr=False)
    products: frozenset[str] = frozenset()
    folds: tuple[Fold, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    outputs: frozenset[int] = frozenset()
    rotary: tuple[Rotary, ...] = dataclasses.field(default=(), repr=False)

    @property
    def rotates(self) -> bool:
        """Whether more than permutations may act on some space."""
        return any(space.symmetry.rotates for space in self.spaces)

    @property
    def source(self) -> Plan:
        """The plan of the parents that are aligned with the target: this one, if widths are equal."""
        return self

    @property
    def gains(self) -> Gains:
        """By what a source's weights must be multiplied."""
        return Gains()

    def __getitem__(self, name: str) -> Space:
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(name)

    def only(self, parameters: Collection[str]) -> Plan:
        """Return a plan of some parameters."""
        layouts = {name: layout for name, layout in self.layouts.items() if name in parameters}
        return dataclasses.replace(self, layouts=layouts)

    def scope_size(self, name: str) -> int:
        """Return the number of units of a space, fixed or free, by name."""
        return next(space.size for space in (*self.spaces, *self.fixed) if space.name == name)

    def __iter__(self) -> Iterator[Space]:
        return iter(self.spaces)

    @property
    def wreath(self) -> Sequence[Space]:
        """The spaces that may differ from unit to unit of an outer space."""
        return [space for space in self.spaces if space.scope]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters and statistics buffers that :meth:`explain` knows, in the model's order."""
        return tuple(self.evidence.parameters)

    def explain(self, parameter: str, axis: int | None = None) -> tuple[AxisExplanation, ...]:
        """Say what every axis of a parameter enumerates, and why what is fixed in it is fixed.

        Parameters
        ----------
        parameter : str
            Fully qualified name; of tied parameters, any.
        axis : int, optional
            One axis only; by default all.

        Returns
        -------
        tuple of AxisExplanation
            Plain data, an entry per axis. The chain of a fixed part holds the steps from the axis to the
            first cause, which comes last.

        Raises
        ------
        UnknownParameterError
            If the model has no such parameter.
        OptionError
            If the parameter has no such axis.

        Examples
        --------
        >>> import torch, fxfusion
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rows, columns = fxfusion.plan(model, (torch.randn(2, 4),)).explain("0.weight")
        >>> rows.parts[0].space, columns.structure
        ('0.weight[0]', '4!')
        >>> for step in columns.parts[0].chain:
        ...     print(f"{step.operator}: {step.message}")
        aten.linear.default: its units are those of an axis of the input input_1
        placeholder: it is an axis of an input
        """
        return self.evidence.explain(parameter, axis)

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """The parameter elements without a free axis, grouped by first cause, most elements first.

        Their numbers of elements add up to what :attr:`covered` leaves out, plus the parameters that the
        graph never reads (a cause of kind ``"unused"``).

        Examples
        --------
        >>> import torch, fxfusion
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = fxfusion.plan(model, (torch.randn(2, 4),))
        >>> [(item.cause.kind, item.elements, item.parameters) for item in plan.frozen]
        [('output', 2, ('2.bias',))]
        """
        return self.evidence.frozen


@dataclasses.dataclass(frozen=True, eq=False)
class PairedPlan(Plan):
    """The plan of a target whose source is a network of the same structure and other widths.

    Everything else is the target's; spaces and blocks of both correspond one to one, by name and by order.

    Attributes
    ----------
    other : Plan
        The source's plan.
    gain : Gains
    """

    other: Plan = dataclasses.field(kw_only=True)
    gain: Gains = dataclasses.field(kw_only=True)

    @property
    def source(self) -> Plan:
        """The source's plan."""
        return self.other

    @property
    def gains(self) -> Gains:
        """By what the source's weights must be multiplied."""
        return self.gain

    @classmethod
    def of(cls, target: Plan, source: Plan, gain: Gains) -> PairedPlan:
        """Return the pair of two plans."""
        fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(Plan)}
        return cls(**fields, other=source, gain=gain)
