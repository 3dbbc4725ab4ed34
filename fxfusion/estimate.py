"""What a fusion takes, told before it starts: bytes, operations, and seconds at this machine's rate.

Counted are the matrix products by which weights are compared, the assignments, and what is read and held.
These are most of a fusion without learning; the rest (capture, certificates, repair) is not told.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import fx
from torch.utils._pytree import tree_leaves

from fxfusion import references
from fxfusion.checkpoints import checkpoint_files
from fxfusion.inputs import Example, example_inputs, parse_input
from fxfusion.pipeline import planned
from fxfusion.plan import Plan
from fxfusion.recipes import Recipe
from fxfusion.rules.registry import operator_name
from fxfusion.transport.cost import MEMORY
from fxfusion.transport.hierarchy import Shape
from fxfusion.transport.map import innermost

SWEEPS = 2  # over all spaces, as a rule: the first solution, and what it improves
ASSIGNMENT = 2e-10  # seconds per cube of units: measured on uneven random features, the hardest we know
_MEASURED = 1024  # rows of the product that the rate is measured on


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a fusion takes.

    Attributes
    ----------
    parents : int
    parameters : int
        Of the target.
    files : int
        Bytes of weight files that would be read.
    memory : int
        Bytes held at most, beside the libraries.
    comparing : float
        Floating-point operations of all comparisons of weights.
    calibrating : float
        Those of the target's forward pass, per sample.
    rate : float
        Floating-point operations that this machine does in a second, one thread as many as torch uses.
    solving : float
        Seconds of assignments.
    calibrates : bool
        Whether calibration data are given, or may be.
    """

    parents: int
    parameters: int
    files: int
    memory: int
    comparing: float
    calibrating: float
    rate: float
    solving: float
    calibrates: bool

    @property
    def seconds(self) -> float:
        """Seconds of comparing weights and of solving."""
        return self.comparing / self.rate + self.solving

    def table(self) -> Table:
        """Return a table for a terminal."""
        table = Table(title="what it takes", show_header=False)
        rows = {
            "parents": f"{self.parents} of {self.parameters / 1e6:,.1f} million parameters",
            "weight files": f"{self.files / 1e9:,.2f} GB" if self.files else "none named: random weights",
            "memory, beside the libraries": f"at most about {self.memory / 1e9:,.2f} GB",
            "comparing weights": f"{self.comparing / 1e9:,.0f} billion operations, about "
            f"{self.comparing / self.rate:,.1f} s at {self.rate / 1e9:,.0f} billion a second",
            "assignments": f"at most about {self.solving:,.1f} s",
        }
        if self.calibrates:
            passes = 1000 * self.parents * self.calibrating
            rows["1,000 calibration samples"] = f"about {passes / self.rate:,.1f} s of forward passes"
        for name, text in rows.items():
            table.add_row(name, text)
        return table


def estimate(recipe: Recipe) -> tuple[Plan, Estimate]:
    """Tell what a recipe takes, without reading a weight.

    Parameters
    ----------
    recipe : Recipe

    Returns
    -------
    Plan
        Of the target.
    Estimate

    Raises
    ------
    FusionError
        Where a model or a file is not there, or cannot be captured.
    """
    resolved = references.resolve(recipe.models[recipe.target], weights=False)
    files = [file for model in recipe.models for file in _files(model)]
    example = example_inputs(resolved.model, [parse_input(text) for text in recipe.inputs], None)
    state = planned(resolved.model, example.args, example.kwargs, recipe.outputs)
    assert state.plan is not None
    count = len(recipe.models)
    numbers = [math.prod(shape) for shape in state.capture.parameters.values()]
    units = [Shape.of(state.plan, space).units for space in state.plan.spaces]
    held = sum(file.stat().st_size for file in files) or 4 * count * sum(numbers)
    sources = count - 1
    found = Estimate(
        parents=count,
        parameters=sum(numbers),
        files=sum(file.stat().st_size for file in files),
        memory=_memory(recipe, held, numbers, units),
        comparing=sources * SWEEPS * comparisons(state.plan),
        calibrating=forward(state.capture.module.graph, _samples(example)),
        rate=measured_rate(),
        solving=sources * SWEEPS * ASSIGNMENT * sum(float(number) ** 3 for number in units),
        calibrates=not recipe.stream or recipe.calibration is not None,
    )
    return state.plan, found


