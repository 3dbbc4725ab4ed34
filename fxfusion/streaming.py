"""Fusion of checkpoints from file to file: no parent is ever in memory.

Parents are aligned by their weights and, with calibration data, by activations. Each parameter is read once
for these, whenever a space that it holds is compared, and once more when it is written. The result appears
at its place whole: it grows in a directory beside that, from which an interrupted run goes on. There the
transports are kept, and every finished shard with the hash of its content.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fxfusion.atomic import replacing, take_place, write_text
from fxfusion.average import weighted_average
from fxfusion.calibration import Batches
from fxfusion.capture import Model, tied_groups
from fxfusion.checkpoints import (
    INDEX_NAME,
    REPORT_SUFFIX,
    WEIGHTS_NAME,
    check_fits,
    check_output_directory,
    companions,
    write_safetensors,
)
from fxfusion.methods import Method
from fxfusion.pairing import Parent, pair
from fxfusion.pipeline import certify_all, planned
from fxfusion.plan import Plan
from fxfusion.processes import current
from fxfusion.progress import Progress, logged
from fxfusion.repair import batch_norms
from fxfusion.report import FusionReport
from fxfusion.reporting import fusion_report, model_card, versions
from fxfusion.staging import MemoryLimit
from fxfusion.state import FusionState
from fxfusion.statistics import gather, observations
from fxfusion.stored import StoredWeights
from fxfusion.symmetry import act
from fxfusion.transport.cost import MEMORY
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.joint import Alignment, align
from fxfusion.transport.map import HardMap, Map, SoftMap
from fxfusion.transport.observed import StoredCosts
from fxfusion.validation import check_alike, check_shares

SHARD_BYTES = 10**9
CALIBRATION_BYTES = 4 * 2**30
_TRANSPORTS = "transports.safetensors"
_JOB = "job.json"
_RESULT = "result"
_HASH_SUFFIX = ".sha256"


@dataclasses.dataclass(eq=False)
class _Work:
    """A fusion on its way: what is read, what was found, and where it is written."""

    stored: list[StoredWeights]
    state: FusionState
    directory: Path  # transports, hashes, and the result until it is whole
    out: Path
    seconds: dict[str, float]
    progress: Progress

    @property
    def result(self) -> Path:
        """The directory that will take its place."""
        return self.directory / _RESULT

    @property
    def target(self) -> StoredWeights:
        """The target's weights."""
        return self.stored[self.state.target]

    @property
    def read(self) -> float:
        return sum(item.seconds for item in self.stored)


