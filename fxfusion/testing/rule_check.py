"""Hold one operator rule against the operator itself: is what it claims true, and is anything missed?

A rule is checked on a graph of one operator whose tensors are all parameters, so that every axis starts
free and whatever the rule lets pass is claimed to be a symmetry. Claims are then tried on the operator
itself, in float64. Pair it with a property-testing library that draws shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator as builtin_operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.nn.functional import one_hot

from fxfusion.axes import Axis, Case, Leaf, Sum, children_of, describe, factors_of, leaves_of, resolve
from fxfusion.capture import Capture
from fxfusion.dependencies import dependencies
from fxfusion.inference import Inferred, infer
from fxfusion.layout import lay_out
from fxfusion.transport.map import HardMap, Map, transport_tensor

TOLERANCE = 1e-9  # relative to the largest element, in float64
LARGEST_SUBSET = 5  # axes that are permuted together in search of a missed symmetry
SHUFFLES = 8  # other values for which a missed symmetry must hold too
LARGEST_AXIS = 12  # units of an axis of which every pair is swapped in search of a missed symmetry

_State = dict[str, torch.Tensor]
_Trials = Sequence[tuple[_State, list[torch.Tensor]]]  # parameters, and the outputs that they give


@dataclasses.dataclass(frozen=True, eq=False)
class Free:
    """Mark an integer or boolean tensor as data that may be permuted, not as indices or a fixed mask."""

    tensor: torch.Tensor


@dataclasses.dataclass(frozen=True)
class RuleReport:
    """What :func:`check_rule` found.

    Attributes
    ----------
    operator : str
        The operator, such as ``aten.linear.default``.
    false_claims : tuple of str
        Permutations that the rule allows and the operator does not, and failures of the rule.
    missed : tuple of str
        Permutations of input axes that the operator allows and the rule does not: sound, but a loss.
    """

    operator: str
    false_claims: tuple[str, ...]
    missed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no false claims."""
        return not self.false_claims


def check_rule(
    operator: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    structured: bool = True,
    thorough: bool = True,
) -> RuleReport:
    """Hold the rule of an operator against the operator itself.

    Parameters
    ----------
    operator : torch._ops.OpOverload
        Such as ``torch.ops.aten.linear.default``, or an operator of a ``torch.library``.
    args, kwargs : sequence, mapping
        Example arguments: tensors, lists of tensors, and anything else that is passed on. Floating-point
        tensors become parameters in float64, integer and boolean ones constants unless wrapped in
        :class:`Free`. Give them random values and different sizes: a coincidence is taken for a symmetry.
    seed : int
        Draws the permutations.
    structured : bool
        Look for false claims also with each axis in turn made by repetition, by a view of two axes and by
        concatenation, so that the rule meets types with structure.
    thorough : bool
        Try every space and every structure by itself, and search for missed symmetries. Without, one random
        permutation of all spaces is tried on arguments of random structure: some milliseconds, for a
        property-testing library that draws many calls.

    Returns
    -------
    RuleReport

    Examples
    --------
    >>> import torch
    >>> x, weight = torch.randn(2, 3), torch.randn(5, 3)
    >>> report = check_rule(torch.ops.aten.linear.default, (x, weight))
    >>> report.ok, report.missed
    (True, ())
    """
    generator = torch.Generator().manual_seed(seed)
    arguments = _Arguments(operator, args, dict(kwargs or {}))
    if not thorough:
        ways = arguments.random_ways(generator) if structured else {}
        context = "".join(f"with {key}[{axis}] made by {way}: " for key, (axis, way) in ways.items())
        claims = _Trial(arguments, ways).false_claims(generator, together=True)
        return RuleReport(str(operator), tuple(context + claim for claim in claims), ())
    plain = _Trial(arguments, {})
    false_claims = plain.false_claims(generator)
    missed = [] if false_claims else plain.missed(generator)
    if structured and not false_claims:
        for key, axis, way in arguments.ways():
            trial = _Trial(arguments, {key: (axis, way)})
            context = f"with {key}[{axis}] made by {way}: "
            false_claims += [context + claim for claim in trial.false_claims(generator)]
    return RuleReport(str(operator), tuple(false_claims), tuple(missed))


# -- a graph of one operator ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor among an operator's arguments."""

    key: str


