"""Capture: a model becomes a functional ATen graph that keeps the model's parameter names.

``torch.export`` traces, ``run_decompositions({})`` removes in-place operators while compound operators
(linear, convolution, layer norm, attention) stay whole. The captured module shares its tensors with the
user's model: whoever changes parameters replaces them and never writes in place.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import dataclasses
import inspect
import io
import keyword
import operator
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import ShapesCollection

from fxfusion.devices import device_of, onto
from fxfusion.errors import CaptureError, InputError, OutputSelectionError
from fxfusion.specialise import Specialised

Model = torch.nn.Module | ExportedProgram

# Outputs that show a network's inside: keeping them would fix the spaces they expose.
_INTERNAL = re.compile(
    r"hidden_state|attention|past_key_values|pooler_output|_model_output|cache|^encoder_|^extract_features"
    r"|^mems$|^router_|^intermediate_|^rnn_state|^state$|^feature_maps|_loss$"
)
_RESERVED = frozenset([*dir(builtins), *keyword.kwlist, "device", "inf", "nan", "torch"])  # in generated code
_NUMBER = re.compile(r"(_\d+)+$")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(eq=False)
class Capture:
    """A captured model.

    Attributes
    ----------
    module : torch.fx.GraphModule
        The functional graph; its tensors are the model's own.
    name : str
        The model's class, for messages.
    args, kwargs : tuple, dict
        Example inputs with which it was captured (a single sample was doubled).
    parameters : dict of str to tuple of int
        Shape of every parameter and of every statistics buffer, by the name under which the graph uses it.
    aliases : dict of str to str
        Other names of tied tensors, each to the name that the graph uses.
    constants : frozenset of str
        Names of the tensors that are neither.
    unused : tuple of str
        Parameters that the graph never reads.
    inputs : tuple of str
        Names of the positional inputs; keyword inputs have theirs in ``kwargs``.
    outputs : tuple of str
        Name of every flat output.
    dynamic : bool
        Whether the batch size is symbolic.
    lifted : frozenset of str
        Constants of the model's code. No state dict has them, but copying a graph module makes buffers of
        them.
    """

    module: fx.GraphModule
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    constants: frozenset[str]
    unused: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: bool
    lifted: frozenset[str] = frozenset()

    def canonical(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the typed tensors of a state dict under the names that the graph uses."""
        return {name: state[name] for name in self.parameters}

    def select_outputs(self, outputs: Sequence[str] | None) -> frozenset[int]:
        """Return the flat positions of the outputs that count.

        Parameters
        ----------
        outputs : sequence of str or None
            Names; None means all but hidden states, attentions and caches, or all where nothing else reads
            the parameters.

        Raises
        ------
        OutputSelectionError
            If the model has no output of a given name.
        """
        if outputs is None:
            named = sorted(set(self.outputs))
            outputs = [name for name in named if not _INTERNAL.search(name)]
            if not self._reads_parameters(outputs):
                outputs = named
        unknown = set(outputs) - set(self.outputs)
        if unknown or not outputs:
            raise OutputSelectionError(
                f"{self.name} has no output named {', '.join(sorted(unknown)) or '(none given)'}; "
                f"it has: {', '.join(dict.fromkeys(self.outputs))}"
            )
        return frozenset(index for index, name in enumerate(self.outputs) if name in outputs)

    def _reads_parameters(self, outputs: Sequence[str]) -> bool:
        """Whether a parameter is among what the named outputs are computed from."""
        flat = pytree.tree_leaves(self.module.graph.output_node().args[0])
        ends = [leaf for leaf, name in zip(flat, self.outputs, strict=True) if name in outputs]
        return any(node.op == "get_attr" and str(node.target) in self.parameters for node in _ancestors(ends))


