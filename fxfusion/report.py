"""What a user needs to trust a fusion: as a table, as JSON, and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import networkx as nx
import rich.table
import rich.text

from fxfusion import atomic, drawing
from fxfusion.plan import Limit

__all__ = ["FusionReport", "SpaceRow"]


@dataclasses.dataclass(frozen=True)
class SpaceRow:
    """What happened to one space.

    Attributes
    ----------
    name : str
        The space's name.
    size : int
        Number of units.
    symmetry : str
        The group that may act on the units.
    scope : tuple of str
        Names of the outer spaces whose every unit may move this space's units differently.
    writers, readers : tuple of str
        Parameters that write and that read the space.
    cost_before, cost_after : float
        Mean ground cost, over the parents other than the target, of pairing every unit with the unit at
        the same place, and of the solved transport, in the same unit. Not a number where not measured.
    moved : float
        Fraction of units that the transport moves, in [0, 1]; of a soft transport, one less the mean of
        the diagonal mass.
    """

    name: str
    size: int
    symmetry: str
    scope: tuple[str, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    cost_before: float
    cost_after: float
    moved: float


@dataclasses.dataclass(frozen=True, eq=False)
class FusionReport:
    """The record of one fusion.

    Attributes
    ----------
    model : str
        The architecture.
    parents : tuple of str
        Names of the parents, the target first.
    weights : tuple of float
        Weight of every parent in the mean.
    options : dict of str to str
        Options of the fusion, by name.
    covered : float
        Fraction of parameter elements with at least one free axis, in [0, 1].
    certified : tuple of float
        Per parent, the largest relative error of its outputs under a random element of the symmetry group.
    spaces : tuple of SpaceRow
        The spaces, in graph order.
    limits : tuple of Limit
        What was fixed, and why.
    graph : networkx.MultiDiGraph
        The alignment flow graph.
    seconds : dict of str to float
        Duration of every stage, in seconds.
    versions : dict of str to str
        Versions of the libraries that took part.
    notes : tuple of str
        Anything else that a user should know.

    Examples
    --------
    >>> import networkx as nx
    >>> writers, readers = ("fc1.weight",), ("fc2.weight",)
    >>> row = SpaceRow("fc1.weight[0]", 64, "permutation", (), writers, readers, 2.0, 0.5, 0.9)
    >>> report = FusionReport(
    ...     "MLP", ("a", "b"), (0.5, 0.5), {}, 1.0, (0.0, 0.0), (row,), (), nx.MultiDiGraph(), {}, {}
    ... )
    >>> report.table().row_count
    1
    """

    model: str
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    options: dict[str, str]
    covered: float
    certified: tuple[float, ...]
    spaces: tuple[SpaceRow, ...]
    limits: tuple[Limit, ...]
    graph: nx.MultiDiGraph
    seconds: dict[str, float]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def table(self) -> rich.table.Table:
        """Summarise the spaces for a terminal.

        Returns
        -------
        rich.table.Table
            One row per space.
        """
        title = rich.text.Text(f"{self.model}: {_summary(self)}")
        table = rich.table.Table(title=title, title_justify="left")
        table.add_column("space", overflow="fold")
        table.add_column("size", justify="right")
        table.add_column("symmetry")
        for heading in ("cost before", "cost after", "change", "moved"):
            table.add_column(heading, justify="right")
        for row in self.spaces:
            # Text, because rich would take the "[0]" of a name for markup.
            costs = _measure(row.cost_before), _measure(row.cost_after)
            cells = [row.name, str(row.size), _symmetry(row), *costs, _change(row), _percent(row.moved)]
            table.add_row(*map(rich.text.Text, cells))
        return table

    def to_json(self, timings: bool = False) -> str:
        """Write everything as JSON.

        Parameters
        ----------
        timings : bool
            Whether to include ``seconds``, without which the same fusion gives the same bytes.

        Returns
        -------
        str
            The JSON text. Numbers that are not finite are ``null``. Element ``graph`` is in the format of
            :func:`fxfusion.drawing.to_json`.
        """
        content = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("spaces", "limits", "graph", "seconds")
        }
        content["spaces"] = [dataclasses.asdict(row) for row in self.spaces]
        content["limits"] = [dataclasses.asdict(limit) for limit in self.limits]
        if timings:
            content["seconds"] = self.seconds
        content["graph"] = json.loads(drawing.to_json(self.graph))
        return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """Write everything as one page that needs no network and no other file.

        Returns
        -------
        str
            The HTML document.
        """
        sections = [
            _cards(self),
            _section("Notes", _list(self.notes)) if self.notes else "",
            _section(f"Spaces ({len(self.spaces)})", _space_table(self.spaces)),
            _section(f"Fixed, and why ({len(self.limits)})", _limit_table(self.limits)),
            _section("Alignment flow graph", _graph_view(self.graph)),
            _section("Options and versions", _facts({**self.options, **self.versions})),
            _section("Seconds", _facts({name: f"{value:.2f}" for name, value in self.seconds.items()})),
            f"<details><summary>JSON</summary><pre>{_text(self.to_json(timings=True))}</pre></details>",
        ]
        title = _text(f"Fusion of {self.model}")
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8">',
                # The browser itself then enforces that nothing is loaded from elsewhere.
                '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
                "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{title}</title><style>{_STYLE}</style></head>",
                f"<body><h1>{title}</h1>",
                *filter(None, sections),
                f"<script>{_SCRIPT}</script></body></html>\n",
            ]
        )

    def save_html(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write :meth:`to_html` to a file, whole or not at all.

        Parameters
        ----------
        path : str or os.PathLike
            The target, whose folder must exist.

        Returns
        -------
        pathlib.Path
            ``path``.

        Raises
        ------
        OSError
            If it cannot be written; what was there before stays as it was.
        """
        return atomic.write_text(path, self.to_html())