class _Arguments:
    """An operator's arguments, its tensors named after its schema."""

    def __init__(self, operator: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.operator = operator
        self.free: _State = {}
        self.constant: _State = {}
        schema = getattr(operator, "_schema", None)
        names = [item.name for item in schema.arguments] if schema is not None else []
        names += [f"argument{index}" for index in range(len(names), len(args))]
        self.args = tuple(self._enter(name, item) for name, item in zip(names, args, strict=False))
        self.kwargs = {name: self._enter(name, item) for name, item in kwargs.items()}

    def _enter(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._enter(f"{name}_{index}", item) for index, item in enumerate(value)]
        if isinstance(value, Free):
            self.free[name] = value.tensor.detach()
        elif isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            wide = torch.complex128 if value.is_complex() else torch.float64
            self.free[name] = value.detach().to(wide)
        elif isinstance(value, torch.Tensor):
            self.constant[name] = value
        else:
            return value
        return _Slot(name)

    def ways(self) -> Iterator[tuple[str, int, str]]:
        """Yield every way to make one axis of one tensor from something else."""
        for key, tensor in self.free.items():
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    yield key, axis, "repetition"
                    yield key, axis, "concatenation"
                if any(size % outer == 0 for outer in range(2, size)):
                    yield key, axis, "a view"

    def random_ways(self, generator: torch.Generator) -> dict[str, tuple[int, str]]:
        """Return a way to make one axis of every other tensor or so."""
        ways: dict[str, tuple[int, str]] = {}
        for key, tensor in self.free.items():
            options = [
                (axis, way) for axis, size in enumerate(tensor.shape) for way in _ways(tensor, axis, size)
            ]
            picked = int(torch.randint(2 * len(options), (), generator=generator)) if options else 0
            if picked < len(options):
                ways[key] = options[picked]
        return ways


def _ways(tensor: torch.Tensor, axis: int, size: int) -> list[str]:
    """Return the ways to make an axis of a tensor from something else."""
    if size < 2:
        return []
    ways = ["repetition", "concatenation", "a slice", "a selection"]
    if any(size % outer == 0 for outer in range(2, size)):
        ways.append("a view")
    if axis + 1 < tensor.ndim and tensor.shape[axis + 1] > 1:
        ways.append("unflattening")
    return ways


class _Bare(torch.nn.Module):
    """What inference reads of a graph module; to generate code for it would take most of the time."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph


class _Trial:
    """A graph that calls the operator once.

    Parameters
    ----------
    arguments : _Arguments
    ways : mapping
        Which axis of which tensor is made by what.
    """

    def __init__(self, arguments: _Arguments, ways: Mapping[str, tuple[int, str]]) -> None:
        self.graph = fx.Graph()
        self.root = _Bare(self.graph)
        self.state: _State = {}
        nodes = {key: self._get(key, tensor, free=False) for key, tensor in arguments.constant.items()}
        for key, tensor in arguments.free.items():
            nodes[key] = self._make(key, tensor, *ways[key]) if key in ways else self._get(key, tensor)
        args, kwargs = _fill((arguments.args, arguments.kwargs), nodes)
        result = self._call(arguments.operator, args, kwargs)
        self.outputs = [result]
        if not isinstance(result.meta["val"], torch.Tensor):
            self.outputs = [
                self._call(builtin_operator.getitem, (result, index), {})
                for index, item in enumerate(result.meta["val"])
                if isinstance(item, torch.Tensor)
            ]
        self.before = [node.meta["val"] for node in self.outputs]
        self.graph.output(list(self.outputs))
        self.capture = Capture(
            module=cast(fx.GraphModule, self.root),
            name=str(arguments.operator),
            args=(),
            kwargs={},
            parameters={name: tuple(tensor.shape) for name, tensor in self.state.items()},
            aliases={},
            constants=frozenset(arguments.constant),
            unused=(),
            inputs=(),
            outputs=tuple(node.name for node in self.outputs),
            dynamic=False,
        )

    def _get(self, key: str, tensor: torch.Tensor, free: bool = True) -> fx.Node:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if free:
            self.state[key] = tensor
        self.root.register_buffer(key, tensor)
        node = self.graph.get_attr(key)
        node.meta["val"] = tensor
        return node

    def _make(self, key: str, tensor: torch.Tensor, axis: int, way: str) -> fx.Node:
        size = tensor.shape[axis]
        if way == "repetition":
            single = self._get(key, tensor.narrow(axis, 0, 1))
            repeated = self._call(torch.ops.aten.expand.default, (single, list(tensor.shape)), {})
            return self._call(torch.ops.aten.contiguous.default, (repeated,), {})
        if way == "concatenation":
            parts = tensor.tensor_split([size // 2], axis)
            nodes = [self._get(f"{key}_part{index}", part) for index, part in enumerate(parts)]
            return self._call(torch.ops.aten.cat.default, (nodes, axis), {})
        if way == "a slice":  # of a packed parameter
            packed = self._get(key, torch.cat([tensor, tensor.flip(axis), tensor.roll(1, axis)], axis))
            part = self._call(torch.ops.aten.slice.Tensor, (packed, axis, size, 2 * size), {})
            return self._call(torch.ops.aten.contiguous.default, (part,), {})
        if way == "a selection":  # of a packed parameter, viewed
            packed = self._get(key, torch.cat([tensor, tensor.flip(axis), tensor.roll(1, axis)], axis))
            shape = [*tensor.shape[:axis], 3, *tensor.shape[axis:]]
            viewed = self._call(torch.ops.aten.view.default, (packed, shape), {})
            part = self._call(torch.ops.aten.select.int, (viewed, axis, 1), {})
            return self._call(torch.ops.aten.contiguous.default, (part,), {})
        if way == "unflattening":
            flat = self._get(key, tensor.flatten(axis, axis + 1))
            return self._call(torch.ops.aten.view.default, (flat, list(tensor.shape)), {})
        outer = next(outer for outer in range(2, size) if size % outer == 0)
        factors = self._get(key, tensor.unflatten(axis, (outer, size // outer)))
        return self._call(torch.ops.aten.view.default, (factors, list(tensor.shape)), {})

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = _evaluate(node, lambda item: item.meta["val"])
        return node

    def run(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs for other parameters."""
        env: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                env[node] = state.get(str(node.target), node.meta["val"])
            elif node.op == "call_function":
                env[node] = _evaluate(node, env.__getitem__)
        return [env[node] for node in self.outputs]

    # -- soundness ------------------------------------------------------------------------------

    def false_claims(self, generator: torch.Generator, together: bool = False) -> list[str]:
        """Return what the rule claims and the operator contradicts, spaces moved one by one or together."""
        try:
            claims = _Claims(infer(self.capture, frozenset()))
        except Exception as error:  # a rule may fail in any way
            return [f"the rule raises {type(error).__name__}: {error}"]
        found = self._varying(claims)
        single = [] if together else [[leaf] for leaf in claims.free]
        for leaves in single + [claims.free] * (len(claims.free) > (not together)):
            maps = {claims.names[leaf]: claims.draw(leaf, generator) for leaf in leaves}
            moved = {
                name: claims.carry(tensor, claims.inferred.parameters[name], maps)
                for name, tensor in self.state.items()
            }
            for index, (node, before, after) in enumerate(
                zip(self.outputs, self.before, self.run(moved), strict=True)
            ):
                axes = claims.inferred.tensors[node.name]
                meaning = claims.inferred.meanings.get(node.name)
                if meaning is not None and meaning.kind == "index":  # the numbers of units change alike
                    axes = (*axes, meaning.axis)
                    before, after = (one_hot(item.long(), axes[-1].size) for item in (before, after))
                expected = claims.carry(before, axes, maps)
                for place, axis in enumerate(axes):
                    if resolve(axis) in claims.inferred.context.ordered:
                        after, expected = (item.sort(place).values for item in (after, expected))
                if not _same(after, expected):
                    places = " and ".join(claims.place(leaf) for leaf in leaves)
                    found.append(f"permuting {places} does not permute output {index} {_text(axes)} alike")
        return found

    def _varying(self, claims: _Claims) -> list[str]:
        """Return outputs that vary along an axis that is claimed to repeat."""
        found = []
        for index, (node, value) in enumerate(zip(self.outputs, self.before, strict=True)):
            axes = claims.inferred.tensors[node.name]
            for block in lay_out(node.name, value.shape, axes, lambda leaf: "unit").blocks:
                view = block.view(value)
                for dimension, factor in enumerate(block.factors):
                    if factor.space or factor.size < 2:
                        continue
                    if not _same(view, view.narrow(dimension, 0, 1).expand_as(view), _scale(value)):
                        found.append(f"output {index} {_text(axes)} varies along an axis claimed constant")
        return found

    # -- completeness ---------------------------------------------------------------------------

    def missed(self, generator: torch.Generator) -> list[str]:
        """Return permutations of input axes that the operator allows and the rule does not."""
        claims = _Claims(infer(self.capture, frozenset()))
        known = claims.unit_sets()
        states = [self.state, *(_shuffled(self.state, generator) for _ in range(SHUFFLES))]
        trials = [(state, self.run(state)) for state in states]
        found: list[frozenset[_Unit]] = []
        by_size: dict[int, list[_Unit]] = {}
        for unit in claims.units():
            by_size.setdefault(unit.size, []).append(unit)
        for _, units in sorted(by_size.items(), reverse=True):
            for count in range(1, min(len(units), LARGEST_SUBSET) + 1):
                for subset in map(frozenset, itertools.combinations(units, count)):
                    covered = any(_covers(item, subset) for item in (*known, *found))
                    if not covered and self._allows(subset, trials, generator):
                        found.append(subset)
        touched = {(unit.key, unit.axis) for subset in found for unit in subset}
        texts = [" = ".join(sorted(str(unit) for unit in subset)) for subset in found]
        for key, axes in claims.inferred.parameters.items():
            for axis, kind in enumerate(axes):
                if (key, axis) not in touched and not any(leaf.fixed is None for leaf in leaves_of(kind)):
                    texts += self._swappable(key, axis, trials)
        return sorted(texts)

    def _allows(self, units: frozenset[_Unit], trials: _Trials, generator: torch.Generator) -> bool:
        """Return whether permuting units together permutes every output along one axis or not at all."""
        if len({(unit.key, unit.axis) for unit in units}) < len(units):
            return False
        size = next(iter(units)).size
        candidates = [[None, *_units_of(value.shape, size)] for value in self.before]
        for state, before in trials:
            permutation = _permutation(size, generator)
            moved = dict(state)
            for unit in units:
                moved[unit.key] = unit.permute(moved[unit.key], permutation)
            candidates = [
                [
                    unit
                    for unit in several
                    if _same(new, old if unit is None else unit.permute(old, permutation))
                ]
                for several, old, new in zip(candidates, before, self.run(moved), strict=True)
            ]
            if not all(candidates):
                return False
        return True

    def _swappable(self, key: str, axis: int, trials: _Trials) -> list[str]:
        """Return the sets of units of a fixed axis any two of which may swap."""
        size = self.state[key].shape[axis]
        classes = list(range(size))
        for left, right in itertools.combinations(range(size if size <= LARGEST_AXIS else 0), 2):
            order = torch.arange(size)
            order[[left, right]] = order[[right, left]]
            if all(
                _same_but_for_order(old, new)
                for state, before in trials
                for old, new in zip(
                    before, self.run({**state, key: state[key].index_select(axis, order)}), strict=True
                )
            ):
                classes = [classes[left] if item == classes[right] else item for item in classes]
        sets = [[unit for unit in range(size) if classes[unit] == item] for item in sorted(set(classes))]
        sets = [units for units in sets if len(units) > 1]
        return [f"{key}[{axis}] units {' '.join(map(str, units))}" for units in sets]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One factor of a tensor's axis: ``size`` units between ``outer`` and ``inner`` others."""

    key: str
    axis: int
    outer: int
    size: int
    inner: int

    def permute(self, tensor: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the units reordered."""
        view = tensor.unflatten(self.axis, (self.outer, self.size, self.inner))
        return view.index_select(self.axis + 1, permutation).reshape(tensor.shape)

    def __str__(self) -> str:
        name = f"{self.key}[{self.axis}]"
        return name if self.outer == self.inner == 1 else f"{name} as {self.outer}*({self.size})*{self.inner}"


class _Claims:
    """The symmetry group that an inference claims for a graph's parameters."""

    def __init__(self, inferred: Inferred) -> None:
        self.inferred = inferred
        self.held = list(
            dict.fromkeys(
                leaf for axes in inferred.parameters.values() for axis in axes for leaf in leaves_of(axis)
            )
        )
        self.free = [leaf for leaf in self.held if leaf.fixed is None and leaf.size > 1]
        self.names = {leaf: f"space{index}" for index, leaf in enumerate(self.held)}
        self.scopes = dependencies(inferred, frozenset(self.held))

    def draw(self, leaf: Leaf, generator: torch.Generator) -> Map:
        """Return a random transport of a space, one permutation per unit of its outer spaces."""
        outer = self.scopes.get(leaf, ())
        count = 1
        for item in outer:
            count *= item.size
        rows = torch.stack([_permutation(leaf.size, generator) for _ in range(count)])
        return HardMap(
            tuple(self.names[item] for item in outer),
            rows.reshape(*(item.size for item in outer), leaf.size),
        )

    def carry(self, tensor: torch.Tensor, axes: Sequence[Axis], maps: Mapping[str, Map]) -> torch.Tensor:
        """Return a tensor with its units permuted."""
        layout = lay_out("tensor", tensor.shape, axes, lambda leaf: self.names.get(leaf, ""))
        return transport_tensor(tensor, layout, maps)

    def place(self, leaf: Leaf) -> str:
        """Return where a space lies."""
        return " = ".join(
            f"{name}[{axis}]"
            for name, axes in self.inferred.parameters.items()
            for axis, kind in enumerate(axes)
            if leaf in leaves_of(kind)
        )

    def unit_sets(self) -> list[frozenset[_Unit]]:
        """Return for every free space the factors of parameter axes that it enumerates."""
        found: dict[Leaf, set[_Unit]] = {leaf: set() for leaf in self.free}
        for key, axes in self.inferred.parameters.items():
            for index, axis in enumerate(axes):
                inner, size = 1, axis.size
                if not size:
                    continue
                for factor in reversed(factors_of(axis)):
                    unit = _Unit(key, index, size // (inner * factor.size), factor.size, inner)
                    for leaf in leaves_of(factor):
                        if leaf in found:
                            found[leaf].add(unit)
                    inner *= factor.size
        return [frozenset(units) for units in found.values()]

    def units(self) -> Iterator[_Unit]:
        """Yield every whole axis, and the factors of every axis that may have them without being claimed."""
        for key, axes in self.inferred.parameters.items():
            for index, axis in enumerate(axes):
                kind = resolve(axis)
                whole = (isinstance(kind, Leaf) and kind.fixed is None) or _has_parts(kind)
                for unit in _units_of([item.size for item in axes], None):
                    if unit.axis == index and (unit.size == axis.size or not whole):
                        yield dataclasses.replace(unit, key=key)


def _units_of(shape: Sequence[int], size: int | None) -> Iterator[_Unit]:
    for axis, length in enumerate(shape):
        for units in range(2, length + 1) if size is None else [size]:
            for inner in range(1, length // units + 1):
                if length and length % (units * inner) == 0:
                    yield _Unit("", axis, length // (units * inner), units, inner)


def _covers(known: frozenset[_Unit], units: frozenset[_Unit]) -> bool:
    """Return whether permuting units is nothing new where permuting some whole axes or units is known."""
    if known <= units:
        return True
    whole = {(unit.key, unit.axis) for unit in known if unit.outer == unit.inner == 1}
    return len(whole) == len(known) and whole <= {(unit.key, unit.axis) for unit in units}


def _shuffled(state: _State, generator: torch.Generator) -> _State:
    """Return other numbers from the same domain: every tensor's own elements at other places."""
    return {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
        for name, tensor in state.items()
    }


def _has_parts(axis: Axis) -> bool:
    axis = resolve(axis)
    return isinstance(axis, (Sum, Case)) or any(_has_parts(child) for child in children_of(axis))


def _permutation(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random permutation other than the identity."""
    drawn = torch.randperm(size, generator=generator)
    while size > 1 and torch.equal(drawn, torch.arange(size)):
        drawn = torch.randperm(size, generator=generator)
    return drawn


def _fill(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, _Slot):
        return nodes[value.key]
    if isinstance(value, dict):
        return {key: _fill(item, nodes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, nodes) for item in value)
    return value


def _evaluate(node: fx.Node, look_up: Callable[[fx.Node], Any]) -> Any:
    args = fx.map_arg(node.args, look_up)
    kwargs = fx.map_arg(node.kwargs, look_up)
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _scale(tensor: torch.Tensor) -> float:
    tensor = tensor.abs() if tensor.is_complex() else tensor
    """Return the largest finite magnitude."""
    largest = float(tensor.abs().max()) if tensor.numel() and tensor.is_floating_point() else math.inf
    if math.isfinite(largest):
        return largest
    finite = tensor[tensor.isfinite()]
    finite = finite.abs() if tensor.is_complex() else finite.double().abs()
    return float(finite.max()) if finite.numel() else 1.0


def _same(left: torch.Tensor, right: torch.Tensor, scale: float | None = None) -> bool:
    if left.shape != right.shape:
        return False
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    if not left.is_floating_point():
        return torch.equal(left, right)
    scale = _scale(right) if scale is None else scale
    return torch.allclose(left, right, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True)


def _same_but_for_order(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors are equal, or become so by reordering them along one axis."""
    if _same(left, right):
        return True
    shape = left.shape
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    left, right = (tensor.double().nan_to_num(nan=0.1234) for tensor in (left, right))
    for axis, size in enumerate(shape):
        slices = [tensor.movedim(axis, 0).reshape(size, -1) for tensor in (left, right)]
        weights = torch.sin(torch.arange(1.0, slices[0].shape[1] + 1, dtype=torch.float64))
        first, second = (item[(item @ weights).argsort(stable=True)] for item in slices)
        if _same(first, second):
            return True
    return False


def _text(axes: Sequence[Axis]) -> str:
    return "[" + ", ".join(describe(axis) for axis in axes) + "]"
