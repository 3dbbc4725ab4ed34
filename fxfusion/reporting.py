"""The report of a fusion, from what its passes leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from fxfusion.capture import Model
from fxfusion.certify import Certificate
from fxfusion.plan import PairedPlan
from fxfusion.progress import LOG
from fxfusion.report import FusionReport, SpaceRow
from fxfusion.state import FusionState
from fxfusion.validation import model_name


def fusion_report(
    state: FusionState,
    models: Sequence[Model],
    options: dict[str, str],
    certificates: Sequence[Certificate],
    seconds: dict[str, float],
) -> FusionReport:
    """Return the report of a fusion.

    Parameters
    ----------
    state : FusionState
        After the last pass.
    models : sequence
        The parents.
    options : dict of str to str
    certificates : sequence of Certificate
        One per parent.
    seconds : dict of str to float
        Per stage.

    Returns
    -------
    FusionReport
    """
    assert state.plan is not None
    solved = [alignment for alignment in state.alignments if alignment is not None]
    graph = state.plan.graph
    rows = []
    for space in state.plan.spaces:
        roles = [(incidence.parameter, incidence.role.value) for incidence in space.incidences]
        rows.append(
            SpaceRow(
                name=space.name,
                size=space.size,
                symmetry=space.symmetry.value,
                scope=space.scope,
                writers=tuple(dict.fromkeys(name for name, role in roles if role != "reads")),
                readers=tuple(dict.fromkeys(name for name, role in roles if role != "writes")),
                cost_before=max(_mean([item.before[space.name] for item in solved]), 0.0),  # but for rounding
                cost_after=max(_mean([item.after[space.name] for item in solved]), 0.0),
                moved=_mean([item.maps[space.name].moved for item in solved]),
            )
        )
    return FusionReport(
        model=state.capture.name,
        parents=tuple(model_name(model, index) for index, model in enumerate(models)),
        weights=state.weights,
        options=options,
        covered=state.plan.covered,
        certified=tuple(certificate.max_relative_error for certificate in certificates),
        spaces=tuple(rows),
        limits=state.plan.limits,
        graph=graph,
        seconds=seconds,
        versions=versions(),
        notes=_notes(state),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _notes(state: FusionState) -> tuple[str, ...]:
    notes = []
    if not state.capture.dynamic:
        notes.append("the model fixes its batch size: the fused module takes the example's only")
    if state.refined is not None:
        learning = state.method.refinement
        labelled = learning is not None and learning.labels > 0
        told = "loss" if labelled else "distance from the parents' average outputs"
        notes.append(
            f"transports refined in {state.refined.steps} steps: {told} "
            f"{state.refined.before:.4g} before and {state.refined.after:.4g} after, on batches held out"
        )
    gaps = {name: gap for item in state.alignments if item is not None for name, gap in item.gaps.items()}
    if gaps:
        worst = max(gaps, key=gaps.__getitem__)
        notes.append(
            f"assignments of {len(gaps)} spaces are approximate: certified to cost at most "
            f"{100 * gaps[worst]:.2g} % more than the best ({worst})"
        )
    found = (*notes, *widths_told(state), *state.notes)
    for note in found:
        LOG.info("%s", note)
    return found


def widths_told(state: FusionState) -> list[str]:
    """Say of every parent of other widths what they are."""
    notes = []
    for index, parent in enumerate(state.parents):
        if isinstance(parent.plan, PairedPlan):
            sizes = {
                f"{parent.plan.source[space.name].size} to {space.size}"
                for space in parent.plan
                if parent.plan.source[space.name].size != space.size
            }
            notes.append(f"parent {index} has other widths: {', '.join(sorted(sizes))} units")
    return notes


def versions() -> dict[str, str]:
    """Return the versions of the libraries that take part."""
    found = {}
    for package in ("fxfusion", "torch", "pot", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_card(report: FusionReport, parents: Sequence[str]) -> str:
    """Return a model card, as the Hugging Face Hub shows it: parents, shares, method, versions.

    Parameters
    ----------
    report : FusionReport
    parents : sequence of str
        What to call the parents.
    """
    shares = ", ".join(f"{name} ({weight:.3g})" for name, weight in zip(parents, report.weights, strict=True))
    made = [f"- {name}: {value}" for name, value in {**report.options, **report.versions}.items()]
    return "\n".join(
        [
            "---",
            "tags:",
            "- merge",
            "- fxfusion",
            "---",
            "",
            f"# {report.model}, fused",
            "",
            f"Parents, and their shares: {shares}. Their units were aligned by optimal transport in "
            f"{len(report.spaces)} spaces, then weights were averaged.",
            "",
            *made,
            "",
        ]
    )
