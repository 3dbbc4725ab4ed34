"""The paper's own code beside fxfusion: the same parents, the same calibration images.

    python examples/paper/beside_reference.py TABLE --reference DIRECTORY --task mnist --data DIRECTORY

========  ==========================================================================================
parity    do ``fxfusion.reference()`` and the code itself give the same parameters, setting by setting?
accuracy  the best of 48 settings of the code, chosen on the test images, against our default
speed     seconds by stage, and memory, of fusing one pair; every way in a process of its own
========  ==========================================================================================

``--reference`` is a checkout of github.com/graldij/transformer-fusion. Its functions are called as its main
program calls them, with the settings of its experiment file but for those that a table varies. It fuses
vision transformers alone: tasks are digits, mnist and cifar10. Needs ``pip install -e '.[examples]'``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml  # type: ignore[import-untyped]
from measure import Measured
from methods import average, fuse, loaded
from rich.console import Console
from rich.table import Table
from run import chosen_task, pairs_of, shown_arguments, write
from tasks import Size, Task
from torch import nn

import fxfusion

TASKS = ("digits", "mnist", "cifar10")
GOAL = 1e-3  # relative difference below which two parameters count as the same
# Of soft couplings: what its experiment file recommends, and what was better still in some settings on MNIST.
REGULARISATIONS = {"weights": (0.06, 0.015), "activations": (0.08, 0.16)}
POLICIES = {"mean": "mean", "only_resid": "skip", "weighted_matrix": "weighted_matrix"}  # its names and ours
FORMER_NAMES = {  # of what transformers 5 has renamed
    "vit.layers.": "vit.encoder.layer.",
    ".q_proj": ".attention.query",
    ".k_proj": ".attention.key",
    ".v_proj": ".attention.value",
    ".o_proj": ".output.dense",
    ".mlp.fc1": ".intermediate.dense",
    ".mlp.fc2": ".output.dense",
}

Pair = list[nn.Module]
Found = tuple[list[str], list[list[str]]]  # headings, and rows below them


def former(name: str) -> str:
    """Return the name of a layer or parameter in transformers 4: the reference knows no other."""
    for now, before in FORMER_NAMES.items():
        name = name.replace(now, before)
    return name


class Renamed:
    """As much of a network as the reference asks for, by its former names."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config

    def __call__(self, images: torch.Tensor) -> Any:
        """Run the network."""
        return self.model(images)

    def to(self, device: torch.device) -> Renamed:
        """Stay: everything is on one device."""
        return self

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield layers."""
        return ((former(name), layer) for name, layer in self.model.named_modules())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters."""
        return ((former(name), parameter) for name, parameter in self.model.named_parameters())


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the reference is told, in its words.

    Attributes
    ----------
    features, policy, query_key : str
        ``weights`` or ``activations``; how transports are joined at residual connections; ``separate``,
        ``eq_t_map`` or ``joint`` transports of queries and keys.
    regularisation : float or None
        Of Sinkhorn couplings; none for EMD.
    """

    features: str
    regularisation: float | None = None
    policy: str = "mean"
    query_key: str = "separate"

    def __str__(self) -> str:
        solver = "EMD" if self.regularisation is None else f"Sinkhorn {self.regularisation:g}"
        return f"{solver}, {self.features}, {self.policy}, {self.query_key}"

    @property
    def ours(self) -> dict[str, Any]:
        """The options of :func:`fxfusion.fuse` that say the same."""
        coupling = "hard" if self.regularisation is None else "soft"
        query_key = "shared" if self.query_key == "eq_t_map" else self.query_key
        options = fxfusion.reference(self.features, coupling, POLICIES[self.policy], query_key)
        flow: fxfusion.Flow = options["flow"]
        return options | {"flow": dataclasses.replace(flow, regularisation=self.regularisation)}


class Reference:
    """The paper's code, in a folder."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder / "otfusion"))  # its files import each other from there
        self._fusion = importlib.import_module("hf_vit_fusion")
        self._utils = importlib.import_module("utils")
        # Histograms, made whether they are logged or not: they need the width of a terminal, and time.
        importlib.import_module("otfusion_lib").__dict__["matrix_stats"] = lambda matrix, name: ""
        logging.getLogger().setLevel(logging.WARNING)  # it lets everyone inform
        self._told = yaml.safe_load((folder / "experiments" / "fuse_hf_vit_cifar10.yaml").read_text())
        self._common = {"device": torch.device("cpu"), "LOGGING_LEVEL": logging.WARNING}

    def _arguments(self, setting: Setting, samples: int = 0) -> dict[str, Any]:
        told: dict[str, Any] = copy.deepcopy(self._told)
        told["fusion"] |= {
            "type": "wts" if setting.features == "weights" else "acts",
            "ot_solver": "emd" if setting.regularisation is None else "sinkhorn",
            "sinkhorn_reg": setting.regularisation,
            "resid_policy": setting.policy,
            "qk_fusion": setting.query_key,
        }
        # Its windows are of 8 x 8 patches, which only one task has: all positions count.
        told["fusion"]["acts"] |= {"num_samples": samples, "seq_filter": None}
        told["fusion"]["acts"] |= dict.fromkeys(("std", "center", "norm"), True)
        return told

    def activations(self, models: Pair, images: torch.Tensor, setting: Setting) -> dict[str, Any]:
        """Return activations of both parents, image by image. Its hooks stay on them."""
        # It takes labels with them, for a filter that is off.
        loader = [{"pixel_values": image[None], "labels": torch.zeros(1)} for image in images]
        told, named = self._arguments(setting, len(images)), list(map(Renamed, models))
        get: Callable[..., dict[str, Any]] = self._utils.get_activations
        return get(args=told, models=named, dataloader=loader, **self._common)

    def fuse(self, models: Pair, activations: dict[str, Any], setting: Setting) -> nn.Module:
        """Return the fusion of two networks in the second one's basis."""
        weights = {f"model_{i}": self._utils.model_to_dict(Renamed(model)) for i, model in enumerate(models)}
        fused = self._fusion.hf_vit_fusion(
            args=self._arguments(setting), weights=weights, acts=activations, alpha=0.5, **self._common
        )
        names = [name for name, _ in models[1].named_parameters()]
        found = {name: self._utils.dict_get(former(name).split("."), fused).detach() for name in names}
        return loaded(models[1], {**models[1].state_dict(), **found})


