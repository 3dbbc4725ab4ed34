"""How far a network's outputs are from the average of its parents': what can be judged without labels.

Logits are compared as probabilities: the Kullback-Leibler divergence from the parents' mean softmax, in nats
per prediction. Other outputs are compared as they are: the squared distance from the parents' mean, relative
to how much that varies. What is averaged are outputs, as an ensemble does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.nn import functional

from fxfusion.calibration import IGNORED, Batches, Inputs
from fxfusion.capture import Capture
from fxfusion.errors import CalibrationMismatchError
from fxfusion.execution import Program, flat_outputs

MEMORY = 256 * 2**20  # bytes of inputs and outputs that are kept rather than computed anew


@dataclasses.dataclass(frozen=True)
class Distance:
    """What outputs are compared by.

    Attributes
    ----------
    classes : dict of int to int
        Axis of classes of every flat output that is taken as logits.
    values : tuple of int
        Flat positions of the other outputs.

    Examples
    --------
    >>> distance = Distance({0: -1}, ())
    >>> logits = torch.tensor([[0.0, 0.0]])
    >>> float(distance([logits], distance.average([[logits], [logits]], [0.5, 0.5])))
    0.0
    """

    classes: dict[int, int]
    values: tuple[int, ...]

    @classmethod
    def of(cls, capture: Capture, outputs: frozenset[int], example: Sequence[Any]) -> Distance:
        """Return the distance for a model's outputs.

        Outputs named logits are logits, and so is the only output of a model; classes are their last axis,
        of images (four axes) their second.

        Parameters
        ----------
        capture : Capture
        outputs : frozenset of int
            Flat positions of those that count.
        example : sequence
            Flat outputs of some batch.
        """
        real = [
            index
            for index in sorted(outputs)
            if isinstance(example[index], torch.Tensor) and example[index].is_floating_point()
        ]
        classes = {}
        for index in real:
            output = example[index]
            named = "logits" in capture.outputs[index] or len(real) == 1
            axis = 1 if output.ndim == 4 else -1
            if named and output.ndim > 1 and output.shape[axis] > 1:
                classes[index] = axis
        return cls(classes, tuple(index for index in real if index not in classes))

    def average(self, parents: Sequence[Sequence[Any]], weights: Sequence[float]) -> list[torch.Tensor]:
        """Return the parents' average: probabilities, then values."""
        total: list[torch.Tensor] = []
        for index, axis in self.classes.items():
            total.append(
                sum(
                    weight * parent[index].float().softmax(axis)
                    for parent, weight in zip(parents, weights, strict=True)
                )
            )
        for index in self.values:
            total.append(
                sum(weight * parent[index].float() for parent, weight in zip(parents, weights, strict=True))
            )
        return total

    def __call__(self, outputs: Sequence[Any], average: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distance of outputs from an average, summed over outputs."""
        total = torch.zeros((), device=average[0].device if average else None)
        for (index, axis), expected in zip(self.classes.items(), average, strict=False):
            found = outputs[index].float().log_softmax(axis)
            surprise = expected * (expected.clamp_min(torch.finfo(expected.dtype).tiny).log() - found)
            divergence = torch.where(expected > 0, surprise, torch.zeros_like(surprise)).sum(axis)
            total = total + divergence.mean()
        for index, expected in zip(self.values, average[len(self.classes) :], strict=True):
            spread = (expected - expected.mean()).square().mean().clamp_min(1e-12)
            total = total + (outputs[index].float() - expected).square().mean() / spread
        return total


def difference(
    capture: Capture, model: torch.nn.Module, batches: Iterable[Inputs], outputs: frozenset[int]
) -> Callable[[torch.nn.Module], float]:
    """Return how to measure the mean distance of another network's outputs from a network's own.

    Parameters
    ----------
    capture : Capture
        Of a network that takes the same inputs and gives the same outputs.
    model : torch.nn.Module
    batches : iterable of tuple
        Args and kwargs; kept, with the network's outputs.
    outputs : frozenset of int
        Flat positions of the outputs that count.
    """
    seen = [(inputs, flat_outputs(model, *inputs)) for inputs in batches]
    distance = Distance.of(capture, outputs, seen[0][1])
    expected = [(inputs, distance.average([found], [1.0])) for inputs, found in seen]

    def measure(other: torch.nn.Module) -> float:
        found = [float(distance(flat_outputs(other, *inputs), average)) for inputs, average in expected]
        return sum(found) / len(found)

    return measure


def check_labels(
    capture: Capture, state: Mapping[str, torch.Tensor], outputs: frozenset[int], batches: Batches
) -> None:
    """Refuse calibration data whose first batch has no labels, or such as do not fit the logits.

    Raises
    ------
    CalibrationMismatchError
        If so.
    """
    inputs, classes = next(batches.labelled())
    found = Program(capture).run([state], *inputs)[0]
    distance = Distance.of(capture, outputs, found)
    _check_shape(distance, found, classes)
    _check_range(distance, found, classes)


def _check_shape(distance: Distance, outputs: Sequence[Any], classes: torch.Tensor) -> None:
    expected = _labelled_logits(distance, outputs).shape[:-1]
    if expected != classes.shape:
        raise CalibrationMismatchError(
            f"labels have shape {tuple(classes.shape)}, predictions {tuple(expected)}"
        )


def _check_range(distance: Distance, outputs: Sequence[Any], classes: torch.Tensor) -> None:
    count = _labelled_logits(distance, outputs).shape[-1]
    counted = classes[classes != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < count:
        raise CalibrationMismatchError(
            f"labels go from {int(counted.min())} to {int(counted.max())}, classes from 0 to {count - 1} "
            f"({IGNORED} does not count)"
        )


def _labelled_logits(distance: Distance, outputs: Sequence[Any]) -> torch.Tensor:
    """Return the first logits, classes last."""
    if not distance.classes:
        raise CalibrationMismatchError("labels are compared with logits, but no output is logits")
    index, axis = next(iter(distance.classes.items()))
    logits: torch.Tensor = outputs[index].movedim(axis, -1)
    return logits


class Lessons:
    """Calibration batches with the parents' average outputs, and with labels where these count.

    As far as they fit into memory they are kept; beyond that, batches are read and outputs computed anew.
    Labels are kept.

    Parameters
    ----------
    capture : Capture
    parents : sequence of (Capture, mapping)
        Graph and weights of each.
    outputs : frozenset of int
        Flat positions of the outputs that count.
    weights : sequence of float
        The parents' shares.
    batches : Batches
    memory : int
        Bytes that may be kept.
    labels : float
        Share of a network's loss that is the cross-entropy with the batches' labels; the rest is its
        distance from the parents' average.

    Raises
    ------
    CalibrationMismatchError
        If labels count, and there are none, or they do not fit the first logits.
    """

    def __init__(
        self,
        capture: Capture,
        parents: Sequence[tuple[Capture, Mapping[str, torch.Tensor]]],
        outputs: frozenset[int],
        weights: Sequence[float],
        batches: Batches,
        memory: int = MEMORY,
        labels: float = 0.0,
    ) -> None:
        self.batches = batches
        self.labels = labels
        self._classes: list[torch.Tensor] = []
        self.weights = list(weights)
        self._runs = [
            (Program(parent), state)
            for (parent, state), weight in zip(parents, weights, strict=True)
            if weight
        ]
        self._memory = memory
        self._kept: list[Inputs] | None = self._keep()
        self._averages: dict[int, list[torch.Tensor]] = {}
        self._held = 0  # bytes of them
        first = self._parents(next(iter(batches)))[0]
        self.distance = Distance.of(capture, outputs, first)
        if self._classes:
            _check_shape(self.distance, first, self._classes[0])
        for classes in self._classes:
            _check_range(self.distance, first, classes)

    def _keep(self) -> list[Inputs] | None:
        kept: list[Inputs] | None = []
        size = 0
        for inputs, classes in self.batches.labelled() if self.labels else _unlabelled(self.batches):
            size += _bytes(inputs)
            if size > self._memory:
                kept = None
            if kept is not None:
                kept.append(inputs)
            if classes is not None:
                self._classes.append(classes)
            elif kept is None:
                break
        return kept

    def _parents(self, inputs: Inputs) -> list[list[Any]]:
        return [program.run([state], *inputs)[0] for program, state in self._runs]

    def average(self, position: int, inputs: Inputs) -> list[torch.Tensor]:
        """Return the parents' average outputs for a batch.

        Parameters
        ----------
        position : int
            The batch's place among all.
        inputs : tuple
            Args and kwargs.
        """
        known = self._averages.get(position) if self._kept is not None else None
        if known is None:
            shares = [weight for weight in self.weights if weight]
            known = self.distance.average(self._parents(inputs), shares)
            size = _bytes(known)
            if self._kept is not None and self._held + size <= self._memory:
                self._averages[position] = known
                self._held += size
        return known

    def once(self) -> Iterator[tuple[int, Inputs]]:
        """Yield every batch with its position."""
        return enumerate(self.batches if self._kept is None else self._kept)

    def endless(self, first: int) -> Iterator[tuple[int, Inputs]]:
        """Yield the batches from position ``first`` on, again and again."""
        while True:
            empty = True
            for position, inputs in itertools.islice(self.once(), first, None):
                empty = False
                yield position, inputs
            if empty:
                return

    def loss(self, position: int, inputs: Inputs, outputs: Sequence[Any]) -> torch.Tensor:
        """Return how far outputs are from the parents' average, and from labels if they count.

        Parameters
        ----------
        position : int
            The batch's place among all.
        inputs : tuple
            Args and kwargs.
        outputs : sequence
            A network's flat outputs.
        """
        total = torch.zeros(())
        if self.labels < 1:
            total = (1 - self.labels) * self.distance(outputs, self.average(position, inputs))
        if self.labels:
            logits = _labelled_logits(self.distance, outputs).float().flatten(0, -2)
            classes = self._classes[position].flatten().to(logits.device)
            if bool((classes != IGNORED).any()):
                found = functional.cross_entropy(logits, classes, ignore_index=IGNORED)
                total = total.to(found) + self.labels * found
        return total

    def judge(self, run: Callable[[Inputs], Sequence[Any]], limit: int | None = None) -> float:
        """Return a network's mean loss.

        Parameters
        ----------
        run : callable
            Gives the network's flat outputs for a batch.
        limit : int, optional
            How many batches count, from the first on; by default all.
        """
        with torch.no_grad():
            found = [
                float(self.loss(position, inputs, run(inputs)))
                for position, inputs in itertools.islice(self.once(), limit)
            ]
        return sum(found) / len(found)


def _unlabelled(batches: Iterable[Inputs]) -> Iterator[tuple[Inputs, None]]:
    return ((inputs, None) for inputs in batches)


def _bytes(values: Any) -> int:
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
    )
