"""The paper's tables, one command each, and those beyond it.

    python examples/paper/run.py TABLE [--task digits] [--data DIRECTORY] [--pairs 3] [--output RESULTS.md]

==============  ========================================================================================
one-shot        parents, ensemble, vanilla average, fusion: hard, soft, with rotations, with units repaired
stages          from the vanilla average to learned transports, with barrier and seconds; also the reference
residual        residual policies of flow solving
query-key       transports of queries and keys
samples         number of calibration samples
regularisation  softness of soft couplings
layers          how many layers are fused, from the input; the others are the target's
widths          parents of twice the width, of half the feed-forward layer, and narrower ones
depths          parents of other depths
many            two to five parents
tuning          accuracy over further training: fusion, vanilla average, a parent, the ensemble
distillation    the same from the parents' averaged logits
landscape       accuracy along and around the line between parents, as a picture
==============  ========================================================================================

Every figure is the mean over pairs of parents, with the smallest and the largest. Tasks: digits,
digits-resnet (no data folder needed), mnist, cifar10, cifar10-resnet, gpt2, bert (see tasks.py). Parents are
trained once, and kept in ``--checkpoints`` if that is given. Needs ``pip install -e '.[examples]'``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import Measured
from methods import average, first_layers, fuse, halved, loaded, mixed, moved, padded, truncated
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Size, Task, load
from torch import nn

import fxfusion

Scores = dict[str, list[tuple[float, ...]]]  # by method: what is measured of every pair
COLUMNS = ("accuracy, %", "loss", "barrier", "seconds", "memory, MiB")
DIGITS = (1, 3, 3, 0, 0)
STACKS = {"digits": "vit.layers", "mnist": "vit.layers", "cifar10": "vit.layers"}
STACKS |= {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer"}


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A task, its parents, and what a table does with them.

    Attributes
    ----------
    task : Task
    pairs : int
        How many pairs of parents.
    checkpoints : Path or None
    tuning : int
        Steps of further training.
    rate : float
        Its largest learning rate.
    refinement : fxfusion.Refinement
        How transports are learned.
    refined_on : int
        Unlabelled samples that they are learned on.
    picture : Path
        Where a picture goes.
    only : str
        Part of the names of stages or widths that are shown, or of what is trained on; all by default.
    also : str
        What transports are learned with besides: ``soft`` couplings, ``labels``; separated by commas.
    batch : int
        Unlabelled samples in one step of learning.
    """

    task: Task
    pairs: int
    checkpoints: Path | None
    tuning: int
    rate: float
    picture: Path
    refinement: fxfusion.Refinement = dataclasses.field(default_factory=fxfusion.Refinement)
    refined_on: int = 2000
    only: str = ""
    also: str = ""
    batch: int = 100

    def parent(self, seed: int, size: Size | None = None) -> nn.Module:
        """Return a trained network."""
        return self.task.parent(size or self.task.size, seed, self.checkpoints)

    def each(self, size: Size | None = None) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Yield pairs of parents, every two of as few as are needed; the first may have another size."""
        for left, right in pairs_of(self.pairs):
            yield self.parent(left, size), self.parent(right)

    @property
    def learning(self) -> dict[str, Any]:
        """Options of a fusion whose transports are learned."""
        size = {"samples": self.refined_on, "batch": self.batch}
        return {"method": "learned", "refine": self.refinement, **size}

    def learned_otherwise(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield further ways to learn, by name."""
        for name in filter(None, self.also.split(",")):
            refinement = dataclasses.replace(self.refinement, labels=0.5 if name == "labels" else 0.0)
            coupling = "soft" if name == "soft" else "hard"
            yield f"learned, {name}", self.learning | {"refine": refinement, "coupling": coupling}

    def tuned(self, model: nn.Module) -> nn.Module:
        """Return a network after further training; the network itself stays."""
        return self.task.fit(copy.deepcopy(model), self.tuning, 7, self.rate)

    def add(self, scores: Scores, name: str, *models: nn.Module) -> None:
        """Enter a network, or an ensemble."""
        scores.setdefault(name, []).append(self.task.score(*models))


