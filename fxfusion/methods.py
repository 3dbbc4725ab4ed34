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
    repair : {"norms", "units", "layers", "none"}
    refinement : Refinement or None
    """

    symmetry: str
    repair: str = "norms"
    refinement: Refinement | None = None

    def __str__(self) -> str:
        name = {"none": "vanilla", "permutation": "permutation", "largest": "orthogonal"}[self.symmetry]
        name = name if self.refinement is None else "learned"
        told = {"units": ", units repaired", "layers": ", layers fitted"}
        return name + told.get(self.repair, "")


METHODS: dict[str, Method] = {
    "vanilla": Method("none", "none"),
    "permutation": Method("permutation"),
    "orthogonal": Method("largest"),
    "learned": Method("largest", refinement=Refinement()),
}
"""``vanilla`` averages what lies in the same place."""


def candidates(refinement: Refinement | None) -> list[Method]:
    """Return what ``method="auto"`` tries.

    Parameters
    ----------
    refinement : Refinement or None
        Learning takes minutes: it is tried where it is asked for.

    Examples
    --------
    >>> [str(method) for method in candidates(None)]  # doctest: +NORMALIZE_WHITESPACE
    ['vanilla', 'permutation', 'orthogonal', 'permutation, units repaired', 'orthogonal, units repaired']
    """
    learned = [] if refinement is None else [Method("largest", refinement=refinement)]
    aligned = [Method("permutation"), Method("largest"), *learned]
    return [METHODS["vanilla"], *aligned, *(dataclasses.replace(item, repair="units") for item in aligned)]
