"""Calibration statistics: cross-moments between two parents, streamed, never raw activations.

At every node where a space is written, joined or passed through a nonlinearity, the units of both parents
are observed over samples, tokens and positions; what is kept is their means, variances and
cross-covariance (``n_target x n_source`` numbers). Updates follow Chan, Golub and LeVeque (1983), so that
they are stable whatever the means are, and moments of disjoint data add up.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.errors import CalibrationMismatchError
from fxfusion.execution import Program, State, by_capture, run_together
from fxfusion.layout import ActivationBlock
from fxfusion.pairing import Parent
from fxfusion.plan import Plan
from fxfusion.processes import Processes, current
from fxfusion.progress import Progress, silent
from fxfusion.rules.registry import operator_name
from fxfusion.transport.hierarchy import Shape
from fxfusion.transport.map import innermost
from fxfusion.transport.options import Observe, Positions


class CrossMoments:
    """Streamed first and second moments of two sets of units seen on the same samples.

    Parameters
    ----------
    batch, target, source : int
        Number of independent pairs of sets, and units in each set.
    own : bool
        Whether the target's own covariance is gathered, too.

    Examples
    --------
    >>> moments = CrossMoments(1, 2, 2)
    >>> x = torch.tensor([[[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]])
    >>> moments.update(x[..., :2], x[..., :2])
    >>> moments.update(x[..., 2:], x[..., 2:])
    >>> moments.covariance
    tensor([[[0.6667, 1.3333],
             [1.3333, 2.6667]]], dtype=torch.float64)
    """

    def __init__(self, batch: int, target: int, source: int, own: bool = False) -> None:
        self.count = 0
        self.mean_target = torch.zeros(batch, target, dtype=torch.float64)
        self.mean_source = torch.zeros(batch, source, dtype=torch.float64)
        self.square_target = torch.zeros(batch, target, dtype=torch.float64)
        self.square_source = torch.zeros(batch, source, dtype=torch.float64)
        self.cross = torch.zeros(batch, target, source, dtype=torch.float64)
        self.absolute_target = torch.zeros(batch, target, dtype=torch.float64)
        self.own = torch.zeros(batch, target, target, dtype=torch.float64) if own else None

    def update(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Add samples: ``[batch, units, samples]`` of each parent."""
        count, left, right = self.cross.shape
        batch = CrossMoments(count, left, right, self.own is not None)
        batch.count = target.shape[-1]
        batch.absolute_target = target.abs().sum(-1).double()
        mean_target, mean_source = target.mean(-1), source.mean(-1)
        target, source = target - mean_target.unsqueeze(-1), source - mean_source.unsqueeze(-1)
        batch.mean_target, batch.mean_source = mean_target.double(), mean_source.double()
        batch.square_target = target.square().sum(-1).double()
        batch.square_source = source.square().sum(-1).double()
        batch.cross = torch.matmul(target, source.mT).double()
        if batch.own is not None:
            batch.own = torch.matmul(target, target.mT).double()
        self.add(batch)

    def sent(self, processes: Processes, last: int) -> Iterator[CrossMoments]:
        """Yield the moments that the first ``last`` processes have, in the order of ranks."""
        facts = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        count = torch.tensor(self.count)
        for found, *tensors in processes.turns([count, *facts.values()], last):
            moments = copy.copy(self)
            vars(moments).update(zip(facts, tensors, strict=True), count=int(found))
            yield moments

    def add(self, other: CrossMoments) -> None:
        """Add the moments of disjoint samples."""
        total = self.count + other.count
        if not total:
            return
        shift_target = other.mean_target - self.mean_target
        shift_source = other.mean_source - self.mean_source
        weight = self.count * other.count / total
        self.square_target += other.square_target + weight * shift_target.square()
        self.square_source += other.square_source + weight * shift_source.square()
        self.cross += other.cross + weight * shift_target.unsqueeze(-1) * shift_source.unsqueeze(-2)
        if self.own is not None and other.own is not None:
            self.own += other.own + weight * shift_target.unsqueeze(-1) * shift_target.unsqueeze(-2)
        self.mean_target += shift_target * (other.count / total)
        self.mean_source += shift_source * (other.count / total)
        self.absolute_target += other.absolute_target
        self.count = total

    @property
    def magnitude(self) -> torch.Tensor:
        """Mean magnitude of the target's units, ``[batch, target]``."""
        return self.absolute_target / max(self.count, 1)

    @property
    def covariance(self) -> torch.Tensor:
        """Cross-covariance ``[batch, target, source]``."""
        return self.cross / max(self.count, 1)

    @property
    def correlation(self) -> torch.Tensor:
        """Cross-correlation ``[batch, target, source]``, zero for units that do not vary."""
        deviation = self.square_target.sqrt().unsqueeze(-1) * self.square_source.sqrt().unsqueeze(-2)
        return torch.where(deviation > 0, self.cross / deviation.clamp_min(1e-300), 0.0)


@dataclasses.dataclass(frozen=True)
class Observation:
    """Where a space is observed: a block of a node's output, and the dimension that enumerates it.

    Attributes
    ----------
    node : str
    block : ActivationBlock
    dimension : int
        Dimension of the block's view with the space's units.
    scope : tuple of int
        Dimensions with the units of the outer spaces.
    """

    node: str
    block: ActivationBlock
    dimension: int
    scope: tuple[int, ...]

    def of(self, plan: Plan, other: Plan) -> Observation:
        """Return the same place in a network of other widths."""
        if other is plan:
            return self
        number = next(index for index, item in enumerate(plan.activations[self.node]) if item is self.block)
        return dataclasses.replace(self, block=other.activations[self.node][number])


LEAST_SAMPLES = 2  # below, units have no correlation

# Operators after which units are observed. Views and element-wise scalings in between carry nothing new.
WRITERS = frozenset(
    [
        "linear",
        "addmm",
        "mm",
        "bmm",
        "matmul",
        "baddbmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "embedding",
    ]
)
JOINS = frozenset(["add", "sub"])
NONLINEAR = frozenset(
    [
        "relu",
        "relu6",
        "gelu",
        "silu",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "mish",
        "softplus",
        "prelu",
        "scaled_dot_product_attention",
    ]
)
NORMS = frozenset(
    ["layer_norm", "rms_norm", "group_norm", "batch_norm", "_native_batch_norm_legit_no_training"]
)


def observations(plan: Plan, graph: fx.Graph) -> dict[str, list[Observation]]:
    """Choose where each space is observed.

    Parameters
    ----------
    plan : Plan
    graph : torch.fx.Graph

    Returns
    -------
    dict of str to list of Observation
        By name of space.
    """
    scopes = {space.name: space.scope for space in plan.spaces}
    found: dict[str, list[Observation]] = {name: [] for name in scopes}
    for node in graph.nodes:
        if node.name in plan.activations and _is_observed(node, plan):
            for block in plan.activations[node.name]:
                for name, dimension, scope in innermost(block.bind(block.sizes), scopes):
                    found[name].append(Observation(node.name, block, dimension, tuple(scope)))
    return found


def _is_observed(node: fx.Node, plan: Plan) -> bool:
    operator = operator_name(node.args[0].target if node.target is getitem else node.target)  # type: ignore[union-attr]
    if operator in JOINS:
        return sum(item.name in plan.activations for item in node.all_input_nodes) > 1
    return operator in WRITERS or operator in NONLINEAR or operator in NORMS


def collect(
    parents: Sequence[Parent],
    target: int,
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    total: int = 0,
    progress: Progress = silent,
    places: Mapping[str, Sequence[Observation]] | None = None,
    observed: Observe | None = None,
    own: bool = False,
) -> list[dict[str, list[CrossMoments]]]:
    """Stream calibration data through all parents and gather cross-moments with the target.

    Parameters
    ----------
    parents : sequence of Parent
    target : int
        Position of the parent in whose basis the others will be expressed.
    batches : iterable of (args, kwargs)
        Calibration inputs.
    total : int
        Number of batches for the progress display, 0 if unknown.
    progress : callable, optional
    places : mapping of str to sequence of Observation, optional
        Where spaces are observed; by default where :func:`observations` says.
    observed : Observe, optional
        Which samples and positions count; by default all.
    own : bool
        Whether the target's own covariances are gathered, too.

    Returns
    -------
    list of dict of str to list of CrossMoments
        Per parent (empty for the target), by space, one per observation.
    """
    plan, graph = parents[target].plan, parents[target].capture.module.graph
    if places is None:
        places = observations(plan, graph)
    shapes = [
        {space.name: Shape.of(parent.plan, space) for space in parent.plan.spaces} for parent in parents
    ]

    def unseen() -> list[dict[str, list[CrossMoments]]]:
        return [
            {
                name: [
                    CrossMoments(
                        shape.fixed, shape.outer * shape.size, shape.source_outer * shape.source_size, own
                    )
                    for _ in where
                ]
                for name, where in places.items()
                for shape in [shapes[index][name]]
                if index != target
            }
            for index in range(len(parents))
        ]

    moments = drawn = unseen()
    at_node: dict[str, list[tuple[str, int, Observation]]] = {}
    for name, where in places.items():
        for number, observation in enumerate(where):
            at_node.setdefault(observation.node, []).append((name, number, observation))

    chosen = observed or Observe()
    alike = by_capture([parent.capture for parent in parents])
    order = [index for group in alike for index in group]

    def observe(node: fx.Node, values: list[list[torch.Tensor]]) -> None:
        found = dict(zip(order, (value for part in values for value in part), strict=True))
        for name, number, observation in at_node.get(node.name, ()):
            shape = shapes[target][name]
            own = _samples(found[target], observation, shape.fixed, shape.outer * shape.size, chosen)
            for index in order:
                if index != target:
                    shape = shapes[index][name]
                    place = observation.of(plan, parents[index].plan.source)
                    units = shape.source_outer * shape.source_size
                    sample = _samples(found[index], place, shape.fixed, units, chosen)
                    drawn[index][name][number].update(own, sample)

    programs = [
        (Program(parents[group[0]].capture), [parents[index].state for index in group]) for group in alike
    ]
    own_program = next(
        program for (program, _), group in zip(programs, alike, strict=True) if target in group
    )

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if chosen.confident < 1.0:
            args, kwargs = _confident(own_program, parents[target].state, args, kwargs, chosen.confident)
        run_together([program.steps(states, args, kwargs) for program, states in programs], observe)

    processes, remaining, done = current(), iter(batches), 0
    while turn := list(itertools.islice(remaining, processes.count)):
        if processes.count > 1:
            drawn = unseen()
        own_part = turn[processes.rank : processes.rank + 1]
        processes.each(functools.partial(list, itertools.starmap(run, own_part)))
        if processes.count > 1:
            _add_up(moments, drawn, processes, len(turn))
        done += len(turn)
        progress("calibrate", done, total)
    for name, streamed in next((item for item in moments if item), {}).items():
        if any(item.count < LEAST_SAMPLES for item in streamed):
            raise CalibrationMismatchError(
                f"the calibration data show space {name} fewer than {LEAST_SAMPLES} samples: give more"
            )
    return moments


def _add_up(
    moments: list[dict[str, list[CrossMoments]]],
    drawn: list[dict[str, list[CrossMoments]]],
    processes: Processes,
    last: int,
) -> None:
    """Add what the first processes have drawn from a batch each, in the order of batches."""
    for whole, part in zip(moments, drawn, strict=True):
        for name, items in whole.items():
            for item, fresh in zip(items, part[name], strict=True):
                for other in fresh.sent(processes, last):
                    item.add(other)


def _confident(
    program: Program, state: State, args: Sequence[Any], kwargs: Mapping[str, Any], share: float
) -> tuple[Any, Any]:
    """Return the samples of a batch of whose classes a network is most certain."""
    output = next(item for item in program.run([state], args, kwargs)[0] if isinstance(item, torch.Tensor))
    logits = (
        output.float().flatten(1, -2).log_softmax(-1) if output.ndim > 2 else output.float().log_softmax(-1)
    )
    entropy = -(logits.exp() * logits).sum(-1).reshape(len(output), -1).mean(-1)
    kept = entropy.argsort()[: max(round(share * len(entropy)), LEAST_SAMPLES)].sort().values

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[kept] if tensor.ndim and tensor.shape[0] == len(entropy) else tensor

    return pytree.tree_map_only(torch.Tensor, cut, (tuple(args), dict(kwargs)))


def _positions(counts: Sequence[int], chosen: Observe) -> torch.Tensor | None:
    """Return which of a sample's positions count, as flat indices; None for all.

    Parameters
    ----------
    counts : sequence of int
        Sizes of the axes that enumerate positions: rows and columns, or one axis of tokens.
    chosen : Observe

    Examples
    --------
    >>> _positions([4, 4], Observe(positions="centre"))
    tensor([ 5,  6,  9, 10])
    >>> _positions([17], Observe(positions="centre"))  # a class token before 4 x 4 patches
    tensor([ 6,  7, 10, 11])
    >>> _positions([5], Observe(positions="first"))
    tensor([0])
    """
    total = math.prod(counts)
    if chosen.positions is Positions.ALL or total <= 1:
        return None
    if chosen.positions is Positions.FIRST:
        return torch.zeros(1, dtype=torch.int64)
    if chosen.positions is Positions.RANDOM:
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(total))
        return drawn[: max(round(chosen.share * total), 1)].sort().values
    first = 0
    if len(counts) == 1:  # tokens: a grid of patches, one token before it perhaps
        first = int(math.isqrt(total) ** 2 != total and math.isqrt(total - 1) ** 2 == total - 1)
        side = math.isqrt(total - first)
        counts = [side, side] if side**2 == total - first else [total]
    grid = torch.arange(first, total).reshape(*counts)
    for axis, count in enumerate(counts):
        grid = grid.narrow(axis, count // 4, max(count // 2, 1))
    return grid.flatten()


def _samples(
    value: torch.Tensor, observation: Observation, fixed: int, units: int, chosen: Observe
) -> torch.Tensor:
    """Return an activation as ``[fixed outer units, outer * own units, samples]`` in float32 or wider."""
    block = observation.block.bind(value.shape)
    view = block.view(value)
    leading = [*observation.scope, observation.dimension]
    rest = [axis for axis in range(view.ndim) if axis not in leading]
    lead = len(leading)
    view = view.permute(*leading, *rest)
    if chosen.positions is not Positions.ALL and rest and rest[0] == 0 and observation.block.axes[0] is None:
        kept = _positions(view.shape[lead + 1 :], chosen)
        if kept is not None:
            view = view.flatten(lead + 1).index_select(-1, kept)
    view = view.reshape(fixed, units, -1)
    return view if view.dtype is torch.float64 else view.float()
