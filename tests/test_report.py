"""A report says what happened, in a form that can be trusted to arrive whole."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import math
import os
import pathlib
import re

import networkx as nx
import pytest
import rich.console

from fxfusion.plan import Limit
from fxfusion.report import FusionReport, SpaceRow


def make_report(**changes: object) -> FusionReport:
    graph = nx.MultiDiGraph()
    graph.add_node("fc1.weight", kind="parameter", shape=[64, 32])
    graph.add_node("fc1.weight[0]", kind="space", size=64, symmetry="permutation", scope=[])
    graph.add_edge("fc1.weight", "fc1.weight[0]", role="writes", axis=0, through=[])
    rows = (
        SpaceRow("fc1.weight[0]", 64, "permutation", (), ("fc1.weight",), ("fc2.weight", "x"), 2.0, 0.5, 0.9),
        SpaceRow("unmeasured", 3, "orthogonal", ("fc1.weight[0]",), (), (), math.nan, math.nan, 0.0),
    )
    report = FusionReport(
        model="<script>alert(1)</script>",
        parents=("first", "second"),
        weights=(0.25, 0.75),
        options={"method": "joint"},
        covered=0.983,
        certified=(3e-15, 2e-15),
        spaces=rows,
        limits=(Limit("cumsum", "aten.cumsum.default", "order <matters>", "model.py:42", ("pos_embed",)),),
        graph=graph,
        seconds={"align": 1.25},
        versions={"torch": "2.15"},
        notes=("a note",),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_table_shows_every_space() -> None:
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(make_report().table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "fc1.weight[0]" in text
    assert "-75.0 %" in text
    assert "90.0 %" in text
    assert re.search(r"unmeasured.*orthogonal per unit of fc1\.weight\[0\].*–", text)


def test_json_holds_everything_but_timings() -> None:
    report = make_report()
    content = json.loads(report.to_json())
    fields = {field.name for field in dataclasses.fields(report)}
    assert set(content) == fields - {"seconds"}
    assert json.loads(report.to_json(timings=True))["seconds"] == {"align": 1.25}
    assert content["spaces"][1]["cost_before"] is None
    assert content["limits"][0]["source"] == "model.py:42"


def test_json_does_not_depend_on_timings() -> None:
    assert make_report(seconds={"align": 9.0}).to_json() == make_report().to_json()


def test_html_is_well_formed_and_complete() -> None:
    page = Page(make_report().to_html())
    assert page.open == []
    text = " ".join(page.text)
    for expected in ("fc1.weight[0]", "98.3 %", "3.0e-15", "order <matters>", "model.py:42", "a note"):
        assert expected in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 1


def test_html_escapes_names() -> None:
    page = Page(make_report().to_html())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "Fusion of <script>alert(1)</script>" in page.text


def test_html_loads_nothing() -> None:
    text = make_report().to_html()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "xlink:href", "action"} & set(attributes)
    # The name of a namespace is not an address that is fetched.
    assert "//" not in re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", text)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_html_bars_are_proportional() -> None:
    text = make_report().to_html()
    assert 'class="before" style="width:100.0%"' in text
    assert 'class="after" style="width:25.0%"' in text
    assert 'class="moved" style="width:90.0%"' in text


@pytest.mark.parametrize(
    "changes",
    [
        {"spaces": (), "limits": (), "certified": (), "graph": nx.MultiDiGraph(), "seconds": {}, "notes": ()},
        {"certified": (math.nan, math.inf), "covered": math.nan},
        {"spaces": (SpaceRow("s", 1, "permutation", (), (), (), 0.0, 0.0, 0.0),)},
        {"spaces": (SpaceRow("s", 1, "permutation", (), (), (), -2.0, -3.0, 1.5),)},
    ],
)
def test_incomplete_reports_are_written(changes: dict[str, object]) -> None:
    report = make_report(**changes)
    assert Page(report.to_html()).open == []
    json.loads(report.to_json(timings=True))
    assert report.table().row_count == len(report.spaces)


def test_saved_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    report = make_report()
    assert report.save_html(target) == target
    assert target.read_text(encoding="utf-8") == report.to_html()

    def no_space_left(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space_left)
    with pytest.raises(OSError, match="no space left"):
        make_report(model="other").save_html(target)
    assert target.read_text(encoding="utf-8") == report.to_html()
    assert os.listdir(tmp_path) == ["report.html"]