def parity(task: Task, pairs: Sequence[Pair], reference: Reference, samples: int) -> Found:
    """Compare fused parameters, setting by setting.

    Joint queries and keys are compared by weights alone: by activations the code moves queries as keys.
    """
    rows = []
    for number, models in enumerate(pairs):
        seen = reference.activations(copy.deepcopy(models), _images(task, samples), Setting("activations"))
        ways = [*((policy, "separate") for policy in POLICIES), ("mean", "eq_t_map"), ("mean", "joint")]
        settings = [
            Setting(features, softness, *way)
            for features, recommended in REGULARISATIONS.items()
            for softness, way in itertools.product((None, recommended[0]), ways)
            if (way[1], features) != ("joint", "activations")
        ]
        for setting in settings:
            theirs = reference.fuse(models, seen, setting)
            ours = fuse(task, models, models[1], samples, **setting.ours)
            rows.append([str(number), str(setting), *_difference(theirs, ours), _scores(task, theirs, ours)])
    return ["pair", "setting", "class token", "largest other", f"above {GOAL:g}", "accuracy, %"], rows


def _images(task: Task, samples: int) -> torch.Tensor:
    return torch.cat([batch[task.inputs] for batch in task.calibration(samples)])


def _difference(theirs: nn.Module, ours: nn.Module) -> list[str]:
    """Return the class token's difference, the largest of all others, and how many are above the goal.

    Units of a class token differ in one number: of their assignments, many are equally good.
    """
    state, other = theirs.state_dict(), ours.state_dict()
    found = {name: float((value - other[name]).norm() / value.norm()) for name, value in state.items()}
    token = found.pop("vit.embeddings.cls_token")
    worst = max(found, key=lambda name: found[name])
    above = [value for value in found.values() if value > GOAL]
    return [f"{token:.1e}", f"{found[worst]:.1e}, {worst}", f"{len(above)} of {len(found)}"]


def _scores(task: Task, *models: nn.Module) -> str:
    return " / ".join(f"{task.score(model)[0]:.1f}" for model in models)


def accuracy(task: Task, pairs: Sequence[Pair], reference: Reference, samples: int) -> Found:
    """Set the reference's best setting for each pair beside our default."""
    policies = ("mean", "only_resid", "weighted_scalar", "weighted_matrix")
    settings = [
        Setting(features, softness, policy, query_key)
        for features, recommended in REGULARISATIONS.items()
        for softness in (None, *recommended)
        for policy, query_key in itertools.product(policies, ("separate", "eq_t_map"))
    ]
    rows = []
    for number, models in enumerate(pairs):
        seen = reference.activations(copy.deepcopy(models), _images(task, samples), settings[0])
        scores = {item: task.score(reference.fuse(models, seen, item))[0] for item in settings}
        best = max(scores, key=lambda item: scores[item])
        published = Setting("activations", REGULARISATIONS["activations"][0])
        ours = fuse(task, models, models[1], samples)
        facts = [_scores(task, *models), _scores(task, average(models)), f"{scores[published]:.1f}"]
        rows.append([str(number), *facts, f"{scores[best]:.1f}", str(best), _scores(task, ours)])
    count = len(settings)
    return ["pair", "parents, %", "vanilla", "published setting", f"best of {count}", "which", "ours"], rows


