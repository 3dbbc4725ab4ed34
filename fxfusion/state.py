"""What passes hand to one another: held in ``graph_module.meta["fxfusion"]``, keyed by parameter name.

Node metadata of one's own is lost by decomposition, re-export and saving; names survive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.capture import Capture
from fxfusion.certify import Certificate
from fxfusion.errors import PassOrderError
from fxfusion.methods import Method
from fxfusion.pairing import Parent
from fxfusion.plan import Plan
from fxfusion.transport.joint import Alignment
from fxfusion.transport.learned import Refined

KEY = "fxfusion"


@dataclasses.dataclass(eq=False)
class FusionState:
    """The state of a fusion between passes.

    Attributes
    ----------
    capture : Capture
        Set by capture.
    outputs : frozenset of int
        Flat positions of the outputs that count; set by ``Propagate``.
    plan : Plan or None
        Set by ``Propagate``.
    parents : sequence of Parent
        Graph, plan and weights of every parent; set by ``Pair``.
    target : int
        In whose basis the others are expressed; set by ``Pair``.
    teachers : tuple of (Capture, mapping)
        Whose outputs are learned from, if not the parents': those had other widths or depths.
    factors : tuple of torch.Tensor
        By which the target was scaled; set by ``Balance``, taken back by ``Restore``.
    certificates : list of Certificate
        One per parent; set by the pipeline.
    alignments : list of Alignment or None
        One per parent, None for the target; set by ``Align``.
    aligned : list of mapping
        The parents' weights in the target's basis; set by ``ApplyTransports``.
    refined : Refined or None
        What was learned on calibration data; set by ``Refine``.
    weights : tuple of float
        The parents' shares; set by ``Merge``.
    method : Method
        How the fusion is made; set by the pipeline.
    notes : tuple of str
        What the report shall say beside the rest; set by the pipeline.
    merged : dict of str to torch.Tensor
        The fused weights; set by ``Merge``, amended by ``Repair``.
    """

    capture: Capture
    outputs: frozenset[int] = frozenset()
    plan: Plan | None = None
    parents: Sequence[Parent] = ()
    target: int = -1
    teachers: tuple[tuple[Capture, Mapping[str, torch.Tensor]], ...] = ()
    factors: tuple[torch.Tensor, ...] = ()
    certificates: list[Certificate] = dataclasses.field(default_factory=list)
    alignments: list[Alignment | None] = dataclasses.field(default_factory=list)
    aligned: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    refined: Refined | None = None
    weights: tuple[float, ...] = ()
    method: Method = dataclasses.field(default_factory=lambda: Method("permutation"))
    notes: tuple[str, ...] = ()
    merged: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def taught_by(self) -> tuple[tuple[Capture, Mapping[str, torch.Tensor]], ...]:
        """Graph and weights of every parent as it came."""
        return self.teachers or tuple((parent.capture, parent.state) for parent in self.parents)


def attach(capture: Capture) -> fx.GraphModule:
    """Return a capture's graph module with a fresh state, ready for passes."""
    capture.module.meta[KEY] = FusionState(capture)
    return capture.module


def prepared(model: Any) -> Capture | None:
    """Return the capture that a graph module of :func:`attach` carries, or None for any other model."""
    state = model.meta.get(KEY) if isinstance(model, fx.GraphModule) else None
    return dataclasses.replace(state.capture, module=model) if isinstance(state, FusionState) else None


def state_of(
    module: fx.GraphModule, need: str = "capture", by: str = "fxfusion.capture.capture"
) -> FusionState:
    """Return the state attached to a graph module.

    Parameters
    ----------
    module : torch.fx.GraphModule
    need : str
        The attribute that must have been set.
    by : str
        What sets it, for the message.

    Raises
    ------
    PassOrderError
        If there is no state, or what is needed is not set.
    """
    state: Any = module.meta.get(KEY)
    if not isinstance(state, FusionState):
        raise PassOrderError(
            "this GraphModule carries no fusion state: make it with fxfusion.prepare(model, args, kwargs)"
        )
    value = getattr(state, need)
    if value is None or (not value and isinstance(value, (list, tuple, dict))):
        raise PassOrderError(f"'{need}' is not set yet: run {by} first")
    return state
