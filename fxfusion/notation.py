"""The notation in which rules state contractions: ``"... i, o i -> ... o"``.

Operands are separated by commas, labels by blanks; ``...`` stands for any number of leading axes. A label
that the result lacks is contracted. Parsing is cached, so a rule may parse at every call.
"""

from __future__ import annotations

import dataclasses
import functools

from fxfusion.errors import NotationError

ELLIPSIS = "..."


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A parsed contraction.

    Attributes
    ----------
    operands : tuple of tuple of str
        Labels of each operand, in order; ``"..."`` may stand first.
    result : tuple of str
        Labels of the result.
    """

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]


@functools.cache
def parse(text: str) -> Contraction:
    """Parse a contraction.

    Parameters
    ----------
    text : str
        Such as ``"b i k, b k j -> b i j"``.

    Returns
    -------
    Contraction

    Raises
    ------
    NotationError
        If there is no arrow, an ellipsis does not stand first, a label repeats within one operand, or
        the result has a label that no operand has.

    Examples
    --------
    >>> parse("... i, o i -> ... o").result
    ('...', 'o')
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise NotationError(f"'{text}' has no arrow: write operands -> result")
    operands = tuple(tuple(operand.split()) for operand in left.split(","))
    result = tuple(right.split())
    for labels in (*operands, result):
        if len(set(labels)) != len(labels):
            raise NotationError(f"'{text}' repeats a label within '{' '.join(labels)}'")
        if ELLIPSIS in labels[1:]:
            raise NotationError(f"'{text}' has an ellipsis that does not stand first")
    unknown = set(result) - {label for labels in operands for label in labels}
    if unknown:
        raise NotationError(f"'{text}' has {sorted(unknown)} in its result but in no operand")
    return Contraction(operands, result)


def expand(contraction: Contraction, ranks: tuple[int, ...]) -> Contraction:
    """Replace each ellipsis by as many labels as an operand of that rank needs, aligned on the right.

    Parameters
    ----------
    contraction : Contraction
    ranks : tuple of int
        Rank of each operand.

    Returns
    -------
    Contraction
        The same without ellipses.

    Raises
    ------
    NotationError
        If an operand's rank does not fit its labels.

    Examples
    --------
    >>> expand(parse("... i, o i -> ... o"), (3, 2)).operands[0]
    ('...1', '...0', 'i')
    """
    if len(ranks) != len(contraction.operands):
        raise NotationError(f"{len(contraction.operands)} operands in the notation, {len(ranks)} given")
    widest = 0
    operands = []
    for labels, rank in zip(contraction.operands, ranks, strict=True):
        extra = rank - len([label for label in labels if label != ELLIPSIS])
        if extra < 0 or (extra and ELLIPSIS not in labels):
            raise NotationError(f"an operand of rank {rank} does not fit '{' '.join(labels)}'")
        widest = max(widest, extra)
        operands.append(_replace(labels, extra))
    return Contraction(tuple(operands), _replace(contraction.result, widest))


def _replace(labels: tuple[str, ...], extra: int) -> tuple[str, ...]:
    if ELLIPSIS not in labels:
        return labels
    return tuple(f"{ELLIPSIS}{index}" for index in reversed(range(extra))) + labels[1:]
