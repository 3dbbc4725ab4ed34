"""Ways to fuse, by name: what may act on spaces, what is repaired, whether transports are learned."""

from __future__ import annotations

import dataclasses

from fxfusion.transport.learned import Refinement


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to fuse.

    Attributes
    ----------
    symmetry : {"none", "permutation", "largest"}
    repair : {"norms", "units", "none"}
    refinement : Refinement or None
    """

    symmetry: str
    repair: str = "norms"
    refinement: Refinement | None = None

    def __str__(self) -> str:
        name = {"none": "vanilla", "permutation": "permutation", "largest": "orthogonal"}[self.symmetry]
        name = name if self.refinement is None else "learned"
        return f"{name}, units repaired" if self.repair == "units" else name


METHODS: dict[str, Method] = {
    "vanilla": Method("none", "none"),
    "permutation": Method("permutation"),
    "orthogonal": Method("largest"),
    "learned": Method("largest", refinement=Refinement()),
}
"""``vanilla`` averages what lies in the same place."""


def candidates(refinement: Refinement | None, turning: bool, units: bool) -> list[Method]:
    """Return what ``method="auto"`` tries.

    Parameters
    ----------
    refinement : Refinement or None
        Learning takes minutes: it is tried where it is asked for.
    turning : bool
        Whether rotations, and leaving units where they are, can be tried: parents of equal widths.
    units : bool
        Whether units can be repaired.

    Examples
    --------
    >>> [str(method) for method in candidates(None, turning=False, units=True)]
    ['permutation', 'permutation, units repaired']
    """
    bases = [Method("permutation")]
    if turning:
        bases = [METHODS["vanilla"], *bases, Method("largest")]
    if refinement is not None:
        bases.append(Method("largest" if turning else "permutation", refinement=refinement))
    repaired = [dataclasses.replace(base, repair="units") for base in bases if base.symmetry != "none"]
    return [*bases, *(repaired if units else [])]
