"""Drawings show everything, legibly, and the same way each time."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import networkx as nx
import pytest

import fxfusion
from fxfusion import drawing
from fxfusion.drawing import collapse_modules, from_json, to_dot, to_json, to_mermaid, to_svg
from fxfusion.flow import space_node
from fxfusion.plan import Symmetry
from tests import zoo

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "a<b>&\"'\\`#; ]]>\x00\n|é"


def add_space(graph: nx.MultiDiGraph, name: str, size: int, scope: tuple[str, ...] = ()) -> None:
    graph.add_node(name, kind="space", size=size, symmetry="permutation", scope=list(scope))


def add_parameters(graph: nx.MultiDiGraph, module: str, outputs: int, inputs: int = 0) -> list[str]:
    """A module's weight and bias; of a normalisation without inputs."""
    names = [f"{module}.weight", f"{module}.bias"]
    graph.add_node(names[0], kind="parameter", shape=[outputs, inputs] if inputs else [outputs])
    graph.add_node(names[1], kind="parameter", shape=[outputs])
    return names


def connect(graph: nx.MultiDiGraph, sources: list[str], targets: list[str], role: str) -> None:
    for source, target in itertools.product(sources, targets):
        places = {} if role == "joins" else {"axis": int(role == "reads"), "through": ["layer_norm"]}
        graph.add_edge(source, target, role=role, **places)


def vision_transformer(blocks: int, width: int = 192) -> nx.MultiDiGraph:
    graph = nx.MultiDiGraph()
    stream = "cls_token[2]"
    add_space(graph, stream, width)
    graph.add_node("cls_token", kind="parameter", shape=[1, 1, width])
    graph.add_node("add", kind="join", operator="aten.add.Tensor", node="add")
    connect(graph, ["cls_token", *add_parameters(graph, "patch_embed.proj", width, 768)], ["add"], "writes")
    last = "add"
    for block in range(blocks):
        for number, (inner, outer, normalisation) in enumerate(
            [("attn.qkv", "attn.proj", "norm1"), ("mlp.fc1", "mlp.fc2", "norm2")]
        ):
            prefix = f"blocks.{block}."
            connect(graph, [stream], add_parameters(graph, prefix + normalisation, width), "reads")
            names = add_parameters(graph, prefix + inner, 4 * width, width)
            connect(graph, [stream], names[:1], "reads")
            hidden = [names[0] + "[0]"]
            add_space(graph, hidden[0], 4 * width)
            if number == 0:
                hidden.append(names[0] + "[0].0.1")
                add_space(graph, hidden[1], 64, (hidden[0],))
            connect(graph, names, hidden, "writes")
            names = add_parameters(graph, prefix + outer, width, 4 * width)
            connect(graph, hidden, names[:1], "reads")
            join = f"add_{2 * block + number + 1}"
            graph.add_node(join, kind="join", operator="aten.add.Tensor", node=join)
            connect(graph, [last], [join], "joins")
            connect(graph, names, [join], "writes")
            last = join
    connect(graph, [last], [stream], "joins")
    connect(graph, [stream], add_parameters(graph, "norm", width), "reads")
    connect(graph, [stream], add_parameters(graph, "head", 1000, width)[:1], "reads")
    return graph


def multilayer_perceptron(layers: int = 3) -> nx.MultiDiGraph:
    graph = nx.MultiDiGraph()
    for layer in range(layers):
        names = add_parameters(graph, f"layers.{layer}", 64, 64)
        if layer:
            connect(graph, [f"layers.{layer - 1}.weight[0]"], names[:1], "reads")
        if layer < layers - 1:
            add_space(graph, names[0] + "[0]", 64)
            connect(graph, names, [names[0] + "[0]"], "writes")
    return graph


def tied_autoencoder() -> nx.MultiDiGraph:
    graph = nx.MultiDiGraph()
    graph.add_node("weight", kind="parameter", shape=[8, 4])
    add_space(graph, "weight[0]", 8)
    connect(graph, ["weight"], ["weight[0]"], "writes")
    connect(graph, ["weight[0]"], ["weight"], "reads")
    return graph