def _ancestors(ends: Iterable[Any]) -> set[fx.Node]:
    """Return nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    pending = [node for node in ends if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def capture(model: Model, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Capture:
    """Capture a model as a functional ATen graph.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        Any module that ``torch.export`` accepts, a ``torch.fx.GraphModule`` among them. It may lie on the
        meta device: then nothing is allocated.
    args, kwargs : sequence, mapping
        Example inputs. Their batch and sequence lengths become symbolic where the model allows.

    Returns
    -------
    Capture

    Raises
    ------
    CaptureError
        If ``torch.export`` refuses the model.

    Examples
    --------
    >>> import torch
    >>> captured = capture(torch.nn.Linear(3, 2), (torch.randn(4, 3),))
    >>> captured.parameters
    {'weight': (2, 3), 'bias': (2,)}
    """
    if isinstance(args, torch.Tensor):
        raise InputError("args is a tensor: give a tuple of positional inputs, (tensor,)")
    if isinstance(model, ExportedProgram):
        example = onto(_example_of(model, args, kwargs), device_of(model.state_dict.values()))
        return _from_program(model, model, "ExportedProgram", *example)
    device = device_of([*model.parameters(), *model.buffers()])
    given = onto((tuple(args), dict(kwargs or {})), device)
    example = _double_single_sample(given)
    name = type(model).__name__
    # Export leaves traces in the module's train/eval flags only when it fails: restore them ourselves.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        try:
            program = _export(model, *example)
        except CaptureError:
            if example is given:
                raise
            example = given  # a model that takes batches of one only
            program = _export(model, *example)
    finally:
        for module in training:
            module.training = True
    return _from_program(program, model, name, *example)


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    failures: list[Exception] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
            model, args, kwargs = _fake(model, args, kwargs)
        for shapes in _dynamic_shapes(model, args, kwargs):
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # it prints the graph that it gives up on
                    program = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
            except Exception as error:  # torch.export raises whatever the model raises
                failures.append(error)
                continue
            unknown = _size_from_data(program)
            if unknown is None or isinstance(model, Specialised):  # what is left then is frozen
                return program
            # With fewer symbolic sizes it may be a number (DeBERTa reads one from a tensor of a size).
            failures.append(ValueError(f"a size depends on data at node {unknown}"))
    raise CaptureError(_explain(type(model).__name__, failures[-1])) from failures[-1]


def _size_from_data(program: ExportedProgram) -> str | None:
    """Return the first node with a size that only running the model tells, or None."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(
            isinstance(size, torch.SymInt) and size.node.hint is None for size in value.shape
        ):
            return str(node.name)
    return None


def _explain(name: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = ""
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        library = "/torch/" in filename or ("/lib/python" in filename and "-packages" not in filename)
        if not library and not filename.startswith("<") and "fxfusion" not in filename:
            where = f" at {filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return (
        f"torch.export refused {name}{where}: {type(error).__name__}: {reason.strip()}. "
        "Check the example inputs; if the model's control flow depends on data, trace it on inputs that take "
        "the branches you need: fxfusion.specialise(model, args, kwargs)."
    )