def _files(reference: str) -> tuple[Path, ...]:
    """Return the weight files that a reference names."""
    if reference.startswith("hf:"):
        return checkpoint_files(reference.removeprefix("hf:"))
    if reference.endswith(".pt2"):
        return (Path(reference),)
    _, _, file = reference.partition("@")
    return checkpoint_files(file) if file else ()


def _memory(recipe: Recipe, held: int, numbers: Sequence[int], units: Sequence[int]) -> int:
    """Return the bytes held at most.

    In memory: all parents, each of the others moved, and the average. From file to file: what is kept in
    float32 while weights are compared, the largest tensor a few times, and a shard, or what calibration may
    take. Either way the costs of the largest space, and what the solver copies of them.
    """
    count, solver = len(recipe.models), 3 * 8 * max(units, default=0) ** 2
    if not recipe.stream:
        return 2 * held + solver + (8 * (count - 1) * sum(number**2 for number in units))
    compared = min(MEMORY, int(recipe.max_memory * 1e9 / 2), 4 * 2 * sum(numbers))
    compared += int(4 * 4 * max(numbers) + min(recipe.shard_size * 1e9, held / count) + solver)
    return compared if recipe.calibration is None else max(compared, int(recipe.max_memory * 1e9))


def _samples(example: Example) -> int:
    tensors = (item for item in tree_leaves((example.args, example.kwargs)) if isinstance(item, torch.Tensor))
    return next((int(item.shape[0]) for item in tensors if item.ndim), 1)


def forward(graph: fx.Graph, samples: int) -> float:
    """Return the floating-point operations of a captured graph's contractions, per sample.

    Parameters
    ----------
    graph : torch.fx.Graph
        With the shapes that it was captured with.
    samples : int
        How many samples it was captured with.
    """
    total = 0.0
    for node in graph.nodes:
        value, operator = node.meta.get("val"), operator_name(node.target)
        operands = [item.meta["val"] for item in node.all_input_nodes if "val" in item.meta]
        if not isinstance(value, torch.Tensor) or operator not in _CONTRACTED:
            continue
        total += 2.0 * int(value.numel()) * int(_CONTRACTED[operator](operands))
    return total / samples


def _attended(operands: Sequence[torch.Tensor]) -> int:
    """Return over how many products attention sums per element of its output: values, and scores."""
    query, keys, values = operands[:3]
    return keys.shape[-2] * (values.shape[-1] + query.shape[-1]) // values.shape[-1]


_CONTRACTED: dict[str, Callable[[Sequence[torch.Tensor]], int]] = {
    **dict.fromkeys(["mm", "bmm", "matmul", "linear"], lambda operands: operands[0].shape[-1]),
    **dict.fromkeys(["addmm", "baddbmm"], lambda operands: operands[1].shape[-1]),
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "convolution"], lambda operands: math.prod(operands[1].shape[1:])
    ),
    "scaled_dot_product_attention": _attended,
}  # per element of its output, how many products a contraction sums


def comparisons(plan: Plan) -> float:
    """Return the floating-point operations of comparing all weights of two networks once.

    Every unit is compared with every one of the other network, along all that a parameter holds of it: two
    operations per weight and unit.

    Examples
    --------
    >>> import fxfusion
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> comparisons(fxfusion.plan(model, (torch.ones(2, 4),)))  # 32 + 8 + 16 weights, 8 units
    896.0
    """
    units = {space.name: Shape.of(plan, space).units for space in plan.spaces}
    scopes = {space.name: space.scope for space in plan.spaces}
    return float(
        sum(
            2 * block.volume * units[name]
            for layout in plan.layouts.values()
            for block in layout.blocks
            for name, _, _ in innermost(block, scopes)
        )
    )


def measured_rate() -> float:
    """Return how many floating-point operations of a matrix product this machine does in a second."""
    left = torch.rand(_MEASURED, _MEASURED)
    left @ left
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        left @ left
        runs += 1
    return 2 * _MEASURED**3 * runs / (time.perf_counter() - start)
