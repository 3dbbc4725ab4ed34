"""Why an axis of a parameter is fixed: the way from it, node by node, to the first cause.

Inference leaves behind which leaves were unified or refined, and at which graph node
(:class:`fxfusion.axes.Link`), and which leaves were fixed by an operator, an input or an output themselves.
The way from a parameter's own leaf to the nearest leaf that was fixed itself is the explanation. It is
looked for when somebody asks; what a plan carries is plain data.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping

from fxfusion.errors import OptionError, UnknownParameterError

# Of several axes that keep a parameter from moving, the one to blame: what could be lifted comes first.
_BLAME = ("no rule", "clash", "constant", "output", "order", "input")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on the way from an axis to the first cause why it is fixed.

    Attributes
    ----------
    node, operator, source : str
        The graph node, its operator, and ``file:line`` in the model's code (empty if there is none).
    kind : str
        ``"same"``, ``"factor"``, ``"part"``, ``"alternative"`` or ``"whole"`` for a step towards another
        axis; for the first cause, which comes last: ``"input"``, ``"output"``, ``"order"`` (the operator
        gives positions a meaning), ``"constant"`` (a constant varies along it), ``"clash"`` (two structures
        do not agree), ``"no rule"``, ``"unused"`` or ``"single"`` (of one unit).
    message : str
        One sentence.
    """

    node: str
    operator: str
    source: str
    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A factor of a block of an axis: the units of a free space, or fixed.

    Attributes
    ----------
    block, factor : int
        Where it lies, counted as in :class:`fxfusion.plan.Incidence`.
    size : int
        Number of units.
    space : str
        Name of the free space, empty if the part is fixed.
    scope : tuple of str
        Names of the outer spaces whose every unit may move this part's units differently.
    chain : tuple of Step
        If it is fixed, the steps to the first cause, which comes last.
    """

    block: int
    factor: int
    size: int
    space: str = ""
    scope: tuple[str, ...] = ()
    chain: tuple[Step, ...] = ()

    @property
    def free(self) -> bool:
        """Whether its units may be permuted."""
        return not self.chain


@dataclasses.dataclass(frozen=True)
class AxisExplanation:
    """What an axis of a parameter enumerates, and what of it is free or fixed, and why.

    Attributes
    ----------
    parameter : str
        Fully qualified name, as it was asked for.
    axis, size : int
        The axis and its number of units.
    structure : str
        Its type as text: ``12*64`` (product), ``64+64`` (sum), ``{4|4}`` (a case for each summand of
        another axis), ``=1`` (one unit), ``7!`` (fixed).
    parts : tuple of Part
        Its factors, block by block; none if it has one unit.
    """

    parameter: str
    axis: int
    size: int
    structure: str
    parts: tuple[Part, ...]

    @property
    def free(self) -> bool:
        """Whether any part may be permuted."""
        return any(part.free for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameter elements without a free axis that have one first cause.

    Attributes
    ----------
    cause : Step
        The first cause; of causes at several nodes that one source line made alike, that at the first.
    nodes : tuple of str
        All these nodes.
    elements : int
        Number of parameter elements.
    parameters : tuple of str
        The parameters that they lie in.
    """

    cause: Step
    nodes: tuple[str, ...]
    elements: int
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PlacedPart:
    """A part of a parameter axis and the leaf that it is."""

    block: int
    factor: int
    size: int
    leaf: int


@dataclasses.dataclass(frozen=True)
class AxisEvidence:
    """A parameter axis: its leaf when inference began, and what that leaf has become."""

    size: int
    structure: str
    leaf: int
    parts: tuple[PlacedPart, ...]