def _fake(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Put a meta model on a fake CPU: shapes and devices are right, nothing is allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    model = copy.deepcopy(model)
    replaced: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            replaced[id(tensor)] = empty
        return replaced[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _as_parameter(fake(parameter), replaced, id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = fake(buffer)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor,
        lambda tensor: fake(tensor) if tensor.is_meta else mode.from_tensor(tensor),
        (args, kwargs),
    )
    return model, args, kwargs


def _as_parameter(tensor: torch.Tensor, replaced: dict[int, torch.Tensor], key: int) -> torch.nn.Parameter:
    if not isinstance(tensor, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
        replaced[key] = tensor
    return tensor


def _double_single_sample(given: Example) -> Example:
    """Repeat a batch of one: torch.export takes a size of one for a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if tensors and all(tensor.ndim and tensor.shape[0] == 1 for tensor in tensors):
        return pytree.tree_map_only(torch.Tensor, lambda tensor: torch.cat([tensor, tensor]), given)
    return given


def _dynamic_shapes(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield what may stay symbolic, most first: batch and sequence, batch, nothing."""
    if isinstance(model, Specialised):  # its sizes are numbers already
        yield None
        return
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def axes(tensor: torch.Tensor, sequence: bool) -> dict[int, Any]:
        has_sequence = tensor.ndim == 3 or (tensor.ndim == 2 and not tensor.is_floating_point())
        return {axis: Dim.AUTO for axis in range(2 if sequence and has_sequence else 1) if axis < tensor.ndim}

    attempts = []
    for sequence in (True, False):
        shapes = ShapesCollection()
        for tensor in tensors:
            shapes[tensor] = axes(tensor, sequence)
        attempts.append([axes(tensor, sequence) for tensor in tensors])
        if sequence or attempts[0] != attempts[1]:
            try:
                yield shapes.dynamic_shapes(model, args, kwargs)
            except Exception:  # an input structure that ShapesCollection cannot bind: keep sizes static
                continue
    yield None


def _example_of(
    program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args or kwargs:
        return tuple(args), dict(kwargs or {})
    if program.example_inputs is None:
        raise CaptureError("the ExportedProgram carries no example inputs: give args or kwargs")
    return tuple(program.example_inputs[0]), dict(program.example_inputs[1])


def _from_program(
    program: ExportedProgram, model: Model, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Capture:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            functional = program.run_decompositions({})
            module = functional.module(check_guards=False)
        except Exception as error:
            raise CaptureError(_explain(name, error)) from error
    assert isinstance(module, fx.GraphModule)
    _check_evaluation(module, name)
    _drop_mutations(module)
    _number(module)
    state = module.state_dict(keep_vars=True)
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.users}
    aliases = _aliases(model, state, read)
    typed = {key: tensor for key, tensor in state.items() if _is_typed(tensor) and key not in aliases}
    parameters = {key: tuple(tensor.shape) for key, tensor in typed.items()}
    constants = read - set(parameters) - set(aliases)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    return Capture(
        module=module,
        name=name,
        args=args,
        kwargs=kwargs,
        parameters=parameters,
        aliases=aliases,
        constants=frozenset(constants),
        unused=tuple(key for key in parameters if key not in read),
        inputs=_positional_names(model, module, args),
        outputs=_output_names(module),
        dynamic=any(
            isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].ndim
            and isinstance(node.meta["val"].shape[0], torch.SymInt)
            and not node.meta["val"].shape[0].node.expr.is_number
            for node in placeholders
        ),
        lifted=frozenset(constants - set(state)),
    )


def _check_evaluation(module: fx.GraphModule, name: str) -> None:
    """Refuse a program exported in training mode: its statistics depend on the batch."""
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op != "call_function" or "batch_norm" not in target or "no_training" in target:
            continue
        if not any(item.op == "placeholder" for item in _ancestors(node.all_input_nodes)):
            continue  # weight standardisation: it normalises weights
        place = 5 if target.startswith("aten.batch_norm") or "legit" in target else None
        if place is None or (len(node.args) > place and node.args[place]) or "functional" in target:
            raise CaptureError(
                f"{name} was exported in training mode: node {node.name} ({target}) normalises by the batch. "
                "Call .eval() before torch.export.export"
            )


def _drop_mutations(module: fx.GraphModule) -> None:
    """Take out writes into buffers: a fused network must not count calls in its parents' tensors."""
    for node in list(module.graph.nodes):
        destination = node.args[0] if node.args else None
        if node.target is torch.ops.aten.copy_.default and isinstance(destination, fx.Node):
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
    module.recompile()


def _number(module: fx.GraphModule) -> None:
    """Number operators by their order alone: to PyTorch, traced sizes and what was left out count, too.

    Graphs of parents of other widths are compared, and run side by side, by these names.
    """
    operators = [node for node in module.graph.nodes if node.op == "call_function"]
    taken = {node.name for node in module.graph.nodes if node.op != "call_function"} | _RESERVED
    counts: dict[str, int] = {}
    for node in operators:
        name = base = _NUMBER.sub("", node.name)
        count = counts.get(base, 0)
        if count:
            name = f"{base}_{count}"
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        counts[base] = count + 1
        taken.add(name)
        node.name = name
    # A node that someone adds to the graph must not get one of these names.
    module.graph._graph_namespace._used_names.update(taken)


def _positional_names(model: Model, module: fx.GraphModule, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of positional inputs: of forward's parameters, else of the graph's placeholders."""
    if isinstance(model, torch.nn.Module) and not isinstance(model, fx.GraphModule):
        parameters = list(inspect.signature(model.forward).parameters.values())[: len(args)]
        if len(parameters) == len(args) and not any(item.kind is item.VAR_POSITIONAL for item in parameters):
            return tuple(item.name for item in parameters)
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    return tuple(placeholders[: len(args)])


def _is_typed(tensor: torch.Tensor) -> bool:
    """Parameters and persistent floating-point buffers carry units; counters and scalars do not."""
    if isinstance(tensor, torch.nn.Parameter):
        return True
    return tensor.is_floating_point() and tensor.ndim > 0


def tied_groups(model: Model) -> list[tuple[str, ...]]:
    """Return the groups of names under which a model holds one tensor.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> tied_groups(model)
    [('0.weight', '1.weight')]
    """
    if isinstance(model, ExportedProgram):
        named: list[tuple[str, torch.Tensor]] = list(model.state_dict.items())
    else:
        named = list(model.named_parameters(remove_duplicate=False))
        named += list(model.named_buffers(remove_duplicate=False))
    groups: dict[Any, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(_identity(tensor), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _identity(tensor: torch.Tensor) -> Any:
    """Two tensors are one if they are the same object or the same memory seen alike."""
    if not is_real(tensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _aliases(model: Model, state: Mapping[str, torch.Tensor], read: set[str]) -> dict[str, str]:
    aliases = {}
    for group in tied_groups(model):
        names = [name for name in group if name in state]
        used = next((name for name in names if name in read), names[0] if names else "")
        aliases.update({name: used for name in names if name != used})
    return aliases


def _output_names(module: fx.GraphModule) -> tuple[str, ...]:
    spec = getattr(module, "_out_spec", None) or module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    count = spec.num_leaves
    tree = pytree.tree_unflatten(list(range(count)), spec)
    names = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        key = path[0] if path else None
        names.append(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "output")))))
    return tuple(names)


def attribute(module: torch.nn.Module, target: str) -> Any:
    """Return what a graph's ``get_attr`` node names."""
    return operator.attrgetter(target)(module)


def is_real(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def hint(value: Any) -> Any:
    """Return the size that the example has where the graph is symbolic."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value


def source_line(node: fx.Node) -> str:
    """Return ``file:line`` of the model's code that made a node, or an empty string."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return ":".join(own[-1]) if own else ""
