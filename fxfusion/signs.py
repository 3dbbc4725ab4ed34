"""Units that may change sign: what passes odd functions and linear maps alone, such as values that are gated.

A unit whose sign changes is read with the other sign. It passes an odd function (tanh), loses its sign in an
even one (a square), and gives it on to a product. So every tensor that holds a space has a parity, odd where
the sign acts, and every operator gives equations between parities, as between the exponents of factors
(:mod:`fxfusion.scaling`), modulo two.

The sign of a unit is a space of one dimension below it, whose rotations are 1 and -1. All else follows: how
well two units match is how well they match at the better sign, as heads match at their best rotations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import fx

from fxfusion.capture import Capture
from fxfusion.holding import Held
from fxfusion.layout import ActivationBlock, AxisBlock, Block, Factor
from fxfusion.plan import Incidence, Place, Plan, Space, Symmetry
from fxfusion.scaling import BATCH_NORMS, HOMOGENEOUS, NORMS, Search

_ODD = frozenset(
    [
        *("tanh", "atanh", "tan", "atan", "sin", "asin", "sinh", "asinh", "erf", "erfinv"),
        *("hardshrink", "softshrink", "sgn", "sign", "trunc"),
    ]
)
_EVEN = frozenset(["abs", "cos", "cosh", "sinc"])
_LINEAR = frozenset(["avg_pool3d", "adaptive_avg_pool3d"])
_ORDERED = frozenset(["maximum", "minimum", "prelu"])
_CENTRING = frozenset(["layer_norm", "native_layer_norm", "group_norm"])
_Block = TypeVar("_Block", Block, ActivationBlock)
_MOST_WAYS = 5  # beyond, only single ones are looked at

_SIGNED = {Symmetry.PERMUTATION: Symmetry.SIGNED, Symmetry.SCALED: Symmetry.MONOMIAL}


def with_signs(capture: Capture, plan: Plan) -> Plan:
    """Return a plan with the signs of units as spaces of their own, below the spaces of the units.

    Parameters
    ----------
    capture : Capture
    plan : Plan
        Of the symmetries of its spaces, those without rotations are made larger.

    Returns
    -------
    Plan
        The plan itself where no unit may change its sign.
    """
    held = Held(capture, plan)
    outer = {name for space in plan.spaces for name in space.scope}
    found: dict[str, list[_Odd]] = {}
    for space in plan.spaces:
        if space.symmetry in _SIGNED and space.name not in outer:
            ways = _apart(plan, _parities(held, space.name))
            if ways:
                found[space.name] = ways
    return _inserted(plan, found) if found else plan


@dataclasses.dataclass(frozen=True)
class _Odd:
    """Where the sign of a space's units acts, in parameters and in activations."""

    parameters: frozenset[Place]
    activations: frozenset[Place]

    @property
    def places(self) -> frozenset[Place]:
        return self.parameters | self.activations

    def __xor__(self, other: _Odd) -> _Odd:
        return _Odd(self.parameters ^ other.parameters, self.activations ^ other.activations)


class _Parities(Search):
    """The equations between parities."""

    def __init__(self, held: Held, space: str) -> None:
        super().__init__(held, space, modulus=2)

    def _related(self, node: fx.Node, name: str, operands: Sequence[fx.Node], result: fx.Node) -> bool:
        """Enter an operator's equations; False where none are known."""
        if name in _ODD or name in _LINEAR or (name == "hardtanh" and _is_symmetric(node)):
            return self._relate((self._keys(node.args[0]), 1), (self._keys(result), -1))
        if name in _EVEN:
            self._hold([result])
            return True
        if name in HOMOGENEOUS or name in _ORDERED:
            return False
        if name in ("mul", "div"):
            # The sign of a gain marks a unit's sign, so that none is left to choose.
            self._hold(item for item in operands if self.held.parameter(item) is not None)
        if name == "rnn_tanh":
            keys = [key for item in (*operands, result) for key in self._keys(item)]
            return all(self._relate(([key], 1), (keys[:1], -1)) for key in keys[1:])
        return super()._related(node, name, operands, result)

    def _normalised(self, node: fx.Node, name: str, result: fx.Node) -> bool:
        """What is divided by its size keeps its sign; where a mean is taken off, it is that of all units."""
        if name in _CENTRING:
            return False
        if name in BATCH_NORMS:
            weight, bias, mean, variance = node.args[1:5]
            self._hold([weight, variance])
            others = [item for item in (bias, mean) if isinstance(item, fx.Node)]
        else:
            self._hold(node.args[NORMS[name] : NORMS[name] + 1])
            others = []
        keys = self._keys(result)
        return all(self._relate((self._keys(item), 1), (keys, -1)) for item in (node.args[0], *others))