def one_shot(study: Study) -> Scores:
    """Compare all ways to fuse without further training."""
    scores: Scores = {}
    for left, right in study.each():
        study.add(scores, "better parent", max(left, right, key=lambda model: study.task.score(model)[0]))
        study.add(scores, "worse parent", min(left, right, key=lambda model: study.task.score(model)[0]))
        study.add(scores, "ensemble", left, right)
        study.add(scores, "vanilla average", average([left, right]))
        for features in ("weights", "activations"):
            for coupling in ("hard", "soft"):
                options = {"features": features, "coupling": coupling, "symmetry": "permutation"}
                fused = fuse(study.task, [left, right], right, **options)
                study.add(scores, f"{features}, {coupling}", fused)
        settings: tuple[tuple[str, dict[str, Any]], ...] = (
            ("activations, hard, units repaired", {"method": "permutation", "repair": "units"}),
            ("activations, rotations", {"method": "orthogonal"}),
            ("activations, rotations, units repaired", {"symmetry": "largest", "repair": "units"}),
            ("reference, activations", fxfusion.reference()),
            ("reference, EMD, weights", fxfusion.reference("weights", "hard")),
            ("flow, hard", {"flow": fxfusion.Flow(), "coupling": "hard"}),
            ("flow, soft", {"flow": fxfusion.Flow(), "coupling": "soft"}),
        )
        for name, options in settings:
            study.add(scores, name, fuse(study.task, [left, right], right, **options))
    return scores


def stages(study: Study) -> Scores:
    """Add one stage after the other: nothing, permutations, rotations, repair, learning."""
    scores: Scores = {}
    for left, right in study.each():
        parents = [study.task.score(model) for model in (left, right)]
        middle = sum(loss for _, loss in parents) / 2
        for name, found in zip(("better parent", "worse parent"), sorted(parents, reverse=True), strict=True):
            scores.setdefault(name, []).append(found)
        study.add(scores, "ensemble", left, right)
        settings: tuple[tuple[str, dict[str, Any]], ...] = (
            ("vanilla average", {"method": "vanilla"}),
            ("reference, Sinkhorn, activations", fxfusion.reference()),
            ("reference, EMD, weights", fxfusion.reference("weights", "hard")),
            ("weight matching (Git Re-Basin)", {"method": "permutation", "features": "weights"}),
            (
                "weight matching, units repaired",
                {"method": "permutation", "features": "weights", "repair": "units"},
            ),
            ("permutations", {"method": "permutation"}),
            ("permutations, units repaired", {"method": "permutation", "repair": "units"}),
            ("rotations", {"method": "orthogonal"}),
            ("rotations, units repaired", {"method": "orthogonal", "repair": "units"}),
            ("auto", {"method": "auto"}),
            ("permutations, layers fitted", {"method": "permutation", "repair": "layers"}),
            ("rotations, layers fitted", {"method": "orthogonal", "repair": "layers"}),
            ("learned", study.learning),
            *study.learned_otherwise(),
        )
        for name, options in (item for item in settings if study.only in item[0]):
            with Measured() as cost:
                fused = fuse(study.task, [left, right], right, **options)
            accuracy, loss = study.task.score(fused)
            found = (accuracy, loss, loss - middle, cost.seconds, cost.mebibytes)
            scores.setdefault(name, []).append(found)
            line = f"{name}: {accuracy:.2f} % {loss:.4f} {cost.seconds:.0f} s {cost.mebibytes:.0f} MiB"
            Console(stderr=True).print(line, highlight=False)
    return scores


def residual(study: Study) -> Scores:
    """Compare residual policies."""
    scores: Scores = {}
    for left, right in study.each():
        for policy in ("mean", "weighted_scalar", "weighted_matrix", "skip", "branch", "identity"):
            for coupling in ("hard", "soft"):
                options = {"flow": fxfusion.Flow(residual=policy), "coupling": coupling}
                study.add(scores, f"{policy}, {coupling}", fuse(study.task, [left, right], right, **options))
    return scores


def query_key(study: Study) -> Scores:
    """Compare transports of queries and keys, and whether heads are respected."""
    scores: Scores = {}
    settings = {
        "heads matched, shared": fxfusion.Flow(),
        "heads ignored, shared": fxfusion.Flow(heads="ignored"),
        "heads ignored, separate": fxfusion.Flow(heads="ignored", query_key="separate"),
        "heads ignored, joint": fxfusion.Flow(heads="ignored", query_key="joint"),
    }
    for left, right in study.each():
        for name, flow in settings.items():
            for coupling in ("hard", "soft"):
                fused = fuse(study.task, [left, right], right, flow=flow, coupling=coupling)
                study.add(scores, f"{name}, {coupling}", fused)
    return scores