# -------------------------------------------------------------------------------------------------- numbers


def _summary(report: FusionReport) -> str:
    counts = f"{_count(len(report.parents), 'parent')}, {_count(len(report.spaces), 'space')}"
    return f"{counts}, {_percent(report.covered)} of the parameters covered"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _symmetry(row: SpaceRow) -> str:
    return row.symmetry.replace("_", " ") + (f" per unit of {', '.join(row.scope)}" if row.scope else "")


def _measure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _relative(row: SpaceRow) -> float:
    """Change of the cost as a fraction of what it was."""
    change = row.cost_after - row.cost_before
    return change / abs(row.cost_before) if row.cost_before else (0.0 if change == 0 else math.nan)


def _change(row: SpaceRow) -> str:
    relative = _relative(row)
    return f"{100 * relative:+.1f} %" if math.isfinite(relative) else "–"


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# ----------------------------------------------------------------------------------------------------- HTML


def _text(value: object) -> str:
    return escape(str(value))


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>{content}</section>"


def _cards(report: FusionReport) -> str:
    certified = [error for error in report.certified if math.isfinite(error)]
    whole = len(certified) == len(report.certified) > 0
    parents = [
        f"{name} · {_measure(weight)}" for name, weight in zip(report.parents, report.weights, strict=True)
    ]
    changes = [_relative(row) for row in report.spaces]
    measured = [change for change in changes if math.isfinite(change)]
    mean_change = sum(measured) / len(measured) if measured else math.nan
    cards = [
        ("Parents, weight", str(len(report.parents)), parents),
        ("Parameters covered", _percent(report.covered), [_count(len(report.limits), "limit")]),
        (
            "Certified, largest relative error",
            f"{max(certified):.1e}" if whole else "not for all" if report.certified else "no",
            [f"{error:.1e}" if math.isfinite(error) else "–" for error in report.certified],
        ),
        (
            "Cost, mean change",
            f"{100 * mean_change:+.1f} %" if measured else "–",
            [f"{len(measured)} of {_count(len(report.spaces), 'space')} measured"],
        ),
        ("Seconds", f"{sum(report.seconds.values()):.1f}", []),
    ]
    return '<div class="cards">' + "".join(map(_card, cards)) + "</div>"