def fuse_files(
    parents: Sequence[str | Path],
    out: str | Path,
    models: Sequence[Model],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    target: int = -1,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    calibration: Iterable[Any] | None = None,
    memory: int = CALIBRATION_BYTES,
    gap: float = 0.0,
    progress: Progress | None = None,
) -> FusionReport:
    """Fuse checkpoints without loading them, from file to file; the result is safetensors.

    Memory holds a few parameters at a time, and one shard of the result. Permutations are solved, hard; other
    widths may be fused, too. Numbers are averaged in float32 and stored as the target's are.

    Parameters
    ----------
    parents : sequence of str or Path
        A safetensors file each, an index beside its shards, a directory with either, or a ``.pt2`` file.
    out : str or Path
        The directory to write: shards with an index, the target's configuration and tokenizer files, a model
        card, a report. An empty one or an earlier fusion is replaced. A run that was interrupted is gone on
        with if it is started again with the same parents and options.
    models : sequence of torch.nn.Module or torch.export.ExportedProgram
        Per parent, a network of its class, whose parameters do not count: see
        :func:`fxfusion.hollow.hollow` and :func:`fxfusion.archives.hollow_archive`. Buffers that a checkpoint
        holds are read into the target's.
    args, kwargs : sequence, mapping
        Example inputs of all.
    weights, target, seed, outputs, progress
        As for :func:`fxfusion.fuse`.
    shard_bytes : int
        How large a file of the result may be; a larger tensor has one of its own.
    calibration : iterable, optional
        As for :func:`fxfusion.fuse`. All batches go through one stage of the network, then through the next:
        see :func:`fxfusion.statistics.gather`. Activations between stages, and costs, are kept in files.
    memory : int
        How many bytes calibration may take for weights, statistics and activations between stages. Half of it
        holds weights while these are compared, a gibibyte at most.

    gap : float
        As for :class:`fxfusion.Coupling`.

    Returns
    -------
    FusionReport
        Also in ``out``, as a page.

    Raises
    ------
    FusionError
        As for :func:`fxfusion.fuse`; nothing is at ``out`` then.
    MemoryLimitError
        If a single step of calibration takes more than ``memory``.

    Examples
    --------
    >>> import tempfile
    >>> from fxfusion.checkpoints import read_weights, save_weights
    >>> from fxfusion.hollow import hollow
    >>> folder = Path(tempfile.mkdtemp())
    >>> from torch import nn
    >>> make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> paths = [folder / "a.safetensors", folder / "b.safetensors"]
    >>> for path in paths:
    ...     save_weights(make().state_dict(), path)
    >>> report = fuse_files(paths, folder / "out", [hollow(make), hollow(make)], (torch.ones(2, 4),))
    >>> sorted(read_weights(folder / "out")) == sorted(make().state_dict())
    True
    """
    start = time.perf_counter()
    progress = logged(progress)
    out = Path(out)
    check_output_directory(out)
    shares, coupling = check_shares(weights, len(parents)), Coupling(gap=gap)
    target = check_alike(models, target)
    stored = [StoredWeights(path, _aliases(model)) for path, model in zip(parents, models, strict=True)]
    for item, model in zip(stored, models, strict=True):
        check_fits(model, item.shells(), item, str(item.path))
    state = _bound(models, stored, target, args, kwargs, outputs)
    state.weights, state.method = shares, Method("permutation")
    if batch_norms(state.capture):
        state.notes = ("statistics of batch normalisations are the parents' average, not measured anew",)
    batches = None if calibration is None else Batches(state.capture, calibration)
    processes, out = current(), out.absolute()
    work = _Work(stored, state, out.parent / f".{out.name}.partial", out, {}, progress)
    work.seconds["plan"] = time.perf_counter() - start
    job = {"seed": seed, "outputs": outputs, "shard_bytes": shard_bytes, "gap": gap}
    processes.once(
        lambda: _resume(work, {**job, "calibration": None if batches is None else batches.fingerprint()})
    )
    _certify(work, models, seed)
    _solve(work, coupling, batches, memory)
    shards = _write_shards(work, shard_bytes)
    options = {
        "features": "weights" if batches is None else "activations",
        "coupling": "hard",
        "symmetry": "permutation",
        "target": str(target),
        "seed": str(seed),
    }
    report = fusion_report(state, models, options, state.certificates, work.seconds)
    processes.once(lambda: _finish(work, shards, report))
    return report


# -- what is read --------------------------------------------------------------------------------------


def _aliases(model: Model) -> dict[str, str]:
    """Return for every name of a tied tensor the others', whichever of them a file holds."""
    return {name: other for group in tied_groups(model) for name in group for other in group if other != name}


def _bound(
    models: Sequence[Model],
    stored: Sequence[StoredWeights],
    target: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    outputs: Sequence[str] | None,
) -> FusionState:
    """Capture and plan the target, and every parent of other widths, and pair them."""
    state = _planned(models[target], stored[target], args, kwargs, outputs)
    assert state.plan is not None
    state.target = target
    bound = []
    for index, (model, item) in enumerate(zip(models, stored, strict=True)):
        capture, plan = state.capture, state.plan
        if any(item.shapes[name] != stored[target].shapes.get(name) for name in item):
            other = _planned(model, item, args, kwargs, outputs)
            assert other.plan is not None
            names = f"model {target} ({state.capture.name})", f"model {index} ({other.capture.name})"
            plan = pair(state.capture, state.plan, other.capture, other.plan, names)
            capture = other.capture
        bound.append(Parent(capture, plan, item))
    state.parents = bound
    return state


def _planned(
    model: Model,
    stored: StoredWeights,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    outputs: Sequence[str] | None,
) -> FusionState:
    """Capture and plan a network; its buffers are read, its parameters never."""
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(stored[name])
    return planned(model, args, kwargs, outputs)


