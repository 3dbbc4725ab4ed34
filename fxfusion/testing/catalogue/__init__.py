"""Every model that fxfusion is held against: how to build it small, and what to call it with.

==================  =======================================================================
``timm_models``     one variant of every module of timm, any other by name
``transformers``    every type of transformers that builds from a tiny configuration
``torchvision``     every classification model of torchvision
==================  =======================================================================

Nothing is downloaded: weights are random.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxfusion.errors import OptionError
from fxfusion.testing.catalogue.entry import Entry, Inputs, perturb
from fxfusion.testing.catalogue.timm_models import timm_entries
from fxfusion.testing.catalogue.torchvision_models import torchvision_entries
from fxfusion.testing.catalogue.transformers_models import transformers_entries

__all__ = ["SOURCES", "Entry", "Inputs", "entries", "perturb"]

_MAKERS = {
    "timm": timm_entries,
    "transformers": transformers_entries,
    "torchvision": torchvision_entries,
}
SOURCES = tuple(_MAKERS)


def entries(source: str, patterns: Sequence[str] = ()) -> list[Entry]:
    """Return the models of a library.

    Parameters
    ----------
    source : {"timm", "transformers", "torchvision"}
    patterns : sequence of str
        Shell patterns of names. Without any, timm gives one variant of each of its modules and the others
        give everything; with patterns, timm gives every variant whose name or module matches.

    Returns
    -------
    list of Entry

    Raises
    ------
    OptionError
        If there is no such library, or a pattern matches nothing.

    Examples
    --------
    >>> [entry.name for entry in entries("torchvision", ["resnet?8"])]
    ['resnet18']
    """
    if source not in _MAKERS:
        raise OptionError(f"there is no catalogue {source!r}: choose {', '.join(SOURCES)}")
    return _MAKERS[source](patterns)
