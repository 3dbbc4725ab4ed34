"""Loss and accuracy along the line between aligned parents, and the barrier that is left on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional

from fxfusion.atomic import replacing
from fxfusion.calibration import IGNORED, LABELS, Batches, labels_of
from fxfusion.capture import Capture, Model
from fxfusion.errors import CalibrationMismatchError, MissingDependencyError, OptionError
from fxfusion.execution import Program
from fxfusion.methods import METHODS
from fxfusion.pipeline import align, prepare
from fxfusion.progress import Progress, silent
from fxfusion.state import state_of
from fxfusion.transport.learned import Refinement


@dataclasses.dataclass(frozen=True)
class Curve:
    """What networks on the line between two aligned parents do.

    Attributes
    ----------
    method : str
    shares : tuple of float
        The second parent's share at every point, from 0 to 1.
    losses : tuple of float
        Cross-entropy, in nats per prediction.
    accuracies : tuple of float
        In per cent.

    Examples
    --------
    >>> Curve("vanilla", (0.0, 0.5, 1.0), (1.0, 3.0, 2.0), (90.0, 10.0, 80.0)).barrier
    1.5
    """

    method: str
    shares: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Largest loss above the straight line between the parents' losses; 0 if there is none.

        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020.
        """
        first, last = self.losses[0], self.losses[-1]
        return max(
            loss - ((1 - share) * first + share * last)
            for share, loss in zip(self.shares, self.losses, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class BarrierReport:
    """The curves of several methods.

    Attributes
    ----------
    curves : tuple of Curve
        One per method, in the order asked for.
    """

    curves: tuple[Curve, ...]

    def __getitem__(self, method: str) -> Curve:
        for curve in self.curves:
            if curve.method == method:
                return curve
        raise KeyError(method)

    def table(self) -> Table:
        """Return loss and accuracy at the ends, in the middle, and the barrier."""
        table = Table("method", "loss, parents", "loss, middle", "accuracy, parents", "accuracy, middle")
        table.add_column("barrier", justify="right")
        for curve in self.curves:
            middle = min(range(len(curve.shares)), key=lambda place: abs(curve.shares[place] - 0.5))
            table.add_row(
                curve.method,
                f"{curve.losses[0]:.3f} / {curve.losses[-1]:.3f}",
                f"{curve.losses[middle]:.3f}",
                f"{curve.accuracies[0]:.1f} / {curve.accuracies[-1]:.1f} %",
                f"{curve.accuracies[middle]:.1f} %",
                f"{curve.barrier:.3f}",
            )
        return table

    def plot(self, path: str | Path) -> None:
        """Draw losses and accuracies along the line; the format goes by the file's name.

        Raises
        ------
        MissingDependencyError
            If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError("plots need matplotlib: pip install 'fxfusion[plot]'") from error
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for curve in self.curves:
            left.plot(curve.shares, curve.losses, marker=".", label=curve.method)
            right.plot(curve.shares, curve.accuracies, marker=".", label=curve.method)
        for axes, name in ((left, "loss, nats"), (right, "accuracy, %")):
            axes.set_xlabel("share of the second parent")
            axes.set_ylabel(name)
        left.legend()
        with replacing(path) as temporary:
            figure.savefig(temporary)


def barrier(
    models: Sequence[Model],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    evaluation: Iterable[Any] = (),
    methods: Sequence[str] = ("vanilla", "permutation", "orthogonal"),
    points: int = 11,
    refine: Refinement | int | None = None,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    progress: Progress = silent,
) -> BarrierReport:
    """Measure loss and accuracy along the line between two parents, aligned by several methods.

    Parameters
    ----------
    models : sequence
        Two parents of equal widths; the second is the basis.
    args, kwargs, calibration, seed, outputs
        As for :func:`fxfusion.fuse`.
    evaluation : iterable
        Batches with labels: ``(inputs, ..., labels)``, or dicts with an entry ``labels``. Labels are classes,
        one per prediction (of a language model the next tokens, already shifted); -100 does not count.
    methods : sequence of str
        Of ``vanilla``, ``permutation``, ``orthogonal`` and ``learned``.
    points : int
        On the line, with both ends.
    refine : Refinement or int, optional
        How ``learned`` learns.
    progress : callable, optional

    Returns
    -------
    BarrierReport

    Raises
    ------
    OptionError
        If there are not two models, fewer than three points, or no such method.
    CalibrationMismatchError
        If evaluation data have no labels or do not fit.

    Examples
    --------
    >>> import torch
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    >>> report = barrier([make(), make()], (x,), calibration=[x], evaluation=[(x, y)], points=3)
    >>> report["vanilla"].shares
    (0.0, 0.5, 1.0)
    """
    if len(models) != 2:
        raise OptionError(f"a line has two ends, but {len(models)} models are given")
    if points < 3:
        raise OptionError(f"points={points}: give at least 3")
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise OptionError(f"methods {', '.join(unknown) or '(none)'}: give some of {', '.join(METHODS)}")
    target = prepare(models[1], args, kwargs)
    capture = state_of(target).capture
    samples = labelled(capture, evaluation)
    position = min(capture.select_outputs(outputs))
    seen = None if calibration is None else Batches(capture, calibration).source
    program = Program(capture)
    shares = [place / (points - 1) for place in range(points)]
    curves = []
    for index, method in enumerate(methods):
        aligned = align(
            [models[0], target],
            calibration=seen,
            method=method,
            refine=refine if method == "learned" else None,
            seed=seed,
            outputs=outputs,
            progress=progress,
        )
        found = []
        for place, share in enumerate(shares):
            state = capture.canonical(aligned.average([1 - share, share]))
            found.append(_score(program, state, samples, position))
            progress(f"evaluate {method}", place + 1, points)
        curves.append(
            Curve(method, tuple(shares), tuple(loss for loss, _ in found), tuple(right for _, right in found))
        )
        progress("methods", index + 1, len(methods))
    return BarrierReport(tuple(curves))


Labelled = tuple[tuple[tuple[Any, ...], dict[str, Any]], torch.Tensor]


def labelled(capture: Capture, evaluation: Iterable[Any]) -> list[Labelled]:
    """Return evaluation batches as a captured model's inputs, with their labels.

    Raises
    ------
    CalibrationMismatchError
        If there are none, labels are missing or are no integers, or batches do not fit.
    """
    left, right = itertools.tee(evaluation)
    labels = [labels_of(batch, "an evaluation batch") for batch in left]
    inputs = list(Batches(capture, [_unlabelled(batch) for batch in right]))
    if len(inputs) != len(labels):
        raise CalibrationMismatchError(f"{capture.name} fixes its batch size: evaluate on batches of it")
    return list(zip(inputs, labels, strict=True))


def _unlabelled(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != LABELS}
    return tuple(batch[:-1])


@torch.no_grad()
def _score(
    program: Program, state: Mapping[str, torch.Tensor], samples: Sequence[Labelled], position: int
) -> tuple[float, float]:
    """Return cross-entropy per prediction, and accuracy in per cent."""
    loss, right, total = 0.0, 0, 0
    for (args, kwargs), labels in samples:
        logits = program.run([state], args, kwargs)[0][position]
        if logits.shape[:-1] != labels.shape:
            raise CalibrationMismatchError(
                f"labels have shape {tuple(labels.shape)}, predictions {tuple(logits.shape[:-1])}"
            )
        logits, labels = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
        loss += float(functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        right += int((logits.argmax(-1) == labels)[labels != IGNORED].sum())
        total += int((labels != IGNORED).sum())
    return loss / max(total, 1), 100.0 * right / max(total, 1)
