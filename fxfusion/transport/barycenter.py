"""Many parents: each aligned with what the others have in common, not with one of them alone.

Aligning every parent with one anchor leaves two others aligned with each other only through it. Here each
parent in turn is aligned anew with the average of all others, as they are aligned by then, and the result is
kept if the parents are closer together afterwards: coordinate descent on the sum of squared distances
between all pairs, which for permutations is the free-support Wasserstein barycenter of the layers. The
target stays in place, so that all maps lead into its basis and are consistent around every cycle.

References
----------
Cuturi and Doucet, Fast Computation of Wasserstein Barycenters, ICML 2014, arXiv 1310.4375, algorithm 2.
Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, arXiv 2209.04836, appendix A.10 (MergeMany).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxfusion.pairing import Parent
from fxfusion.progress import Progress, silent
from fxfusion.statistics import CrossMoments
from fxfusion.symmetry import act
from fxfusion.transport.cost import State
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.joint import Alignment, align


def spread_of(states: Sequence[State], names: Sequence[str]) -> float:
    """Return the mean squared distance between all pairs of parents, parameters at unit scale.

    Parameters
    ----------
    states : sequence of mapping
        Weights in one basis.
    names : sequence of str
        The parameters that count.

    Examples
    --------
    >>> states = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    >>> spread_of(states, ["w"])
    2.0
    """
    total = 0.0
    for name in names:
        stacked = torch.stack([state[name].detach().double() for state in states])
        scale = float(stacked.square().sum()) / len(states)
        if scale:
            # Twice the sum of squares around the mean is the mean over pairs.
            around = stacked - stacked.mean(0)
            total += 2 * float(around.square().sum()) / (len(states) - 1) / scale
    return total


def align_together(
    parents: Sequence[Parent],
    alignments: Sequence[Alignment | None],
    target: int,
    coupling: Coupling,
    moments: Sequence[Mapping[str, Sequence[CrossMoments]]] | None,
    rounds: int,
    progress: Progress = silent,
) -> list[Alignment | None]:
    """Align every parent with the average of the others until they come no closer.

    Parameters
    ----------
    parents : sequence of Parent
    alignments : sequence of Alignment or None
        With the target, None for the target itself.
    target : int
    coupling : Coupling
    moments : sequence of mapping, optional
        Of every parent's activations with the target's.
    rounds : int
        How often each parent is aligned at most.
    progress : callable, optional

    Returns
    -------
    list of Alignment or None
        The parents' mean squared distance under it is that of ``alignments`` or less.
    """
    found = list(alignments)
    moved = [
        dict(parent.state) if item is None else act(parent.plan, item.maps, parent.state)
        for item, parent in zip(found, parents, strict=True)
    ]
    names = list(parents[target].plan.layouts)
    closest = spread_of(moved, names)
    for number in range(rounds):
        improved = False
        for index, parent in enumerate(parents):
            if index == target:
                continue
            others = [state for position, state in enumerate(moved) if position != index]
            centre = {name: torch.stack([state[name] for state in others]).mean(0) for name in names}
            seen = moments[index] if moments else None
            anew = align(parent.plan, {**moved[target], **centre}, parent.state, coupling, seen)
            tried = act(parent.plan, anew.maps, parent.state)
            distance = spread_of([*others, tried], names)
            if distance < closest * (1 - 1e-9):
                found[index], moved[index], closest, improved = anew, tried, distance, True
            progress("together", number * len(parents) + index + 1, rounds * len(parents))
        if not improved:
            break
    return found
