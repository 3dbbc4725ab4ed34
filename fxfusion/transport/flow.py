"""Flow solving: every layer gets the transport of its own units, given those carried into it.

Each writer of a stream is aligned by what it computes: its activations, or its weights with the axes that
read carried by the transports that arrive there. Residual connections combine two transports by policy.
For two networks that are copies of each other, units permuted, all transports of a space agree and the
alignment is exact; otherwise the aligned parent no longer computes what it did, since skip and branch of a
residual stream are transported differently.

References
----------
Imfeld et al., Transformer Fusion with Optimal Transport, ICLR 2024, arXiv 2310.05719, section 4.
Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, arXiv 1910.05653.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxfusion.devices import device_of
from fxfusion.layout import Block
from fxfusion.plan import Plan
from fxfusion.statistics import CrossMoments, Observation
from fxfusion.symmetry import act, reading_axes
from fxfusion.transport.assignment import Masses
from fxfusion.transport.carry import Carried, Join, Solve, Streams, Transport, Writer, settled
from fxfusion.transport.compare import Comparison, compare, ground_cost
from fxfusion.transport.cost import State, resample
from fxfusion.transport.hierarchy import (
    Coupling,
    Ground,
    Shape,
    Tree,
    costs_in_place,
    costs_of,
    pairs,
    solve_tree,
    spread,
    to_maps,
    trees,
)
from fxfusion.transport.joint import Alignment
from fxfusion.transport.magnitudes import Magnitude
from fxfusion.transport.map import (
    BlockMaps,
    HardMap,
    Map,
    SoftMap,
    axis_of,
    in_order,
    transport_block,
)
from fxfusion.transport.options import Flow, Heads, Marginals, Residual, Scaling

Moments = Mapping[tuple[str, str], Sequence[CrossMoments]]  # by node and space


def flow_observations(
    plan: Plan, carried: Carried, streams: Streams, graph: fx.Graph
) -> dict[str, list[Observation]]:
    """Choose where spaces are observed: where they are written.

    Parameters
    ----------
    plan : Plan
    carried : Carried
    streams : Streams
    graph : torch.fx.Graph

    Returns
    -------
    dict of str to list of Observation
        By name of space.
    """
    earlier: dict[tuple[str, str], str | None] = {}  # by node and stream: whose units come before these
    for transport in carried.transports():
        if isinstance(transport, Solve) and transport.joint is not None:
            nodes = (dict.fromkeys(writer.node for writer in item.writers) for item in transport.joint)
            earlier |= {(own, transport.stream): other for other, own in zip(*nodes, strict=False)}
        elif isinstance(transport, Solve):
            earlier |= {(writer.node, transport.stream): None for writer in transport.writers}
    at: dict[tuple[str, str], list[tuple[str, Observation]]] = {}
    for stream, space, observation in streams.observations(plan, graph):
        at.setdefault((observation.node, stream), []).append((space, observation))
    found: dict[str, list[Observation]] = {space.name: [] for space in plan.spaces}
    for (node, stream), other in earlier.items():
        here = at.get((node, stream), [])
        if other is None:
            for space, observation in here:
                found[space].append(observation)
        else:
            for (space, observation), (_, first) in zip(here, at.get((other, stream), []), strict=False):
                found[space].append(dataclasses.replace(observation, after=first))
    return found


def solve_flow(
    plan: Plan,
    carried: Carried,
    target: State,
    source: State,
    options: Flow,
    coupling: Coupling,
    moments: Moments | None = None,
    magnitudes: Magnitude | None = None,
) -> Alignment:
    """Solve the transports of one parent into the target's basis, layer by layer.

    Parameters
    ----------
    plan : Plan
    carried : Carried
        From :func:`fxfusion.transport.carry.carry`.
    target, source : mapping of str to torch.Tensor
        Weights by the names that the graph uses.
    options : Flow
    coupling : Coupling
        Hard or soft.
    moments : mapping, optional
        Of activations, by node and space; without them weights are compared.
    magnitudes : mapping, optional
        From :func:`fxfusion.transport.magnitudes.magnitudes`, for policies that weigh.

    Returns
    -------
    Alignment
        With transports per parameter; ``maps`` are those that reach the end of every space.
    """
    solver = _FlowSolver(plan, carried, target, source, options, coupling, moments or {}, magnitudes or {})
    for transport in carried.writing.values():  # as the network computes
        solver.maps(transport)
    maps: dict[str, Map] = {}
    for transport in carried.last.values():
        maps.update(solver.maps(transport))
    local = {
        name: [solver.block_maps(name, block) for block in layout.blocks]
        for name, layout in plan.layouts.items()
    }
    ends = {space.name: maps.get(space.name) or _in_place(plan, space.name) for space in plan.spaces}
    return Alignment(ends, solver.before, solver.after, 1, local, solver.mixed_maps(), gaps=solver.gaps)


def act_locally(
    plan: Plan,
    local: Mapping[str, Sequence[BlockMaps]],
    state: State,
    mixed: Mapping[str, tuple[str, Sequence[BlockMaps]]] | None = None,
) -> dict[str, torch.Tensor]:
    """Carry transports that differ from parameter to parameter.

    Parameters
    ----------
    plan : Plan
    local : mapping of str to sequence of BlockMaps
        By parameter, one per block.
    state : mapping of str to torch.Tensor
        Not written.
    mixed : mapping, optional
        By parameter, another one that is carried, too, and added.

    Returns
    -------
    dict of str to torch.Tensor
    """
    reading = reading_axes(plan)
    moved = dict(state)
    for name in plan.layouts:
        if not any(item.writing or item.reading for item in local[name]):
            continue
        moved[name] = _acted_on(plan, name, local[name], state, reading)
        if mixed and name in mixed:
            moved[name] += _acted_on(plan, *mixed[name], state, reading)
    return moved


def _acted_on(
    plan: Plan,
    name: str,
    maps: Sequence[BlockMaps],
    state: State,
    reading: Mapping[str, frozenset[int]],
) -> torch.Tensor:
    """Return a parameter after its blocks were carried."""
    layout, tensor, reads = plan.layouts[name], state[name].detach(), reading.get(name, frozenset())
    moved = tensor.new_empty(layout.shape)
    for into, block, item in zip(layout.blocks, plan.source.layouts[name].blocks, maps, strict=True):
        view = transport_block(block, block.view(tensor), item.writing, reads, reads=item.reading)
        factor = plan.gains.of(layout, block, reads)
        into.view(moved).copy_(view if factor == 1.0 else view * factor)
    return moved


def carried(plan: Plan, alignment: Alignment, state: State) -> dict[str, torch.Tensor]:
    """Return a parent's weights in the target's basis.

    Parameters
    ----------
    plan : Plan
    alignment : Alignment
    state : mapping of str to torch.Tensor
        Not written.

    Returns
    -------
    dict of str to torch.Tensor
    """
    if alignment.local is not None:
        return act_locally(plan, alignment.local, state, alignment.mixed)
    return act(plan, alignment.maps, state)


class _FlowSolver:
    def __init__(
        self,
        plan: Plan,
        carried: Carried,
        target: State,
        source: State,
        options: Flow,
        coupling: Coupling,
        moments: Moments,
        magnitudes: Magnitude,
    ) -> None:
        assert isinstance(options.heads, Heads)
        self.plan = plan
        self.carried = carried
        self.states = target, source
        self.options = options
        self.coupling = coupling
        self.moments = moments
        self.magnitudes = magnitudes
        self.streams = Streams(plan, options.heads)
        self.trees = {tree.root.name: tree for tree in trees(plan)}
        self.reading = reading_axes(plan)
        self.arrivals: dict[str, list[Transport]] = {}
        for (name, _), transport in carried.reading.items():
            self.arrivals.setdefault(name, []).append(transport)
        self.known: dict[int, dict[str, Map]] = {}
        self.crossed: dict[int, dict[str, Map]] = {}  # of joint transports: from the other's units
        self.pending: set[int] = set()
        self.before = {space.name: 0.0 for space in plan.spaces}
        self.after = dict(self.before)
        self.gaps: dict[str, float] = {}

    # -- transports -------------------------------------------------------------------------------

    def maps(self, transport: Transport) -> dict[str, Map]:
        """Return a transport's maps by space, solving what it needs first."""
        transport = settled(transport)
        key = id(transport)
        if key not in self.known:
            joint = transport.joint if isinstance(transport, Solve) else None
            unknown = {id(item) for item in joint or (transport,)}
            self.pending |= unknown
            if joint is not None:
                self._solve_together(joint)
            else:
                solved = self._join(transport) if isinstance(transport, Join) else self._solve(transport)
                self.known[key] = solved
            self.pending -= unknown
        return self.known[key]

    def mixed_maps(self) -> dict[str, tuple[str, list[BlockMaps]]]:
        """Return what acts on other parameters, to be added to some: keys to queries, queries to keys."""
        found = {}
        for transport in self.carried.transports():
            if not isinstance(transport, Solve) or transport.joint is None:
                continue
            (other,) = (item for item in transport.joint if item is not transport)
            pairs = zip(*map(self.carried.moved_by, (transport, other)), strict=True)
            for name, partner in pairs:
                blocks = []
                for block in self.plan.layouts[partner].blocks:
                    own = self.block_maps(partner, block)
                    blocks.append(BlockMaps({**own.writing, **self.crossed[id(transport)]}, own.reading))
                found[name] = partner, blocks
        return found

    def block_maps(self, name: str, block: Block) -> BlockMaps:
        """Return what acts on a block of a parameter."""
        chosen = BlockMaps()
        for stream, space, dimension, _ in self.streams.in_block(block):
            key = name, stream
            reads = axis_of(block, dimension) in self.reading.get(name, frozenset())
            first, second = self.carried.reading, self.carried.writing
            transport = first.get(key, second.get(key)) if reads else second.get(key, first.get(key))
            side = chosen.reading if reads else chosen.writing
            side.update(self._found({} if transport is None else self.maps(transport), space))
        return chosen

    def _found(self, maps: Mapping[str, Map], space: str) -> dict[str, Map]:
        """Return the maps of a space and its outer ones; what has none, in place if it may stay there."""
        found = {}
        for name in (space, *self.streams.scopes[space]):
            if name in maps:
                found[name] = maps[name]
            elif self.plan.scope_size(name) != self.plan.source.scope_size(name):
                found[name] = _in_place(self.plan, name)
        return found

    def _join(self, join: Join) -> dict[str, Map]:
        skip, branch = self.maps(join.skip), self.maps(join.branch)
        policy = self.options.residual
        if policy is Residual.IDENTITY:
            return {}
        if policy in (Residual.SKIP, Residual.BRANCH):
            return skip if policy is Residual.SKIP else branch
        joined: dict[str, Map] = {}
        for name in self._members(join.stream):
            weight = self._share_of_skip(join, name)
            pair = [_soft(maps.get(name), self.plan, name) for maps in (skip, branch)]
            sides = []
            for left, right in ((pair[0].write, pair[1].write), (pair[0].read, pair[1].read)):
                share = weight.unsqueeze(-1).to(left.dtype) if weight.ndim else weight.to(left.dtype)
                sides.append(share * left + (1.0 - share) * right)
            joined[name] = SoftMap(pair[0].scope, sides[0], sides[1])
        return joined

    def _members(self, stream: str) -> list[str]:
        if not self.streams.is_whole(stream):
            return [*self._scope(stream), stream]
        return [space.name for space in self.trees[stream].members]

    def _scope(self, name: str) -> tuple[str, ...]:
        return next(space.scope for space in (*self.plan.spaces, *self.plan.fixed) if space.name == name)

    def _share_of_skip(self, join: Join, space: str) -> torch.Tensor:
        """Return the weight of the skip's transport: a number, or one per unit of the target."""
        half = torch.tensor(0.5, dtype=torch.float64)
        nested = bool(self._scope(space))  # its units differ from outer unit to outer unit: not weighed
        if self.options.residual is Residual.MEAN or nested:
            return half
        skip = self._magnitude(join.skip, join.nodes[0], space)
        branch = self._magnitude(join.branch, join.nodes[1], space)
        if skip is None or branch is None:
            return half
        if self.options.residual is Residual.WEIGHTED_SCALAR:
            skip, branch = skip.mean(), branch.mean()
        total = skip + branch
        return torch.where(total > 0, skip / total, half)

    def _magnitude(self, part: Transport, node: str, space: str) -> torch.Tensor | None:
        """Return the mean magnitude of every unit of the target in a part of a join."""
        if node:
            return self.magnitudes.get((node, space))
        part = settled(part)
        assert isinstance(part, Solve)
        return self._rows(part.writers[0].parameter, space, 0)[0].abs().mean(-1)

    # -- layers -----------------------------------------------------------------------------------

    def _solve(self, solve: Solve) -> dict[str, Map]:
        costs = {}
        masses = {}
        whole = self.streams.is_whole(solve.stream)
        for name in self._members(solve.stream) if whole else [solve.stream]:
            compared = self._compare(solve, name)
            if compared is not None:
                costs[name] = ground_cost(compared, self.options.costs)
                if self.options.marginals is Marginals.MAGNITUDE:
                    masses[name] = self._magnitudes(solve, name).masses
        if whole:
            return self._solve_tree(self.trees[solve.stream], costs, masses)
        return self._solve_flat(solve.stream, costs[solve.stream], masses) if costs else {}

    def _solve_tree(
        self, tree: Tree, costs: Mapping[str, torch.Tensor], masses: Mapping[str, Masses]
    ) -> dict[str, Map]:
        if not costs:
            return {}
        shaped = {}
        weighed = dict(masses)
        device = device_of(costs.values())
        for space in tree.members:
            shape = Shape.of(self.plan, space)
            cost = costs.get(space.name)
            if masses and space.name not in masses:
                units = shape.outer * shape.size
                alike = torch.ones(shape.fixed, units, dtype=torch.float64, device=device)
                weighed[space.name] = alike, alike
            shaped[space.name] = Ground.zeros(shape, device) if cost is None else Ground(pairs(cost, shape))
        solved = solve_tree(self.plan, tree, shaped, self.coupling.of(tree.root.name), weighed)
        self._count(costs_in_place(self.plan, tree, shaped), self.before)
        self._count(costs_of(self.plan, tree, shaped, solved), self.after)
        for name, solution in solved.items():
            self._widen(name, solution.gap)
        return to_maps(self.plan, tree, solved)

    def _solve_together(self, pair: tuple[Solve, Solve]) -> None:
        """Solve over the units of two transports at once."""
        stream = pair[0].stream
        compared = self._compare_together(pair)
        cost = ground_cost(compared, self.options.costs)
        weighed = self.options.marginals is Marginals.MAGNITUDE
        masses = self._compare_together(pair, Scaling.RAW).masses if weighed else None
        sides = self._solved_flat(stream, cost, masses)
        for row, item in enumerate(pair):
            parts = [side.chunk(2, -2)[row].chunk(2, -1) for side in sides]
            own, crossed = (
                self._flat_maps(stream, *(part[column] for part in parts)) for column in (row, 1 - row)
            )
            self.known[id(item)], self.crossed[id(item)] = own, crossed

    def _solve_flat(self, stream: str, cost: torch.Tensor, masses: Mapping[str, Masses]) -> dict[str, Map]:
        """Solve over all units of all outer units at once."""
        return self._flat_maps(stream, *self._solved_flat(stream, cost, masses.get(stream)))

    def _solved_flat(
        self, stream: str, cost: torch.Tensor, masses: Masses | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what writes (rows sum to one) and what reads (columns do): ``[fixed, target, source]``."""
        found = self.coupling.of(stream).solve(cost, masses)
        self._widen(stream, found.gap)
        plans = found.plans
        if plans is None:
            assert found.index is not None
            plans = torch.nn.functional.one_hot(found.index, cost.shape[-1]).double()
        ordered = in_order(*cost.shape[-2:]).to(cost) * cost.shape[-2]
        self._count({stream: float((ordered * cost).sum())}, self.before)
        self._count({stream: float(found.values.sum())}, self.after)
        tiny = torch.finfo(plans.dtype).tiny
        write, read = (plans / plans.sum(axis, keepdim=True).clamp_min(tiny) for axis in (-1, -2))
        return write, read

    def _flat_maps(self, stream: str, write: torch.Tensor, read: torch.Tensor) -> dict[str, Map]:
        """Return the maps of a stream and its outer spaces from couplings of all units at once."""
        space = self.plan[stream]
        shape = Shape.of(self.plan, space)
        sizes = [(self.plan.scope_size(name), self.plan.source.scope_size(name)) for name in space.scope]
        fixed = sum(name in {item.name for item in self.plan.fixed} for name in space.scope)
        target, source = zip(*sizes, strict=True) if sizes else ((), ())
        sides = [spread(pairs(side, shape), target, source, fixed) for side in (write, read)]
        maps: dict[str, Map] = {stream: SoftMap(space.scope, sides[0], sides[1])}
        free = {item.name for item in self.plan.spaces}
        for position, outer in enumerate(space.scope):
            if outer in free:  # what an outer unit is coupled with is decided unit by unit below it
                ones = write.new_ones(*[side for pair in sizes[: position + 1] for side in pair])
                maps[outer] = SoftMap(space.scope[:position], ones, ones)
        return maps

    def _count(self, costs: Mapping[str, float], total: dict[str, float]) -> None:
        for name, cost in costs.items():
            total[name] += cost

    def _widen(self, name: str, gap: float) -> None:
        """Note how far from the best a space was solved at most."""
        if gap:
            self.gaps[name] = max(self.gaps.get(name, 0.0), gap)

    def _magnitudes(self, solve: Solve, space: str) -> Comparison:
        """Return the features of a layer as they are, whatever they are scaled to for the costs."""
        found = self._compare(solve, space, Scaling.RAW)
        assert found is not None
        return found

    def _compare_together(self, pair: tuple[Solve, Solve], forced: Scaling | None = None) -> Comparison:
        """Compare the units of two transports as one set."""
        stream = pair[0].stream
        scaling = forced or self.options.costs.activations
        found = [
            Comparison.of_moments(item, scaling, self.options.costs.components)
            for node in dict.fromkeys(writer.node for writer in pair[1].writers)
            for item in self.moments.get((node, stream), ())
        ]
        if not found:
            scaling = forced or self.options.costs.weights
            for writers in zip(*(self._compared(item, stream) for item in pair), strict=True):
                target, source = (
                    torch.cat([self._rows(writer.parameter, stream, side) for writer in writers], 1)
                    for side in (0, 1)
                )
                found.append(Comparison.of_features(target, source, scaling))
        return compare(found, scaling)

    def _compare(self, solve: Solve, space: str, forced: Scaling | None = None) -> Comparison | None:
        nodes = dict.fromkeys(writer.node for writer in solve.writers)
        scaling = forced or self.options.costs.activations
        found: list[Comparison] = [
            Comparison.of_moments(item, scaling, self.options.costs.components)
            for node in nodes
            for item in self.moments.get((node, space), ())
        ]
        if not found:
            scaling = forced or self.options.costs.weights
            writers = self._compared(solve, space)
            ready = [item for item in writers if not self._is_blocked(item.parameter)]
            compared = [self._of_weights(writer, space, scaling) for writer in ready or writers]
            found = [item for item in compared if item is not None]
        return compare(found, scaling) if found else None

    def _compared(self, solve: Solve, space: str) -> list[Writer]:
        """Return the writers whose weights are compared: no vectors, unless asked for or alone."""
        writers = [item for item in solve.writers if space in self.plan.layouts[item.parameter].spaces()]
        wide = [item for item in writers if self.states[0][item.parameter].ndim > 1]
        return writers if self.options.costs.bias or not wide else wide

    def _of_weights(self, writer: Writer, space: str, scaling: Scaling | str) -> Comparison | None:
        rows = [self._rows(writer.parameter, space, side) for side in (0, 1)]
        if not rows[0].numel():
            return None
        return Comparison.of_features(rows[0], rows[1], scaling)

    def _rows(self, name: str, space: str, side: int) -> torch.Tensor:
        """Return the weights that write each unit: ``[fixed, outer * units, features]``.

        Those of the source are carried along the axes that read.
        """
        tensor = self.states[side][name].detach().float()
        reading = self.reading.get(name, frozenset())
        shape = Shape.of(self.plan, self.plan[space])
        units = shape.source_outer * shape.source_size if side else shape.outer * shape.size
        plan = self.plan.source if side else self.plan
        found = []
        for block, own in zip(plan.layouts[name].blocks, self.plan.layouts[name].blocks, strict=True):
            for _, inner, dimension, scope in self.streams.in_block(block):
                if inner != space or axis_of(block, dimension) in reading:
                    continue
                view = block.view(tensor)
                carried, unknown = self._arriving(name, block)
                if side:
                    view = transport_block(block, view, {}, reading, reads=carried)
                places = [*scope, dimension]
                known = [place for place in range(view.ndim) if place not in (*places, *unknown)]
                unknown = [place for place in unknown if place not in places]
                view = view.permute(*places, *known, *unknown)
                if unknown:  # in no order that could be compared
                    view = view.flatten(view.ndim - len(unknown)).sort(-1).values
                    view = resample(view, math.prod(own.factors[place].size for place in unknown))
                found.append(view.reshape(shape.fixed, units, -1))
        return torch.cat(found, -1) if found else torch.empty(0)

    def _arriving(self, name: str, block: Block) -> tuple[dict[str, Map], list[int]]:
        """Return what is carried into the axes of a block that only read, and dimensions not known yet."""
        arriving: dict[str, Map] = {}
        unknown = []
        for stream, space, dimension, scope in self.streams.in_block(block):
            transport = self.carried.reading.get((name, stream))
            if transport is None or axis_of(block, dimension) not in self.reading.get(name, frozenset()):
                continue
            if self._needs_pending(transport):
                unknown += [*scope, dimension]
                continue
            arriving.update(self._found(self.maps(transport), space))
        return arriving, unknown

    def _is_blocked(self, name: str) -> bool:
        """Return whether a parameter reads what is being solved, such as the gate of its own signal."""
        return any(map(self._needs_pending, self.arrivals.get(name, ())))

    def _needs_pending(self, transport: Transport) -> bool:
        """Return whether a transport is being solved, or needs one that is."""
        seen: set[int] = set()
        pending = [settled(transport)]
        while pending:
            item = pending.pop()
            if id(item) in seen or id(item) in self.known:
                continue
            seen.add(id(item))
            if id(item) in self.pending:
                return True
            if isinstance(item, Join):
                pending += [settled(item.skip), settled(item.branch)]
            else:
                for writer in item.writers:
                    pending += map(settled, self.arrivals.get(writer.parameter, ()))
        return False


def _soft(item: Map | None, plan: Plan, name: str) -> SoftMap:
    """Return a map as a soft one; none is the identity."""
    if isinstance(item, SoftMap):
        return item
    item = item if item is not None else _in_place(plan, name)
    if isinstance(item, SoftMap):
        return item
    assert isinstance(item, HardMap), "signs are of the largest group, which flows exclude"
    sizes, size = item.index.shape[:-1], item.index.shape[-1]
    write = torch.nn.functional.one_hot(item.index, size).float()  # [target outer..., n, n]
    for axis, outer in enumerate(sizes):  # alike for every source outer unit: the outer map picks
        write = write.unsqueeze(2 * axis + 1).expand(
            *write.shape[: 2 * axis + 1], outer, *write.shape[2 * axis + 1 :]
        )
    return SoftMap(item.scope, write, write)


def _in_place(plan: Plan, name: str) -> Map:
    """Return the map that leaves every unit in its place; of unequal widths, in its order."""
    space = next(space for space in (*plan.spaces, *plan.fixed) if space.name == name)
    names = (*space.scope, name)
    target, source = ([side.scope_size(item) for item in names] for side in (plan, plan.source))
    if target == source:
        return HardMap(space.scope, torch.arange(space.size).expand(*target))
    sizes = [side for pair in zip(target, source, strict=True) for side in pair]
    return SoftMap.from_coupling(in_order(space.size, source[-1]).expand(*sizes), space.scope)