def speed(task: Task, pairs: Sequence[Pair], folder: Path, samples: int) -> Found:
    """Measure one fusion of one pair. Rewriting includes repair."""
    small = [task.build(Size(16, 2, 16, 1), seed) for seed in (0, 1)]
    ways: list[tuple[str, Callable[..., list[str]], Any]] = [
        ("the networks alone", _time_networks, None),  # what no way to observe them can fall below
        ("ours, default", _time_ours, {}),
    ]
    for solver, softness in (("EMD", None), ("Sinkhorn", REGULARISATIONS["activations"][0])):
        setting = Setting("activations", softness)
        ways.append((f"reference, {solver}", _time_theirs, (folder, setting)))
        ways.append((f"ours, reference(), {solver}", _time_ours, setting.ours))
    rows = []
    for name, measure, how in sorted(ways, key=lambda way: way[0].startswith("ours")):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # so that memory is not reused
            job = process.submit(measure, how, pairs[0], small, task.calibration(samples), task.example())
            rows.append([name, *job.result()])
    stages = ["capture", "certificates", "calibration", "alignment", "rewriting"]
    return ["seconds", *stages, "in all", "memory, MiB"], rows


def _time_networks(how: None, models: Pair, small: Pair, seen: Any, example: Any) -> list[str]:
    """Run both networks on all images, a batch at a time, and observe nothing."""
    torch.set_num_threads(1)
    with torch.no_grad():
        for network in small:
            network(**seen[0])
        with Measured() as cost:
            for batch in seen:
                for network in models:
                    network(**batch)
    return ["", "", f"{cost.seconds:.2f}", "", "", f"{cost.seconds:.2f}", f"{cost.mebibytes:.0f}"]


def _time_theirs(how: tuple[Path, Setting], models: Pair, small: Pair, seen: Any, example: Any) -> list[str]:
    torch.set_num_threads(1)
    reference, setting = Reference(how[0]), how[1]
    images = torch.cat([tensor for batch in seen for tensor in batch.values()])
    reference.fuse(small, reference.activations(small, images[:2], setting), setting)  # what is loaded late
    with Measured() as cost:
        start = time.perf_counter()
        activations = reference.activations(models, images, setting)
        observed = time.perf_counter() - start
        reference.fuse(models, activations, setting)
    solved = cost.seconds - observed
    return ["", "", f"{observed:.2f}", f"{solved:.2f}", "", f"{cost.seconds:.2f}", f"{cost.mebibytes:.0f}"]


def _time_ours(how: dict[str, Any], models: Pair, small: Pair, seen: Any, example: Any) -> list[str]:
    torch.set_num_threads(1)
    fxfusion.fuse(small, kwargs=example, calibration=seen[:1], **how)  # what is loaded late
    latest: dict[str, float] = {}  # when each stage was last heard of

    def note(stage: str, done: int, total: int) -> None:
        latest[stage] = time.perf_counter()

    with Measured() as cost:
        result = fxfusion.fuse(models, kwargs=example, calibration=seen, progress=note, **how)
    spent = dict(result.report.seconds)
    captured = sum(spent.pop(stage) for stage in ("capture", "compare", "propagate"))
    certified = spent.pop("certify")
    observed = latest["calibrate"] - latest["certify"]  # the report counts it with what is aligned by it
    aligned = sum(spent.pop(stage, 0.0) for stage in ("FoldNorms", "Balance", "Align", "AlignFlow"))
    stages = (captured, certified, observed, aligned - observed, sum(spent.values()), cost.seconds)
    return [*(f"{seconds:.2f}" for seconds in stages), f"{cost.mebibytes:.0f}"]


TABLES: dict[str, Callable[..., Found]] = {"parity": parity, "accuracy": accuracy, "speed": speed}


def main(
    table: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    reference: Annotated[Path, typer.Option(help="Checkout of the paper's code.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Data folder.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Where parents are kept.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of parents; for speed, one.")] = 1,
    samples: Annotated[int, typer.Option(min=2, help="Calibration images.")] = 200,
    size: Annotated[str | None, typer.Option(help="WIDTH,HEADS,HIDDEN,DEPTH of the networks.")] = None,
    tested: Annotated[int, typer.Option(min=1, help="Score every n-th test image.")] = 1,
    untrained: Annotated[bool, typer.Option(help="Random weights: for speed alone.")] = False,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.")] = None,
) -> None:
    """Set the paper's code and ours side by side."""
    if table not in TABLES:
        raise typer.BadParameter(f"give one of {', '.join(TABLES)}")
    found = chosen_task(task, data, size, tested, TASKS)
    chosen = list(pairs_of(1 if table == "speed" else pairs))
    make = found.build if untrained else functools.partial(found.parent, checkpoints=checkpoints)
    made = [make(found.size, seed) for seed in range(max(map(max, chosen)) + 1)]
    parents = [[made[left], made[right]] for left, right in chosen]
    code = reference if table == "speed" else Reference(reference)
    headings, rows = TABLES[table](found, parents, code, samples)
    shown = Table(*headings, title=f"{table}, {task}")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    if output is not None:
        title = f"beside the reference: {table}, {task}"
        lines = [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]
        command = " ".join(["python examples/paper/beside_reference.py", *shown_arguments(sys.argv[1:])])
        facts = f"{found.size}, {samples} calibration images, {len(found.test[0])} test images."
        write(output, title, "\n".join([f"## {title}", "", f"`{command}`", "", facts, "", *lines, ""]))


if __name__ == "__main__":
    typer.run(main)