# -- stages --------------------------------------------------------------------------------------------


def _certify(work: _Work, models: Sequence[Model], seed: int) -> None:
    start = time.perf_counter()
    # Finding out whether rounding alone would do the same takes all weights at once.
    work.state.certificates = certify_all(work.state, models, seed, work.progress, diagnose=False)
    work.seconds["certify"] = time.perf_counter() - start


def _solve(work: _Work, coupling: Coupling, batches: Batches | None, memory: int) -> None:
    """Solve the transports of all parents but the target, or find them where an earlier run left them."""
    state = work.state
    own = state.parents[state.target].state
    file = work.directory / _TRANSPORTS
    processes = current()
    kept = _kept_transports(file, state.plan) if processes.once(file.is_file) else {}
    observed: list[StoredCosts | None] = [None] * len(state.parents)
    if batches is not None and len(kept) < len(state.parents) - 1:
        observed = _observe(work, batches, memory)
    start, read, solving = time.perf_counter(), work.read, 0.0
    for index, parent in enumerate(state.parents):
        if index == state.target:
            state.alignments.append(None)
            continue
        if index not in kept:
            kept[index] = align(
                parent.plan,
                own,
                parent.state,
                coupling,
                None,
                work.progress,
                observed[index],
                min(MEMORY, memory // 2),
            )
            solving += kept[index].solving
            processes.once(functools.partial(_keep_transports, file, kept))
        state.alignments.append(kept[index])
    work.seconds["read for alignment"] = work.read - read
    work.seconds["solve"] = solving
    work.seconds["compare"] = time.perf_counter() - start - work.seconds["read for alignment"] - solving


def _observe(work: _Work, batches: Batches, memory: int) -> list[StoredCosts | None]:
    """Run calibration data through all parents, stage by stage, and return the costs that they show."""
    start, read, state = time.perf_counter(), work.read, work.state
    directory = work.directory / f"calibration-{current().rank}"
    if directory.exists():  # of a run that was killed
        shutil.rmtree(directory)
    directory.mkdir()
    places = observations(state.parents[state.target].plan, state.capture.module.graph)
    costs: list[StoredCosts | None] = [None] * len(state.parents)
    for index, parent in enumerate(state.parents):
        if index != state.target:
            (directory / str(index)).mkdir()
            counts = {name: len(where) for name, where in places.items()}
            costs[index] = StoredCosts(parent.plan, counts, directory / str(index))
    parts = gather(
        state.parents,
        state.target,
        batches,
        len(batches),
        work.progress,
        places,
        limit=MemoryLimit(memory, directory),
    )
    for part in parts:
        for stored, moments in zip(costs, part, strict=True):
            for name, number in list(moments):
                assert stored is not None
                stored.add(name, moments.pop((name, number)))
    work.seconds["read for calibration"] = work.read - read
    work.seconds["calibrate"] = time.perf_counter() - start - work.seconds["read for calibration"]
    return costs


def _write_shards(work: _Work, shard_bytes: int) -> dict[str, list[str]]:
    """Write all shards that are not there yet; return the names in each."""
    start, read = time.perf_counter(), work.read
    target = work.target
    groups: list[list[str]] = [[]]
    held = 0
    for name in target:
        size = target.bytes_of(name)
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    count = len(groups)
    files = [
        WEIGHTS_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        for index in range(count)
    ]

    def write(index: int) -> None:
        work.progress("write shards", index, count)
        path = work.result / files[index]
        if not _is_written(work, files[index]):
            with replacing(path) as temporary:
                write_safetensors({name: _fused(work, name) for name in groups[index]}, temporary)
            write_text(work.directory / (files[index] + _HASH_SUFFIX), _hash(path))

    current().share(write, range(count), [len(names) for names in groups])
    work.progress("write shards", count, count)
    work.seconds["read for writing"] = work.read - read
    work.seconds["write"] = time.perf_counter() - start - work.seconds["read for writing"]
    return dict(zip(files, groups, strict=True))


def _fused(work: _Work, name: str) -> torch.Tensor:
    """Return one tensor of the result: the parents' average, or the target's where nothing is averaged."""
    state = work.state
    kept = state.capture.aliases.get(name, name)
    if kept not in state.capture.parameters:
        return work.target[name]
    moved = []
    for parent, alignment in zip(state.parents, state.alignments, strict=True):
        tensor = parent.state[kept]
        if alignment is not None:
            tensor = act(parent.plan.only({kept}), alignment.maps, {kept: tensor})[kept]
        moved.append({name: tensor})
    return weighted_average(moved, state.weights, state.target)[name]


def _is_written(work: _Work, file: str) -> bool:
    """Whether a shard was written before, by a run that was interrupted."""
    place = work.result if work.result.exists() else work.out  # there if all was done but tidying up
    hashed, path = work.directory / (file + _HASH_SUFFIX), place / file
    return hashed.is_file() and path.is_file() and hashed.read_text(encoding="utf-8") == _hash(path)


def _finish(work: _Work, shards: Mapping[str, list[str]], report: FusionReport) -> None:
    """Put everything beside the shards, and the directory in its place."""
    if work.result.exists():
        _furnish(work, shards, report)
        take_place(work.result, work.out)
    shutil.rmtree(work.directory)


def _furnish(work: _Work, shards: Mapping[str, list[str]], report: FusionReport) -> None:
    target, directory = work.target, work.result
    if len(shards) > 1:
        table = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": target.size}, "weight_map": dict(sorted(table.items()))}
        write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    if target.path.is_dir():
        for file in companions(target.path):
            shutil.copyfile(file, directory / file.name)
    write_text(directory / "README.md", model_card(report, [item.path.name for item in work.stored]))
    write_text(directory / f"{work.out.name}{REPORT_SUFFIX}", report.to_html())
    for file in directory.glob(".*"):  # what a killed run was writing
        file.unlink()


# -- going on ------------------------------------------------------------------------------------------


def _resume(work: _Work, options: Mapping[str, Any]) -> None:
    """Go on in the directory of an interrupted run, if that was the same job, else begin anew."""
    job = json.dumps(
        {
            "options": {**options, "shares": work.state.weights, "target": work.state.target},
            "versions": versions(),
            "files": [
                [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in item.files]
                for item in work.stored
            ],
        },
        sort_keys=True,
    )
    file = work.directory / _JOB
    written = [path.name.removesuffix(_HASH_SUFFIX) for path in work.directory.glob(f"*{_HASH_SUFFIX}")]
    whole = work.result.exists() or (bool(written) and all(_is_written(work, name) for name in written))
    if whole and file.is_file() and file.read_text(encoding="utf-8") == job:
        return
    if work.directory.exists():
        shutil.rmtree(work.directory)
    work.result.mkdir(parents=True)
    write_text(file, job)


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


def _keep_transports(path: Path, alignments: Mapping[int, Alignment]) -> None:
    """Write transports; costs go into the header."""
    tensors, facts = {"none": torch.zeros(1)}, {}
    for index, alignment in alignments.items():
        for name, item in alignment.maps.items():
            sides = ("index",) if isinstance(item, HardMap) else ("write", "read")
            tensors.update({f"{index}/{name}/{side}": getattr(item, side) for side in sides})
        names = ("before", "after", "sweeps", "gaps")
        facts[index] = {name: getattr(alignment, name) for name in names}
    with replacing(path) as temporary:
        write_safetensors(tensors, temporary, {"alignments": json.dumps(facts)})


def _kept_transports(path: Path, plan: Plan | None) -> dict[int, Alignment]:
    assert plan is not None
    weights = StoredWeights(path)
    with safe_open(path, framework="pt") as content:
        facts = json.loads(content.metadata()["alignments"])
    return {
        int(index): Alignment(
            {space.name: _kept_map(weights, f"{index}/{space.name}", space.scope) for space in plan.spaces},
            **found,
        )
        for index, found in facts.items()
    }


def _kept_map(weights: StoredWeights, name: str, scope: tuple[str, ...]) -> Map:
    if f"{name}/index" in weights:
        return HardMap(scope, weights[f"{name}/index"])
    return SoftMap(scope, weights[f"{name}/write"], weights[f"{name}/read"])
