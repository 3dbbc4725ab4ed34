"""Progress of long work: a callback that the pipeline calls and a command line may draw."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``; ``total`` is 0 where it is unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
