"""From settled axis types to the plan: spaces with names, layouts, coverage and limits."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any

from fxfusion.axes import Axis, Leaf, leaves_of
from fxfusion.capture import Capture
from fxfusion.dependencies import dependencies
from fxfusion.evidence import Causes, gather
from fxfusion.explain import Evidence, Step
from fxfusion.flow import flow_graph
from fxfusion.inference import Inferred, infer
from fxfusion.layout import ActivationBlock, ParameterLayout, activation_blocks, lay_out, tensor_blocks
from fxfusion.plan import Incidence, Limit, Plan, Role, Rotary, Space, Symmetry
from fxfusion.rules.context import Use

# Kinds of first causes that are no limits of inference.
_EXPECTED = ("input", "output", "order", "constant", "unused")


def make_plan(capture: Capture, outputs: frozenset[int], parts: Sequence[Rotary] = ()) -> Plan:
    """Infer the spaces of a captured model.

    Parameters
    ----------
    capture : Capture
    outputs : frozenset of int
        Flat positions of the outputs that must be kept.
    parts : sequence of Rotary, optional
        Parts of the graph that turn pairs of dimensions: these are spaces then, and otherwise fixed.

    Returns
    -------
    Plan
    """
    with _no_collection():
        while True:
            inferred = infer(capture, outputs, parts)
            if not inferred.unsound:
                return _make_plan(capture, outputs, inferred, parts)
            parts = [part for part in parts if part not in inferred.unsound]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among all that torch holds: half of the time on large graphs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _make_plan(
    capture: Capture, outputs: frozenset[int], inferred: Inferred, parts: Sequence[Rotary]
) -> Plan:
    read = {name: axes for name, axes in inferred.parameters.items() if name not in capture.unused}
    _fix_unread(inferred, read)
    held = frozenset(leaf for axes in read.values() for axis in axes for leaf in leaves_of(axis))
    scopes = dependencies(inferred, held)
    free = {leaf for leaf in held if _is_free(leaf)}
    incidences = _incidences(read, _roles(inferred, read))
    names = {
        leaf: str(places[0])
        for leaf, places in incidences.items()
        if leaf in free or any(leaf in scopes[inner] for inner in free)
    }
    spaces = [
        Space(
            name,
            leaf.size,
            _symmetry(leaf, leaf in free, inferred),
            tuple(incidences[leaf]),
            tuple(names[outer] for outer in scopes.get(leaf, ())),
            inferred.turned.get(leaf, ()),
        )
        for leaf, name in names.items()
    ]
    layouts = {
        name: lay_out(name, capture.parameters[name], axes, lambda leaf: names.get(leaf, ""))
        for name, axes in read.items()
    }
    names_of = {
        leaf: (space.name, *space.scope) for leaf, space in zip(names, spaces, strict=True) if leaf in free
    }
    movable = tuple(space for space in spaces if space.symmetry is not Symmetry.FIXED)
    causes = Causes(capture, inferred)
    evidence = gather(capture, inferred, causes, names_of)
    return Plan(
        spaces=movable,
        fixed=tuple(space for space in spaces if space.symmetry is Symmetry.FIXED),
        covered=_covered(layouts, {space.name for space in movable}),
        limits=(*_limits(evidence, [causes.step(reason) for reason in inferred.ruleless]), *_unused(capture)),
        graph=flow_graph(capture, inferred, movable, layouts, {leaf: names[leaf] for leaf in free}),
        layouts=layouts,
        activations=_activations(inferred, names),
        evidence=evidence,
        products=frozenset(
            names[leaf]
            for axis in inferred.context.records.products
            for leaf in leaves_of(axis)
            if leaf in free
        ),
        outputs=outputs,
        rotary=tuple(parts),
    )


def _symmetry(leaf: Leaf, free: bool, inferred: Inferred) -> Symmetry:
    if not free:
        return Symmetry.FIXED
    return Symmetry.ROTARY if leaf in inferred.turned else Symmetry.PERMUTATION


def _fix_unread(inferred: Inferred, read: dict[str, tuple[Axis, ...]]) -> None:
    """Fix the units that no operator reads (rows of a table beyond what is sliced off it).

    Anything may act on them, and there is nothing by which to match them.
    """
    records = inferred.context.records
    met = [*inferred.tensors.values(), *records.inner]
    met += [(meaning.axis,) for meaning in inferred.meanings.values()]
    met += [axes for mix in records.mixes for axes in (mix.kept, mix.mixed)]
    met += [use.operand.axes for use in records.uses]
    seen = {leaf for axes in met for axis in axes for leaf in leaves_of(axis)}
    for name, axes in read.items():
        for axis in axes:
            for leaf in leaves_of(axis):
                if leaf.fixed is None and leaf.size > 1 and leaf not in seen:
                    inferred.context.enter(name, "parameter", "", [])
                    leaf.fixed = leaf.cause = inferred.context.reason("unused", "no operator reads its units")


def _is_free(leaf: Leaf) -> bool:
    return leaf.fixed is None and leaf.size > 1


def _incidences(
    read: dict[str, tuple[Axis, ...]], roles: dict[tuple[str, int], Role]
) -> dict[Leaf, list[Incidence]]:
    """Return where every leaf lies in parameters, leaves in the order of their first incidence."""
    found: dict[Leaf, dict[Incidence, None]] = {}
    for name, axes in read.items():
        # Per axis: a block's number, by its offset and leaves. Alternatives that depend on the block of
        # another axis begin at one offset, and are told apart by their leaves.
        blocks: list[dict[Any, int]] = [{} for _ in axes]
        for pieces in tensor_blocks(axes):
            for axis, piece in enumerate(pieces):
                key = piece.offset, tuple(leaf for leaf, _, _ in piece.factors)
                number = blocks[axis].setdefault(key, len(blocks[axis]))
                for position, (leaf, _, _) in enumerate(piece.factors):
                    if leaf is not None:
                        role = roles.get((name, axis), Role.WRITES)
                        place = Incidence(name, axis, number, position, role)
                        found.setdefault(leaf, {})[place] = None
    return {leaf: list(places) for leaf, places in found.items()}


def _activations(inferred: Inferred, names: dict[Leaf, str]) -> dict[str, list[ActivationBlock]]:
    # Tokens sorted by their experts, or sent to them, are not the same in two networks: they are no samples.
    found = {
        node: activation_blocks(axes, lambda leaf: names.get(leaf, ""))
        for node, axes in inferred.tensors.items()
        if any(leaf in names for axis in axes for leaf in leaves_of(axis))
        and not any(leaf.route for axis in axes for leaf in leaves_of(axis))
    }
    return {node: blocks for node, blocks in found.items() if blocks}


def _roles(inferred: Inferred, read: dict[str, tuple[Axis, ...]]) -> dict[tuple[str, int], Role]:
    """Return what each parameter axis does, from how operators used it."""
    seen: dict[tuple[str, int], set[bool]] = {}
    for use in inferred.context.records.uses:
        for place in _places(use, read):
            seen.setdefault(place, set()).add(use.contracted)
    both = {frozenset([True]): Role.READS, frozenset([False]): Role.WRITES}
    return {place: both.get(frozenset(kinds), Role.BOTH) for place, kinds in seen.items()}


def _places(use: Use, read: dict[str, tuple[Axis, ...]]) -> list[tuple[str, int]]:
    if use.operand.parameter:
        return [(use.operand.parameter, use.axis)]
    leaves = set(leaves_of(use.operand.axes[use.axis]))
    return [
        (name, index)
        for name in use.operand.origins
        for index, axis in enumerate(read.get(name, ()))
        if leaves & set(leaves_of(axis))
    ]


def _covered(layouts: dict[str, ParameterLayout], free: set[str]) -> float:
    total = sum(math.prod(layout.shape) for layout in layouts.values())
    covered = sum(
        block.volume
        for layout in layouts.values()
        for block in layout.blocks
        if any(factor.space in free for factor in block.factors)
    )
    return covered / total if total else 0.0


def _unused(capture: Capture) -> list[Limit]:
    if not capture.unused:
        return []
    return [
        Limit("", "", "the graph never reads these parameters: they stay as they are", "", capture.unused)
    ]


def _limits(evidence: Evidence, ruleless: Sequence[Step]) -> list[Limit]:
    """Return the first causes that are no consequence of the model's meaning, each with what it fixed."""
    touched: dict[Step, list[str]] = {step: [] for step in ruleless}
    for name in evidence.parameters:
        parts = [part for axis in evidence.explain(name) for part in axis.parts if not part.free]
        for cause in dict.fromkeys(part.chain[-1] for part in parts):
            if cause.kind not in _EXPECTED:
                touched.setdefault(cause, []).append(name)
    return [
        Limit(step.node, step.operator, step.message, step.source, tuple(parameters))
        for step, parameters in touched.items()
    ]
