"""The alignment flow graph: which parameters write and read each space, through which operators.

Nodes of the ``networkx.MultiDiGraph`` are strings with an attribute ``kind``:

=============  ==========================================  ==============================
kind           key                                         attributes
=============  ==========================================  ==============================
``space``      ``space:NAME``                              ``size symmetry scope``
``parameter``  the fully qualified name                    ``shape``
``join``       ``join:NODE@NAME``                          ``operator node``
=============  ==========================================  ==============================

Edges carry ``role``: a parameter ``writes`` a join or a space (``axis``, ``through``: the operators
passed on the way), a join ``joins`` a later join or the space, and a parameter ``reads`` a space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from operator import getitem

import networkx as nx
from torch import fx

from fxfusion.axes import Axis, Leaf, leaves_of
from fxfusion.capture import Capture
from fxfusion.inference import Inferred
from fxfusion.layout import ParameterLayout
from fxfusion.plan import Role, Space
from fxfusion.rules.registry import operator_name

_JOINS = ("add", "sub", "rsub", "lerp")
_LONGEST_PATH = 8  # operators named on an edge
_SILENT = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "expand",
        "slice",
        "select",
        "getitem",
        "clone",
        "contiguous",
        "unsqueeze",
    ]
)

_Sources = dict[str, tuple[str, ...]]  # parameter or join -> operators passed since


@dataclasses.dataclass(eq=False)
class _Walk:
    graph: nx.MultiDiGraph
    parameters: Mapping[str, ParameterLayout]
    sources: dict[tuple[fx.Node, str], _Sources] = dataclasses.field(default_factory=dict)
    consumed: set[tuple[str, str]] = dataclasses.field(default_factory=set)


def flow_graph(
    capture: Capture,
    inferred: Inferred,
    spaces: Sequence[Space],
    layouts: Mapping[str, ParameterLayout],
    names: Mapping[Leaf, str],
) -> nx.MultiDiGraph:
    """Build the alignment flow graph.

    Parameters
    ----------
    capture, inferred
        The graph and its settled types.
    spaces : sequence of Space
        The free spaces.
    layouts : mapping of str to ParameterLayout
    names : mapping of Leaf to str
        The free leaves and the spaces that they are.

    Returns
    -------
    networkx.MultiDiGraph
    """
    graph = nx.MultiDiGraph()
    for name, layout in layouts.items():
        graph.add_node(name, kind="parameter", shape=list(layout.shape))
    for space in spaces:
        graph.add_node(
            space_node(space.name),
            kind="space",
            size=space.size,
            symmetry=space.symmetry.value,
            scope=list(space.scope),
        )
    walk = _Walk(graph, layouts)
    for node in capture.module.graph.nodes:
        if node.op == "call_function" and node.name in inferred.tensors:
            _visit(walk, node, capture, inferred, names)
    _close(walk, spaces)
    return graph


def space_node(name: str) -> str:
    """Return the node of a space: it may be named as a parameter is."""
    return f"space:{name}"


def _held(axes: Iterable[Axis], names: Mapping[Leaf, str]) -> set[str]:
    return {names[leaf] for axis in axes for leaf in leaves_of(axis) if leaf in names}


def _visit(
    walk: _Walk, node: fx.Node, capture: Capture, inferred: Inferred, names: Mapping[Leaf, str]
) -> None:
    operator = operator_name(node.target)
    if node.target is getitem:  # one output of an operator with several
        node_read = node.args[0]
        assert isinstance(node_read, fx.Node)
        operands, operator = node_read.all_input_nodes, operator_name(node_read.target)
    else:
        operands = node.all_input_nodes
    for space in _held(inferred.tensors[node.name], names):
        incoming = [walk.sources[item, space] for item in operands if (item, space) in walk.sources]
        written = _writers(walk, operands, capture, space)
        if operator in _JOINS and len(incoming) > 1 and len({frozenset(item) for item in incoming}) > 1:
            incoming = [_join(walk, node, space, incoming)]
        passed: _Sources = {}
        for sources in incoming:
            for source, through in sources.items():
                longer = through if operator in _SILENT else (*through, operator)[-_LONGEST_PATH:]
                passed.setdefault(source, longer)
        for name in written:
            passed.setdefault(name, ())
        walk.sources[node, space] = passed


def _writers(walk: _Walk, operands: Iterable[fx.Node], capture: Capture, space: str) -> list[str]:
    """Return the parameters among a node's operands that hold the space."""
    found = []
    for item in operands:
        name = capture.aliases.get(str(item.target), str(item.target))
        if item.op == "get_attr" and name in walk.parameters and space in walk.parameters[name].spaces():
            found.append(name)
    return found


def _join(walk: _Walk, node: fx.Node, space: str, incoming: Sequence[_Sources]) -> _Sources:
    key = f"join:{node.name}@{space}"
    walk.graph.add_node(key, kind="join", operator=str(node.target), node=node.name)
    for sources in incoming:
        for source, through in sources.items():
            _arrive(walk, source, key, space, through)
    return {key: ()}


def _arrive(walk: _Walk, source: str, target: str, space: str, through: Sequence[str]) -> None:
    role = "joins" if source.startswith("join:") else "writes"
    if walk.graph.has_edge(source, target):
        return
    attributes: dict[str, object] = {"role": role, "through": list(through)}
    if role == "writes":
        attributes["axis"] = walk.parameters[source].first_axes.get(space, 0)
    walk.graph.add_edge(source, target, **attributes)
    walk.consumed.add((source, space))


def _close(walk: _Walk, spaces: Sequence[Space]) -> None:
    """Let what no join consumed end in its space, and add the readers."""
    ends: dict[str, _Sources] = {}
    for (_, name), sources in walk.sources.items():
        for source, through in sources.items():
            ends.setdefault(name, {}).setdefault(source, through)
    for space in spaces:
        key = space_node(space.name)
        for source, through in ends.get(space.name, {}).items():
            reads_only = not source.startswith("join:") and all(
                incidence.role is Role.READS
                for incidence in space.incidences
                if incidence.parameter == source
            )
            if (source, space.name) not in walk.consumed and not reads_only:
                _arrive(walk, source, key, space.name, through)
        for incidence in space.incidences:
            if incidence.role in (Role.READS, Role.BOTH):
                walk.graph.add_edge(key, incidence.parameter, role="reads", axis=incidence.axis, through=[])
            elif not any(walk.graph.out_edges(incidence.parameter)):
                walk.graph.add_edge(incidence.parameter, key, role="writes", axis=incidence.axis, through=[])