def samples(study: Study) -> Scores:
    """Vary the number of calibration samples."""
    scores: Scores = {}
    for left, right in study.each():
        for count in (2, 10, 50, 200, 1000):
            for coupling in ("hard", "soft"):
                options = {"samples": count, "coupling": coupling, "symmetry": "permutation"}
                fused = fuse(study.task, [left, right], right, **options)
                study.add(scores, f"{count} samples, {coupling}", fused)
    return scores


def regularisation(study: Study) -> Scores:
    """Vary the softness of couplings."""
    scores: Scores = {}
    for left, right in study.each():
        for softness in (0.001, 0.005, 0.02, 0.1, 0.5):
            fused = fuse(study.task, [left, right], right, coupling="soft", regularisation=softness)
            study.add(scores, f"{softness}", fused)
    return scores


def layers(study: Study) -> Scores:
    """Fuse the first layers only: the others are the target's."""
    scores: Scores = {}
    path = STACKS[study.task.name]
    for left, right in study.each():
        fused = fuse(study.task, [left, right], right)
        depth = len(list(right.get_submodule(path).children()))
        for count in range(depth + 1):
            state, merged = right.state_dict(), fused.state_dict()
            later = tuple(f"{path}.{layer}." for layer in range(count, depth))
            partly = loaded(
                right, {name: state[name] if name.startswith(later) else merged[name] for name in state}
            )
            study.add(scores, f"first {count} of {depth} layers", partly)
    return scores


