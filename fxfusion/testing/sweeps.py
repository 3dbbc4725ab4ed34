"""Sweep over whole model libraries: is every model captured, certified, covered, and its twin recovered?

Every model runs in a process of its own, with a limit on time and memory, forked from one that has
imported the libraries. What is known is written line by line, so that a sweep goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fxfusion
from fxfusion.certify import certify_plan
from fxfusion.errors import CaptureError, CertificationError
from fxfusion.plan import Plan
from fxfusion.progress import Progress, silent
from fxfusion.state import KEY, FusionState
from fxfusion.testing.catalogue import Entry, Inputs, entries, perturb

TIME_LIMIT = 600.0  # seconds
MEMORY_LIMIT = 10.0  # GiB
COVERED = 0.97  # of the parameter elements: below it a model counts as poorly covered
SENSITIVE = 1e-6  # relative change by half a group element, below which a certificate says little
_PRELOADED = ["torch", "timm", "transformers", "torchvision", "fxfusion.testing.sweeps"]


@dataclasses.dataclass
class Record:
    """What a sweep knows about one model.

    Attributes
    ----------
    source, family, name : str
        As in the catalogue.
    status : str
        ``certified``; ``unsound`` (a group element changed the function); ``unstable`` (so did rounding:
        signals explode, and nothing can be said); ``refused`` (torch.export);
        ``failed`` (any other error); ``too slow`` or ``too large`` for the limits.
    message : str
        The error, if there was one.
    stage : str
        What was last begun.
    specialised : bool
        Whether ``torch.export`` refused it (see ``message``), and it was traced on the example instead.
    nodes, elements : int
        Graph nodes, and parameter elements.
    spaces, wreath, hidden : int
        Free spaces, those of them below an outer one, and the sum of their sizes.
    covered, moved : float
        Fractions of the parameter elements with a free axis, and of those that the certificate moved.
    error : float or None
        Largest relative change of an output under a random group element, in float64.
    control : float or None
        The same when a random half of the parameters is left as it was: must not be small.
    groups : dict of str to int
        How many spaces have which group, where the largest ones were certified.
    recovered : float or None
        Largest difference between a model and its planted twin after ``fuse`` has aligned and averaged
        them; 0 is exact.
    limits : list of str
        What inference had to fix, with the reason.
    frozen : list of str
        Why elements are not covered: first causes, with their share of the elements, largest first.
    seconds : dict of str to float
        Per stage.
    memory : float
        Peak resident GiB.
    """

    source: str
    family: str
    name: str
    status: str = "failed"
    message: str = ""
    stage: str = "build"
    specialised: bool = False
    nodes: int = 0
    elements: int = 0
    spaces: int = 0
    wreath: int = 0
    hidden: int = 0
    covered: float = 0.0
    moved: float = 0.0
    error: float | None = None
    control: float | None = None
    groups: dict[str, int] = dataclasses.field(default_factory=dict)
    recovered: float | None = None
    limits: list[str] = dataclasses.field(default_factory=list)
    frozen: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: float = 0.0

    @property
    def certified(self) -> bool:
        """Whether a random group element left the function as it was, and half of one did not."""
        return self.status == "certified"

    @property
    def twin_recovered(self) -> bool:
        """Whether ``fuse`` gave the model back from itself and its planted twin, exactly or to rounding."""
        return self.recovered is not None and self.recovered <= 1e-5


def examine(
    entry: Entry,
    seed: int = 0,
    recover: bool = True,
    report: Callable[[Record], None] = lambda record: None,
    symmetry: str = "permutation",
) -> Record:
    """Build one model, capture, plan and certify it, then recover its planted twin.

    Parameters
    ----------
    entry : Entry
    seed : int
        Draws weights and group elements.
    recover : bool
        Plant a random symmetric twin, fuse it with the model by weights, and compare.
    report : callable
        Gets the record at every stage.
    symmetry : {"permutation", "largest"}
        What is certified.

    Returns
    -------
    Record

    Examples
    --------
    >>> from fxfusion.testing.catalogue import entries
    >>> examine(entries("torchvision", ["squeezenet1_1"])[0], recover=False).status
    'certified'
    """
    record = Record(entry.source, entry.family, entry.name)
    try:
        _examine(entry, seed, recover, record, report, symmetry)
    except CaptureError as error:
        record.status, record.message = "refused", str(error)
    except CertificationError as error:
        record.status, record.message = "unsound", str(error)
    except MemoryError:
        record.status, record.message = "too large", "out of memory"
    except Exception as error:  # a model may fail in any way, and the sweep goes on
        memory = isinstance(error, RuntimeError) and "memory" in str(error)
        record.status = "too large" if memory else "failed"
        record.message = "".join(traceback.format_exception_only(error)).strip()[:2000]
    record.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    record.message = without_folders(record.message)
    report(record)
    return record


def without_folders(text: str) -> str:
    """Return a text without the folders of whoever ran it: paths begin at the package.

    Examples
    --------
    >>> without_folders("at /home/me/lib/python3.12/site-packages/timm/layers/mlp.py:7")
    'at timm/layers/mlp.py:7'
    """
    return re.sub(r"/[^\s'\"]*/(?:site-packages/|(?=fxfusion/))", "", text)


def _examine(
    entry: Entry,
    seed: int,
    recover: bool,
    record: Record,
    report: Callable[[Record], None],
    symmetry: str,
) -> None:
    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        record.stage = name
        report(record)
        start = time.perf_counter()
        yield
        record.seconds[name] = round(time.perf_counter() - start, 3)

    with stage("build"):
        model, example = _instance(entry, seed)
    with stage("capture"):
        try:
            prepared = fxfusion.prepare(model, *example)
        except CaptureError as error:
            record.message = str(error)
            model, example = _instance(entry, seed)  # a failed export leaves traces in the first
            prepared = fxfusion.prepare(fxfusion.specialise(model, *example), *example)
            record.specialised = True
    del model
    record.nodes = len(prepared.graph.nodes)
    with stage("propagate"):
        plan = fxfusion.plan(prepared)
    _describe(record, plan)
    if symmetry != "permutation":
        larger = fxfusion.plan(prepared, symmetry=symmetry)
        record.groups = dict(Counter(space.symmetry.value for space in larger))
    with stage("certify"):
        certificate = fxfusion.certify(prepared, seed=seed, symmetry=symmetry)
    record.error, record.moved = certificate.max_relative_error, certificate.moved
    if not certificate.ok:
        record.message = f"the function changed by {record.error:.1e}"
        record.status = "unsound"
        if (certificate.rounding or 0.0) > certificate.tolerance:
            record.status = "unstable"
            record.message += f", and by {certificate.rounding:.1e} under rounding alone"
        return
    with stage("control"):
        record.control = _control(prepared, plan, seed)
    record.status = "certified"
    if recover and plan.spaces:
        with stage("recover"):
            record.recovered = _recover(prepared, seed)
    record.stage = ""


def _instance(entry: Entry, seed: int) -> tuple[torch.nn.Module, Inputs]:
    torch.manual_seed(seed)
    model = entry.build()
    example = entry.inputs(model)
    state = perturb(model, example, seed).state_dict()
    fresh = entry.build().eval()  # one that has not run: some models keep what they computed (LeViT)
    fresh.load_state_dict(state)
    return fresh, example


def _describe(record: Record, plan: Plan) -> None:
    record.elements = sum(math.prod(layout.shape) for layout in plan.layouts.values())
    record.spaces, record.wreath = len(plan.spaces), len(plan.wreath)
    record.hidden = sum(space.size for space in plan.spaces)
    record.covered = plan.covered
    for item in [item for item in plan.frozen if item.cause.kind != "unused"][:5]:
        share = f"{100 * item.elements / max(record.elements, 1):.2f} %"
        place = f"{item.cause.node} {item.cause.source}".strip()
        text = f"{share}: {item.cause.message} ({item.cause.operator} at {place})"
        record.frozen.append(without_folders(text))
    for limit in plan.limits:
        named = ", ".join(limit.parameters[:3]) + (", ..." if len(limit.parameters) > 3 else "")
        text = f"{limit.operator} at {limit.node} {limit.source}: {limit.reason} [{named}]"
        record.limits.append(without_folders(text))


def _control(prepared: torch.fx.GraphModule, plan: Plan, seed: int) -> float:
    """Return by how much the outputs change when only a random half of the parameters is transported."""
    state: FusionState = prepared.meta[KEY]
    generator = torch.Generator().manual_seed(seed + 1)
    names = sorted(plan.layouts)
    kept = {names[index] for index in torch.randperm(len(names), generator=generator)[: len(names) // 2]}
    half = dataclasses.replace(
        plan, layouts={name: layout for name, layout in plan.layouts.items() if name in kept}
    )
    capture = state.capture
    weights = capture.canonical(prepared.state_dict())
    outputs = capture.select_outputs(None)
    return certify_plan(capture, half, weights, outputs, seed, diagnose=False).max_relative_error


def _recover(prepared: torch.fx.GraphModule, seed: int) -> float:
    """Return how far a model and its planted twin, fused by their weights, are from the model."""
    twin = copy.deepcopy(prepared)
    # Not strict: copying a graph module makes buffers of its constants.
    twin.load_state_dict(fxfusion.scramble(prepared, seed=seed + 2), strict=False)
    fused = fxfusion.fuse([twin, prepared], coupling="hard", features="weights").state_dict()
    worst = 0.0
    for name, tensor in prepared.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            scale = float(tensor.abs().masked_fill(tensor.isinf(), 0.0).max()) or 1.0
            apart = (fused[name] - tensor).abs().masked_fill(fused[name] == tensor, 0.0)
            worst = max(worst, float(apart.max()) / scale)
    return worst


# -- many models ----------------------------------------------------------------------------------


def sweep(
    source: str,
    directory: str | Path,
    patterns: Sequence[str] = (),
    jobs: int = 1,
    time_limit: float = TIME_LIMIT,
    memory_limit: float = MEMORY_LIMIT,
    recover: bool = True,
    symmetry: str = "permutation",
    seed: int = 0,
    progress: Progress = silent,
) -> list[Record]:
    """Examine every model of a library, each in a process of its own.

    Parameters
    ----------
    source : {"timm", "transformers", "torchvision"}
    directory : path
        Where records are kept, one line each; a model that has one is not examined again.
    patterns : sequence of str
        Shell patterns of names, see :func:`fxfusion.testing.catalogue.entries`.
    jobs : int
        Models at a time.
    time_limit : float
        Seconds per model.
    memory_limit : float
        GiB per model, where the system can limit it.
    recover, symmetry, seed
        As for :func:`examine`.
    progress : callable ``(name, done, total)``, optional

    Returns
    -------
    list of Record
        In the catalogue's order.
    """
    chosen = entries(source, patterns)
    path = Path(directory) / (
        f"{source}.jsonl" if symmetry == "permutation" else f"{source}-{symmetry}.jsonl"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {record.name: record for record in read_records(path)}
    pending = [entry for entry in chosen if entry.name not in known]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    options = (seed, recover, symmetry, memory_limit, jobs)
    running: list[_Run] = []
    while pending or running:
        while pending and len(running) < jobs:
            running.append(_Run(context, pending.pop(0), options, time_limit))
        multiprocessing.connection.wait([run.reports for run in running], timeout=0.5)
        for run in list(running):
            if not run.poll():
                continue
            running.remove(run)
            known[run.record.name] = run.record
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(run.record)) + "\n")
            progress(run.record.name, len(chosen) - len(pending) - len(running), len(chosen))
    return [known[entry.name] for entry in chosen]


def read_records(path: str | Path) -> list[Record]:
    """Return the records of a sweep; the last of a name counts, and a line cut short is left out."""
    found: dict[str, Record] = {}
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                record = Record(**json.loads(line))
                found[record.name] = record
    return list(found.values())


class _Run:
    """One model being examined in a process of its own."""

    def __init__(self, context: Any, entry: Entry, options: tuple[Any, ...], time_limit: float) -> None:
        self.record = Record(entry.source, entry.family, entry.name)
        self.reports, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_child, args=(entry.source, entry.name, options, sender), daemon=True
        )
        self.process.start()
        sender.close()
        self.deadline = time.monotonic() + time_limit
        self.time_limit = time_limit

    def poll(self) -> bool:
        """Take in what the process reported; return whether it has ended."""
        ended = False
        try:
            while self.reports.poll():
                self.record = self.reports.recv()
        except (EOFError, OSError):
            ended = True
        if not ended and time.monotonic() > self.deadline:
            self.process.kill()
            if self.record.status == "failed":
                self.record.status = "too slow"
            self.record.message = f"stopped after {self.time_limit:.0f} s at stage {self.record.stage}"
            ended = True
        if ended:
            self.process.join()
            self.reports.close()
            if self.process.exitcode and not self.record.message:
                self.record.message = f"its process ended with code {self.process.exitcode}"
        return ended


def _child(source: str, name: str, options: tuple[Any, ...], reports: Any) -> None:
    seed, recover, symmetry, memory_limit, jobs = options
    if memory_limit:
        size = int(memory_limit * 1024**3)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    entry = next(entry for entry in entries(source, [name]) if entry.name == name)
    examine(entry, seed, recover, lambda record: reports.send(record), symmetry)
    reports.close()
