"""Calibration data: whatever the user iterates over, as inputs of the captured model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
import torch.utils._pytree as pytree

from fxfusion.capture import Capture
from fxfusion.errors import CalibrationMismatchError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(eq=False)
class Batches:
    """Calibration batches bound to a captured model's inputs, to be gone through several times.

    Parameters
    ----------
    capture : Capture
    source : iterable
        Of tensors, tuples or lists (further entries, such as labels, are ignored) or dicts (names that
        are no inputs, such as labels, are ignored).

    Raises
    ------
    CalibrationMismatchError
        If the first batch does not fit the model, or there is none.
    """

    capture: Capture
    source: Iterable[Any]

    def __post_init__(self) -> None:
        if iter(self.source) is self.source:  # an iterator can be gone through only once
            self.source = list(self.source)
        first = next(iter(self.source), None)
        if first is None:
            raise CalibrationMismatchError("the calibration data are empty: give at least one batch")
        self._names = _input_names(self.capture)
        self._check(self._bind(first))
        self._count = len(self.source) if isinstance(self.source, Sized) else 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Inputs]:
        bound = map(self._bind, self.source)
        return bound if self.capture.dynamic else self._rechunked(bound)

    def _bind(self, batch: Any) -> Inputs:
        """Return a batch as the args and kwargs with which the model was captured."""
        positional, keyword = self._names
        if isinstance(batch, Mapping):
            return self._bind_mapping(batch)
        values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        wanted = [name for name in keyword if _has_tensor(self.capture.kwargs[name])]
        count = len(positional) + len(wanted)
        if len(values) < count:
            raise CalibrationMismatchError(
                f"{self.capture.name} takes {count} input tensors ({', '.join([*positional, *wanted])}); a "
                f"calibration batch has {len(values)}"
            )
        return (
            tuple(values[: len(positional)]),
            dict(zip(wanted, values[len(positional) : count], strict=True)),
        )

    def _bind_mapping(self, batch: Mapping[str, Any]) -> Inputs:
        positional, keyword = self._names
        wanted = [name for name in keyword if _has_tensor(self.capture.kwargs[name])]
        missing = [name for name in (*positional, *wanted) if name not in batch]
        if missing:
            raise CalibrationMismatchError(
                f"{self.capture.name} was captured with the inputs {', '.join([*positional, *wanted])}; a "
                f"calibration batch lacks {', '.join(missing)} (it has {', '.join(map(str, batch))})"
            )
        return tuple(batch[name] for name in positional), {name: batch[name] for name in wanted}

    def _check(self, inputs: Inputs) -> None:
        """Compare a batch with the example inputs."""
        args, kwargs = inputs
        example = (self.capture.args, {name: self.capture.kwargs[name] for name in kwargs})
        pairs = zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(example), strict=False)
        for given, expected in pairs:
            if not isinstance(expected, torch.Tensor):
                continue
            if not isinstance(given, torch.Tensor):
                raise CalibrationMismatchError(
                    f"a calibration batch holds {type(given).__name__}, not a tensor"
                )
            fits = given.ndim == expected.ndim and given.is_floating_point() == expected.is_floating_point()
            free = 1 if given.ndim != 2 or given.is_floating_point() else 2
            free = 2 if given.ndim == 3 else free
            if not fits or given.shape[free:] != expected.shape[free:]:
                raise CalibrationMismatchError(
                    f"a calibration batch has an input of shape {tuple(given.shape)} and {given.dtype}; "
                    f"{self.capture.name} was captured with {tuple(expected.shape)} and {expected.dtype}"
                )
            if given.is_floating_point() and not bool(given.isfinite().all()):
                raise CalibrationMismatchError("a calibration batch holds NaN or infinite values")

    def _rechunked(self, bound: Iterator[Inputs]) -> Iterator[Inputs]:
        """Cut batches to the size that the model fixes; what is left over at the end is dropped."""
        size = _batch_size((self.capture.args, self.capture.kwargs))
        pending: Inputs | None = None
        for item in bound:
            pending = item if pending is None else _join(pending, item)
            while _batch_size(pending) >= size:
                yield _rows(pending, 0, size)
                pending = _rows(pending, size, None)


def _batch_size(inputs: Any) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


def _rows(inputs: Inputs, start: int, stop: int | None) -> Inputs:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[start:stop], inputs)


def _join(left: Inputs, right: Inputs) -> Inputs:
    return pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, torch.Tensor) else a, left, right)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _input_names(capture: Capture) -> tuple[list[str], list[str]]:
    """Return the names of positional and keyword inputs."""
    placeholders = [node.name for node in capture.module.graph.nodes if node.op == "placeholder"]
    positional: Sequence[str] = placeholders[: len(capture.args)]
    return list(positional), list(capture.kwargs)