def _card(card: tuple[str, str, Sequence[str]]) -> str:
    heading, value, details = card
    lines = "".join(f"<li>{_text(line)}</li>" for line in details)
    return f'<div class="card"><h2>{_text(heading)}</h2><strong>{_text(value)}</strong><ul>{lines}</ul></div>'


def _space_table(rows: Sequence[SpaceRow]) -> str:
    headings = ("space", "size", "symmetry", "written by", "read by", "cost before, after", "change", "moved")
    return _table(headings, (_space_cells(row) for row in rows))


def _space_cells(row: SpaceRow) -> list[tuple[object, str]]:
    return [
        (row.name, f"<code>{_text(row.name)}</code>"),
        (row.size, str(row.size)),
        (row.symmetry, _text(_symmetry(row))),
        (len(row.writers), _names(row.writers)),
        (len(row.readers), _names(row.readers)),
        (row.cost_before, _cost_bars(row)),
        (_relative(row), f'<span class="change">{_change(row)}</span>'),
        (row.moved, _bar(row.moved, "moved", _percent(row.moved))),
    ]


def _names(names: Sequence[str]) -> str:
    if len(names) < 2:
        return f"<code>{_text(''.join(names))}</code>"
    return f"<details><summary>{len(names)}</summary>{_list(names)}</details>"


def _cost_bars(row: SpaceRow) -> str:
    largest = max((abs(c) for c in (row.cost_before, row.cost_after) if math.isfinite(c)), default=0.0) or 1.0
    bars = (("before", row.cost_before), ("after", row.cost_after))
    return "".join(_bar(abs(cost) / largest, style, _measure(cost)) for style, cost in bars)


def _bar(fraction: float, style: str, label: str) -> str:
    width = 100 * min(1.0, max(0.0, fraction)) if math.isfinite(fraction) else 0.0
    bar = f'<span class="bar"><i class="{style}" style="width:{width:.1f}%"></i></span>'
    return f'<div class="measure">{bar}<span>{_text(label)}</span></div>'


def _limit_table(limits: Sequence[Limit]) -> str:
    if not limits:
        return "<p>Nothing but inputs and outputs had to be fixed.</p>"
    rows = (
        [
            (limit.operator, f"<code>{_text(limit.operator)}</code>"),
            (limit.reason, _text(limit.reason)),
            (limit.source, f"<code>{_text(limit.source)}</code>"),
            (limit.node, f"<code>{_text(limit.node)}</code>"),
            (len(limit.parameters), _names(limit.parameters)),
        ]
        for limit in limits
    )
    return _table(("operator", "reason", "source", "node", "parameters"), rows)