def _is_symmetric(node: fx.Node) -> bool:
    low = node.args[1] if len(node.args) > 1 else -1.0
    high = node.args[2] if len(node.args) > 2 else 1.0
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return numbers and not node.kwargs and low == -high  # type: ignore[operator]


def _parities(held: Held, space: str) -> list[_Odd]:
    """Return the independent ways in which the units of a space may change sign."""
    found = []
    for solution in _Parities(held, space).solve():
        sides: tuple[set[Place], set[Place]] = (set(), set())
        for node, axis, offset in solution:
            name = held.parameters.get(node)
            sides[name is None].add((node.name if name is None else name, axis, offset))
        found.append(_Odd(*map(frozenset, sides)))
    return found


def _apart(plan: Plan, ways: Sequence[_Odd]) -> list[_Odd]:
    """Return combinations of ways that share no place, those first that act on most weights.

    Where two ways act at one place, a unit has the product of two signs there: of those, one combination is
    used.
    """
    longest = len(ways) if len(ways) <= _MOST_WAYS else 1
    combined = [
        functools.reduce(operator.xor, chosen)
        for count in range(1, longest + 1)
        for chosen in itertools.combinations(ways, count)
    ]
    kept: list[_Odd] = []
    for way in sorted(combined, key=lambda item: -_reached(plan, item.parameters)):
        if not any(way.places & other.places for other in kept):
            kept.append(way)
    return kept


def _reached(plan: Plan, places: frozenset[Place]) -> int:
    """Return how many weights change sign with the units."""
    return sum(
        block.volume
        for name in {name for name, _, _ in places}
        for block in plan.layouts[name].blocks
        if sum((name, axis, part.offset) in places for axis, part in enumerate(block.axes)) % 2
    )


def _inserted(plan: Plan, found: Mapping[str, Sequence[_Odd]]) -> Plan:
    """Put the signs of units into all that holds them."""
    names: dict[tuple[str, Place], str] = {}  # of a sign, by the space of its units and where it acts
    spaces: list[Space] = []
    for space in plan.spaces:
        ways = found.get(space.name, ())
        spaces.append(dataclasses.replace(space, symmetry=_SIGNED[space.symmetry]) if ways else space)
        for number, way in enumerate(ways):
            name = f"{space.name} sign" + (f" {number + 1}" if number else "")
            names.update({(space.name, place): name for place in way.places})
            places = tuple(_incidences(plan, space, way))
            spaces.append(Space(name, 1, Symmetry.SIGN, places, (*space.scope, space.name)))

    def signed(holder: str, block: _Block) -> _Block:
        axes = []
        for axis, part in enumerate(block.axes):
            factors: list[Factor] = []
            for factor in part.factors if part is not None else ():
                factors.append(factor)
                sign = names.get((factor.space, (holder, axis, part.offset)))  # type: ignore[union-attr]
                if sign is not None:
                    factors.append(Factor(sign, 1, factor.stride))
            axes.append(part and AxisBlock(part.offset, tuple(factors)))
        return dataclasses.replace(block, axes=tuple(axes))

    layouts = {
        name: dataclasses.replace(layout, blocks=tuple(signed(name, block) for block in layout.blocks))
        for name, layout in plan.layouts.items()
    }
    activations = {
        name: [signed(name, block) for block in blocks] for name, blocks in plan.activations.items()
    }
    return dataclasses.replace(plan, spaces=tuple(spaces), layouts=layouts, activations=activations)


def _incidences(plan: Plan, space: Space, way: _Odd) -> Iterator[Incidence]:
    """Yield where the sign of a space's units acts on parameters."""
    for place in space.incidences:
        parts = (block.axes[place.axis] for block in plan.layouts[place.parameter].blocks)
        blocks = list(dict.fromkeys(parts))
        if (place.parameter, place.axis, blocks[place.block].offset) in way.parameters:
            yield dataclasses.replace(place, factor=place.factor + 1)
