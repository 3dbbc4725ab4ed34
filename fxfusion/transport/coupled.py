"""Spaces that a parameter holds on two axes: a recurrent layer writes the units that it reads.

Where both axes move together, the cost of an assignment is quadratic: how well two units match depends on
what the others are matched with. The Frank-Wolfe method relaxes assignments to doubly stochastic matrices,
goes again and again towards the assignment that is best for the cost's gradient, as far as the cost falls,
and takes the assignment that is closest to where it ends (Vogelstein et al., Fast Approximate Quadratic
Programming for Graph Matching, PLoS ONE 2015). Units that may change sign are matched by signed permutation
matrices: of these, the best for a gradient has the better sign for every pair of units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fxfusion.transport.assignment import assign

STEPS = 50
_TOLERANCE = 1e-9  # of the scale of the cost


@dataclasses.dataclass(frozen=True, eq=False)
class Square:
    """A parameter of both parents that holds a space on two axes.

    Attributes
    ----------
    target, source : torch.Tensor
        float64 ``[n, n, features]``.
    signed : bool
        Whether the signs of units act along both axes; else along none.
    """

    target: torch.Tensor
    source: torch.Tensor
    signed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Matched:
    """An assignment of units, and a sign for each.

    Attributes
    ----------
    index : torch.Tensor
        int64 ``[n]``: the source unit of every target unit.
    signs : torch.Tensor
        float64 ``[n]``, 1 or -1.
    value : float
        The cost.
    """

    index: torch.Tensor
    signs: torch.Tensor
    value: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Point:
    """A point in the relaxation: units, and units with signs."""

    plain: torch.Tensor
    signed: torch.Tensor

    def __sub__(self, other: _Point) -> _Point:
        return _Point(self.plain - other.plain, self.signed - other.signed)

    def towards(self, step: _Point, length: float) -> _Point:
        return _Point(self.plain + length * step.plain, self.signed + length * step.signed)

    def dot(self, other: _Point) -> float:
        return float((self.plain * other.plain).sum() + (self.signed * other.signed).sum())


class Quadratic:
    """The cost ``<plain, P> + <signed, S> - sum <target, X source X'>`` of matching units.

    ``P`` is the permutation matrix, ``S`` the same with signs, and ``X`` is ``S`` for what signs act on, else
    ``P``.

    Parameters
    ----------
    plain, signed : torch.Tensor
        float64 ``[n, n]``; the latter is zero where units have no sign.
    squares : sequence of Square
    has_signs : bool

    Examples
    --------
    >>> source = torch.rand(5, 5, 1, dtype=torch.float64)
    >>> order = torch.tensor([2, 0, 3, 4, 1])
    >>> square = Square(source[order][:, order], source)
    >>> zeros = torch.zeros(5, 5, dtype=torch.float64)
    >>> start = torch.arange(5), torch.ones(5, dtype=torch.float64)
    >>> Quadratic(zeros, zeros, [square], has_signs=False).solve(*start).index.tolist()
    [2, 0, 3, 4, 1]
    """

    def __init__(
        self, plain: torch.Tensor, signed: torch.Tensor, squares: Sequence[Square], has_signs: bool
    ) -> None:
        self.linear = _Point(plain, signed)
        self.squares = squares
        self.has_signs = has_signs

    def solve(self, index: torch.Tensor, signs: torch.Tensor) -> Matched:
        """Return an assignment that costs no more than the given one.

        Parameters
        ----------
        index, signs : torch.Tensor
            As of :class:`Matched`: where to start, besides the centre of the relaxation.
        """
        best = Matched(index, signs, self._value(self._vertex(index, signs)))
        size = len(index)
        centre = torch.full_like(self.linear.plain, 1.0 / size)
        for start in (self._vertex(index, signs), _Point(centre, torch.zeros_like(centre))):
            found = self._settled(self._nearest(self._descended(start)))
            best = min(best, found, key=lambda item: item.value)
        return best

    def value(self, index: torch.Tensor, signs: torch.Tensor) -> float:
        """Return what an assignment costs."""
        return self._value(self._vertex(index, signs))

    def _descended(self, point: _Point) -> _Point:
        """Follow the Frank-Wolfe method to a stationary point."""
        for _ in range(STEPS):
            gradient = self._gradient(point)
            step = self._vertex(*self._best(gradient)) - point
            slope, bend = gradient.dot(step), self._bend(step)
            if slope > -_TOLERANCE * len(point.plain):
                break
            length = min(-slope / (2 * bend), 1.0) if bend > 0 else 1.0
            point = point.towards(step, length)
        return point

    def _settled(self, found: Matched) -> Matched:
        """Go from assignment to assignment, as long as each costs less."""
        for _ in range(STEPS):
            index, signs = self._best(self._gradient(self._vertex(found.index, found.signs)))
            signs = self._flipped(index, signs)
            value = self.value(index, signs)
            if value >= found.value - _TOLERANCE * len(index):
                break
            found = Matched(index, signs, value)
        return found

    def _flipped(self, index: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """Change single signs, each time the one by which the cost falls most, until none does."""
        if not self.has_signs:
            return signs
        linear = self.linear.signed.gather(1, index.unsqueeze(1)).squeeze(1)
        products = torch.zeros_like(self.linear.plain)  # what pairs of units of equal sign cost
        for square in self.squares:
            if square.signed:
                products -= (square.target * square.source[index][:, index]).sum(-1)
        products = products + products.mT
        products.fill_diagonal_(0.0)
        for _ in range(STEPS * len(index)):
            falls = 2 * signs * (products @ signs + linear)
            unit = int(falls.argmax())
            if float(falls[unit]) <= _TOLERANCE * len(index):
                break
            signs = signs.clone()
            signs[unit] *= -1
        return signs

    def _best(self, gradient: _Point) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the assignment and the signs that are best for a linear cost."""
        index, _ = assign((gradient.plain - gradient.signed.abs())[None].cpu())
        index = index[0].to(gradient.plain.device)
        met = gradient.signed.gather(1, index.unsqueeze(1)).squeeze(1)
        return index, torch.where(met > 0, -1.0, 1.0).to(gradient.plain)

    def _nearest(self, point: _Point) -> Matched:
        index, signs = self._best(_Point(-point.plain, -point.signed))
        signs = self._flipped(index, signs)
        return Matched(index, signs, self.value(index, signs))

    def _vertex(self, index: torch.Tensor, signs: torch.Tensor) -> _Point:
        plain = torch.nn.functional.one_hot(index, len(index)).to(self.linear.plain)
        signed = plain * signs.unsqueeze(1) if self.has_signs else torch.zeros_like(plain)
        return _Point(plain, signed)

    def _value(self, point: _Point) -> float:
        return self.linear.dot(point) + self._bend(point)

    def _bend(self, point: _Point) -> float:
        """Return the quadratic part."""
        total = 0.0
        for square in self.squares:
            side = point.signed if square.signed else point.plain
            moved = torch.einsum("ia,abf,jb->ijf", side, square.source, side)
            total -= float((square.target * moved).sum())
        return total

    def _gradient(self, point: _Point) -> _Point:
        found = [self.linear.plain, self.linear.signed]
        for square in self.squares:
            side = point.signed if square.signed else point.plain
            forth = torch.einsum("ijf,jb,abf->ia", square.target, side, square.source)
            back = torch.einsum("jif,jb,baf->ia", square.target, side, square.source)
            found[square.signed] = found[square.signed] - forth - back
        return _Point(*found)
