"""Run a captured graph with any number of weight sets side by side, node by node.

Running the parents in lock step lets a statistic of both be taken at a node while only two sets of live
activations exist, and what depends on no parameter (masks, positions) is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram

from fxfusion.capture import Capture, Model, attribute, source_line
from fxfusion.devices import device_of, onto
from fxfusion.errors import CalibrationMismatchError, InputError
from fxfusion.rules.registry import operator_name

State = Mapping[str, torch.Tensor]
Observer = Callable[[fx.Node, Sequence[torch.Tensor]], None]

_INVALID = (IndexError, RuntimeError, TypeError, ValueError)  # what operators raise
_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,  # rotary tables as complex numbers
}


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
    """A batch on its way through a graph: the values that later nodes need.

    Attributes
    ----------
    shared : dict of Node to value
        Of nodes that depend on no parameter.
    own : tuple of dict of Node to value
        Of the others, one per weight set.
    """

    shared: dict[fx.Node, Any]
    own: tuple[dict[fx.Node, Any], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Environment:
    """Values of nodes: a state's own, those that all states share, and what is stored, on demand."""

    own: dict[fx.Node, Any]
    shared: dict[fx.Node, Any]
    stored: Callable[[fx.Node], Any]

    def look_up(self, item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        if item in self.own:
            return self.own[item]
        if item in self.shared:
            return self.shared[item]
        return self.stored(item)


class Program:
    """A captured graph, ready to run on given weights.

    Parameters
    ----------
    capture : Capture
    double : bool
        Run in float64: casts to a lower precision inside the graph become casts to float64.

    Attributes
    ----------
    nodes : list of Node
    shared : frozenset of Node
        Those that depend on no parameter.

    Examples
    --------
    >>> import torch
    >>> from fxfusion.capture import capture
    >>> model = torch.nn.Linear(3, 2)
    >>> program = Program(capture(model, (torch.ones(4, 3),)))
    >>> program.run([dict(model.named_parameters())], (torch.ones(4, 3),), {})[0][0].shape
    torch.Size([4, 2])
    """

    def __init__(self, capture: Capture, double: bool = False) -> None:
        self.capture = capture
        self.double = double
        self.device = device_of(capture.module.state_dict().values())
        self.nodes = list(capture.module.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self._dead = _last_uses(self.nodes)
        self.shared = _parameter_free(self.nodes, capture)
        self._constants = {
            node: attribute(capture.module, str(node.target))
            for node in self.nodes
            if node.op == "get_attr" and node in self.shared
        }

    def run(
        self,
        states: Sequence[State],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        observe: Observer | None = None,
        override: Callable[[fx.Node, int, tuple[Any, ...]], Any] | None = None,
        gradients: bool = False,
    ) -> list[list[Any]]:
        """Run the graph once per state, in lock step.

        Parameters
        ----------
        states : sequence of mapping
            Weights by the names that the graph uses.
        args, kwargs : sequence, mapping
            Inputs of the model.
        observe : callable ``(node, values)``, optional
            Called at every node whose value depends on parameters, with one value per state.
        override : callable ``(node, index, args) -> value or None``, optional
            Computes a node in place of its operator unless it returns None.
        gradients : bool
            Whether outputs can be differentiated with respect to the weights.

        Returns
        -------
        list of list
            Flat outputs per state.
        """
        outputs: list[list[Any]] = []
        with torch.set_grad_enabled(gradients):
            for node, values in self.steps(states, args, kwargs, override):
                if node.op == "output":
                    outputs = values
                elif observe is not None:
                    observe(node, values)
        return outputs

    def steps(
        self,
        states: Sequence[State],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        override: Callable[[fx.Node, int, tuple[Any, ...]], Any] | None = None,
    ) -> Iterator[tuple[fx.Node, list[Any]]]:
        """Run the graph node by node.

        Parameters
        ----------
        states, args, kwargs, override
            As for :meth:`run`.

        Yields
        ------
        node, values
            Every node whose value depends on parameters, and the output node, with one value per state. What
            later nodes do not need is dropped when the next one is asked for.
        """
        return self.advance(self.start(args, kwargs, len(states)), self.nodes, states, override)

    def start(self, args: Sequence[Any], kwargs: Mapping[str, Any], states: int) -> Live:
        """Return a batch before the first node, to be run on so many weight sets."""
        inputs = map(self._cast, onto(self.flatten(args, kwargs), self.device))
        return Live(dict(zip(self.placeholders, inputs, strict=True)), tuple({} for _ in range(states)))

    def advance(
        self,
        live: Live,
        nodes: Sequence[fx.Node],
        states: Sequence[State],
        override: Callable[[fx.Node, int, tuple[Any, ...]], Any] | None = None,
    ) -> Iterator[tuple[fx.Node, list[Any]]]:
        """Run the next nodes of a graph, in which only their parameters are looked up.

        Parameters
        ----------
        live : Live
            The batch; afterwards it holds what later nodes need.
        nodes : sequence of Node
            Those that follow the last ones run.
        states, override
            As for :meth:`run`.

        Yields
        ------
        node, values
            As :meth:`steps`.
        """
        shared = live.shared
        envs = [
            _Environment(own, shared, self._stored(state))
            for own, state in zip(live.own, states, strict=True)
        ]
        constant = _Environment({}, shared, self._stored({}))
        for node in nodes:
            if node.op == "output":
                outputs: Any = node.args[0]
                yield node, [[env.look_up(item) for item in outputs] for env in envs]
            elif node in self.shared:
                if node.op == "call_function":
                    shared[node] = self._call(node, constant)
            elif node.op != "get_attr":
                for index, env in enumerate(envs):
                    env.own[node] = self._compute(node, index, env, override)
                yield node, [env.own[node] for env in envs]
            for dead in self._dead.get(node, ()):
                shared.pop(dead, None)
                for env in envs:
                    env.own.pop(dead, None)

    def _compute(self, node, index, env, override) -> Any:  # type: ignore[no-untyped-def]
        if override is not None:
            value = override(node, index, fx.map_arg(node.args, env.look_up))
            if value is not None:
                return value
        return self._call(node, env)

    def _call(self, node: fx.Node, env: _Environment) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.look_up)
        if self.double:
            args, kwargs = _widen(args), _widen(kwargs)
        target: Any = node.target
        if self.double:
            target = _IN_DOUBLE.get(operator_name(target), target)
        try:
            value = target(*args, **kwargs)
        except _INVALID as error:
            line = source_line(node)
            place = f"{self.capture.name}: {operator_name(node.target)}" + (f" at {line}" if line else "")
            raise _refusal(error, place) from error
        if self.double:  # what is created without a dtype is float32 by default
            value = pytree.tree_map(self._cast, value)
        return value

    def _cast(self, value: Any) -> Any:
        if self.double and isinstance(value, torch.Tensor) and value.dtype in _WIDE:
            return value.to(_WIDE[value.dtype])
        return value

    def _stored(self, state: State) -> Callable[[fx.Node], Any]:
        """Return what looks up a parameter, or a constant of the graph.

        They are widened only where they are used: no second set of weights lives.
        """

        def look_up(node: fx.Node) -> Any:
            if node in self._constants:
                return self._cast(self._constants[node])
            return self._cast(state[self.capture.aliases.get(str(node.target), str(node.target))])

        return look_up

    # -- inputs ---------------------------------------------------------------------------------

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the graph's flat inputs; keyword arguments that are no tensors default to the example's."""
        spec = self.capture.module._in_spec
        _, keywords = pytree.tree_unflatten([None] * spec.num_leaves, spec)
        names = list(keywords)
        known = {
            **{key: value for key, value in self.capture.kwargs.items() if not _has_tensor(value)},
            **kwargs,
        }
        missing = [name for name in names if name not in known]
        if missing:
            raise CalibrationMismatchError(
                f"{self.capture.name} was captured with the inputs {', '.join(names)}; "
                f"missing: {', '.join(missing)}"
            )
        flat, given = pytree.tree_flatten((tuple(args), {name: known[name] for name in names}))
        if given.num_leaves != spec.num_leaves:
            raise CalibrationMismatchError(
                f"{self.capture.name} takes {spec.num_leaves} inputs, {given.num_leaves} were given"
            )
        return flat


def run_together(
    runs: Sequence[Iterator[tuple[fx.Node, list[Any]]]],
    observe: Callable[[fx.Node, list[list[Any]]], None] | None = None,
) -> None:
    """Run graphs that correspond node by node side by side; the last comes last at every node.

    Parameters
    ----------
    runs : sequence of iterator
        What :meth:`Program.steps` gives, one per graph.
    observe : callable ``(node, values)``, optional
        Called with every node of the first graph and the values of all states, graph by graph.
    """
    with torch.no_grad():
        for steps in zip(*runs, strict=True):
            node = steps[0][0]
            if observe is not None and node.op != "output":
                observe(node, [values for _, values in steps])


def by_capture(captures: Sequence[Capture]) -> list[list[int]]:
    """Return the positions that share a graph; the group of the last position comes last."""
    groups: dict[int, list[int]] = {}
    for index, capture in enumerate(captures):
        groups.setdefault(id(capture), []).append(index)
    return sorted(groups.values(), key=lambda group: group[-1])


def _grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply stacked matrices, or each group of rows by a matrix of its own."""
    if offs is None or (x.ndim, weight.ndim) != (2, 3):
        result = x @ weight
    else:
        ends = offs.tolist()
        groups = [
            x[start:end] @ weight[i] for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]
        rest = x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[-1])
        result = torch.cat([*groups, rest])
    return result if bias is None else result + bias


