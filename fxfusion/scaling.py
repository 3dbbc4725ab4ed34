"""By what power of a factor every place of a space is multiplied, so that the function stays.

A unit whose values are multiplied by ``s`` is read with ``1 / s``, passes a rectifier as it is, and adds to
others that carry the same factor. So every tensor that holds the space has an exponent, every operator gives
linear equations between the exponents of its operands and of its result, and what is not known to go along
has the exponent zero. A solution with more than zeros is a way to scale units: the hidden units of ReLU
networks, the values of a gated layer, each side of a normalisation.

The same equations say which places of a space of invertible maps take the map and which its inverse: of
queries and keys, whose products are summed, one and the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from operator import getitem
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.capture import hint
from fxfusion.holding import KEEPING, METADATA, Held, operands_of, sizes_of
from fxfusion.layout import AxisBlock
from fxfusion.plan import Scaling
from fxfusion.rules.registry import operator_name

Key = tuple[fx.Node, int, int]
"""A tensor, its axis, and where on the axis a block of units begins."""

_Terms = Mapping[Key, Fraction | int]

HOMOGENEOUS = frozenset(
    [
        *("relu", "leaky_relu", "abs", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "avg_pool3d", "adaptive_avg_pool3d"),
    ]
)
_ADDING = frozenset(["add", "sub", "rsub", "maximum", "minimum"])
BATCH_NORMS = frozenset(["batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"])
NORMS = {"layer_norm": 2, "native_layer_norm": 2, "rms_norm": 2, "_fused_rms_norm": 2, "group_norm": 2}
_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d"])
_TRACED = (
    "view reshape _unsafe_view transpose permute t expand clone contiguous alias unsqueeze squeeze detach "
    "flatten unflatten split split_with_sizes chunk narrow slice select unbind index_select roll flip "
    "movedim repeat cat stack"
)
_VIEWS = frozenset(_TRACED.split())
_JOINING = frozenset(["cat", "stack"])
_COPYING = frozenset(["to", "_to_copy", "dropout", "type_as", "lift_fresh_copy"])
_LARGEST_TRACED = 2**24  # elements of a tensor whose views are followed element by element


def scalings(held: Held, space: str) -> tuple[Scaling, ...]:
    """Return the independent ways to scale the units of a space.

    Parameters
    ----------
    held : Held
        Which tensors hold which spaces.
    space : str
        Name of the space.

    Returns
    -------
    tuple of Scaling
        Empty where nothing but factors of one keeps the function, as far as is known.
    """
    solutions = []
    for exponents in Search(held, space).solve():
        sign = math.copysign(1.0, next(iter(exponents.values())))
        places = {
            (held.parameters[node], axis, offset): sign * float(value)
            for (node, axis, offset), value in exponents.items()
            if node in held.parameters
        }
        solutions.append(Scaling(space, places))
    return tuple(solutions)


class _Equations:
    """Homogeneous linear equations, kept solved: every bound unknown as a sum of free ones.

    Of a ``modulus``, a prime number, they are between remainders.
    """

    def __init__(self, modulus: int | None = None) -> None:
        self.modulus = modulus
        self.bound: dict[Key, dict[Key, Fraction]] = {}
        self.used: dict[Key, set[Key]] = {}  # in which bound unknowns a free one occurs

    def reduce(self, terms: _Terms) -> dict[Key, Fraction]:
        """Return a sum in terms of free unknowns."""
        total: dict[Key, Fraction] = {}
        for key, factor in terms.items():
            for free, share in self.bound.get(key, {key: Fraction(1)}).items():
                total[free] = total.get(free, Fraction()) + factor * share
        return self._remaining(total)

    def require(self, terms: _Terms) -> None:
        """Add the equation that a sum is zero."""
        reduced = self.reduce(terms)
        if not reduced:
            return
        key, leading = next(iter(reduced.items()))
        solved = {other: -factor / leading for other, factor in reduced.items() if other != key}
        for place in (key, *self.used.pop(key, ())):
            expression = self.bound.get(place, {place: Fraction(1)})
            share = expression.pop(key, Fraction())  # it may have cancelled since
            for other, factor in solved.items():
                expression[other] = expression.get(other, Fraction()) + share * factor
                self.used.setdefault(other, set()).add(place)
            self.bound[place] = self._remaining(expression)

    def _remaining(self, terms: Mapping[Key, Fraction]) -> dict[Key, Fraction]:
        """Return the terms that are not zero."""
        if self.modulus is not None:
            terms = {key: factor % self.modulus for key, factor in terms.items()}
        return {key: factor for key, factor in terms.items() if factor}


class Search:
    """The equations of one space.

    Parameters
    ----------
    held : Held
        Which tensors hold which spaces.
    space : str
        Name of the space.
    modulus : int, optional
        Where exponents are remainders: 2 for signs.
    """

    def __init__(self, held: Held, space: str, modulus: int | None = None) -> None:
        self.held, self.space = held, space
        self.equations = _Equations(modulus)
        self.labels: dict[fx.Node, Any] = {}  # of tensors without a layout: which key every element has
        self.named: dict[int, Key] = {}

    def solve(self) -> list[dict[Key, Fraction]]:
        """Return the independent solutions that reach parameters, each as its exponents other than zero."""
        holders = self.held.holders.get(self.space, ())
        parts = (part for node in holders for parts in self.held.axes[node] for part in parts)
        if any(map(self._repeats, parts)):
            return []  # a unit has several factors of one space, and so no factor of its own
        pending = list(self.held.nodes.get(self.space, ()))
        seen = set(pending)
        for node in pending:  # grows while it is read
            self._judge(node)
            if operator_name(node.target) in _VIEWS or node.target is getitem:
                later = [user for user in node.users if user not in seen and user.op == "call_function"]
                pending += later
                seen.update(later)
        self._hold(node for node in holders if any(user.op == "output" for user in node.users))
        first: dict[str, fx.Node] = {}
        for node in holders:
            if node in self.held.parameters:  # the same tensor, read in several places
                other = first.setdefault(self.held.parameters[node], node)
                self._relate((self._keys(node), 1), (self._keys(other), -1))
        return self._solutions(holders)

    def _solutions(self, holders: Sequence[fx.Node]) -> list[dict[Key, Fraction]]:
        found: dict[Key, dict[Key, Fraction]] = {}
        for node in sorted(holders, key=lambda item: item not in self.held.parameters):
            for key in self._keys(node):
                for free, factor in self.equations.reduce({key: 1}).items():
                    if node in self.held.parameters or free in found:
                        found.setdefault(free, {})[key] = factor
        return list(found.values())

    # -- equations --------------------------------------------------------------------------------

    def _keys(self, node: Any, axis: int | None = None) -> list[Key]:
        """Return the places of a tensor that hold the space, on one axis or on all."""
        if not isinstance(node, fx.Node):
            return []
        found = {
            (node, index, part.offset): None
            for index, parts in enumerate(self.held.axes.get(node, ()))
            if axis is None or index == axis % len(self.held.axes[node])
            for part in parts
            if self._holds(part)
        }
        return sorted(found, key=lambda key: key[1:])

    def _repeats(self, part: AxisBlock) -> bool:
        return sum(factor.space == self.space for factor in part.factors) > 1

    def _holds(self, part: AxisBlock) -> bool:
        return any(factor.space == self.space for factor in part.factors)

    def _hold(self, nodes: Iterable[Any]) -> None:
        """Require factors of one wherever some tensors hold the space."""
        for node in nodes:
            if isinstance(node, fx.Node):
                keys = self._keys(node) if node in self.held.axes else self._labelled(self._label(node))
                for key in keys:
                    self.equations.require({key: 1})

    def _relate(self, *sides: tuple[Sequence[Key], int]) -> bool:
        """Require of blocks that begin alike that ``sign * exponent`` adds up to zero."""
        counts = {len(keys) for keys, _ in sides}
        if counts != {1} and len({tuple(key[2] for key in keys) for keys, _ in sides}) != 1:
            return False
        for keys in zip(*(keys for keys, _ in sides), strict=True):
            terms: dict[Key, Fraction] = {}
            for key, (_, sign) in zip(keys, sides, strict=True):
                terms[key] = terms.get(key, Fraction()) + sign
            self.equations.require(terms)
        return True

    def _judge(self, node: fx.Node) -> None:
        operator = operator_name(node.target)
        operands = operands_of(node)
        if operator in METADATA:
            return
        result = self._result(node)
        if node.target is getitem and operator_name(node.args[0].target) not in _VIEWS:  # type: ignore[union-attr]
            return  # judged with the operator of several results
        if operator not in KEEPING and node.target is not getitem:
            self._hold(item for item in operands if item not in self.held.axes)
        if not self._related(node, operator, operands, result):
            self._hold([*operands, result])

    def _result(self, node: fx.Node) -> fx.Node:
        """Return a node, or the first result of one that has several."""
        if isinstance(node.meta.get("val"), (tuple, list)) and operator_name(node.target) not in _VIEWS:
            return next((user for user in node.users if user.target is getitem and user.args[1] == 0), node)
        return node

    def _related(self, node: fx.Node, operator: str, operands: Sequence[fx.Node], result: fx.Node) -> bool:
        """Enter an operator's equations; False where none are known."""
        holders = [item for item in operands if self._keys(item)]
        if operator in KEEPING or node.target is getitem:
            return self._moved(node, operator, operands)
        if operator in HOMOGENEOUS:
            return self._relate((self._keys(node.args[0]), 1), (self._keys(result), -1))
        if operator in _ADDING:
            numbers = [item for item in node.args[:2] if not isinstance(item, fx.Node) and item]
            return (
                not numbers
                and len(holders) == len(operands)
                and all(self._relate((self._keys(item), 1), (self._keys(node), -1)) for item in holders)
            )
        if operator in ("mul", "div"):
            signs = (1, -1 if operator == "div" else 1)
            sides = [(self._keys(item), sign) for item, sign in zip(node.args, signs, strict=False)]
            return self._relate(*[side for side in sides if side[0]], (self._keys(node), -1))
        if operator in ("pow", "square"):
            power = node.args[1] if operator == "pow" else 2
            return isinstance(power, int) and self._relate(
                (self._keys(node.args[0]), power), (self._keys(node), -1)
            )
        if operator in ("mean", "sum"):
            return self._relate((self._keys(node.args[0]), 1), (self._keys(node), -1))
        if operator == "constant_pad_nd":
            padded = node.args[2] if len(node.args) > 2 else 0
            return not padded and self._relate((self._keys(node.args[0]), 1), (self._keys(node), -1))
        if operator == "prelu":
            self._hold(node.args[1:2])
            return self._relate((self._keys(node.args[0]), 1), (self._keys(node), -1))
        if operator in BATCH_NORMS or operator in NORMS:
            return self._normalised(node, operator, result)
        if operator == "scaled_dot_product_attention":
            return self._attended(node)
        if operator in _CONVOLUTIONS:
            return self._convolved(node)
        if operator in ("linear", "addmm", "mm", "matmul", "bmm"):
            return self._multiplied(node, operator)
        return False

    def _normalised(self, node: fx.Node, operator: str, result: fx.Node) -> bool:
        """What comes in keeps its size, what goes out has that of weight and bias."""
        self._hold(node.args[:1])
        first = 1 if operator in BATCH_NORMS else NORMS[operator]
        if operator in BATCH_NORMS:
            self._hold(node.args[3:5])
        vectors = [item for item in node.args[first : first + 2] if isinstance(item, fx.Node)]
        return bool(vectors) and all(
            self._relate((self._keys(item), 1), (self._keys(result), -1)) for item in vectors
        )

    def _attended(self, node: fx.Node) -> bool:
        queries, keys, values = node.args[:3]
        products = self._keys(queries, -1), self._keys(keys, -1)
        given = self._keys(values, -1), self._keys(node, -1)
        known = [len(self._keys(item)) for item in (queries, keys, values, node)]
        if known != [len(item) for item in (*products, *given)] or any(map(self._keys, node.args[3:])):
            return False
        return self._relate((products[0], 1), (products[1], 1)) and self._relate(
            (given[0], 1), (given[1], -1)
        )

    def _convolved(self, node: fx.Node) -> bool:
        x, weight = node.args[:2]
        groups = node.args[6] if len(node.args) > 6 else 1
        taken, written, given = self._keys(x), self._keys(weight, 0), self._keys(node)
        if not self._added(node, node.args[2] if len(node.args) > 2 else None):
            return False
        if groups == 1:
            read = self._keys(weight, 1)
            return self._relate((taken, 1), (read, 1)) and self._relate((written, 1), (given, -1))
        depthwise = sizes_of(weight)[:1] == sizes_of(x)[1:2] == [groups]
        return depthwise and self._relate((taken, 1), (written, 1), (given, -1))

    def _multiplied(self, node: fx.Node, operator: str) -> bool:
        left, right = node.args[1:3] if operator == "addmm" else node.args[:2]
        bias = node.args[0] if operator == "addmm" else (node.args[2:3] or (None,))[0]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return False
        read, written = (-1, 0) if operator == "linear" else (-2, -1)
        if operator != "linear" and min(len(sizes_of(left)), len(sizes_of(right))) < 2:
            return False
        if not self._added(node, bias if operator in ("linear", "addmm") else None):
            return False
        taken = self._keys(left, -1), self._keys(right, read)
        others = [key for key in self._keys(left) if key not in taken[0]]
        batch = [key for key in self._keys(right) if key not in (*taken[1], *self._keys(right, written))]
        last = self._keys(node, -1)
        rest = [key for key in self._keys(node) if key not in last]
        return (
            not batch
            and self._relate((taken[0], 1), (taken[1], 1))
            and self._relate((self._keys(right, written), 1), (last, -1))
            and self._relate((others, 1), (rest, -1))
        )

    def _added(self, node: fx.Node, bias: Any) -> bool:
        """Require that a bias has the exponents of the result."""
        if not isinstance(bias, fx.Node):
            return True
        return self._relate((self._keys(bias), 1), (self._keys(node), -1))

    # -- views ------------------------------------------------------------------------------------

    def _moved(self, node: fx.Node, operator: str, operands: Sequence[fx.Node]) -> bool:
        """Require that units keep their exponents wherever they are moved."""
        holders = [item for item in operands if self._keys(item)]
        if node not in self.held.axes:  # whatever reads it follows the units back, if that can be done
            return self._label(node) is not None or not any(map(self._carries, operands))
        keys = self._keys(node)
        if len(holders) == 1 and len(keys) == len(self._keys(holders[0])) == 1 and operator not in _JOINING:
            return self._relate((keys, 1), (self._keys(holders[0]), -1))
        label = self._run(node)
        if label is None:
            return not keys and not holders
        for key in keys:
            block = self._block(label, key)
            if bool((block < 0).any()):  # joined with what has no factor
                return False
            for origin in self._labelled(block):
                self.equations.require({key: 1, origin: -1} if key != origin else {})
        return True

    def _carries(self, node: fx.Node) -> bool:
        """Return whether units lie in a tensor, with a layout or without."""
        return bool(self._keys(node)) or self._label(node) is not None

    def _label(self, node: fx.Node) -> Any:
        """Return which key every element of a tensor has: an int64 tensor, or None where none has any."""
        if node not in self.labels:
            self.labels[node] = self._own_label(node) if node in self.held.axes else self._run(node)
        return self.labels[node]

    def _own_label(self, node: fx.Node) -> torch.Tensor | None:
        keys, sizes = self._keys(node), sizes_of(node)
        if len({axis for _, axis, _ in keys}) != 1 or math.prod(sizes) > _LARGEST_TRACED:
            return None  # an element has one label
        label = torch.full(sizes, -1, dtype=torch.int64)
        for key in keys:
            label.index_fill_(key[1], self._positions(key), len(self.named))
            self.named[len(self.named)] = key
        return label

    def _positions(self, key: Key) -> torch.Tensor:
        """Return where on its axis a block lies."""
        node, axis, offset = key
        found = [torch.empty(0, dtype=torch.int64)]
        for part in self.held.axes[node][axis]:
            if part.offset == offset and self._holds(part):
                places = torch.tensor([offset])
                for factor in part.factors:
                    places = (places[:, None] + factor.stride * torch.arange(factor.size)).flatten()
                found.append(places)
        return torch.cat(found).unique()

    def _block(self, label: torch.Tensor, key: Key) -> torch.Tensor:
        return label.index_select(key[1], self._positions(key))

    def _labelled(self, label: Any) -> list[Key]:
        """Return the keys that elements of tensors have."""
        tensors = [item for item in pytree.tree_leaves(label) if isinstance(item, torch.Tensor)]
        found = dict.fromkeys(index for item in tensors for index in item.unique().tolist() if index >= 0)
        return [self.named[index] for index in found]

    def _run(self, node: fx.Node) -> Any:
        """Run a view on labels in place of values; None where no operand has any."""
        operands = list(filter(_has_elements, node.all_input_nodes))
        if node.op != "call_function" or all(self._label(item) is None for item in operands):
            return None
        if operator_name(node.target) in _COPYING:
            return self._label(operands[0])
        if operator_name(node.target) not in _VIEWS and node.target is not getitem:
            return None

        def given(item: fx.Node) -> Any:
            if not _has_elements(item):
                return hint(item.meta.get("val"))
            label = self._label(item)
            return torch.full(sizes_of(item), -1, dtype=torch.int64) if label is None else label

        args, kwargs = fx.map_arg((node.args, node.kwargs), given)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        return target(*args, **kwargs)


def _has_elements(item: fx.Node) -> bool:
    return isinstance(item.meta.get("val"), (torch.Tensor, list, tuple))