def widths(study: Study) -> Scores:
    """Fuse parents of other widths: into the narrower and the wider, one-shot and after training."""
    full, half = study.task.size, halved(study.task.size)
    cases = {
        f"{full.width} into {half.width}": (full, half),
        f"{half.width} into {full.width}": (half, full),
    }
    within = {
        f"feed-forward {full.hidden} into {full.hidden // 2}": (
            full,
            dataclasses.replace(full, hidden=full.hidden // 2),
        ),
        f"heads {full.heads} into {full.heads // 2}": (
            full,
            dataclasses.replace(full, heads=full.heads // 2),
        ),
    }
    return _unequal(
        study,
        {**cases, **within} if full.heads else cases,  # a residual network has channels alone
        lambda parent, like: truncated(parent, like) if _fits(like, parent) else padded(parent, like),
    )


def _fits(smaller: nn.Module, larger: nn.Module) -> bool:
    sizes = larger.state_dict()
    return all(
        all(a <= b for a, b in zip(tensor.shape, sizes[name].shape, strict=True))
        for name, tensor in smaller.state_dict().items()
    )


def depths(study: Study) -> Scores:
    """Fuse parents of other depths."""
    size = study.task.size
    deep, path = dataclasses.replace(size, depth=size.depth * 3 // 2), STACKS[study.task.name]
    cases = {f"depth {deep.depth} into {size.depth}": (deep, size)}
    return _unequal(study, cases, functools.partial(first_layers, path=path))


def _unequal(
    study: Study, cases: dict[str, tuple[Size, Size]], cut: Callable[[nn.Module, nn.Module], nn.Module]
) -> Scores:
    """Compare what a parent of another size gives: alone, cut to size, and fused with the target."""
    scores: Scores = {}
    for name, (other, size) in ((name, case) for name, case in cases.items() if study.only in name):
        for pair in range(study.pairs):
            parent, target = study.parent(2 * pair, other), study.parent(2 * pair + 1, size)
            fresh = study.task.build(size, 100 + pair)
            starts = {
                "random restart": fresh,
                "other parent cut to size": cut(parent, fresh),
                "other parent carried over": fuse(study.task, [parent, target], target, weights=[1, 0]),
                "other parent carried over, layers fitted": fuse(
                    study.task, [parent, target], target, weights=[1, 0], repair="layers"
                ),
                "target parent": target,
                "fused, hard": fuse(study.task, [parent, target], target),
                "fused, soft": fuse(study.task, [parent, target], target, coupling="soft"),
                "fused, layers fitted": fuse(study.task, [parent, target], target, repair="layers"),
                "fused, learned": fuse(study.task, [parent, target], target, **study.learning),
            }
            study.add(scores, f"{name}: other parent", parent)
            for label, start in starts.items():
                study.add(scores, f"{name}: {label}", start)
                study.add(scores, f"{name}: {label}, {study.tuning} steps", study.tuned(start))
    return scores


def many(study: Study) -> Scores:
    """Fuse two to five parents."""
    scores: Scores = {}
    parents = [study.parent(seed) for seed in range(5)]
    for count in range(2, 6):
        for target in range(min(study.pairs, count)):
            chosen = parents[:count]
            like = chosen[target]
            study.add(scores, f"{count}: ensemble", *chosen)
            study.add(scores, f"{count}: vanilla average", average(chosen))
            for name, options in (
                ("anchor", {}),
                ("barycenter", {"rounds": 3}),
                ("learned", study.learning),
            ):
                fused = fuse(study.task, chosen, like, target=target, **options)
                study.add(scores, f"{count}: {name}", fused)
                study.add(scores, f"{count}: {name}, {study.tuning} steps", study.tuned(fused))
    return scores


def tuning(study: Study, teach: bool = False) -> Scores:
    """Train on from the fusion, the vanilla average and a parent."""
    scores: Scores = {}
    for left, right in study.each():
        study.add(scores, "ensemble", left, right)
        better = max(left, right, key=lambda model: study.task.score(model)[0])
        starts: dict[str, dict[str, Any] | nn.Module] = {
            "better parent": better,
            "vanilla average": average([left, right]),
            "fused, hard": {},
            "fused, soft": {"coupling": "soft"},
            "fused, learned": study.learning,
        }
        for name, made in starts.items():
            if made is better:
                study.add(scores, f"{name}, step 0", better)
            if study.only not in name:
                continue
            start = made if isinstance(made, nn.Module) else fuse(study.task, [left, right], right, **made)
            if start is not better:
                study.add(scores, f"{name}, step 0", start)
            learner = copy.deepcopy(start)
            teachers = [left, right] if teach else None

            def watch(step: int, name: str = name, learner: nn.Module = learner) -> None:
                study.add(scores, f"{name}, step {step}", learner)

            study.task.fit(learner, study.tuning, 7, study.rate, teachers, watch)
    return scores


def distillation(study: Study) -> Scores:
    """Train on from the parents' averaged logits."""
    return tuning(study, teach=True)


def landscape(study: Study) -> Scores:
    """Draw accuracy along the line between parents, and in the plane through both and the fusion."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    scores: Scores = {}
    left, right = next(iter(study.each()))
    carried = fuse(study.task, [left, right], right, weights=[1, 0], method="permutation")
    soft = fuse(study.task, [left, right], right, weights=[1, 0], coupling="soft")
    shares = [index / 10 for index in range(11)]
    figure, (line, plane) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, start in (("vanilla", left), ("hard", carried), ("soft", soft)):
        found = [study.task.score(mixed(start, right, share)) for share in shares]
        for share, score in zip(shares, found, strict=True):
            scores[f"{name}, {share:.1f}"] = [score]
        line.plot(shares, [accuracy for accuracy, _ in found], marker="o", label=name)
    line.set(xlabel="share of the target", ylabel="accuracy, %", title="between parent and target")
    line.legend()
    grid = [index / 4 - 0.5 for index in range(9)]
    heights = [
        [study.task.score(moved(right, [carried, left], [across, up]))[0] for across in grid] for up in grid
    ]
    drawn = plane.contourf(grid, grid, heights, levels=20)
    figure.colorbar(drawn, label="accuracy, %")
    for name, place in (("target", (0, 0)), ("aligned parent", (1, 0)), ("parent", (0, 1))):
        plane.plot(*place, "w^")
        plane.annotate(name, place, color="white", xytext=(4, 4), textcoords="offset points")
    plane.set(title="in the plane of target, parent and aligned parent")
    study.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(study.picture)
    return scores


TABLES: dict[str, Callable[[Study], Scores]] = {
    "one-shot": one_shot,
    "stages": stages,
    "residual": residual,
    "query-key": query_key,
    "samples": samples,
    "regularisation": regularisation,
    "layers": layers,
    "widths": widths,
    "depths": depths,
    "many": many,
    "tuning": tuning,
    "distillation": distillation,
    "landscape": landscape,
}


def _range(values: list[float], digits: int) -> str:
    """Write a mean with the smallest and the largest value."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _columns(scores: Scores) -> tuple[str, ...]:
    return COLUMNS[: max(len(item) for found in scores.values() for item in found)]


def _cells(scores: Scores) -> list[list[str]]:
    count = len(_columns(scores))
    rows = []
    for name, found in scores.items():
        cells = [_range(list(values), digits) for values, digits in zip(zip(*found), DIGITS)]  # noqa: B905
        rows.append([name, *cells, *[""] * (count - len(cells))])
    return rows


def _section(table: str, task: Task, command: str, scores: Scores, picture: Path | None) -> str:
    count = max(map(len, scores.values()))
    lines = [
        f"## {table}, {task.name}",
        "",
        f"`{command}`",
        "",
        f"Pairs of parents: {count} ({task.size}, {task.steps} steps).",
        "",
        f"| | {' | '.join(_columns(scores))} |",
        f"|---|{'---|' * len(_columns(scores))}",
        *(f"| {' | '.join(row)} |" for row in _cells(scores)),
    ]
    if picture is not None:
        lines += ["", f"![{table}, {task.name}]({picture.name})"]
    return "\n".join([*lines, ""])


def write(output: Path, title: str, section: str) -> None:
    """Put a section into a file of results, in place of the one of the same title."""
    text = output.read_text(encoding="utf-8") if output.exists() else "# Results\n"
    head, *sections = text.split("\n## ")
    kept = [item for item in sections if not item.startswith(f"{title}\n")]
    body = "".join(f"\n## {item.rstrip()}\n" for item in kept)
    output.write_text(f"{head.rstrip()}\n{body}\n{section}", encoding="utf-8")


def pairs_of(count: int) -> Iterator[tuple[int, int]]:
    """Yield so many pairs of seeds, every two of as few as are needed."""
    return itertools.islice(((left, right) for right in itertools.count(1) for left in range(right)), count)


def chosen_task(
    name: str, data: Path | None, size: str | None, tested: int | None, names: Sequence[str] = TASKS
) -> Task:
    """Return a task; of networks of another size, or scored on a part of its test data, if that is wanted."""
    if name not in names:
        raise typer.BadParameter(f"give --task one of {', '.join(names)}")
    torch.set_num_threads(1)  # small operators: threads cost more than they gain
    found = load(name, data)
    if size is not None:
        found = dataclasses.replace(found, size=Size(*map(int, size.split(","))))
    return dataclasses.replace(found, test=(found.test[0][::tested], found.test[1][::tested]))


def main(
    table: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Data folder.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of parents.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Training steps of a parent.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTH,HEADS,HIDDEN,DEPTH of the networks.")] = None,
    tested: Annotated[int | None, typer.Option(help="Score every n-th test sample.")] = None,
    tuning_steps: Annotated[int, typer.Option(help="Steps of further training.")] = 200,
    tuning_rate: Annotated[
        float | None, typer.Option(help="Its largest learning rate; a third of the parents' by default.")
    ] = None,
    untie: Annotated[bool, typer.Option(help="Untie the output embeddings of trained parents.")] = False,
    refine: Annotated[int, typer.Option(help="Steps in which transports are learned.")] = 400,
    samples: Annotated[int, typer.Option(help="Unlabelled samples that they are learned on.")] = 2000,
    only: Annotated[
        str, typer.Option(help="Stages, widths, or what is trained on: with this in their names.")
    ] = "",
    also: Annotated[
        str, typer.Option(help="Learn with these, too: 'soft' couplings, 'labels' (half of the loss).")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples in one step of learning.")] = 100,
    checkpoints: Annotated[Path | None, typer.Option(help="Where parents are kept.")] = None,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.")] = None,
) -> None:
    """Make a table."""
    if table not in TABLES:
        raise typer.BadParameter(f"give one of {', '.join(TABLES)}")
    found = chosen_task(task, data, size, tested)
    if steps is not None:
        found = dataclasses.replace(found, steps=steps)
    found = dataclasses.replace(found, untie=untie)
    place = output.parent if output is not None else Path()
    picture = place / f"landscape-{task}.png"
    learning = fxfusion.Refinement(steps=refine)
    rate = tuning_rate or found.rate / 3
    study = Study(
        found, pairs, checkpoints, tuning_steps, rate, picture, learning, samples, only, also, batch
    )
    scores = TABLES[table](study)
    shown = Table("network", *_columns(scores), title=f"{table}, {task}")
    for row in _cells(scores):
        shown.add_row(*row)
    Console().print(shown)
    if output is not None:
        command = " ".join(["python examples/paper/run.py", *shown_arguments(sys.argv[1:])])
        drawn = picture if table == "landscape" else None
        write(output, f"{table}, {task}", _section(table, found, command, scores, drawn))


def shown_arguments(arguments: list[str]) -> list[str]:
    """Return the command line without folders of one's own."""
    shown, private = [], False
    for argument in arguments:
        if private:
            argument = "DIRECTORY"
        private = argument in ("--data", "--checkpoints", "--reference")
        shown.append(argument)
    return shown


if __name__ == "__main__":
    typer.run(main)
