"""Progress of long work: a callback that the pipeline calls and a command line may draw, and a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``; ``total`` is 0 where it is unknown."""

LOG = logging.getLogger("fxfusion")
"""Stages at level INFO, when they begin and when they are done, and what a report notes."""


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def logged(progress: Progress | None) -> Progress:
    """Return a callback that logs stages before it hands progress on.

    Parameters
    ----------
    progress : callable, optional
        :func:`silent` by default.

    Examples
    --------
    >>> import sys
    >>> LOG.addHandler(handler := logging.StreamHandler(sys.stdout))
    >>> LOG.setLevel(logging.INFO)
    >>> logged(None)("write shards", 0, 2)
    write shards (2)
    >>> LOG.removeHandler(handler)
    """
    shown, started = progress or silent, dict[str, float]()

    def report(stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage not in started:
            started[stage] = now
            LOG.info("%s (%d)", stage, total) if total else LOG.info("%s", stage)
        if total and done >= total:
            LOG.info("%s: done in %.1f s", stage, now - started.pop(stage))
        shown(stage, done, total)

    return report
