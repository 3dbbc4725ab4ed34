"""Draw things one choice at a time, so that they shrink; hypothesis is imported only when needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fxfusion.errors import MissingDependencyError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

T = TypeVar("T")


class Choices(Protocol):
    """Where choices come from. Simple ones come first: shrinking moves towards them."""

    def of(self, items: Sequence[T]) -> T:
        """Choose one of several things, the first being the simplest."""

    def whole(self, low: int, high: int) -> int:
        """Choose an integer from ``low`` (the simplest) to ``high``."""

    def flag(self) -> bool:
        """Choose yes or no (the simplest)."""

    def part(self, function: Callable[[Choices], T]) -> T:
        """Choose a part of the whole, which shrinking may replace or leave out as one."""


class _Drawn:
    """Choices that hypothesis makes."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw

    def of(self, items: Sequence[T]) -> T:
        if len(items) == 1:
            return items[0]
        chosen: T = self._draw(_strategies().sampled_from(tuple(items)))
        return chosen

    def whole(self, low: int, high: int) -> int:
        return int(self._draw(_strategies().integers(low, high)))

    def flag(self) -> bool:
        return bool(self._draw(_strategies().booleans()))

    def part(self, function: Callable[[Choices], T]) -> T:
        drawn: T = self._draw(strategy_of(function))
        return drawn


def strategy_of(function: Callable[[Choices], T]) -> SearchStrategy[T]:
    """Return the hypothesis strategy that draws ``function(choices)``.

    Parameters
    ----------
    function : callable
        Makes a value from choices, always the same from the same ones.

    Raises
    ------
    MissingDependencyError
        If hypothesis is not installed.

    Examples
    --------
    >>> strategy_of(lambda choices: (choices.whole(1, 3), choices.flag()))
    drawn()
    """
    strategies = _strategies()

    @strategies.composite
    def drawn(draw: Callable[[Any], Any]) -> T:
        return function(_Drawn(draw))

    strategy: SearchStrategy[T] = drawn()
    return strategy


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise MissingDependencyError(
            "drawing networks and operator calls needs hypothesis: pip install 'fxfusion[test]'"
        ) from error
    return strategies
