"""How large skip and branch of a residual connection are: what weighs their transports.

Weighing needs the values themselves, which a covariance does not tell: the target runs alone, unit by unit,
a batch at a time. Values that are scaled first take a second run, since their means have to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import fx

from fxfusion.calibration import Batches
from fxfusion.capture import Capture
from fxfusion.pairing import Parent
from fxfusion.plan import Plan
from fxfusion.rules.registry import operator_name
from fxfusion.statistics import CrossMoments, Observation, Place, watch
from fxfusion.transport.carry import Carried, Join, Streams, is_tensor
from fxfusion.transport.options import Flow, Heads, Magnitudes, Observe, Scaling

Magnitude = Mapping[tuple[str, str], torch.Tensor]  # by node and space, one number per unit of the target

_VIEWS = ["view", "reshape", "flatten", "transpose", "permute", "contiguous", "clone", "dropout"]
_HANDS_ON = frozenset([*_VIEWS, "cat", "concat", "add"])


def magnitudes(
    parent: Parent, carried: Carried, batches: Batches, options: Flow, observed: Observe
) -> dict[tuple[str, str], torch.Tensor]:
    """Return the mean magnitudes of what is added at residual connections.

    Parameters
    ----------
    parent : Parent
        The target.
    carried : Carried
        From :func:`fxfusion.transport.carry.carry`.
    batches : Batches
    options : Flow
        ``magnitudes`` says what is measured; if that is layers, ``costs.activations`` how they are scaled.
    observed : Observe
        Which samples and positions count.

    Returns
    -------
    dict of (str, str) to torch.Tensor
        By node and space, ``[units]``; heads' dimensions, which differ from head to head, have none.
    """
    assert isinstance(options.heads, Heads)
    streams = Streams(parent.plan, options.heads)
    graph = _Graph(parent.capture, parent.plan, streams)
    parts = [
        (node, join.stream)
        for join in carried.transports()
        if isinstance(join, Join)
        for node in join.nodes
        if node
    ]
    by_layers = options.magnitudes is Magnitudes.LAYERS
    terms = {part: graph.terms(*part) if by_layers else [part[0]] for part in dict.fromkeys(parts)}
    sums = _Sums(graph, terms)
    places = {place: graph.places[place] for place in sums.wanted}

    def run(see: Callable[[Place, torch.Tensor], None]) -> None:
        watch(parent, places, batches, observed, see)

    if by_layers and options.costs.activations is not Scaling.RAW:
        sums.scaled_by(_Scales(options.costs.activations, run))
    run(sums.see)
    return sums.means()


class _Graph:
    """Where the units of streams are observed, and which values are outputs of layers."""

    def __init__(self, capture: Capture, plan: Plan, streams: Streams) -> None:
        self.nodes = {node.name: node for node in capture.module.graph.nodes}
        self.places: dict[Place, Observation] = {}
        self._at: dict[tuple[str, str], list[Place]] = {}
        for stream, space, observation in streams.observations(plan, capture.module.graph):
            if stream == space and not observation.scope:
                place = space, len(self.places)
                self.places[place] = observation
                self._at.setdefault((observation.node, space), []).append(place)
        self._computed: set[fx.Node] = set()  # from an input, not from parameters alone
        for node in self.nodes.values():
            from_input = node.op == "placeholder" or any(
                item in self._computed for item in node.all_input_nodes
            )
            if from_input and is_tensor(node):
                self._computed.add(node)

    def at(self, node: str, space: str) -> list[Place]:
        """Return where a space is observed in a node's output."""
        return self._at.get((node, space), [])

    def terms(self, name: str, space: str) -> list[str]:
        """Return the outputs of layers whose sum a value is; itself if it is one, or there are none."""
        node = self.nodes[name]
        operator = operator_name(node.target)
        if _leaves_its_layer(node) or operator not in _HANDS_ON or node.kwargs.get("alpha", 1) != 1:
            return [name]
        held = [item for item in node.all_input_nodes if self.at(item.name, space)]
        computed = [item for item in held if item in self._computed]
        if len(computed) != (2 if operator == "add" else 1) or (operator == "add" and held != computed):
            return [name]  # parameters are put before a stream, but not added to it, by the way
        found = [term for item in computed for term in self.terms(item.name, space)]
        shapes = {(_shape(self.nodes[term]), len(self.at(term, space))) for term in found}
        return found if len(shapes) == 1 else [name]


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))  # as text: symbolic sizes have no hash


