"""What a sweep found, as a table for a terminal and as a page for readers."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fxfusion.atomic import write_text
from fxfusion.testing.sweeps import COVERED, SENSITIVE, Record, without_folders

LARGE = 500  # graph nodes from which the cost of planning is judged
_LIBRARIES = ("torch", "timm", "transformers", "torchvision")
_COLUMNS: dict[str, Callable[[Record], str]] = {
    "model": lambda record: record.name,
    "status": lambda record: record.status,
    "nodes": lambda record: str(record.nodes),
    "spaces": lambda record: str(record.spaces),
    "nested": lambda record: str(record.wreath),
    "units": lambda record: str(record.hidden),
    "covered %": lambda record: f"{100 * record.covered:.2f}",
    "error": lambda record: "" if record.error is None else f"{record.error:.0e}",
    "twin": lambda record: _twin(record),
    "capture s": lambda record: _seconds(record, "capture"),
    "plan s": lambda record: _seconds(record, "propagate"),
}


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts over a library's records.

    Attributes
    ----------
    models, captured, certified, unsound : int
        How many were tried, captured by ``torch.export``, certified, and found silently wrong.
    covered : int
        Certified models with at least 97 % of the parameter elements covered.
    recovered : int
        Models whose planted twin ``fuse`` undid.
    insensitive : int
        Certified models whose control changed nothing: their certificate says little.
    slowest : float
        Largest ratio of planning to capture time among graphs of at least 500 nodes.
    typical : float
        Median of that ratio.
    """

    models: int
    captured: int
    certified: int
    unsound: int
    covered: int
    recovered: int
    insensitive: int
    slowest: float
    typical: float


def totals(records: Sequence[Record]) -> Totals:
    """Count what a sweep found.

    Examples
    --------
    >>> from fxfusion.testing.sweeps import Record
    >>> totals([Record("timm", "resnet", "resnet18", status="certified", covered=1.0, nodes=9)]).covered
    1
    """
    certified = [record for record in records if record.certified]
    ratios = [
        record.seconds["propagate"] / record.seconds["capture"]
        for record in records
        if record.nodes >= LARGE and record.seconds.get("capture") and "propagate" in record.seconds
    ]
    return Totals(
        models=len(records),
        captured=sum(record.nodes > 0 and not record.specialised for record in records),
        certified=len(certified),
        unsound=sum(record.status == "unsound" for record in records),
        covered=sum(record.covered >= COVERED for record in certified),
        recovered=sum(record.twin_recovered for record in records),
        insensitive=sum((record.control or 0.0) < SENSITIVE for record in certified),
        slowest=max(ratios, default=0.0),
        typical=statistics.median(ratios) if ratios else 0.0,
    )


def sentence(records: Sequence[Record], name: str) -> str:
    """Return the totals of a library as one sentence."""
    count = totals(records)
    return (
        f"{name}: {count.captured} of {count.models} captured, {count.certified} certified, "
        f"{count.unsound} silently wrong, {count.covered} with {100 * COVERED:.0f} % or more covered, "
        f"{count.recovered} twins recovered; planning took {count.typical:.3f} of capture "
        f"(at most {count.slowest:.3f} above {LARGE} nodes)"
    )


def table(records: Sequence[Record], title: str) -> Table:
    """Return a terminal table of every model."""
    found = Table(title=Text(title))
    for heading in _COLUMNS:
        found.add_column(heading, justify="left" if heading in ("model", "status") else "right")
    for record in records:
        style = "" if record.certified and record.covered >= COVERED else "yellow"
        style = "red" if record.status == "unsound" else style
        found.add_row(*(Text(cell(record)) for cell in _COLUMNS.values()), style=style)
    return found


def page(records: Mapping[str, Sequence[Record]]) -> str:
    """Return a Markdown page: totals per library, exceptions with their reasons, then every model.

    Parameters
    ----------
    records : mapping of str to sequence of Record
        By library.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    lines = [
        "# Sweep over model libraries",
        "",
        "Made by `fxfusion sweep all --page docs/SWEEP.md`. Every model has random weights, random norm "
        "weights and biases, and random batch statistics. *Certified*: a random element of the inferred "
        "symmetry group, drawn per head, group and expert, changes no output by more than 1e-9 of its "
        "largest element, in float64, on two inputs. *Control*: the same element applied to a random half of "
        "the parameters does change them. *Covered*: parameter elements that the graph reads and that have "
        "a free axis. *Twin*: the largest difference left when `fuse` aligns a random symmetric twin with "
        "the model by their weights and averages the two, relative to the tensor's largest element.",
        "",
        f"Versions: {versions}.",
        "",
        "| library | models | captured | certified | silently wrong | 97 % covered | twins recovered "
        "| plan / capture, median and largest of graphs above 500 nodes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in records.items():
        count = totals(found)
        lines.append(
            f"| {name} | {count.models} | {count.captured} | {count.certified} | {count.unsound} "
            f"| {count.covered} | {count.recovered} | {count.typical:.3f}, {count.slowest:.3f} |"
        )
    for name, found in records.items():
        lines += ["", f"## {name}", "", *_exceptions(found), "", *_rows(found)]
    return "\n".join(lines) + "\n"


def _exceptions(records: Sequence[Record]) -> list[str]:
    """Return one line per model that falls short of something, with the reason."""
    lines = []
    for record in records:
        notes = [f"traced on the example, as {_short(record.message)}"] * record.specialised
        notes += [] if record.certified else [f"{record.status}: {_short(record.message)}"]
        if record.certified and record.covered < COVERED:
            reasons = "; ".join(_short(reason) for reason in record.frozen[:2])
            notes.append(f"{100 * record.covered:.2f} % covered. {reasons}".strip())
        if record.certified and not record.twin_recovered:
            notes.append(f"twin not recovered ({_twin(record) or record.message or 'not tried'})")
        if record.certified and (record.control or 0.0) < SENSITIVE:
            notes.append("the control changed nothing: the certificate says little")
        if notes:
            lines.append(f"- `{record.name}`: {'; '.join(notes)}")
    return lines or ["No exceptions."]


def _rows(records: Sequence[Record]) -> list[str]:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(cell(record) for cell in _COLUMNS.values())} |" for record in records]
    return lines


def _short(text: str, length: int = 240) -> str:
    """Return the beginning of a text on one line, without the folders of whoever ran it."""
    line = " ".join(without_folders(text).split()).replace("|", "\\|")
    return line if len(line) <= length else line[: length - 3] + "..."


def _twin(record: Record) -> str:
    return "" if record.recovered is None else f"{record.recovered:.0e}".replace("0e+00", "0")


def _seconds(record: Record, stage: str) -> str:
    return f"{record.seconds[stage]:.2f}" if stage in record.seconds else ""


def save_json(records: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write all records as JSON."""
    plain = {name: [dataclasses.asdict(record) for record in found] for name, found in records.items()}
    write_text(path, json.dumps(plain, indent=1) + "\n")
