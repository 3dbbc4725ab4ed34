"""Draw an alignment flow graph: SVG, Graphviz DOT, Mermaid and JSON.

The SVG is laid out here, so that a drawing needs nothing but Python: Graphviz is rarely installed where
models are trained. The method is Sugiyama's: cycles are cut, nodes are put in rows along the longest path,
rows are ordered by barycenters, and positions follow from least squares. Three things are particular to
networks with residual streams, whose every block both reads and writes one space:

- the edges that close the cycles leave a space to the blocks that read it. They run along *rails* at the
  left, one per space and role, as do all edges that would cross many rows;
- a block is put below the residual join before the one that it writes, so that depth runs downwards;
- tall drawings are broken into columns, like a newspaper.

Everything depends only on the graph and the order in which its nodes and edges were added.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import networkx as nx

__all__ = ["collapse_modules", "from_json", "to_dot", "to_json", "to_mermaid", "to_svg"]

COLLAPSE_ABOVE = 150
"""Number of nodes above which the parameters of one module are drawn as one node by default."""

_OPERATOR_SYMBOLS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "cat": "‖", "where": "?"}
_SYMMETRY_STYLES = {
    "permutation": "permutation",
    "permutation, positive scale": "scale",
    "permutation, sign": "scale",
    "permutation, scale": "scale",
    "sign": "scale",
    "rotations of pairs": "orthogonal",
    "orthogonal": "orthogonal",
    "orthogonal, mean fixed": "orthogonal",
    "general linear": "linear",
    "fixed": "fixed",
}
# Per style: stroke and fill on light paper, stroke and fill on dark paper.
_NODE_COLOURS = {
    "permutation": ("#0d9488", "#d8f5f0", "#2dd4bf", "#0f3b39"),
    "scale": ("#4d7c0f", "#ecf8d4", "#a3e635", "#2a3d12"),
    "orthogonal": ("#7c3aed", "#ece5fe", "#a78bfa", "#2f2458"),
    "linear": ("#c026a8", "#fbe4f6", "#f472d0", "#4a1b42"),
    "fixed": ("#64748b", "#edf0f4", "#94a3b8", "#262e3a"),
    "other": ("#b45309", "#fdf0d8", "#fbbf24", "#3f2d0d"),
    "parameter": ("#9aa5b4", "#ffffff", "#56616f", "#171d26"),
    "join": ("#475569", "#ffffff", "#94a3b8", "#171d26"),
}
_EDGE_COLOURS = {
    "writes": ("#d97706", "#f0a53a"),
    "reads": ("#2f6fde", "#6ea3f5"),
    "joins": ("#64748b", "#9aa8ba"),
}


# --------------------------------------------------------------------------------------------- public API


def to_svg(graph: nx.MultiDiGraph, collapse: bool | None = None) -> str:
    """Draw the alignment flow graph as a self-contained SVG.

    Spaces are rounded and coloured by symmetry (dashed where they may differ per unit of an outer space),
    parameters are boxes, residual joins small circles. Hovering shows full names. Colours follow the
    reader's light or dark setting.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        The alignment flow graph.
    collapse : bool, optional
        Whether the parameters of one module become one node. By default they do above
        :data:`COLLAPSE_ABOVE` nodes.

    Returns
    -------
    str
        The SVG document, sized in CSS pixels.

    Raises
    ------
    ValueError
        If a node or an edge has an unknown ``kind`` or ``role``.

    Examples
    --------
    >>> import networkx as nx
    >>> graph = nx.MultiDiGraph()
    >>> graph.add_node("fc1.weight", kind="parameter", shape=[64, 32])
    >>> graph.add_node("fc1.weight[0]", kind="space", size=64, symmetry="permutation", scope=[])
    >>> _ = graph.add_edge("fc1.weight", "fc1.weight[0]", role="writes", axis=0, through=["relu"])
    >>> to_svg(graph).startswith("<svg")
    True
    """
    picture = _layout(_sketch(graph, collapse))
    return _render(picture, _title(graph))


def to_dot(graph: nx.MultiDiGraph, collapse: bool | None = None) -> str:
    """Write the alignment flow graph in Graphviz' DOT language.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        The alignment flow graph.
    collapse : bool, optional
        As for :func:`to_svg`.

    Returns
    -------
    str
        The DOT source.

    Raises
    ------
    ValueError
        If a node or an edge has an unknown ``kind`` or ``role``.

    Examples
    --------
    >>> import networkx as nx
    >>> graph = nx.MultiDiGraph()
    >>> graph.add_node("fc1.weight", kind="parameter", shape=[64, 32])
    >>> print(to_dot(graph).splitlines()[0])
    digraph alignment {
    """
    sketch = _sketch(graph, collapse)
    shapes = {"space": "box", "parameter": "box", "join": "circle"}
    lines = [
        "digraph alignment {",
        '  graph [rankdir=TB, fontname="Helvetica"];',
        '  node [fontname="Helvetica", fontsize=10];',
        '  edge [fontname="Helvetica", fontsize=8];',
    ]
    for node in sketch.nodes:
        stroke, fill = _NODE_COLOURS[node.style][:2]
        rounded = ",rounded" if node.kind == "space" else ""
        dashed = ",dashed" if node.dashed else ""
        lines.append(
            f"  {_dot_quoted(node.key)} [label={_dot_quoted(node.label)}, shape={shapes[node.kind]}, "
            f'style="filled{rounded}{dashed}", color="{stroke}", fillcolor="{fill}", '
            f"tooltip={_dot_quoted(node.tooltip)}];"
        )
    for edge in sketch.edges:
        source, target = sketch.nodes[edge.source], sketch.nodes[edge.target]
        lines.append(
            f"  {_dot_quoted(source.key)} -> {_dot_quoted(target.key)} "
            f'[color="{_EDGE_COLOURS[edge.role][0]}", tooltip={_dot_quoted(edge.tooltip)}];'
        )
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(graph: nx.MultiDiGraph, collapse: bool | None = None) -> str:
    """Write the alignment flow graph as a Mermaid flowchart, which GitHub renders in Markdown.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        The alignment flow graph.
    collapse : bool, optional
        As for :func:`to_svg`.

    Returns
    -------
    str
        The Mermaid source, without code fences.

    Raises
    ------
    ValueError
        If a node or an edge has an unknown ``kind`` or ``role``.

    Examples
    --------
    >>> import networkx as nx
    >>> graph = nx.MultiDiGraph()
    >>> graph.add_node("fc1.weight", kind="parameter", shape=[64, 32])
    >>> print(to_mermaid(graph).splitlines()[1].strip())
    n0["fc1.weight<br/>64 × 32"]:::parameter
    """
    sketch = _sketch(graph, collapse)
    brackets = {"space": ("([", "])"), "parameter": ("[", "]"), "join": ("((", "))")}
    lines = ["flowchart TD"]
    for number, node in enumerate(sketch.nodes):
        opening, closing = brackets[node.kind]
        lines.append(f'  n{number}{opening}"{_mermaid_escaped(node.label)}"{closing}:::{node.style}')
    for edge in sketch.edges:
        lines.append(f"  n{edge.source} --> n{edge.target}")
    for role, (stroke, _) in _EDGE_COLOURS.items():
        numbers = [str(number) for number, edge in enumerate(sketch.edges) if edge.role == role]
        if numbers:
            lines.append(f"  linkStyle {','.join(numbers)} stroke:{stroke}")
    for style in dict.fromkeys(node.style for node in sketch.nodes):
        stroke, fill = _NODE_COLOURS[style][:2]
        lines.append(f"  classDef {style} stroke:{stroke},fill:{fill},color:#1c2430")
    return "\n".join(lines) + "\n"


def to_json(graph: nx.MultiDiGraph) -> str:
    """Write the alignment flow graph as node-link JSON, the format of :mod:`networkx`.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        The alignment flow graph. Never collapsed here: nothing is lost.

    Returns
    -------
    str
        The JSON text, with nodes and edges in the graph's order.

    Raises
    ------
    TypeError
        If an attribute is not of a JSON type.

    Examples
    --------
    >>> import networkx as nx
    >>> graph = nx.MultiDiGraph()
    >>> graph.add_node("fc1.weight", kind="parameter", shape=[64, 32])
    >>> nx.utils.graphs_equal(from_json(to_json(graph)), graph)
    True
    """
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> nx.MultiDiGraph:
    """Read what :func:`to_json` wrote.

    Parameters
    ----------
    text : str
        The JSON text.

    Returns
    -------
    networkx.MultiDiGraph
        A graph equal to the one that was written.

    Raises
    ------
    ValueError
        If the text is not node-link JSON of a directed multigraph.

    Examples
    --------
    >>> from_json('{"directed": true, "multigraph": true, "nodes": [], "edges": []}').number_of_nodes()
    0
    """
    data = json.loads(text)
    expected = {"directed": True, "multigraph": True}
    if not isinstance(data, dict) or {key: data.get(key) for key in expected} != expected:
        raise ValueError("not an alignment flow graph: expected node-link JSON of a directed multigraph")
    try:
        return nx.node_link_graph(data, edges="edges")
    except (KeyError, TypeError, nx.NetworkXError) as error:
        raise ValueError(f"not an alignment flow graph: {error!r}") from error


def collapse_modules(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """Merge the parameters of every module into one node.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        The alignment flow graph.

    Returns
    -------
    networkx.MultiDiGraph
        A new graph, in which ``blocks.0.attn.qkv.weight`` and ``.bias`` are ``blocks.0.attn.qkv.*``, a
        parameter node with the attribute ``members``: a list of ``[name, shape]``. Modules with one
        parameter, and parameters of the root module, stay as they are. Every edge is
        kept, and its attribute ``member`` names the parameter.

    Examples
    --------
    >>> import networkx as nx
    >>> graph = nx.MultiDiGraph()
    >>> graph.add_node("fc1.weight", kind="parameter", shape=[64, 32])
    >>> graph.add_node("fc1.bias", kind="parameter", shape=[64])
    >>> list(collapse_modules(graph).nodes(data="members"))
    [('fc1.*', [['weight', [64, 32]], ['bias', [64]]])]
    """
    modules: dict[str, list[str]] = collections.defaultdict(list)
    for key, attributes in graph.nodes(data=True):
        if attributes.get("kind") == "parameter" and "." in key:
            modules[key.rpartition(".")[0]].append(key)
    merged = {
        key: f"{module}.*" for module, members in modules.items() if len(members) > 1 for key in members
    }
    collapsed = nx.MultiDiGraph(**graph.graph)
    for key, attributes in graph.nodes(data=True):
        if key not in merged:
            collapsed.add_node(key, **attributes)
            continue
        if merged[key] not in collapsed:
            collapsed.add_node(merged[key], kind="parameter", members=[])
        shape = list(attributes.get("shape", []))
        collapsed.nodes[merged[key]]["members"].append([key.rpartition(".")[2], shape])
    for source, target, attributes in graph.edges(data=True):
        ends = merged.get(source, source), merged.get(target, target)
        member = next((end for end in (source, target) if end in merged), None)
        collapsed.add_edge(*ends, **attributes, **({"member": member} if member else {}))
    return collapsed


# ------------------------------------------------------------------------- what is drawn, before any layout


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node with its text and size; ``lines`` are pairs of a text style and a text."""

    key: str
    kind: str
    style: str
    meaning: str
    dashed: bool
    lines: tuple[tuple[str, str], ...]
    tooltip: str
    width: float
    height: float

    @property
    def label(self) -> str:
        """The text for formats that lay out by themselves."""
        return "\n".join([_name(self.key), *(text for style, text in self.lines if style == "detail")])


@dataclasses.dataclass(frozen=True)
class _Edge:
    """All parallel edges of one role between two nodes, given by their numbers."""

    source: int
    target: int
    role: str
    tooltip: str


@dataclasses.dataclass(frozen=True)
class _Sketch:
    nodes: tuple[_Node, ...]
    edges: tuple[_Edge, ...]


def _sketch(graph: nx.MultiDiGraph, collapse: bool | None) -> _Sketch:
    if collapse is None:
        collapse = graph.number_of_nodes() > COLLAPSE_ABOVE
    if collapse:
        graph = collapse_modules(graph)
    makers = {"space": _space_node, "parameter": _parameter_node, "join": _join_node}
    nodes = []
    for key, attributes in graph.nodes(data=True):
        kind = attributes.get("kind")
        if kind not in makers:
            raise ValueError(f"node {key!r} has the unknown kind {kind!r}; known: {', '.join(makers)}")
        nodes.append(makers[kind](str(key), attributes))
    numbers = {key: number for number, key in enumerate(graph)}
    tooltips: dict[tuple[int, int, str], list[str]] = collections.defaultdict(list)
    for source, target, attributes in graph.edges(data=True):
        role = attributes.get("role")
        if role not in _EDGE_COLOURS:
            raise ValueError(f"edge {source!r} -> {target!r} has the unknown role {role!r}")
        tooltips[numbers[source], numbers[target], role].append(_edge_tooltip(source, target, attributes))
    edges = [_Edge(*ends, "\n".join(dict.fromkeys(texts))) for ends, texts in tooltips.items()]
    return _Sketch(tuple(nodes), tuple(edges))


def _space_node(key: str, attributes: Mapping[str, Any]) -> _Node:
    symmetry = str(attributes.get("symmetry", "fixed"))
    scope = list(attributes.get("scope", []))
    size = f"{attributes.get('size', '?')}"
    lines = (
        ("size", f"{size} · {symmetry}"),
        ("path", _shortened(_name(key), 30)),
        ("detail", f"{size} units, {symmetry}"),
    )
    tooltip = f"space {_name(key)}\n{size} units, {symmetry}"
    if scope:
        tooltip += f"\nmay differ for every unit of {', '.join(scope)}"
    style = _SYMMETRY_STYLES.get(symmetry, "other")
    return _Node(key, "space", style, symmetry, bool(scope), lines, tooltip, _width(lines[:2], 34, 120), 42)


def _parameter_node(key: str, attributes: Mapping[str, Any]) -> _Node:
    members = attributes.get("members")
    if members:
        shapes = [f"{name} {_shape(shape)}" for name, shape in members]
        tooltip = f"module {key[:-2]}\n" + "\n".join(shapes)
        module, _, name = key[:-2].rpartition(".")
    else:
        shapes = [_shape(attributes.get("shape", []))]
        tooltip = f"parameter {key}\n{shapes[0]}"
        components = key.split(".")
        # A leaf such as "weight" says little, so the module's own name stays beside it.
        module, name = ".".join(components[:-2]), ".".join(components[-2:])
    lines = [("name", _shortened(name, 30))]
    if module:
        lines.insert(0, ("path", _shortened(module, 30)))
    hidden = len(shapes) - 3
    shown = shapes if hidden <= 0 else [*shapes[:2], f"and {hidden + 1} more"]
    lines += [("detail", text) for text in shown]
    height = 12 + 14 * len(lines)
    width = _width(lines, 22, 84)
    return _Node(key, "parameter", "parameter", "parameter", False, tuple(lines), tooltip, width, height)


def _join_node(key: str, attributes: Mapping[str, Any]) -> _Node:
    operator = str(attributes.get("operator", ""))
    plain = operator.split(".")[1] if operator.count(".") else operator
    symbol = _OPERATOR_SYMBOLS.get(plain.rstrip("_"), plain[:2] or "·")
    tooltip = f"residual join {attributes.get('node', key)}\n{operator}"
    lines = (("symbol", symbol), ("detail", operator))
    return _Node(key, "join", "join", "residual join", False, lines, tooltip, 24, 24)


def _edge_tooltip(source: str, target: str, attributes: Mapping[str, Any]) -> str:
    role = attributes["role"]
    start, end = _name(source), _name(target)
    axis = f", axis {attributes['axis']}" if "axis" in attributes else ""
    if role == "writes":
        start = f"{attributes.get('member', source)}{axis}"
    if role == "reads":
        end = f"{attributes.get('member', target)}{axis}"
    through = attributes.get("through") or []
    verb = {"writes": "writes", "reads": "is read by", "joins": "goes into"}[role]
    return f"{start} {verb} {end}" + (f", through {', '.join(map(str, through))}" if through else "")


def _title(graph: nx.MultiDiGraph) -> str:
    counts = collections.Counter(kind for _, kind in graph.nodes(data="kind"))
    names = (("space", "space"), ("parameter", "parameter"), ("join", "residual join"))
    parts = [f"{counts[kind]} {name}{'s' * (counts[kind] != 1)}" for kind, name in names]
    return f"Alignment flow graph: {', '.join(parts)}"


def _name(key: str) -> str:
    """A node's name: keys of spaces and joins start with their kind, to differ from parameters."""
    return key.removeprefix("space:").removeprefix("join:")


def _shape(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _shortened(text: str, length: int) -> str:
    """Cut at the front, because the end of a name tells it from its neighbours."""
    return text if len(text) <= length else "…" + text[1 - length :]


def _width(lines: Iterable[tuple[str, str]], padding: float, least: float) -> float:
    advance = {"name": 7.4, "size": 7.6, "path": 6.1, "detail": 6.1}
    return max(least, padding + max(advance[style] * len(text) for style, text in lines))


# ------------------------------------------------------------------------------------------------- layering


@dataclasses.dataclass
class _Layers:
    """The row of every node, and which edges go by a rail rather than through the rows."""

    row: list[int]
    on_rail: set[int]


def _assign_rows(sketch: _Sketch) -> _Layers:
    acyclic = nx.DiGraph()
    acyclic.add_nodes_from(range(len(sketch.nodes)))
    acyclic.add_edges_from((edge.source, edge.target) for edge in sketch.edges if edge.source != edge.target)
    cut = _cut_cycles(acyclic, sketch)
    hubs = {source for source, _ in cut}
    _put_blocks_in_sequence(acyclic, sketch, {target for _, target in cut})
    _put_final_writers_last(acyclic, sketch, hubs)
    row = [0] * len(sketch.nodes)
    for number, generation in enumerate(nx.topological_generations(acyclic)):
        for node in generation:
            row[node] = number
    for node in reversed(list(nx.lexicographical_topological_sort(acyclic))):
        if not acyclic.in_degree(node) and acyclic.out_degree(node):
            row[node] = min(row[successor] for successor in acyclic.successors(node)) - 1
    pendants = _place_pendants(sketch, row, hubs)
    row = _split_wide_rows(row)
    return _Layers(row, _edges_on_rails(sketch, row, hubs, pendants))


def _cut_cycles(graph: nx.DiGraph, sketch: _Sketch) -> list[tuple[int, int]]:
    """Remove the edges that close cycles and return them.

    In each strongly connected component, the space that is read most is cut from its readers there: it is
    the residual stream, and its readers are the blocks.
    """
    cut: list[tuple[int, int]] = []
    pending = [set(component) for component in nx.strongly_connected_components(graph)]
    while pending:
        component = pending.pop()
        if len(component) == 1:
            continue
        part = graph.subgraph(component).copy()
        hub = max(
            sorted(component),
            key=lambda node: (sketch.nodes[node].kind == "space", part.out_degree(node)),
        )
        edges = sorted(part.out_edges(hub))
        graph.remove_edges_from(edges)
        part.remove_edges_from(edges)
        cut += edges
        pending += [set(inner) for inner in nx.strongly_connected_components(part)]
    return cut


def _put_blocks_in_sequence(graph: nx.DiGraph, sketch: _Sketch, cut_readers: set[int]) -> None:
    """Let what a block reads first depend on the join before the one that the block writes."""
    joins = [node for node in nx.lexicographical_topological_sort(graph) if sketch.nodes[node].kind == "join"]
    for join in joins:
        before = [node for node in graph.predecessors(join) if sketch.nodes[node].kind == "join"]
        for previous in sorted(before or _openers(graph, sketch, join, cut_readers)):
            branch = nx.ancestors(graph, join) - nx.ancestors(graph, previous) - {previous}
            graph.add_edges_from((previous, node) for node in sorted(branch & cut_readers))


def _put_final_writers_last(graph: nx.DiGraph, sketch: _Sketch, hubs: set[int]) -> None:
    """Let what only writes a residual stream's space, such as a final normalisation, follow the last join."""
    for hub in sorted(hubs):
        writers = sorted(graph.predecessors(hub))
        joins = [node for node in writers if sketch.nodes[node].kind == "join"]
        final = [node for node in writers if not graph.in_degree(node) and graph.out_degree(node) == 1]
        graph.add_edges_from(itertools.product(joins, set(final) - set(joins)))


def _openers(graph: nx.DiGraph, sketch: _Sketch, join: int, cut_readers: set[int]) -> list[int]:
    """What writes the start of a residual stream, such as an embedding, rather than a block's output."""
    writers = sorted(graph.predecessors(join))
    sources = [node for node in writers if not graph.in_degree(node) and node not in cut_readers]
    blocks = {_numbered_module(sketch.nodes[node]) for node in writers if graph.in_degree(node)}
    return [node for node in sources if _numbered_module(sketch.nodes[node]) not in blocks]


def _place_pendants(sketch: _Sketch, row: list[int], hubs: set[int]) -> set[int]:
    """Put parameters that touch one residual stream and nothing else beside their module's other ones.

    The weight of a normalisation is an example: its only edge would let it end up beside the residual
    stream's node, far from its block. Parameters without any edge follow in the same way.
    """
    neighbours: dict[int, set[int]] = collections.defaultdict(set)
    for edge in sketch.edges:
        neighbours[edge.source].add(edge.target)
        neighbours[edge.target].add(edge.source)
    parameters = [number for number, node in enumerate(sketch.nodes) if node.kind == "parameter"]
    pendants = [node for node in parameters if len(neighbours[node]) == 1 and neighbours[node] <= hubs]
    unconnected = [node for node in parameters if not neighbours[node]]
    settled = [node for node in parameters if node not in {*pendants, *unconnected}]
    _place_beside(sketch, row, pendants, settled, [node for node in settled if neighbours[node] & hubs])
    _place_beside(sketch, row, unconnected, [*settled, *pendants], [])
    return set(pendants)


def _place_beside(
    sketch: _Sketch, row: list[int], moved: Sequence[int], settled: Sequence[int], readers: Sequence[int]
) -> None:
    """Give each moved parameter the row of the nearest settled one that follows it in the model's order.

    Where none follows in its block (some models register normalisations last), the block's normalisations
    are dealt out to the rows that read the residual stream.
    """
    following: dict[tuple[str, tuple[str, ...]], list[int]] = collections.defaultdict(list)
    first_rows: dict[tuple[str, tuple[str, ...]], set[int]] = collections.defaultdict(set)
    last: dict[tuple[str, tuple[str, ...]], dict[str, int]] = collections.defaultdict(dict)
    for node in sorted(settled):
        for key in _surroundings(sketch.nodes[node].key):
            following[key].append(node)
    for node in readers:
        for key in _surroundings(sketch.nodes[node].key):
            first_rows[key].add(row[node])
    for node in moved:
        key = next((key for key in _surroundings(sketch.nodes[node].key) if key in following), ("", ()))
        place = bisect.bisect(following[key], node)
        if place < len(following[key]):
            row[node] = row[following[key][place]]
        elif first_rows[key] and key[1]:
            modules, rows = last[key], sorted(first_rows[key])
            turn = modules.setdefault(_module(sketch.nodes[node]), len(modules))
            row[node] = rows[min(turn, len(rows) - 1)]
        elif following[key] and not readers:
            row[node] = row[following[key][-1]]


def _module(node: _Node) -> str:
    return node.key.rpartition(".")[0]


def _numbered_module(node: _Node) -> str:
    """The outermost numbered module, such as ``blocks.0``, or nothing."""
    components = node.key.split(".")
    length = next((place for place, component in enumerate(components, 1) if component.isdigit()), 0)
    return ".".join(components[:length])


def _surroundings(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """All modules around a parameter, the innermost first, each with the numbers in the parameter's name."""
    numbers = tuple(component for component in name.split(".") if component.isdigit())
    return [(prefix, numbers) for prefix in _prefixes(name)]


def _prefixes(name: str) -> list[str]:
    """All modules around a parameter, the innermost first."""
    components = name.split(".")[:-1]
    return [".".join(components[:length]) for length in range(len(components), 0, -1)]


def _split_wide_rows(row: list[int]) -> list[int]:
    """Break rows with very many nodes, such as the experts of a mixture, and close empty ones."""
    limit = max(8, math.isqrt(len(row)) // 3)
    members: dict[int, list[int]] = collections.defaultdict(list)
    for node, number in enumerate(row):
        members[number].append(node)
    split = list(row)
    count = 0
    for _, nodes in sorted(members.items()):
        parts = math.ceil(len(nodes) / limit)
        for position, node in enumerate(nodes):
            split[node] = count + position * parts // len(nodes)
        count += parts
    return split


def _edges_on_rails(sketch: _Sketch, row: list[int], hubs: set[int], pendants: set[int]) -> set[int]:
    chosen = set()
    for number, edge in enumerate(sketch.edges):
        span = row[edge.target] - row[edge.source]
        ends = {edge.source, edge.target}
        touches_space = any(sketch.nodes[end].kind == "space" for end in ends)
        longest = 1 if ends & hubs and ends & pendants else 5
        if span <= 0 or (touches_space and span > longest):
            chosen.add(number)
    return chosen


# ----------------------------------------------------------------------- order within rows, and coordinates


@dataclasses.dataclass
class _Grid:
    """Rows of points. Points below ``len(sketch.nodes)`` are nodes, the others bends of long edges."""

    rows: list[list[int]]
    above: dict[int, list[int]]
    below: dict[int, list[int]]
    chains: dict[int, list[int]]  # Per edge that goes through rows: its points, from source to target.
    stream: set[int]  # Points of long edges into residual joins, which are kept at the right.


def _make_grid(sketch: _Sketch, layers: _Layers) -> _Grid:
    rows: list[list[int]] = [[] for _ in range(max(layers.row, default=-1) + 1)]
    for node, number in enumerate(layers.row):
        rows[number].append(node)
    above: dict[int, list[int]] = collections.defaultdict(list)
    below: dict[int, list[int]] = collections.defaultdict(list)
    chains = {}
    points = len(sketch.nodes)
    for number, edge in enumerate(sketch.edges):
        if number in layers.on_rail:
            continue
        chain = [edge.source]
        for between in range(layers.row[edge.source] + 1, layers.row[edge.target]):
            rows[between].append(points)
            chain.append(points)
            points += 1
        chain.append(edge.target)
        chains[number] = chain
        for upper, lower in itertools.pairwise(chain):
            below[upper].append(lower)
            above[lower].append(upper)
    joins = {node for node in range(len(sketch.nodes)) if sketch.nodes[node].kind == "join"}
    into_joins = [chain for chain in chains.values() if chain[-1] in joins]
    stream = {point for chain in into_joins if chain[0] in joins or len(chain) > 3 for point in chain[1:-1]}
    return _Grid(rows, above, below, chains, stream)


def _order_rows(grid: _Grid) -> None:
    """Reduce crossings: order each row by the mean position of its neighbours in the row before."""
    grid.rows[:] = [sorted(row, key=grid.stream.__contains__) for row in grid.rows]
    best, fewest = [list(row) for row in grid.rows], _crossings(grid)
    for sweep in range(16):
        downwards = sweep % 2 == 0
        neighbours = grid.above if downwards else grid.below
        numbers = range(1, len(grid.rows)) if downwards else range(len(grid.rows) - 2, -1, -1)
        for number in numbers:
            before = grid.rows[number - 1 if downwards else number + 1]
            position = {point: place for place, point in enumerate(before)}
            grid.rows[number] = _by_barycenter(grid.rows[number], neighbours, grid, position)
        crossings = _crossings(grid)
        if crossings < fewest:
            best, fewest = [list(row) for row in grid.rows], crossings
    grid.rows[:] = best


def _by_barycenter(
    row: list[int], neighbours: Mapping[int, list[int]], grid: _Grid, position: Mapping[int, int]
) -> list[int]:
    keys: dict[int, float] = {}
    for place, point in enumerate(row):
        places = [position[neighbour] for neighbour in neighbours.get(point, [])]
        if point in grid.stream:
            keys[point] = math.inf
        elif places:
            keys[point] = sum(places) / len(places)
        elif point in grid.above or point in grid.below:
            keys[point] = place
        else:
            keys[point] = -1  # Connected by rails alone, which are at the left.
    return sorted(row, key=keys.__getitem__)


def _crossings(grid: _Grid) -> int:
    total = 0
    for upper, lower in itertools.pairwise(grid.rows):
        position = {point: place for place, point in enumerate(lower)}
        passed: list[int] = []
        for point in upper:
            ends = sorted(position[end] for end in grid.below.get(point, []))
            total += sum(len(passed) - bisect.bisect(passed, end) for end in ends)
            for end in ends:
                bisect.insort(passed, end)
    return total


def _horizontal_positions(sketch: _Sketch, grid: _Grid) -> dict[int, float]:
    """Move every point towards its neighbours, by least squares under the order and the least distances."""
    nodes = sketch.nodes
    gaps = [[_distance(nodes, a, b) for a, b in itertools.pairwise(row)] for row in grid.rows]
    x: dict[int, float] = {}
    for row, distances in zip(grid.rows, gaps, strict=True):
        left = -sum(distances) / 2
        for point, step in zip(row, [0.0, *distances], strict=False):
            left += step
            x[point] = left
    lines = _straight_lines(nodes, grid)
    for sweep in range(36):
        sides = ((grid.above,), (grid.below,), (grid.above, grid.below))[sweep % 3]
        numbers = range(len(grid.rows)) if sweep % 2 == 0 else range(len(grid.rows) - 1, -1, -1)
        means = [sum(x[point] for point in line) / len(line) for line in lines.values()]
        straight = {point: mean for line, mean in zip(lines.values(), means, strict=True) for point in line}
        for number in numbers:
            row, distances = grid.rows[number], gaps[number]
            pulls = [_pull(point, sides, x, straight) for point in row]
            for place in range(len(row) - 2, -1, -1):
                if not pulls[place][1]:  # Connected to nothing: stay close to the next.
                    pulls[place] = (pulls[place + 1][0] - distances[place], 0.01)
            weights = [max(weight, 0.01) for _, weight in pulls]
            x.update(zip(row, _separated([goal for goal, _ in pulls], weights, distances), strict=True))
    return x


def _straight_lines(nodes: Sequence[_Node], grid: _Grid) -> dict[int, list[int]]:
    """Points that should lie below each other: the bends of a long edge, and the joins of one stream."""
    lines: dict[int, list[int]] = {}
    line_of: dict[int, int] = {}
    continued = set()
    for number, chain in grid.chains.items():
        start, *bends, end = chain
        stream = all(point < len(nodes) and nodes[point].kind == "join" for point in (start, end))
        if not stream or start in continued or end in line_of:  # A stream that forks or meets another.
            lines[-1 - number] = bends
            continue
        continued.add(start)
        line = line_of.setdefault(start, start)
        line_of[end] = line
        lines.setdefault(line, [start]).extend([*bends, end])
    return {line: points for line, points in lines.items() if points}


def _pull(
    point: int,
    sides: Iterable[Mapping[int, list[int]]],
    x: Mapping[int, float],
    straight: Mapping[int, float],
) -> tuple[float, float]:
    """Where a point's neighbours and the line that it is on want it, and how strongly."""
    neighbours = [x[neighbour] for side in sides for neighbour in side.get(point, [])]
    weight = float(len(neighbours))
    total = sum(neighbours)
    if point in straight:
        total, weight = total + 200 * straight[point], weight + 200
    return (total / weight, weight) if weight else (x[point], 0.0)


def _distance(nodes: Sequence[_Node], left: int, right: int) -> float:
    halves = [nodes[point].width / 2 if point < len(nodes) else 0.0 for point in (left, right)]
    return sum(halves) + (22.0 if max(left, right) < len(nodes) else 16.0)


def _separated(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Minimise the weighted squared distance to ``wanted`` with neighbours at least ``gaps`` apart.

    After subtracting the accumulated gaps this is isotonic regression, solved by pooling violators.
    """
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, float, int]] = []  # Mean, weight, number of points.
    for goal, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, count = goal - offset, 1
        while pools and pools[-1][0] > mean:
            other, other_weight, other_count = pools.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, count = weight + other_weight, count + other_count
        pools.append((mean, weight, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


# ------------------------------------------------------------------------------- columns, rails, and frames

_MARGIN = 28.0
_LANE = 9.0  # Distance of rails, and of tracks between columns.
_RADIUS = 7.0
_COLUMN_HEIGHT = 2600.0  # Drawings that are not taller stay in one column.
_ASPECT = 1.5  # Width over height to which columns lead.


@dataclasses.dataclass
class _Rail:
    """Edges of one role between a space (the hub) and nodes that are many rows away or against the flow."""

    hub: int
    role: str
    leaves_hub: bool
    edges: list[int]
    lane: int = 0


@dataclasses.dataclass
class _Picture:
    """All coordinates, in CSS pixels."""

    sketch: _Sketch
    layers: _Layers
    grid: _Grid
    x: dict[int, float]  # Centre of every point.
    y: list[float]  # Upper edge of every row.
    heights: list[float]  # Of every row.
    bands: list[range]  # Rows of every column.
    band_of_row: list[int]
    rails: list[_Rail]
    tracks: dict[tuple[int, int, int], float]  # Per column, gap and rail: height of the rail's taps there.
    top: list[float]  # Per column.
    bottom: list[float]
    left: list[float]  # Left edge of the nodes of every column.
    gutters: list[list[int]]  # Per column: what comes from the column before; rail r is ~r, edge e is e.
    frames: list[tuple[str, float, float, float, float]]
    width: float
    height: float

    def box(self, node: int) -> tuple[float, float, float, float]:
        """Left, top, width and height of a node."""
        shape = self.sketch.nodes[node]
        row = self.layers.row[node]
        top = self.y[row] + (self.heights[row] - shape.height) / 2
        return self.x[node] - shape.width / 2, top, shape.width, shape.height

    def band(self, row: int) -> int:
        return self.band_of_row[row]

    def lane_x(self, band: int, rail: _Rail) -> float:
        return self.left[band] - 24 - _LANE * rail.lane


def _layout(sketch: _Sketch) -> _Picture:
    layers = _assign_rows(sketch)
    grid = _make_grid(sketch, layers)
    _order_rows(grid)
    x = _horizontal_positions(sketch, grid)
    heights = [
        max((sketch.nodes[point].height for point in row if point < len(sketch.nodes)), default=24.0)
        for row in grid.rows
    ]
    bands = _break_into_columns(sketch, grid, x, heights)
    band_of_row = [number for number, band in enumerate(bands) for _ in band]
    picture = _Picture(
        sketch, layers, grid, x, [], heights, bands, band_of_row, _make_rails(sketch, layers),
        {}, [], [], [], [[] for _ in bands], [], 0.0, 0.0,
    )  # fmt: skip
    _assign_lanes(picture)
    _collect_gutters(picture)
    _set_vertical_positions(picture)
    _set_columns(picture)
    picture.frames = _module_frames(picture)
    return picture


def _break_into_columns(
    sketch: _Sketch, grid: _Grid, x: Mapping[int, float], heights: Sequence[float]
) -> list[range]:
    ends = [0.0]
    for height in heights:
        ends.append(ends[-1] + height + 44)
    if ends[-1] <= _COLUMN_HEIGHT:
        return [range(len(heights))]
    width = (
        100
        + max(_extent(sketch, row, x)[1] for row in grid.rows)
        - min(_extent(sketch, row, x)[0] for row in grid.rows)
    )
    count = max(1, round(math.sqrt(_ASPECT * ends[-1] / width)))
    crossing = [sum(len(grid.below.get(point, [])) for point in row) for row in grid.rows]
    breaks = [0]
    for number in range(1, count):
        goal, slack = ends[-1] * number / count, ends[-1] / count * 0.2
        near = [row for row in range(breaks[-1] + 1, len(heights)) if abs(ends[row] - goal) < slack]
        if near:  # Where the fewest edges have to go on in the next column.
            breaks.append(min(near, key=lambda row: (crossing[row - 1], abs(ends[row] - goal))))
    return [range(start, end) for start, end in zip(breaks, [*breaks[1:], len(heights)], strict=True)]


def _extent(sketch: _Sketch, row: Iterable[int], x: Mapping[int, float]) -> tuple[float, float]:
    halves = {point: sketch.nodes[point].width / 2 if point < len(sketch.nodes) else 0.0 for point in row}
    return min(x[point] - half for point, half in halves.items()), max(
        x[point] + half for point, half in halves.items()
    )


def _make_rails(sketch: _Sketch, layers: _Layers) -> list[_Rail]:
    rails: dict[tuple[int, str, bool], _Rail] = {}
    for number in sorted(layers.on_rail):
        edge = sketch.edges[number]
        leaves_hub = sketch.nodes[edge.target].kind != "space"
        hub = edge.source if leaves_hub else edge.target
        rail = rails.setdefault((hub, edge.role, leaves_hub), _Rail(hub, edge.role, leaves_hub, []))
        rail.edges.append(number)
    return list(rails.values())


def _taps(picture: _Picture, rail: _Rail) -> list[tuple[int, int, int]]:
    """Where a rail meets nodes: node, its row, and the gap, numbered by the row below it. The hub first."""
    row = picture.layers.row
    others = [
        picture.sketch.edges[edge].target if rail.leaves_hub else picture.sketch.edges[edge].source
        for edge in rail.edges
    ]
    hub_side, other_side = (1, 0) if rail.leaves_hub else (0, 1)
    return [
        (rail.hub, row[rail.hub], row[rail.hub] + hub_side),
        *((node, row[node], row[node] + other_side) for node in others),
    ]


def _assign_lanes(picture: _Picture) -> None:
    """Give short rails the lanes near the nodes, so that long rails are crossed by few taps."""
    spans = []
    for number, rail in enumerate(picture.rails):
        gaps = [gap for _, _, gap in _taps(picture, rail)]
        spans.append((max(gaps) - min(gaps), min(gaps), max(gaps), number))
    taken: list[list[tuple[int, int]]] = []
    for _, first, last, number in sorted(spans):
        free = (
            lane
            for lane, intervals in enumerate(taken)
            if all(last < start or end < first for start, end in intervals)
        )
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        picture.rails[number].lane = lane


def _bands_of_rail(picture: _Picture, rail: _Rail) -> range:
    bands = [picture.band(row) for _, row, _ in _taps(picture, rail)]
    return range(min(bands), max(bands) + 1)


def _collect_gutters(picture: _Picture) -> None:
    """List what has to go from each column to the next."""
    for number, rail in enumerate(picture.rails):
        for band in list(_bands_of_rail(picture, rail))[1:]:
            picture.gutters[band].append(~number)
    for number in picture.grid.chains:
        edge = picture.sketch.edges[number]
        first, last = (picture.band(picture.layers.row[end]) for end in (edge.source, edge.target))
        for band in range(first + 1, last + 1):
            picture.gutters[band].append(number)


def _set_vertical_positions(picture: _Picture) -> None:
    tapped: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
    for number, rail in enumerate(picture.rails):
        for _, row, gap in _taps(picture, rail):
            tapped[picture.band(row), gap].add(number)
    start = _MARGIN + 72 + _LANE * max(len(gutter) for gutter in picture.gutters)
    for band, rows in enumerate(picture.bands):
        picture.top.append(start)
        y = start
        for row in [*rows, rows.stop]:
            inner = row not in (rows.start, rows.stop)
            lines = sorted(tapped[band, row], key=lambda number: picture.rails[number].lane)
            if inner or lines:
                lead = 22.0 if inner else 12.0
                for place, number in enumerate(lines):
                    picture.tracks[band, row, number] = y + lead + _LANE * place
                y += lead + _LANE * len(lines) + 22
            if row != rows.stop:
                picture.y.append(y)
                y += picture.heights[row]
        picture.bottom.append(y)


def _set_columns(picture: _Picture) -> None:
    """Put the columns side by side, with room at the left of each for its rails and its gutter."""
    edge = _MARGIN
    for band, rows in enumerate(picture.bands):
        lanes = [r.lane + 1 for r in picture.rails if band in _bands_of_rail(picture, r)]
        edge += _LANE * len(picture.gutters[band]) + (30 if picture.gutters[band] else 0)
        left = edge + (24 + _LANE * max(lanes) if lanes else 0)
        extents = [_extent(picture.sketch, picture.grid.rows[row], picture.x) for row in rows]
        shift = left - min((low for low, _ in extents), default=0.0)
        for row in rows:
            for point in picture.grid.rows[row]:
                picture.x[point] += shift
        picture.left.append(left)
        edge = max((high for _, high in extents), default=left) + shift + 36
    tails = [len(gutter) for gutter in [*picture.gutters[1:], []]]
    picture.width = edge - 36 + _MARGIN
    picture.height = (
        _MARGIN + 12 + max(bottom + _LANE * tail for bottom, tail in zip(picture.bottom, tails, strict=True))
    )


def _module_frames(picture: _Picture) -> list[tuple[str, float, float, float, float]]:
    """Frames around numbered modules, such as ``blocks.0``, where no other node lies inside."""
    members: dict[str, set[int]] = collections.defaultdict(set)
    homes = _homes(picture.sketch)
    for node, name in enumerate(homes):
        components = name.split(".")
        for length in range(1, len(components) + 1):
            if components[length - 1].isdigit():
                members[".".join(components[:length])].add(node)
    frames: list[tuple[str, float, float, float, float]] = []
    framed: set[int] = set()
    boxes = [picture.box(node) for node in range(len(picture.sketch.nodes))]
    for name, nodes in sorted(members.items(), key=lambda item: (item[0].count("."), min(item[1]))):
        if len(nodes) < 3 or nodes & framed:
            continue
        parts = _frames_of(picture, nodes, boxes)
        outside = (boxes[node] for node in range(len(boxes)) if node not in nodes)
        if any(_overlap(frame, box) for box in outside for frame in parts):
            continue
        if any(_overlap(frame, other[1:]) for frame in parts for other in frames):
            continue
        frames += [(name, *frame) for frame in parts]
        framed |= nodes
    return frames


def _homes(sketch: _Sketch) -> list[str]:
    """The module to which each node belongs by its name; joins belong to what writes them."""
    homes = [_name(node.key).removesuffix(".*") if node.kind != "join" else "" for node in sketch.nodes]
    for edge in sketch.edges:
        source, target = sketch.nodes[edge.source], sketch.nodes[edge.target]
        if target.kind == "join" and source.kind == "parameter":
            homes[edge.target] = homes[edge.source]
    return homes


def _frames_of(
    picture: _Picture, nodes: Iterable[int], boxes: Sequence[tuple[float, float, float, float]]
) -> list[tuple[float, float, float, float]]:
    """The bounding box of some nodes, one for every column in which they lie."""
    columns: dict[int, list[tuple[float, float, float, float]]] = collections.defaultdict(list)
    for node in nodes:
        columns[picture.band(picture.layers.row[node])].append(boxes[node])
    frames = []
    for _, inside in sorted(columns.items()):
        if len(inside) < 3:
            continue
        left = min(box[0] for box in inside) - 12
        top = min(box[1] for box in inside) - 10
        right = max(box[0] + box[2] for box in inside) + 12
        bottom = max(box[1] + box[3] for box in inside) + 10
        frames.append((left, top, right - left, bottom - top))
    return frames


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(
        first[axis] < second[axis] + second[axis + 2] and second[axis] < first[axis] + first[axis + 2]
        for axis in (0, 1)
    )


# ---------------------------------------------------------------------------------------------------- edges


def _ports(picture: _Picture) -> dict[tuple[int, int], tuple[float, float]]:
    """Where the edges that go through rows leave and enter: x at source and target, per edge and end."""
    nodes = picture.sketch.nodes
    ends: dict[tuple[int, int], list[tuple[float, int]]] = collections.defaultdict(list)
    for number, chain in picture.grid.chains.items():
        ends[chain[0], 1].append((picture.x[chain[1]], number))
        ends[chain[-1], 0].append((picture.x[chain[-2]], number))
    ports = {}
    for (node, side), edges in ends.items():
        _, top, width, height = picture.box(node)
        room = 0.0 if nodes[node].kind == "join" else min(16.0, (width - 48) / max(1, len(edges) - 1))
        for place, (_, number) in enumerate(sorted(edges)):
            x = picture.x[node] + room * (place - (len(edges) - 1) / 2)
            ports[number, side] = (x, top + height if side else top)
    return ports


def _chain_path(picture: _Picture, number: int, ports: Mapping[tuple[int, int], tuple[float, float]]) -> str:
    """The path of an edge that goes through rows: curves in the gaps, straight within rows."""
    edge = picture.sketch.edges[number]
    chain = picture.grid.chains[number]
    first = picture.layers.row[edge.source]
    x, y = ports[number, 1]
    path = f"M{_number(x)} {_number(y)}"
    for step, point in enumerate(chain[1:], start=1):
        row = first + step
        last = step == len(chain) - 1
        to_x, to_y = ports[number, 0] if last else (picture.x[point], picture.y[row])
        if picture.band(row) != picture.band(row - 1):
            path += _gutter_path(picture, number, picture.band(row), to_x) + f"V{_number(to_y)}"
        elif abs(to_x - x) < 0.5:
            path += f"L{_number(to_x)} {_number(to_y)}"
        else:
            middle = (y + to_y) / 2
            path += "C" + " ".join(map(_number, (x, middle, to_x, middle, to_x, to_y)))
        if not last:
            to_y += picture.heights[row]
            path += f"V{_number(to_y)}"
        x, y = to_x, to_y
    return path


def _gutter_path(picture: _Picture, crossing: int, band: int, x: float) -> str:
    """From below one column, through the gutter, to ``x`` above the next column."""
    place = picture.gutters[band].index(crossing)
    lanes = [r.lane + 1 for r in picture.rails if band in _bands_of_rail(picture, r)]
    gutter = picture.left[band] - 30 - _LANE * (place + max(lanes, default=0))
    lower = picture.bottom[band - 1] + 12 + _LANE * place
    upper = picture.top[band] - 12 - _LANE * place
    return f"V{_number(lower)}H{_number(gutter)}V{_number(upper)}H{_number(x)}"


def _rail_paths(picture: _Picture, number: int) -> tuple[str, list[str]]:
    """The path of a rail with its connection to the hub, and the path of the tap of each of its edges."""
    rail = picture.rails[number]
    taps = _taps(picture, rail)
    heights: dict[int, list[float]] = collections.defaultdict(list)
    places = []
    for node, row, gap in taps:
        band = picture.band(row)
        y = picture.tracks[band, gap, number]
        heights[band].append(y)
        places.append((band, y, node))
    bands = _bands_of_rail(picture, rail)
    trunk = ""
    for band in bands:
        x = picture.lane_x(band, rail)
        ends = heights[band] + [picture.bottom[band]] * (band != bands[-1])
        starts = heights[band] + [picture.top[band]] * (band != bands[0])
        low, high = min(starts), max(ends)
        # The last tap of a trunk bends away from it.
        low += _RADIUS if band == bands[0] else 0
        high -= _RADIUS if band == bands[-1] else 0
        if band != bands[0]:
            previous = picture.lane_x(band - 1, rail)
            trunk += f"M{_number(previous)} {_number(picture.bottom[band - 1])}"
            trunk += _gutter_path(picture, ~number, band, x) + f"V{_number(low)}"
        if high > low:
            trunk += f"M{_number(x)} {_number(low)}V{_number(high)}"
    order = [(band, y) for band, y, _ in places]
    first, last = min(order), max(order)
    paths = []
    for place, (band, y, node) in enumerate(places):
        upwards = rail.leaves_hub == (place == 0)  # Whether the node lies above its gap.
        if (band, y) == first == last:
            bends = [0]
        elif (band, y) == first:
            bends = [1]
        elif (band, y) == last:
            bends = [-1]
        elif place == 0:
            bends = [-1, 1]
        else:
            bends = [-1 if order[0] < (band, y) else 1]
        paths.append(_tap_path(picture, node, picture.lane_x(band, rail), y, upwards, bends))
    trunk += paths[0]
    return trunk, paths[1:]


def _tap_path(
    picture: _Picture, node: int, lane: float, y: float, upwards: bool, bends: Iterable[int]
) -> str:
    """From a rail at ``lane`` along the track at ``y`` to a node; bends say where the rail goes on."""
    left, top, width, height = picture.box(node)
    port = picture.x[node] if picture.sketch.nodes[node].kind == "join" else left + min(14.0, width / 4)
    turn = -_RADIUS if upwards else _RADIUS
    end = top + height if upwards else top
    path = ""
    for bend in bends:
        path += f"M{_number(lane)} {_number(y + bend * _RADIUS)}Q{_number(lane)} {_number(y)} "
        path += f"{_number(lane + _RADIUS)} {_number(y)}"
    return (
        f"{path}H{_number(port - _RADIUS)}Q{_number(port)} {_number(y)} {_number(port)} {_number(y + turn)}"
        f"V{_number(end)}"
    )


# -------------------------------------------------------------------------------------------------- writing


def _render(picture: _Picture, title: str) -> str:
    legend, width, lift = _legend(picture)
    width = max(width, picture.width, 56 + 9.4 * len(title))
    body = [
        *(_frame_element(*frame) for frame in picture.frames),
        *_rail_elements(picture),
        *_chain_elements(picture),
        *(_node_element(picture, node) for node in range(len(picture.sketch.nodes))),
    ]
    size = f"{_number(width)} {_number(picture.height + lift)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="fx-graph" viewBox="0 0 {size}" '
            f'width="{_number(width)}" height="{_number(picture.height + lift)}" role="img">',
            f"<title>{_escaped(title)}</title>",
            f"<style>{_style_sheet()}</style>",
            f"<defs>{''.join(_marker(role) for role in _EDGE_COLOURS)}</defs>",
            '<rect class="fx-paper" width="100%" height="100%"/>',
            f'<text class="fx-title" x="{_number(_MARGIN)}" y="34">{_escaped(title)}</text>',
            *legend,
            f'<g transform="translate(0 {_number(lift)})">',
            *body,
            "</g>",
            "</svg>\n",
        ]
    )


def _legend(picture: _Picture) -> tuple[list[str], float, float]:
    """The legend's elements, their width, and by how much a second line pushes the drawing down."""
    nodes = picture.sketch.nodes
    samples = {
        "space": '<rect class="fx-shape fx-{}" width="26" height="14" rx="7"/>',
        "parameter": '<rect class="fx-shape fx-{}" width="26" height="14" rx="2"/>',
        "join": '<circle class="fx-shape fx-{}" cx="13" cy="7" r="7"/>',
    }
    items = []
    for kind, sample in samples.items():
        meanings = {node.meaning: node.style for node in nodes if node.kind == kind}
        items += [(sample.format(style), meaning) for meaning, style in meanings.items()]
        if kind == "space" and any(node.dashed for node in nodes):
            items.append((sample.format("permutation fx-dashed"), "may differ per unit of an outer space"))
    roles = dict.fromkeys(edge.role for edge in picture.sketch.edges)
    texts = {"writes": "writes", "reads": "is read by", "joins": "joins"}
    for role in (role for role in texts if role in roles):
        line = f'<path class="fx-edge fx-{role}" d="M0 7H25" marker-end="url(#fx-arrow-{role})"/>'
        items.append((line, texts[role]))
    elements, x, y, widest = ['<g class="fx-legend">'], _MARGIN, 54.0, 0.0
    for shape, text in items:
        width = 34 + 5.9 * len(text) + 22
        if x > _MARGIN and x + width > max(picture.width, 800.0):
            x, y = _MARGIN, y + 24
        place = f"translate({_number(x)} {_number(y)})"
        elements.append(f'<g transform="{place}">{shape}<text x="34" y="11">{_escaped(text)}</text></g>')
        x += width
        widest = max(widest, x)
    return [*elements, "</g>"], widest, y - 78 if y > 78 else 0.0


def _frame_element(name: str, left: float, top: float, width: float, height: float) -> str:
    return (
        f'<g class="fx-frame"><rect x="{_number(left)}" y="{_number(top)}" width="{_number(width)}" '
        f'height="{_number(height)}" rx="10"/><text x="{_number(left + 8)}" y="{_number(top - 4)}">'
        f"{_escaped(name)}</text></g>"
    )


def _rail_elements(picture: _Picture) -> list[str]:
    elements = []
    for number, rail in enumerate(picture.rails):
        trunk, taps = _rail_paths(picture, number)
        hub = picture.sketch.nodes[rail.hub].key
        arrow = "" if rail.leaves_hub else _arrow(rail.role)
        elements.append(
            f'<path class="fx-edge fx-trunk fx-{rail.role}" d="{trunk}"{arrow}>'
            f"<title>{_escaped(f'{rail.role}: {_name(hub)}')}</title></path>"
        )
        arrow = _arrow(rail.role) if rail.leaves_hub else ""
        for edge, tap in zip(rail.edges, taps, strict=True):
            elements.append(_edge_element(picture.sketch, edge, tap, arrow))
    return elements


def _chain_elements(picture: _Picture) -> list[str]:
    ports = _ports(picture)
    return [
        _edge_element(
            picture.sketch, edge, _chain_path(picture, edge, ports), _arrow(picture.sketch.edges[edge].role)
        )
        for edge in picture.grid.chains
    ]


def _edge_element(sketch: _Sketch, number: int, path: str, arrow: str) -> str:
    edge = sketch.edges[number]
    source, target = sketch.nodes[edge.source].key, sketch.nodes[edge.target].key
    return (
        f'<path class="fx-edge fx-{edge.role}" data-source="{_escaped(source)}" '
        f'data-target="{_escaped(target)}" d="{path}"{arrow}><title>{_escaped(edge.tooltip)}</title></path>'
    )


def _node_element(picture: _Picture, number: int) -> str:
    node = picture.sketch.nodes[number]
    left, top, width, height = picture.box(number)
    dashed = " fx-dashed" if node.dashed else ""
    shape_class = f'class="fx-shape fx-{node.style}{dashed}"'
    centre = left + width / 2
    if node.kind == "join":
        shape = f'<circle {shape_class} cx="{_number(centre)}" cy="{_number(top + height / 2)}" r="12"/>'
    else:
        radius = height / 2 if node.kind == "space" else 5
        shape = (
            f'<rect {shape_class} x="{_number(left)}" y="{_number(top)}" width="{_number(width)}" '
            f'height="{_number(height)}" rx="{_number(radius)}"/>'
        )
    # The rest of the lines of a space and of a join is in its tooltip and in the legend.
    shown = {"join": 1, "space": 2}.get(node.kind, len(node.lines))
    first, step = {"join": (17, 0), "space": (18, 15)}.get(node.kind, (17, 14))
    lines = [
        f'<text class="fx-{style}" x="{_number(centre)}" y="{_number(top + first + step * place)}">'
        f"{_escaped(text)}</text>"
        for place, (style, text) in enumerate(node.lines[:shown])
    ]
    return (
        f'<g class="fx-node" data-kind="{node.kind}" data-key="{_escaped(node.key)}">'
        f"<title>{_escaped(node.tooltip)}</title>{shape}{''.join(lines)}</g>"
    )


def _style_sheet() -> str:
    """Plain rules without variables, which viewers other than browsers understand as well."""
    light = _colour_rules(0, paper="#ffffff", ink="#1c2430", faint="#64707f", frame="#f5f7fa", line="#dfe4ea")
    dark = _colour_rules(1, paper="#0d1117", ink="#e6ebf2", faint="#94a0af", frame="#131a23", line="#263040")
    fixed = (
        ".fx-graph text{font-family:Inter,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:11px}"
        ".fx-node text{text-anchor:middle}"
        ".fx-graph .fx-path,.fx-graph .fx-detail,.fx-graph .fx-name"
        "{font-family:ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:10px}"
        ".fx-graph .fx-name{font-size:12px;font-weight:600}.fx-graph .fx-size{font-size:13px;font-weight:600}"
        ".fx-graph .fx-symbol{font-size:15px;font-weight:600}"
        ".fx-graph .fx-title{font-size:15px;font-weight:600}"
        ".fx-shape{stroke-width:1.4}.fx-dashed{stroke-dasharray:5 3}"
        ".fx-edge{fill:none;stroke-width:1.5;stroke-opacity:.85}"
        ".fx-trunk{stroke-width:2.4;stroke-linejoin:round}.fx-edge.fx-joins{stroke-width:2.4}"
        ".fx-edge:hover{stroke-width:3.5;stroke-opacity:1}"
    )
    return f"{fixed}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _colour_rules(dark: int, paper: str, ink: str, faint: str, frame: str, line: str) -> str:
    rules = [
        f".fx-paper{{fill:{paper}}}.fx-graph text{{fill:{ink}}}",
        f".fx-graph .fx-path,.fx-graph .fx-detail,.fx-graph .fx-frame text{{fill:{faint}}}",
        f".fx-frame rect{{fill:{frame};stroke:{line}}}",
    ]
    for style, colours in _NODE_COLOURS.items():
        stroke, fill = colours[2 * dark : 2 * dark + 2]
        rules.append(f".fx-shape.fx-{style}{{stroke:{stroke};fill:{fill}}}")
    for role, strokes in _EDGE_COLOURS.items():
        rules.append(f".fx-edge.fx-{role}{{stroke:{strokes[dark]}}}.fx-head-{role}{{fill:{strokes[dark]}}}")
    return "".join(rules)


def _marker(role: str) -> str:
    return (
        f'<marker id="fx-arrow-{role}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="fx-head-{role}" d="M0 .6 7.6 4 0 7.4z"/>'
        "</marker>"
    )


def _arrow(role: str) -> str:
    return f' marker-end="url(#fx-arrow-{role})"'


def _number(value: float) -> str:
    """At most one decimal, which is finer than a pixel."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _escaped(text: str) -> str:
    """Escape for XML, whose version 1.0 has no way to write most control characters."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def _dot_quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _mermaid_escaped(text: str) -> str:
    codes = {"#": "#35;", "&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "`": "#96;"}
    return "".join(codes.get(character, character) for character in text).replace("\n", "<br/>")
