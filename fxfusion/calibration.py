"""Calibration data: whatever the user iterates over, as inputs of the captured model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree

from fxfusion.capture import Capture
from fxfusion.errors import CalibrationMismatchError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

LABELS = "labels"
IGNORED = -100  # label of a prediction that does not count

Tree = TypeVar("Tree")  # of tensors whose first axis is the batch


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
        try:
            once = iter(self.source) is self.source
        except TypeError:
            raise CalibrationMismatchError(
                f"calibration is a {type(self.source).__name__}: give an iterable of batches"
            ) from None
        if once:  # an iterator can be gone through only once
            self.source = list(self.source)
        first = next(iter(self.source), None)
        if first is None:
            raise CalibrationMismatchError("the calibration data are empty: give at least one batch")
        self._bind(first)
        self._count = len(self.source) if isinstance(self.source, Sized) else 0

    def __len__(self) -> int:
        return self._count

    def first(self, samples: int) -> Batches:
        """Return the first batches, as many as hold so many samples."""
        kept: list[Any] = []
        total = 0
        for item in self.source:
            if total >= samples:
                return Batches(self.capture, kept)
            kept.append(item)
            total += _batch_size(self._bind(item))
        return self

    def halves(self) -> tuple[Batches, Batches] | None:
        """Return every other batch, and the others; None if there are too few for both."""
        items = list(self.source)
        if len(items) < 2:
            return None
        halves = Batches(self.capture, items[::2]), Batches(self.capture, items[1::2])
        return halves if all(next(iter(half), None) is not None for half in halves) else None

    def fingerprint(self) -> str:
        """Return what tells these data from others: a hash of all their tensors, in order."""
        found = hashlib.sha256()
        for item in self:
            for leaf in pytree.tree_leaves(item):
                if isinstance(leaf, torch.Tensor):
                    found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
                    found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def __iter__(self) -> Iterator[Inputs]:
        bound = map(self._bind, self.source)
        return bound if self.capture.dynamic else self._rechunked(bound)

    def labelled(self) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """Yield the batches with their labels.

        Raises
        ------
        CalibrationMismatchError
            If a batch has none, or they are no integers.
        """
        bound = map(self._labelled, self.source)
        return bound if self.capture.dynamic else self._rechunked(bound)

    def _labelled(self, batch: Any) -> tuple[Inputs, torch.Tensor]:
        labels = labels_of(batch, "a calibration batch")
        return self._bind(batch if isinstance(batch, Mapping) else tuple(batch[:-1])), labels

    def _bind(self, batch: Any) -> Inputs:
        """Return a batch as the args and kwargs with which the model was captured.

        Inputs that are no tensors (flags, None) default to the example's.
        """
        example = {**dict(zip(self.capture.inputs, self.capture.args, strict=True)), **self.capture.kwargs}
        wanted = [name for name, value in example.items() if _has_tensor(value)]
        given = _named(batch, wanted, self.capture.name)
        for name in wanted:
            self._check(name, given[name], example[name])
        bound = {**example, **given}
        return (
            tuple(bound[name] for name in self.capture.inputs),
            {name: bound[name] for name in self.capture.kwargs},
        )

    def _check(self, name: str, given: Any, example: Any) -> None:
        """Compare an input of a batch with the example's."""
        place = f"input '{name}' of {self.capture.name} in a calibration batch"
        left, right = pytree.tree_leaves(given), pytree.tree_leaves(example)
        if len(left) != len(right):
            raise CalibrationMismatchError(f"{place} has {len(left)} parts, in the example {len(right)}")
        for actual, expected in zip(left, right, strict=True):
            if not isinstance(expected, torch.Tensor):
                continue
            if not isinstance(actual, torch.Tensor):
                raise CalibrationMismatchError(f"{place} is a {type(actual).__name__}, not a tensor")
            free = _free_axes(expected)
            if actual.ndim != expected.ndim or actual.shape[free:] != expected.shape[free:]:
                raise CalibrationMismatchError(
                    f"{place} has shape {tuple(actual.shape)}; it was captured with {tuple(expected.shape)}"
                )
            if actual.dtype != expected.dtype:
                raise CalibrationMismatchError(
                    f"{place} is {actual.dtype}; it was captured with {expected.dtype}: convert the data"
                )
            if not actual.numel():
                raise CalibrationMismatchError(f"{place} is empty")
            if actual.is_floating_point() and not bool(actual.isfinite().all()):
                raise CalibrationMismatchError(f"{place} holds NaN or infinite values")

    def _rechunked(self, bound: Iterator[Tree]) -> Iterator[Tree]:
        """Cut batches to the size that the model fixes; what is left over at the end is dropped."""
        size = _batch_size((self.capture.args, self.capture.kwargs))
        pending: Tree | None = None
        for item in bound:
            pending = item if pending is None else _join(pending, item)
            while _batch_size(pending) >= size:
                yield _rows(pending, 0, size)
                pending = _rows(pending, size, None)


def labels_of(batch: Any, place: str) -> torch.Tensor:
    """Return the labels of a batch: the entry ``labels`` of a dict, or the last of several entries.

    Raises
    ------
    CalibrationMismatchError
        If there are none, or they are no integers.
    """
    named = isinstance(batch, Mapping)
    if LABELS not in batch if named else not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise CalibrationMismatchError(
            f"{place} has no labels: give (inputs, ..., labels), or a dict with '{LABELS}'"
        )
    found = batch[LABELS] if named else batch[-1]
    if not isinstance(found, torch.Tensor) or found.is_floating_point():
        raise CalibrationMismatchError("labels are classes: give a tensor of integers")
    return found.long()


def _batch_size(inputs: Any) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


def _rows(inputs: Tree, start: int, stop: int | None) -> Tree:
    cut: Tree = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[start:stop], inputs)
    return cut


def _join(left: Tree, right: Tree) -> Tree:
    joined: Tree = pytree.tree_map(
        lambda a, b: torch.cat([a, b]) if isinstance(a, torch.Tensor) else a, left, right
    )
    return joined


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _free_axes(example: torch.Tensor) -> int:
    """Return how many leading axes may differ: batch, and the sequence of tokens or features."""
    has_sequence = example.ndim == 3 or (example.ndim == 2 and not example.is_floating_point())
    return 2 if has_sequence else 1


def _named(batch: Any, wanted: Sequence[str], model: str) -> dict[str, Any]:
    """Return the inputs of a batch by name; what is no input, such as labels, is left out."""
    if isinstance(batch, Mapping):
        missing = [name for name in wanted if name not in batch]
        if missing:
            raise CalibrationMismatchError(
                f"{model} was captured with the inputs {', '.join(wanted)}; a calibration batch lacks "
                f"{', '.join(missing)} (it has {', '.join(map(str, batch)) or 'nothing'})"
            )
        return {name: batch[name] for name in wanted}
    values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if len(values) < len(wanted):
        raise CalibrationMismatchError(
            f"{model} takes {len(wanted)} input tensors ({', '.join(wanted)}); a calibration batch has "
            f"{len(values)}"
        )
    return dict(zip(wanted, values, strict=False))