def _leaves_its_layer(node: fx.Node) -> bool:
    """Whether a module returns this value: somebody outside of the innermost module around it reads it."""
    around = list(node.meta.get("nn_module_stack") or {})
    return bool(around) and any(
        user.op == "output" or around[-1] not in (user.meta.get("nn_module_stack") or {})
        for user in node.users
    )


class _Scales:
    """What is subtracted from a unit's values, and what they are multiplied by."""

    def __init__(self, scaling: Scaling | str, run: Callable[[Callable[..., None]], None]) -> None:
        moments: dict[Place, CrossMoments] = {}

        def see(place: Place, values: torch.Tensor) -> None:
            if place not in moments:
                moments[place] = CrossMoments(1, values.shape[1], 1, device=values.device)
            moments[place].update(values, values[:, :1])  # with one unit: covariances are not needed

        run(see)
        self._found = {place: self._of(item, scaling) for place, item in moments.items()}

    @staticmethod
    def _of(moments: CrossMoments, scaling: Scaling | str) -> tuple[torch.Tensor, torch.Tensor]:
        mean, square = moments.mean_target, moments.square_target
        if scaling is Scaling.UNIT:
            mean, length = torch.zeros_like(mean), (square + moments.count * mean.square()).sqrt()
        elif scaling is Scaling.STANDARDISED:
            length = (square / (moments.count - 1)).sqrt()
        else:
            length = torch.ones_like(square)
        factor = torch.where(length > 0, 1.0 / length, 0.0)
        return mean.unsqueeze(-1), factor.unsqueeze(-1)

    def apply(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        """Return ``[1, units, samples]`` as they are compared."""
        mean, factor = self._found[place]
        return (values - mean.to(values)) * factor.to(values)


class _Sums:
    """Mean magnitudes of sums of observed values, whose terms come one after the other in every batch."""

    def __init__(self, graph: _Graph, terms: Mapping[tuple[str, str], Iterable[str]]) -> None:
        self._parts: list[tuple[tuple[str, str], Sequence[Place]]] = []  # one per block that holds the space
        for part, nodes in terms.items():
            blocks = zip(*(graph.at(node, part[1]) for node in nodes), strict=True)
            self._parts += [(part, block) for block in blocks]
        self._of: dict[Place, list[int]] = {}
        for index, (_, block) in enumerate(self._parts):
            for place in block:
                self._of.setdefault(place, []).append(index)
        self._begun: dict[int, tuple[int, torch.Tensor]] = {}
        self._total: dict[int, torch.Tensor] = {}
        self._count: dict[int, int] = {}
        self._scales: _Scales | None = None

    @property
    def wanted(self) -> Iterable[Place]:
        """The places that are observed."""
        return self._of

    def scaled_by(self, scales: _Scales) -> None:
        """Scale every term before it is added."""
        self._scales = scales

    def see(self, place: Place, values: torch.Tensor) -> None:
        """Take a batch's values of one term: ``[1, units, samples]``."""
        if self._scales is not None:
            values = self._scales.apply(place, values)
        for index in self._of[place]:
            seen, total = self._begun.pop(index, (0, None))
            total = values if total is None else total + values
            if seen + 1 < len(self._parts[index][1]):
                self._begun[index] = seen + 1, total
                continue
            found = total[0].abs().sum(-1).double()
            self._total[index] = self._total.get(index, torch.zeros_like(found)) + found
            self._count[index] = self._count.get(index, 0) + total.shape[-1]

    def means(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return the means over samples, and over blocks."""
        found: dict[tuple[str, str], list[torch.Tensor]] = {}
        for index, (part, _) in enumerate(self._parts):
            found.setdefault(part, []).append(self._total[index] / self._count[index])
        return {part: torch.stack(items).mean(0) for part, items in found.items()}