def mixture(experts: int = 64) -> nx.MultiDiGraph:
    """One space that very many parameters write and read."""
    graph = nx.MultiDiGraph()
    add_space(graph, "hidden", 16)
    for expert in range(experts):
        connect(graph, add_parameters(graph, f"up.{expert}", 16, 8), ["hidden"], "writes")
        connect(graph, ["hidden"], add_parameters(graph, f"down.{expert}", 8, 16), "reads")
    return graph


GRAPHS = {
    "empty": nx.MultiDiGraph(),
    "perceptron": multilayer_perceptron(),
    "deep perceptron": multilayer_perceptron(60),
    "transformer of 2": vision_transformer(2),
    "transformer of 12": vision_transformer(12),
    "tied": tied_autoencoder(),
    "mixture": mixture(),
}


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of every node, by its key."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if group.get("class") != "fx-node":
            continue
        shape = group.find(f"{SVG}rect")
        if shape is not None:
            left, top, width, height = (float(shape.get(name, "")) for name in ("x", "y", "width", "height"))
        else:
            circle = group.find(f"{SVG}circle")
            assert circle is not None
            x, y, radius = (float(circle.get(name, "")) for name in ("cx", "cy", "r"))
            left, top, width, height = x - radius, y - radius, 2 * radius, 2 * radius
        found[group.get("data-key", "")] = (left, top, left + width, top + height)
    return found


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_and_edge_appears_once(name: str, collapse: bool) -> None:
    graph = collapse_modules(GRAPHS[name]) if collapse else GRAPHS[name]
    svg = to_svg(GRAPHS[name], collapse)
    assert set(boxes(svg)) == set(graph)
    root = ElementTree.fromstring(svg)
    drawn = [(path.get("data-source"), path.get("data-target")) for path in root.iter(f"{SVG}path")]
    edges = {(source, target, role) for source, target, role in graph.edges(data="role")}
    assert sorted(pair for pair in drawn if pair[0]) == sorted(edge[:2] for edge in edges)
    titles = " ".join(title.text or "" for title in root.iter(f"{SVG}title"))
    for key, attributes in GRAPHS[name].nodes(data=True):
        shown = key if attributes["kind"] != "parameter" or not collapse else key.rpartition(".")[2]
        assert shown in titles


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_lie_apart_and_inside(name: str, collapse: bool) -> None:
    svg = to_svg(GRAPHS[name], collapse)
    view = [float(number) for number in ElementTree.fromstring(svg).get("viewBox", "").split()]
    found = boxes(svg)
    for box in found.values():
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= view[2]
        assert box[3] <= view[3]
    for first, second in itertools.combinations(found.values(), 2):
        beside = first[2] <= second[0] or second[2] <= first[0]
        assert beside or first[3] <= second[1] or second[3] <= first[1]


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_edges_stay_inside_and_touch_their_target(name: str, collapse: bool) -> None:
    svg = to_svg(GRAPHS[name], collapse)
    root, found = ElementTree.fromstring(svg), boxes(svg)
    width = float(root.get("width", "nan"))
    for path in root.iter(f"{SVG}path"):
        if path.get("data-target") is None:
            continue
        drawn = path.get("d", "")
        assert all(0 <= float(x) <= width for x in re.findall(r"H(-?[\d.]+)", drawn))
        end = float(re.findall(r"-?[\d.]+", drawn)[-1])
        # A tap of a space's rail is drawn from the rail, so it ends at the parameter whatever its role.
        ends = [found[path.get(f"data-{side}", "")] for side in ("target", "source")]
        assert any(abs(end - edge) < 0.11 for edge in (ends[0][1], ends[1][3]))


