"""From what inference recorded to the plain data that explanations are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from operator import getitem

from fxfusion.axes import Axis, Leaf, Reason, describe, leaves_of, resolve
from fxfusion.capture import Capture
from fxfusion.explain import AxisEvidence, Block, Edge, Evidence, PlacedPart, Step
from fxfusion.inference import Inferred
from fxfusion.layout import tensor_blocks
from fxfusion.rules import find_rule

_REPEATED = Step("", "", "", "constant", "the tensor does not vary along it")


class Causes:
    """First causes, as a reader should meet them.

    Parameters
    ----------
    capture : Capture
    inferred : Inferred
    """

    def __init__(self, capture: Capture, inferred: Inferred) -> None:
        self._known = {(reason.node, reason.operator): reason for reason in inferred.ruleless}
        self._ruleless = {
            (node.name, str(node.target))
            for node in capture.module.graph.nodes
            if node.op == "call_function" and node.target is not getitem and find_rule(node.target) is None
        }

    def of(self, reason: Reason) -> Reason:
        """Return a cause; what an operator without a rule gives out is fixed for the lack of the rule."""
        place = reason.node, reason.operator
        if reason.kind == "order" and place in self._ruleless and place not in self._known:
            message = f"{reason.operator} has no rule: its result is fixed"
            self._known[place] = dataclasses.replace(reason, kind="no rule", message=message)
        return self._known.get(place, reason) if reason.kind == "order" else reason

    def step(self, reason: Reason) -> Step:
        """Return a reason as a step of an explanation."""
        reason = self.of(reason)
        operator = "placeholder" if reason.kind == "input" and reason.because is None else reason.operator
        return Step(reason.node, operator, reason.source, reason.kind, reason.message)


def gather(
    capture: Capture, inferred: Inferred, causes: Causes, spaces: Mapping[Leaf, tuple[str, ...]]
) -> Evidence:
    """Return what explains the axes of every parameter; leaves become numbers.

    Parameters
    ----------
    capture : Capture
    inferred : Inferred
    causes : Causes
    spaces : dict of Leaf to tuple of str
        Of every free leaf in a parameter its name, followed by its scope.

    Returns
    -------
    Evidence
    """
    links = inferred.context.unifier.links
    leaves = _leaves(inferred, [leaf for link in links for leaf in (link.first, link.second)])
    numbers = {leaf: number for number, leaf in enumerate(leaves)}
    parameters: dict[str, tuple[AxisEvidence, ...]] = {}
    blocks: list[Block] = []
    for name, axes in inferred.parameters.items():
        parameters[name], fixed = _placed(name, axes, numbers, spaces)
        blocks += fixed
    held = {leaf for axes in inferred.parameters.values() for axis in axes for leaf in leaves_of(axis)}
    return Evidence(
        parameters=parameters,
        aliases=dict(capture.aliases),
        unused=frozenset(capture.unused),
        spaces={numbers[leaf]: names for leaf, names in spaces.items()},
        edges=tuple(
            Edge(
                numbers[link.first],
                numbers[link.second],
                link.relation,
                link.structure,
                link.where.node,
                link.where.operator,
                link.where.source,
            )
            for link in links
        ),
        causes={numbers[leaf]: tuple(map(causes.step, leaf.cause.chain())) for leaf in leaves if leaf.cause},
        recorded={
            -1: (_REPEATED,),
            **{numbers[leaf]: tuple(map(causes.step, leaf.fixed.chain())) for leaf in held if leaf.fixed},
        },
        merged={
            numbers[leaf]: tuple(numbers[item] for item in leaf.merged) for leaf in leaves if leaf.merged
        },
        sizes={number: leaf.size for leaf, number in numbers.items()},
        below=_below(leaves, numbers),
        blocks=tuple(blocks),
    )


def _leaves(inferred: Inferred, linked: Iterable[Leaf]) -> list[Leaf]:
    """Return the leaves of parameters and links, those that they stand for now, and what these stand for."""
    found: dict[Leaf, None] = {}
    own = [axis for axes in inferred.parameters.values() for axis in axes if isinstance(axis, Leaf)]
    pending = [*own, *linked][::-1]
    while pending:
        leaf = pending.pop()
        if leaf not in found:
            found[leaf] = None
            pending += [*leaves_of(leaf), *leaf.merged]
    return list(found)


def _below(leaves: Iterable[Leaf], numbers: Mapping[Leaf, int]) -> dict[int, frozenset[int]]:
    of_root: dict[Axis, frozenset[int]] = {}
    below = {}
    for leaf in leaves:
        root = resolve(leaf)
        if root not in of_root:
            of_root[root] = frozenset(numbers[item] for item in leaves_of(root))
        below[numbers[leaf]] = of_root[root]
    return below


def _placed(
    name: str, axes: tuple[Axis, ...], numbers: Mapping[Leaf, int], spaces: Mapping[Leaf, tuple[str, ...]]
) -> tuple[tuple[AxisEvidence, ...], list[Block]]:
    """Return where leaves lie in a parameter, and its blocks in which none is free."""
    places: list[dict[int, int]] = [{} for _ in axes]  # per axis: offset of a block -> its number
    parts: list[dict[PlacedPart, None]] = [{} for _ in axes]
    blocks = []
    for pieces in tensor_blocks(axes):
        factors, volume, free = [], 1, False
        for axis, piece in enumerate(pieces):
            block = places[axis].setdefault(piece.offset, len(places[axis]))
            for position, (leaf, size, _) in enumerate(piece.factors):
                number = -1 if leaf is None else numbers[leaf]
                parts[axis][PlacedPart(block, position, size, number)] = None
                factors.append((axis, number))
                volume *= size
                free = free or leaf in spaces
        if not free:
            blocks.append(Block(name, volume, tuple(factors)))
    return tuple(
        AxisEvidence(
            axis.size, describe(axis), numbers[axis] if isinstance(axis, Leaf) else -1, tuple(parts[index])
        )
        for index, axis in enumerate(axes)
    ), blocks