# Kernels that refuse float64.
_IN_DOUBLE: dict[str, Callable[..., Any]] = {"_grouped_mm": _grouped_mm}


def _widen(value: Any) -> Any:
    """Replace low-precision dtype arguments by float64."""
    if not _mentions_dtype(value):
        return value
    return pytree.tree_map(
        lambda item: _WIDE.get(item, item) if isinstance(item, torch.dtype) else item, value
    )


def _mentions_dtype(value: Any) -> bool:
    if isinstance(value, torch.dtype):
        return True
    if isinstance(value, Mapping):
        return any(_mentions_dtype(item) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_mentions_dtype(item) for item in value)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _parameter_free(nodes: Sequence[fx.Node], capture: Capture) -> frozenset[fx.Node]:
    """Return the nodes that depend on no parameter: their value is the same for every parent."""
    free: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            free.add(node)
        elif node.op == "get_attr":
            name = capture.aliases.get(str(node.target), str(node.target))
            if name not in capture.parameters:
                free.add(node)
        elif node.op == "call_function" and all(item in free for item in node.all_input_nodes):
            free.add(node)
    return frozenset(free)


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return for every node the values that nobody needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node  # what nobody uses ends where it begins
        for item in node.all_input_nodes:
            last[item] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for item, node in last.items():
        dead.setdefault(node, []).append(item)
    return dead


def _refusal(error: Exception, place: str) -> Exception:
    """Return the error to raise for what an operator raised; want of memory is not the inputs' fault."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
        return MemoryError(f"{place}: {reason}")
    return InputError(f"{place} fails on these inputs: {reason}: give others")


def flat_outputs(model: Model, args: Sequence[object], kwargs: Mapping[str, object]) -> list[object]:
    """Run a parent in evaluation, and leave no trace: flags and counting buffers are put back."""
    module: torch.nn.Module = model.module() if isinstance(model, ExportedProgram) else model
    training = (
        [] if isinstance(model, ExportedProgram) else [item for item in module.modules() if item.training]
    )
    for item in training:
        item.training = False
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    args, kwargs = onto((args, kwargs), device_of([*module.parameters(), *buffers.values()]))
    try:
        with torch.no_grad():
            return pytree.tree_leaves(module(*args, **kwargs))
    except _INVALID as error:
        raise _refusal(error, type(module).__name__) from error
    finally:
        for name, buffer in module.named_buffers():
            if name in buffers and not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
        for item in training:
            item.training = True