@dataclasses.dataclass(frozen=True)
class Edge:
    """:class:`fxfusion.axes.Link` as plain data; ``node``, ``operator`` and ``source`` as in a step."""

    first: int
    second: int
    relation: str
    structure: str
    node: str
    operator: str
    source: str


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a parameter without a free factor: number of elements, and per factor axis and leaf."""

    parameter: str
    volume: int
    factors: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """All that explanations are made of; leaves are numbers.

    Attributes
    ----------
    parameters : dict of str to tuple of AxisEvidence
    aliases : dict of str to str
        Other names of tied parameters.
    unused : frozenset of str
        Parameters that the graph never reads.
    spaces : dict of int to tuple of str
        Of every free leaf its name, followed by its scope.
    edges : tuple of Edge
    causes : dict of int to tuple of Step
        Of every leaf that was fixed itself, why: the first cause, or what follows from it with it last.
    recorded : dict of int to tuple of Step
        Of every fixed leaf in a parameter, the reasons recorded with it, the first cause last.
    merged : dict of int to tuple of int
        Of every product of fixed leaves, these leaves.
    sizes : dict of int to int
    below : dict of int to frozenset of int
        Of every leaf in an edge, the leaves that it stands for now.
    blocks : tuple of Block
        Where no axis is free.
    """

    parameters: Mapping[str, tuple[AxisEvidence, ...]] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    spaces: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    causes: Mapping[int, tuple[Step, ...]] = dataclasses.field(default_factory=dict)
    recorded: Mapping[int, tuple[Step, ...]] = dataclasses.field(default_factory=dict)
    merged: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    below: Mapping[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    blocks: tuple[Block, ...] = ()

    def explain(self, parameter: str, axis: int | None = None) -> tuple[AxisExplanation, ...]:
        """Explain the axes of a parameter; see :meth:`fxfusion.plan.Plan.explain`."""
        name = self.aliases.get(parameter, parameter)
        if name not in self.parameters:
            raise UnknownParameterError(_unknown(parameter, [*self.parameters, *self.aliases]))
        axes = self.parameters[name]
        if axis is None:
            return tuple(self._axis(parameter, index) for index in range(len(axes)))
        if not -len(axes) <= axis < len(axes):
            raise OptionError(
                f"{parameter} has no axis {axis}: it has {len(axes)}, of sizes {[item.size for item in axes]}"
            )
        return (self._axis(parameter, axis % len(axes)),)

    def _axis(self, parameter: str, index: int) -> AxisExplanation:
        name = self.aliases.get(parameter, parameter)
        known = self.parameters[name][index]
        return AxisExplanation(
            parameter,
            index,
            known.size,
            known.structure,
            tuple(self._part(name, known.leaf, part) for part in known.parts),
        )

    def _part(self, parameter: str, start: int, part: PlacedPart) -> Part:
        if parameter in self.unused:
            return Part(part.block, part.factor, part.size, chain=(_UNUSED,))
        if part.leaf in self.spaces:
            name, *scope = self.spaces[part.leaf]
            return Part(part.block, part.factor, part.size, name, tuple(scope))
        return Part(part.block, part.factor, part.size, chain=self.chain(start, part.leaf))

    # -- the way to the first cause -------------------------------------------------------------

    def chain(self, start: int, target: int) -> tuple[Step, ...]:
        """Return the steps from a parameter's own leaf to the first cause why a leaf below it is fixed."""
        key = start, target
        if key not in self._chains:
            self._chains[key] = self._steps(start, target)
        return self._chains[key]

    @functools.cached_property
    def _chains(self) -> dict[tuple[int, int], tuple[Step, ...]]:
        return {}

    @functools.cached_property
    def _edges_of(self) -> dict[int, list[Edge]]:
        found: dict[int, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.first, []).append(edge)
            found.setdefault(edge.second, []).append(edge)
        return found

    @functools.cached_property
    def _owners(self) -> dict[int, str]:
        return {
            axis.leaf: f"{name}[{index}]"
            for name, axes in self.parameters.items()
            for index, axis in enumerate(axes)
            if axis.parts
        }

    def _steps(self, start: int, target: int) -> tuple[Step, ...]:
        path = self._path(start, target)
        if path is None:  # nothing was recorded on the way: what the leaf itself knows
            return self.recorded.get(target, (_SINGLE,))  # an axis of no units is neither free nor fixed
        steps: list[Step] = []
        here = start
        for edge, there in path:
            if edge is not None:
                kind, message = self._sentence(edge, here, there)
                if steps and kind == steps[-1].kind == "whole" and edge.node == steps[-1].node:
                    steps.pop()  # one view splits factor after factor: say where it all lies
                    message = f"it lies in {self._label(there)}, {edge.structure}"
                steps.append(Step(edge.node, edge.operator, edge.source, kind, message))
            here = there
        return (*steps, *self.causes[here])

    def _path(self, start: int, target: int) -> list[tuple[Edge | None, int]] | None:
        """Return the shortest way, as edges and the leaves they lead to.

        It goes down, to leaves of which ``target`` still is a part; then on to equal leaves and to those of
        which it is a part, since what fixes the whole fixes its parts. Breadth first in the order of
        inference: the same way every time.
        """
        begin = (start, True)  # a leaf, and whether the way may still go down
        came: dict[tuple[int, bool], tuple[tuple[int, bool], Edge | None] | None] = {begin: None}
        queue = collections.deque([begin])
        while queue:
            state = queue.popleft()
            if state[0] in self.causes:
                return self._trace(came, state)
            for edge, following in self._moves(state, target):
                if following not in came:
                    came[following] = state, edge
                    queue.append(following)
        return None

    def _moves(self, state: tuple[int, bool], target: int) -> Iterator[tuple[Edge | None, tuple[int, bool]]]:
        leaf, down = state
        for piece in self.merged.get(leaf, ()):
            yield None, (piece, False)
        for edge in self._edges_of.get(leaf, ()):
            there = edge.second if edge.first == leaf else edge.first
            if edge.relation == "same":
                yield edge, (there, down)
            elif edge.second == leaf:
                yield edge, (there, False)
            elif down and target in self.below[there]:
                yield edge, (there, True)

    @staticmethod
    def _trace(
        came: Mapping[tuple[int, bool], tuple[tuple[int, bool], Edge | None] | None], state: tuple[int, bool]
    ) -> list[tuple[Edge | None, int]]:
        path = []
        while (known := came[state]) is not None:
            previous, edge = known
            path.append((edge, state[0]))
            state = previous
        return path[::-1]

    # -- words ----------------------------------------------------------------------------------

    def _sentence(self, edge: Edge, here: int, there: int) -> tuple[str, str]:
        """Return the kind of a step, and what it says."""
        if edge.relation == "same":
            return "same", f"its units are those of {self._label(there)}"
        if edge.relation == "alternative":
            if there == edge.second:
                return (
                    "alternative",
                    f"it may differ by summand of another axis, {edge.structure}: this is one",
                )
            return "whole", f"it is {self._label(there)} in one summand of another axis"
        size = self.sizes[edge.second]
        if there == edge.second:
            return edge.relation, f"it is {edge.structure}, of which this is the {edge.relation} of {size}"
        return "whole", f"it is the {edge.relation} of {size} in {self._label(there)}, {edge.structure}"

    def _label(self, leaf: int) -> str:
        """Name a leaf by where it came from, or by what it was split off."""
        named = self._named(leaf)
        for edge in self._edges_of.get(leaf, ()):
            if not named and edge.second == leaf and edge.relation in ("factor", "part"):
                whole = self._named(edge.first)
                named = whole and f"the {edge.relation} of {self.sizes[leaf]} in {whole}"
        return named or f"an axis of {self.sizes[leaf]} units"

    def _named(self, leaf: int) -> str:
        if leaf in self._owners:
            return self._owners[leaf]
        if leaf in self.merged:
            return self._named(self.merged[leaf][0]).replace("an axis of", "axes of", 1)
        if leaf not in self.causes:
            return ""
        cause = self.causes[leaf][-1]
        thing = {"input": "the input", "constant": "the constant"}.get(cause.kind, "the result of")
        return f"an axis of {thing} {cause.node}"

    # -- what stays where it is -----------------------------------------------------------------

    @functools.cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """The parameter elements without a free axis, by first cause, most elements first."""
        choices = [(block, self._causes_of(block)) for block in self.blocks]
        reach: dict[tuple[str, ...], int] = collections.Counter()
        for block, causes in choices:
            for key in {_key(cause) for cause in causes}:
                reach[key] += block.volume
        groups: dict[tuple[str, ...], list[tuple[Block, Step]]] = {}
        for block, causes in choices:
            # Of equal kinds, that which keeps most from moving: a scan rather than a kernel's taps.
            blamed = min(causes, key=lambda cause: (_rank(cause), -reach[_key(cause)]))
            groups.setdefault(_key(blamed), []).append((block, blamed))
        found = [
            Frozen(
                members[0][1],
                tuple(dict.fromkeys(cause.node for _, cause in members)),
                sum(block.volume for block, _ in members),
                tuple(dict.fromkeys(block.parameter for block, _ in members)),
            )
            for members in groups.values()
        ]
        return tuple(sorted(found, key=lambda item: -item.elements))

    def _causes_of(self, block: Block) -> list[Step]:
        if block.parameter in self.unused:
            return [_UNUSED]
        axes = self.parameters[block.parameter]
        return [self.chain(axes[axis].leaf, leaf)[-1] for axis, leaf in block.factors] or [_SINGLE]


_UNUSED = Step("", "", "", "unused", "the graph never reads it: it stays as it is")
_SINGLE = Step("", "", "", "single", "it has no axis of two units or more")


def _rank(cause: Step) -> int:
    return _BLAME.index(cause.kind) if cause.kind in _BLAME else len(_BLAME)


def _key(cause: Step) -> tuple[str, ...]:
    """Return what causes share that one line of the model's code made at several nodes."""
    own = () if cause.source else (cause.node,)
    return (cause.kind, cause.operator, cause.source, cause.message, *own)


def _unknown(parameter: str, names: list[str]) -> str:
    close = difflib.get_close_matches(parameter, names, 3, 0.5)
    close = close or [name for name in names if parameter and parameter in name][:3]
    if close:
        return f"there is no parameter {parameter!r}; did you mean {' or '.join(close)}?"
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"there is no parameter {parameter!r}; there are {some or 'none'}"