@pytest.mark.parametrize("name", GRAPHS)
def test_straight_parts_of_edges_pass_no_node(name: str) -> None:
    svg = to_svg(GRAPHS[name])
    segments: list[tuple[float, float, float, float]] = []
    for path in ElementTree.fromstring(svg).iterfind(f"{SVG}g/{SVG}path"):
        x = y = 0.0
        for command, text in re.findall(r"([MHVLCQ])([^MHVLCQ]*)", path.get("d", "")):
            before, numbers = (x, y), [float(number) for number in text.split()]
            x = x if command == "V" else numbers[-2:][0]
            y = y if command == "H" else numbers[-1]
            if command in "HVL":
                segments.append((min(before[0], x), min(before[1], y), max(before[0], x), max(before[1], y)))
    found = list(boxes(svg).values())
    assert segments or not GRAPHS[name].number_of_edges()
    for left, top, right, bottom in segments:
        for box in found:
            apart = right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top
            assert apart


def test_writers_lie_above_their_space_and_readers_below() -> None:
    graph = multilayer_perceptron(6)
    found = boxes(to_svg(graph))
    for source, target in graph.edges():
        assert found[source][3] < found[target][1]


def test_blocks_follow_each_other() -> None:
    found = boxes(to_svg(vision_transformer(3), collapse=False))
    modules = [f"blocks.{block}.{module}" for block in range(3) for module in ("attn.qkv", "mlp.fc1")]
    tops = [found[name][1] for name in ("cls_token", "add", *(f"{module}.weight" for module in modules))]
    assert tops == sorted(tops)
    assert found["blocks.1.norm1.weight"][1] == found["blocks.1.attn.qkv.weight"][1]


def test_tall_drawings_are_broken_into_columns() -> None:
    view = ElementTree.fromstring(to_svg(vision_transformer(40))).get("viewBox", "").split()
    assert 0.5 < float(view[2]) / float(view[3]) < 4


def test_large_graphs_are_collapsed_by_default() -> None:
    large = vision_transformer(12)
    assert large.number_of_nodes() > drawing.COLLAPSE_ABOVE
    assert to_svg(large) == to_svg(large, collapse=True) != to_svg(large, collapse=False)
    small = vision_transformer(2)
    assert to_svg(small) == to_svg(small, collapse=False)


def test_collapsing_keeps_edges_and_leaves_the_graph_alone() -> None:
    graph = vision_transformer(1)
    before = to_json(graph)
    collapsed = collapse_modules(graph)
    assert to_json(graph) == before
    assert collapsed.number_of_edges() == graph.number_of_edges()
    assert collapsed.nodes["blocks.0.attn.qkv.*"]["members"] == [["weight", [768, 192]], ["bias", [768]]]
    assert collapsed.nodes["cls_token"] == graph.nodes["cls_token"]
    tooltip = "blocks.0.attn.qkv.bias, axis 0 writes blocks.0.attn.qkv.weight[0], through layer_norm"
    assert tooltip in to_svg(graph, collapse=True)


@pytest.mark.parametrize("name", GRAPHS)
def test_json_round_trip(name: str) -> None:
    graph = GRAPHS[name]
    assert nx.utils.graphs_equal(from_json(to_json(graph)), graph)
    assert list(from_json(to_json(graph))) == list(graph)
    assert to_svg(from_json(to_json(graph))) == to_svg(graph)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"directed": true, "multigraph": true}', to_json(nx.MultiDiGraph())[:-3]]
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        from_json(text)


def nasty_graph() -> nx.MultiDiGraph:
    graph = nx.MultiDiGraph()
    graph.add_node(NASTY, kind="parameter", shape=[])
    graph.add_node(NASTY + "[0]", kind="space", size=3, symmetry=NASTY, scope=[NASTY])
    graph.add_node(NASTY + "+", kind="join", operator=NASTY, node=NASTY)
    graph.add_edge(NASTY, NASTY + "+", role="writes", axis=0, through=[NASTY])
    graph.add_edge(NASTY + "+", NASTY + "[0]", role="joins")
    return graph


def test_svg_escapes() -> None:
    found = boxes(to_svg(nasty_graph()))
    assert len(found) == 3
    assert nx.utils.graphs_equal(from_json(to_json(nasty_graph())), nasty_graph())


