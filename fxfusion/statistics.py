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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfusion.errors import CalibrationMismatchError
from fxfusion.execution import Live, Program, State, by_capture, run_together
from fxfusion.layout import ActivationBlock
from fxfusion.pairing import Parent
from fxfusion.plan import Plan
from fxfusion.processes import Processes, current
from fxfusion.progress import Progress, silent
from fxfusion.rules.registry import operator_name
from fxfusion.staging import MemoryLimit, Shelf, give_back_freed, stages, used
from fxfusion.stored import bytes_of
from fxfusion.transport.hierarchy import Shape
from fxfusion.transport.map import innermost
from fxfusion.transport.options import Observe, Positions

Place = tuple[str, int]  # name of a space, and which of its observations


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

    def __init__(
        self, batch: int, target: int, source: int, own: bool = False, device: torch.device | None = None
    ) -> None:
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.count = 0
        self.mean_target = zeros(batch, target)
        self.mean_source = zeros(batch, source)
        self.square_target = zeros(batch, target)
        self.square_source = zeros(batch, source)
        self.cross = zeros(batch, target, source)
        self.own = zeros(batch, target, target) if own else None

    def update(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Add samples: ``[batch, units, samples]`` of each parent."""
        if not target.shape[-1]:
            return
        batch = copy.copy(self)
        batch.count = target.shape[-1]
        mean_target, mean_source = target.mean(-1), source.mean(-1)
        batch.mean_target, batch.mean_source = mean_target.double(), mean_source.double()
        batch.square_target = torch.zeros_like(self.square_target)
        batch.square_source = torch.zeros_like(self.square_source)
        for start in range(0, batch.count, max(_SAMPLES, target.shape[1])):
            part = slice(start, start + max(_SAMPLES, target.shape[1]))
            left = target[..., part] - mean_target.unsqueeze(-1)
            right = source[..., part] - mean_source.unsqueeze(-1)
            batch.square_target += left.square().sum(-1)
            batch.square_source += right.square().sum(-1)
            _add_products(self.cross, left, right)
            if self.own is not None:
                _add_products(self.own, left, left)
        self._combine(batch)

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
        self.cross += other.cross
        if self.own is not None and other.own is not None:
            self.own += other.own
        if other.count:
            self._combine(other)

    def _combine(self, other: CrossMoments) -> None:
        """Add all but the products, and what the difference of means adds to these."""
        total = self.count + other.count
        shift_target = other.mean_target - self.mean_target
        shift_source = other.mean_source - self.mean_source
        weight = self.count * other.count / total
        self.square_target += other.square_target + weight * shift_target.square()
        self.square_source += other.square_source + weight * shift_source.square()
        left, right = shift_target.unsqueeze(-1), shift_source.unsqueeze(-2)
        self.cross.baddbmm_(left, right, alpha=weight)
        if self.own is not None:
            self.own.baddbmm_(left, left.mT, alpha=weight)
        self.mean_target += shift_target * (other.count / total)
        self.mean_source += shift_source * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """Cross-covariance ``[batch, target, source]``."""
        return self.cross / max(self.count, 1)

    @property
    def correlation(self) -> torch.Tensor:
        """Cross-correlation ``[batch, target, source]``, zero for units that do not vary."""
        deviation = self.square_target.sqrt().unsqueeze(-1) * self.square_source.sqrt().unsqueeze(-2)
        return torch.where(deviation > 0, self.cross / deviation.clamp_min(1e-300), 0.0)


def _add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add inner products over samples, a few rows at a time: widened at once they would be held thrice."""
    rows = max(_PRODUCTS // (right.shape[0] * right.shape[1]), 1)
    for start in range(0, left.shape[1], rows):
        part = slice(start, start + rows)
        total[:, part] += torch.matmul(left[:, part], right.mT)


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
    after : Observation, optional
        An earlier node's units of the same space, which come first: those of both are one set.
    others: tuple[int, ...]
        Dimensions with units of other free spaces: as samples these would not be the same in two networks,
        so that they are averaged.
    """

    node: str
    block: ActivationBlock
    dimension: int
    scope: tuple[int, ...]
    after: Observation | None = None
    others: tuple[int, ...] = ()

    @classmethod
    def all_of(
        cls, node: str, block: ActivationBlock, scopes: Mapping[str, Sequence[str]]
    ) -> Iterator[tuple[str, Observation]]:
        """Yield what a block shows of free spaces below which it holds no other, by their names.

        Parameters
        ----------
        node : str
        block : ActivationBlock
        scopes : mapping of str to sequence of str
            Outer spaces of every free space.
        """
        bound = block.bind(block.sizes)
        free = {dimension for dimension, factor in enumerate(bound.factors) if factor.space in scopes}
        for name, dimension, scope in innermost(bound, scopes):
            others = tuple(sorted(free - {dimension, *scope}))
            yield name, cls(node, block, dimension, tuple(scope), None, others)

    def of(self, plan: Plan, other: Plan) -> Observation:
        """Return the same place in a network of other widths."""
        if other is plan:
            return self
        number = next(index for index, item in enumerate(plan.activations[self.node]) if item is self.block)
        after = None if self.after is None else self.after.of(plan, other)
        return dataclasses.replace(self, block=other.activations[self.node][number], after=after)


LEAST_SAMPLES = 2  # below, units have no correlation
_SAMPLES = 1024  # centred at once: they stay in the cache, and need no pages of their own
_PRODUCTS = 2**22  # numbers that are multiplied before they are added

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
                for name, observation in Observation.all_of(node.name, block, scopes):
                    found[name].append(observation)
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
    if places is None:
        places = observations(parents[target].plan, parents[target].capture.module.graph)
    (found,) = gather(parents, target, batches, total, progress, places, observed, own)
    return [
        {name: [part[name, number] for number in range(len(where))] for name, where in places.items()}
        if part
        else {}
        for part in found
    ]


def gather(
    parents: Sequence[Parent],
    target: int,
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    total: int = 0,
    progress: Progress = silent,
    places: Mapping[str, Sequence[Observation]] | None = None,
    observed: Observe | None = None,
    own: bool = False,
    limit: MemoryLimit | None = None,
) -> Iterator[list[dict[Place, CrossMoments]]]:
    """Stream calibration data through all parents, stage by stage if memory is limited.

    Parameters
    ----------
    parents, target, batches, total, progress, places, observed, own
        As for :func:`collect`.
    limit : MemoryLimit, optional
        All batches go through one stage of the graph, with its weights alone in memory, before the next
        begins; without a limit the whole graph is one stage, and weights are looked up where they are used.

    Yields
    ------
    list of dict of (str, int) to CrossMoments
        After every stage what was gathered there: per parent (empty for the target), by name of a space and
        number of its observation.

    Raises
    ------
    MemoryLimitError
        If a single node takes more than a stage may; before anything is run.
    CalibrationMismatchError
        If a space was shown too few samples.
    """
    gathering = _Gathering(parents, target, places, observed or Observe(), own, limit)
    processes, parts = current(), gathering.parts()
    if limit is not None:
        give_back_freed()
    turns: Iterable[Sequence[Any]] = _turns(batches, processes.count)
    done = 0
    for part in parts:
        states = gathering.states(part)
        moments = drawn = gathering.unseen(part)
        counts = []
        for number, turn in enumerate(turns):
            if processes.count > 1:
                drawn = gathering.unseen(part)
            mine = turn[processes.rank : processes.rank + 1]
            processes.each(functools.partial(gathering.run, part, number, mine, states, drawn))
            if processes.count > 1:
                _add_up(moments, drawn, processes, len(turn))
            done += len(turn)
            counts.append([None] * len(turn))
            progress("calibrate", done, total * len(parts))
        turns = counts  # the batches themselves are on their way
        for seen in moments:
            _check_counts({place: item.count for place, item in seen.items()})
        del states, drawn
        yield moments
        del moments  # whoever takes them may let go of them before the next stage begins


def watch(
    parent: Parent,
    places: Mapping[Place, Observation],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    observed: Observe,
    see: Callable[[Place, torch.Tensor], None],
) -> None:
    """Stream calibration data through one network, and hand on what its units do.

    Parameters
    ----------
    parent : Parent
    places : mapping of (str, int) to Observation
        By name of a space and number of its observation.
    batches : iterable of (args, kwargs)
    observed : Observe
        Which samples and positions count.
    see : callable
        Called with a place and ``[fixed outer units, outer * own units, samples]``, as the graph is run.

    Raises
    ------
    CalibrationMismatchError
        If a space was shown too few samples.
    """
    program, counts = Program(parent.capture), dict.fromkeys(places, 0)
    at_node: dict[str, list[tuple[Place, Observation]]] = {}
    for place, observation in places.items():
        at_node.setdefault(observation.node, []).append((place, observation))
    shapes = {space.name: Shape.of(parent.plan, space) for space in parent.plan.spaces}

    def observe(node: fx.Node, values: Sequence[torch.Tensor]) -> None:
        for place, observation in at_node.get(node.name, ()):
            fixed, units, _ = _units(shapes[place[0]])
            samples = _samples(values[0], observation, fixed, units, observed)
            counts[place] += samples.shape[-1]
            see(place, samples)

    for args, kwargs in batches:
        if observed.confident < 1.0:
            args, kwargs = _confident(program, parent.state, args, kwargs, observed.confident)
        program.run([parent.state], args, kwargs, observe)
    _check_counts(counts)


def _check_counts(counts: Mapping[Place, int]) -> None:
    for (name, _), count in counts.items():
        if count < LEAST_SAMPLES:
            raise CalibrationMismatchError(
                f"the calibration data show space {name} fewer than {LEAST_SAMPLES} samples: give more"
            )


def _turns(batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield batches, as many at once as there are processes."""
    remaining = iter(batches)
    while turn := list(itertools.islice(remaining, count)):
        yield turn


class _Gathering:
    """Parents that run side by side, and where their spaces are observed."""

    def __init__(
        self,
        parents: Sequence[Parent],
        target: int,
        places: Mapping[str, Sequence[Observation]] | None,
        chosen: Observe,
        own: bool,
        limit: MemoryLimit | None,
    ) -> None:
        self.limit = limit
        self.shelf = None if limit is None else Shelf(limit.directory, limit.kept)
        self.parents = parents
        self.target = target
        self.chosen = chosen
        self.own = own
        self.plan = parents[target].plan
        self.shapes = [
            {space.name: Shape.of(parent.plan, space) for space in parent.plan.spaces} for parent in parents
        ]
        if places is None:
            places = observations(self.plan, parents[target].capture.module.graph)
        self.at_node: dict[str, list[tuple[Place, Observation]]] = {}
        self.kept_at: dict[str, list[tuple[Place, Observation]]] = {}  # what later observations come after
        for name, where in places.items():
            for number, observation in enumerate(where):
                self.at_node.setdefault(observation.node, []).append(((name, number), observation))
                if observation.after is not None:
                    assert limit is None, "what is kept between nodes is not kept between stages"
                    earlier = self.kept_at.setdefault(observation.after.node, [])
                    earlier.append(((name, number), observation.after))
        self.groups = by_capture([parent.capture for parent in parents])
        self.order = [index for group in self.groups for index in group]
        self.programs = [Program(parents[group[0]].capture) for group in self.groups]

    def unseen(self, part: slice) -> list[dict[Place, CrossMoments]]:
        """Return moments of nothing for what is observed in a part of the graph."""
        observed = [seen for node in self.programs[0].nodes[part] for seen in self.at_node.get(node.name, ())]
        return [
            {}
            if index == self.target
            else {
                place: CrossMoments(
                    *_units(shapes[place[0]], sets=1 if observation.after is None else 2),
                    self.own,
                    self.programs[0].device,
                )
                for place, observation in observed
            }
            for index, shapes in enumerate(self.shapes)
        ]

    def parts(self) -> list[slice]:
        """Return the parts of the graph that run one after the other: all of it if memory has no limit."""
        if self.limit is None:
            return [slice(None)]
        weights: dict[str, int] = {}
        for parent in self.parents:
            for name in parent.capture.parameters:
                weights[name] = weights.get(name, 0) + bytes_of(parent.state, name)
        held = {}
        for node, observed in self.at_node.items():
            units = [
                _units(shapes[name])
                for (name, _), _ in observed
                for index, shapes in enumerate(self.shapes)
                if index != self.target
            ]
            numbers = sum(fixed * left * (right + self.own * left) for fixed, left, right in units)
            held[node] = torch.float64.itemsize * numbers
        return stages(self.programs[0].capture, weights, held, self.limit.stage)

    def states(self, part: slice) -> list[list[State]]:
        """Return the parents' weights, graph by graph; if memory is limited, those of a part, read once."""
        found: list[list[State]] = []
        for program, group in zip(self.programs, self.groups, strict=True):
            states = [self.parents[index].state for index in group]
            if self.limit is not None:
                names = used(program.capture, program.nodes[part])
                states = [{name: state[name] for name in names} for state in states]
            found.append(states)
        return found

    def _begun(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Live]:
        """Return a batch before the first node of every graph."""
        if self.chosen.confident < 1.0:
            own = next(
                program
                for program, group in zip(self.programs, self.groups, strict=True)
                if self.target in group
            )
            args, kwargs = _confident(
                own, self.parents[self.target].state, args, kwargs, self.chosen.confident
            )
        return [
            program.start(args, kwargs, len(group))
            for program, group in zip(self.programs, self.groups, strict=True)
        ]

    def run(
        self,
        part: slice,
        number: int,
        batches: Sequence[Any],
        states: Sequence[Sequence[State]],
        drawn: Sequence[Mapping[Place, CrossMoments]],
    ) -> None:
        """Run batches (one, or none) through a part of the graph, and add what is seen."""
        for batch in batches:
            lives = self._begun(*batch) if self.shelf is None or not part.start else self.shelf.take(number)
            self._run(part, lives, states, drawn)
            if self.shelf is not None and part.stop < len(self.programs[0].nodes):
                self.shelf.put(number, lives)

    def _run(
        self,
        part: slice,
        lives: Sequence[Live],
        states: Sequence[Sequence[State]],
        drawn: Sequence[Mapping[Place, CrossMoments]],
    ) -> None:
        kept: dict[Place, dict[int, torch.Tensor]] = {}

        def observe(node: fx.Node, values: list[list[torch.Tensor]]) -> None:
            found = dict(zip(self.order, (value for part in values for value in part), strict=True))
            for place, observation in self.kept_at.get(node.name, ()):
                kept[place] = dict(self._seen(place, observation, found))
            for place, observation in self.at_node.get(node.name, ()):
                self._add(place, observation, found, drawn, kept.pop(place, {}))

        run_together(
            [
                program.advance(live, program.nodes[part], theirs)
                for program, live, theirs in zip(self.programs, lives, states, strict=True)
            ],
            observe,
        )

    def _add(
        self,
        place: Place,
        observation: Observation,
        found: Mapping[int, torch.Tensor],
        drawn: Sequence[Mapping[Place, CrossMoments]],
        before: Mapping[int, torch.Tensor],
    ) -> None:
        own = None
        for index, sample in self._seen(place, observation, found):
            if index in before:
                sample = torch.cat([before[index], sample], 1)
            if own is None:
                own = sample
            else:
                drawn[index][place].update(own, sample)

    def _seen(
        self, place: Place, observation: Observation, found: Mapping[int, torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what the parents' units do at a node, the target's first."""
        fixed, units, _ = _units(self.shapes[self.target][place[0]])
        yield self.target, _samples(found[self.target], observation, fixed, units, self.chosen)
        for index in self.order:
            if index != self.target:
                fixed, _, units = _units(self.shapes[index][place[0]])
                there = observation.of(self.plan, self.parents[index].plan.source)
                yield index, _samples(found[index], there, fixed, units, self.chosen)


def _units(shape: Shape, sets: int = 1) -> tuple[int, int, int]:
    """Return the independent pairs of sets of units, and the units of the target's and the source's sets."""
    return shape.fixed, sets * shape.outer * shape.size, sets * shape.source_outer * shape.source_size


def _add_up(
    moments: Sequence[Mapping[Place, CrossMoments]],
    drawn: Sequence[Mapping[Place, CrossMoments]],
    processes: Processes,
    last: int,
) -> None:
    """Add what the first processes have drawn from a batch each, in the order of batches."""
    for whole, part in zip(moments, drawn, strict=True):
        for place, item in whole.items():
            for other in part[place].sent(processes, last):
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
    rest = [axis for axis in range(view.ndim) if axis not in (*leading, *observation.others)]
    lead = len(leading)
    view = view.permute(*leading, *rest, *observation.others)
    if observation.others:
        view = view.mean(tuple(range(-len(observation.others), 0)))
    if chosen.positions is not Positions.ALL and rest and rest[0] == 0 and observation.block.axes[0] is None:
        kept = _positions(view.shape[lead + 1 :], chosen)
        if kept is not None:
            view = view.flatten(lead + 1).index_select(-1, kept)
    view = view.reshape(fixed, units, -1)
    return view if view.dtype is torch.float64 else view.float()