def _table(headings: Iterable[str], rows: Iterable[Sequence[tuple[object, str]]]) -> str:
    """A table whose cells are pairs of the value to sort by and HTML."""
    head = "".join(f'<th><button type="button">{_text(heading)}</button></th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f'<td data-value="{_text(value)}">{cell}</td>' for value, cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _graph_view(graph: nx.MultiDiGraph) -> str:
    buttons = "".join(
        f'<button type="button" data-zoom="{zoom}">{label}</button>'
        for zoom, label in (("fit", "fit"), ("0.8", "−"), ("1.25", "+"), ("1", "1:1"))
    )
    return f'<div class="zoom">{buttons}</div><div class="graph">{drawing.to_svg(graph)}</div>'


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f5f7fa;--line:#dfe4ea;--ink:#1c2430;--faint:#64707f;
--before:#a8b3c2;--after:#0d9488;--moved:#2f6fde}
@media (prefers-color-scheme:dark){:root{--paper:#0d1117;--card:#131a23;--line:#263040;--ink:#e6ebf2;
--faint:#94a0af;--before:#56616f;--after:#2dd4bf;--moved:#6ea3f5}}
body{margin:0 auto;padding:24px 28px 60px;max-width:1500px;background:var(--paper);color:var(--ink);
font:14px/1.45 Inter,'Segoe UI',Helvetica,Arial,sans-serif}
h1{font-size:22px;margin:0 0 18px}section{margin-top:34px}h2{font-size:16px;margin:0 0 10px}
code,pre{font:12px ui-monospace,'SF Mono',Menlo,Consolas,monospace}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card h2{font-size:12px;font-weight:500;color:var(--faint);margin:0 0 4px}.card strong{font-size:24px}
.card ul{list-style:none;margin:6px 0 0;padding:0;max-height:120px;overflow:auto;color:var(--faint);
font-size:12px;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:70vh;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%}td,th{padding:6px 12px;text-align:left;vertical-align:top}
.change{white-space:nowrap}
td{border-top:1px solid var(--line)}thead th{position:sticky;top:0;background:var(--card);z-index:1}
th button{all:unset;cursor:pointer;font-size:12px;font-weight:600;color:var(--faint);white-space:nowrap}
th button:focus-visible{outline:2px solid var(--moved)}
th[aria-sort=ascending] button::after{content:' ▲'}th[aria-sort=descending] button::after{content:' ▼'}
.measure{display:flex;gap:8px;align-items:center;white-space:nowrap;font-size:12px}
.bar{flex:0 0 90px;height:7px;border-radius:4px;background:var(--line);overflow:hidden}
.bar i{display:block;height:100%}.before{background:var(--before)}.after{background:var(--after)}
.moved{background:var(--moved)}
td ul{margin:4px 0;padding-left:18px;font:12px ui-monospace,Menlo,Consolas,monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}
details>summary{cursor:pointer}body>details{margin-top:34px}pre{overflow:auto;max-height:60vh;
padding:14px;background:var(--card);border:1px solid var(--line);border-radius:10px}
.zoom{margin-bottom:8px}.zoom button{font:inherit;min-width:34px;margin-right:6px;padding:2px 10px;
border:1px solid var(--line);border-radius:6px;background:var(--card);color:var(--ink);cursor:pointer}
.graph{overflow:auto;max-height:85vh;border:1px solid var(--line);border-radius:10px}
.graph svg{display:block}.graph .away{opacity:.13}
"""

# Without scripts the page still shows everything; they add sorting, zooming, and showing the neighbours of
# the node under the pointer.
_SCRIPT = """
'use strict';
for (const button of document.querySelectorAll('th button')) button.onclick = () => {
  const head = button.parentElement, column = head.cellIndex, table = head.closest('table');
  const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
  for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
  const value = row => row.cells[column].dataset.value;
  const missing = text => text === 'nan';
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
  });
  table.tBodies[0].append(...rows);
};
const view = document.querySelector('.graph'), svg = view.querySelector('svg');
const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
let zoom = 1;
const setZoom = (value, x, y) => {
  const old = zoom;
  zoom = Math.min(4, Math.max(0.02, value));
  svg.setAttribute('width', width * zoom);
  svg.setAttribute('height', height * zoom);
  view.scrollLeft = (view.scrollLeft + x) * zoom / old - x;
  view.scrollTop = (view.scrollTop + y) * zoom / old - y;
};
const fit = () => Math.min(1, view.clientWidth / width);
for (const button of document.querySelectorAll('[data-zoom]')) button.onclick = () => {
  const choice = button.dataset.zoom;
  const value = choice === 'fit' ? fit() : choice === '1' ? 1 : zoom * choice;
  setZoom(value, view.clientWidth / 2, view.clientHeight / 2);
};
view.addEventListener('wheel', event => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  const box = view.getBoundingClientRect();
  setZoom(zoom * Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
const nodes = [...svg.querySelectorAll('.fx-node')], edges = [...svg.querySelectorAll('[data-source]')];
for (const node of nodes) {
  node.onmouseenter = () => {
    const key = node.dataset.key, near = new Set([key]);
    for (const edge of edges) {
      const {source, target} = edge.dataset, touches = source === key || target === key;
      if (touches) near.add(source).add(target);
      edge.classList.toggle('away', !touches);
    }
    for (const other of nodes) other.classList.toggle('away', !near.has(other.dataset.key));
  };
  node.onmouseleave = () => {
    for (const element of svg.querySelectorAll('.away')) element.classList.remove('away');
  };
}
"""