def test_dot_escapes() -> None:
    dot = to_dot(nasty_graph())
    quoted = re.compile(r'"(?:[^"\\]|\\.)*"')
    # Outside of quoted strings nothing of the names is left.
    assert not set(quoted.sub("", dot)) & set('"<&`#|é\\')
    assert len(dot.splitlines()) == len(["{", "graph", "node", "edge", "}"]) + 3 + 2
    assert r"a<b>&\"'\\`#" in dot


def test_mermaid_escapes() -> None:
    text = to_mermaid(nasty_graph())
    for label in re.findall(r'"(.*)"', text):
        assert not set(label.replace("<br/>", "")) & set('"<>`')
    assert "a#lt;b#gt;#amp;#quot;'\\#96;#35;" in text
    assert len(re.findall(r"^  n\d --> n\d$", text, re.MULTILINE)) == 2


def test_dot_and_mermaid_name_every_node() -> None:
    graph = vision_transformer(2)
    dot, mermaid = to_dot(graph), to_mermaid(graph)
    for key in graph:
        assert f'"{key}"' in dot
        assert f'"{key}<br/>' in mermaid or f'"{key}"' in mermaid


def test_kinds_in_keys_are_not_shown() -> None:
    graph = nx.MultiDiGraph()
    add_space(graph, "space:fc.weight[0]", 3)
    svg = to_svg(graph)
    assert set(boxes(svg)) == {"space:fc.weight[0]"}
    assert ">fc.weight[0]<" in svg
    assert 'n0(["fc.weight[0]<br/>3 units, permutation"])' in to_mermaid(graph)


def test_unknown_kinds_and_roles_are_refused() -> None:
    graph = nx.MultiDiGraph()
    graph.add_node("x", kind="operator")
    with pytest.raises(ValueError, match="unknown kind 'operator'"):
        to_svg(graph)
    graph = tied_autoencoder()
    graph.add_edge("weight", "weight[0]", role="likes")
    with pytest.raises(ValueError, match="unknown role 'likes'"):
        to_dot(graph)


def test_same_drawing_in_every_process() -> None:
    """Sets of strings are ordered differently from process to process."""
    program = (
        "import sys; from fxfusion import drawing; graph = drawing.from_json(sys.stdin.read());"
        "print(drawing.to_svg(graph), drawing.to_dot(graph), drawing.to_mermaid(graph))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=to_json(vision_transformer(12)),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_two_streams_that_read_each_other_are_drawn() -> None:
    """Cycles through several spaces, as with encoders and decoders or tied weights."""
    graph = nx.MultiDiGraph()
    for stream in "ab":
        add_space(graph, stream, 8)
        graph.add_node(f"add_{stream}", kind="join", operator="aten.add.Tensor", node=f"add_{stream}")
        connect(graph, [f"add_{stream}"], [stream], "joins")
        connect(graph, add_parameters(graph, f"into_{stream}", 8, 8), [f"add_{stream}"], "writes")
    connect(graph, ["a"], ["into_b.weight", "into_a.weight"], "reads")
    connect(graph, ["b"], ["into_a.weight", "into_b.weight"], "reads")
    assert len(boxes(to_svg(graph))) == graph.number_of_nodes()


def test_larger_groups_are_drawn_as_what_they_are() -> None:
    plan = fxfusion.plan(zoo.build("hf_vit"), *zoo.inputs("hf_vit"), symmetry="largest")
    assert {space.symmetry for space in plan.spaces} > {Symmetry.CENTRED, Symmetry.LINEAR}
    for space in plan.spaces:
        assert plan.graph.nodes[space_node(space.name)]["symmetry"] == space.symmetry.value
    assert "orthogonal, mean fixed" in drawing.to_mermaid(plan.graph)
    assert {item.value for item in Symmetry} == set(drawing._SYMMETRY_STYLES)
    smaller = fxfusion.plan(zoo.build("hf_vit"), *zoo.inputs("hf_vit"))
    assert {smaller.graph.nodes[space_node(space.name)]["symmetry"] for space in smaller.spaces} == {
        "permutation"
    }
