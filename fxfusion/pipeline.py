"""The pipeline, and the public functions that run it. Only this module knows the order of passes."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import fx

from fxfusion.agreement import Lessons, check_labels, difference
from fxfusion.calibration import Batches, Inputs
from fxfusion.capture import Model, capture
from fxfusion.certify import Certificate, certify_plan
from fxfusion.depth import Kept, match_layers, needed_layers, restored, shallow, stacks_of, unequal_stacks
from fxfusion.errors import CertificationError, InvalidWeightError, OptionError
from fxfusion.execution import Program
from fxfusion.folding import can_fold
from fxfusion.groups import enlarge
from fxfusion.methods import Method, candidates
from fxfusion.pairing import Parent, widths_differ
from fxfusion.passes.align import Align
from fxfusion.passes.align_flow import AlignFlow
from fxfusion.passes.apply_transports import ApplyTransports
from fxfusion.passes.balance import Balance
from fxfusion.passes.base import FusionPass
from fxfusion.passes.fold_norms import FoldNorms
from fxfusion.passes.merge import Merge, write
from fxfusion.passes.normalize import Normalize
from fxfusion.passes.pair import Pair
from fxfusion.passes.propagate import Propagate
from fxfusion.passes.refine import Refine
from fxfusion.passes.repair import Repair
from fxfusion.passes.restore import Restore
from fxfusion.plan import Plan
from fxfusion.processes import current
from fxfusion.progress import Progress
from fxfusion.report import FusionReport
from fxfusion.reporting import fusion_report, widths_told
from fxfusion.settings import AUTO, Settings
from fxfusion.state import KEY, FusionState, attach, prepared, state_of
from fxfusion.symmetry import act, complete, random_maps
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.learned import Refinement
from fxfusion.transport.options import Flow, Observe
from fxfusion.transport.template import first_template
from fxfusion.untying import untied
from fxfusion.validation import (
    check_choice,
    check_finite,
    check_function,
    check_models,
    check_parents,
    check_shares,
    heads_differ,
    model_name,
    state_dict_of,
)

REFITS = 3  # turns in which a template of a third width is fitted
SOLVED_SAMPLES = 1000  # on which closed forms settle; learning goes on with all
TIE = 1e-6  # by how much an average has to be closer to the parents' than what was tried before it
CERTIFIED_SAMPLES = 2  # of the example, on which parents are certified before they are fused


def prepare(
    model: Model, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Capture a model as a graph module on which fxfusion's passes run.

    Parameters
    ----------
    model : torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram
        A graph module made by this function is not captured again: prepare a large model once, then plan,
        certify and fuse it as often as you like.
    args, kwargs : sequence, mapping
        Example inputs. A prepared module keeps its own where none are given.

    Returns
    -------
    torch.fx.GraphModule
        Functional ATen graph with the model's parameter names; its tensors are the model's own.

    Raises
    ------
    CaptureError
        If ``torch.export`` refuses the model.

    Examples
    --------
    >>> import torch
    >>> from torch.fx.passes.infra.pass_manager import PassManager
    >>> from fxfusion.passes.normalize import Normalize
    >>> from fxfusion.passes.propagate import Propagate
    >>> graph_module = prepare(torch.nn.Linear(3, 2), (torch.randn(2, 3),))
    >>> result = PassManager([Normalize(), Propagate()])(graph_module)
    >>> state_of(result.graph_module, "plan").plan.spaces
    ()
    """
    known = prepared(model)
    if known is None:
        return attach(capture(model, args, kwargs))
    example = (tuple(args), dict(kwargs or {})) if args or kwargs else (known.args, known.kwargs)
    return attach(
        dataclasses.replace(known, module=_sharing(known.module), args=example[0], kwargs=example[1])
    )


def _sharing(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph module that holds the very same tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def plan(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
    symmetry: str = "permutation",
) -> Plan:
    """Infer the spaces of a model: which units may be permuted without changing its function.

    Parameters
    ----------
    model : torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram
        It may lie on the meta device.
    args, kwargs : sequence, mapping
        Example inputs.
    outputs : sequence of str, optional
        Names of the outputs that must be kept; by default all but hidden states, attentions and caches.
    symmetry : {"permutation", "largest"}
        What is said to act on every space: permutations, or the largest group that is known.

    Returns
    -------
    Plan

    Raises
    ------
    CaptureError
        If ``torch.export`` refuses the model.
    OutputSelectionError
        If an output does not exist.
    OptionError
        If the symmetry is none of the two.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(space.name, space.size) for space in plan(model, (torch.randn(2, 4),)).spaces]
    [('0.weight[0]', 8)]
    >>> [space.symmetry.value for space in plan(model, (torch.randn(2, 4),), symmetry="largest").spaces]
    ['permutation, positive scale']
    """
    check_choice("symmetry", symmetry, ("permutation", "largest"))
    state = planned(model, args, kwargs, outputs)
    assert state.plan is not None
    return state.plan if symmetry == "permutation" else enlarge(state.capture, state.plan)


def certify(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    symmetry: str = "permutation",
) -> Certificate:
    """Check that a random element of the inferred symmetry group leaves the function unchanged.

    The check runs in float64 on the example inputs and on a second, random input.

    Parameters
    ----------
    model, args, kwargs, outputs, symmetry
        As for :func:`plan`; the model must have weights.
    seed : int
        Draws the group element and the second input.

    Returns
    -------
    Certificate
        ``.ok``, ``.max_relative_error`` and ``.moved``, the fraction of parameter elements that changed.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> certify(model, (torch.randn(2, 4),)).ok
    True
    """
    check_choice("symmetry", symmetry, ("permutation", "largest"))
    state = planned(model, args, kwargs, outputs)
    assert state.plan is not None
    found, weights = state.plan, state.capture.canonical(_real_state(model))
    if symmetry == "largest":
        found = enlarge(state.capture, found, lambda fold: can_fold(fold, weights))
    return certify_plan(state.capture, found, weights, state.outputs, seed)


def scramble(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Return a random symmetric twin: other weights, the same function.

    Parameters
    ----------
    model, args, kwargs, outputs
        As for :func:`plan`; the model must have weights and is not touched.
    seed : int
        Draws the group element.

    Returns
    -------
    dict of str to torch.Tensor
        A state dict that loads strict into the model's class.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(2, 4)
    >>> before = model(x)
    >>> twin = scramble(model, (x,))
    >>> bool((twin["0.weight"] == model[0].weight).all())
    False
    >>> _ = model.load_state_dict(twin)
    >>> torch.allclose(model(x), before, atol=1e-6)
    True
    """
    state = planned(model, args, kwargs, outputs)
    assert state.plan is not None
    full = _real_state(model)
    maps = random_maps(state.plan, torch.Generator().manual_seed(seed))
    twin = complete(state.capture, act(state.plan, maps, state.capture.canonical(full)), full)
    return {name: tensor.clone() for name, tensor in twin.items()}


@dataclasses.dataclass(eq=False)
class FusionResult:
    """The result of :func:`fuse`.

    Attributes
    ----------
    module : torch.fx.GraphModule
        The fused network, ready to run; takes the inputs that the target was captured with.
    report : FusionReport
        Per space: size, symmetry, cost before and after, writers; ``.save_html(path)``.
    plan : Plan
        The spaces and the alignment flow graph.
    """

    module: fx.GraphModule
    report: FusionReport
    plan: Plan
    _state: dict[str, torch.Tensor] = dataclasses.field(repr=False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the fused weights under the target's names, ties kept: loads strict into its class."""
        return dict(self._state)


def fuse(
    models: Sequence[Model],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    features: str | None = None,
    coupling: str | Coupling = "hard",
    weights: Sequence[float] | None = None,
    target: int = -1,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    regularisation: float | None = None,
    flow: Flow | None = None,
    rounds: int = 0,
    layers: str = "keep",
    layer_matching: str = "outputs",
    observe: Observe | None = None,
    symmetry: str | None = None,
    repair: str | None = None,
    refine: Refinement | int | None = None,
    method: str | None = None,
    untie: bool = False,
    into: torch.nn.Module | None = None,
    progress: Progress | None = None,
) -> FusionResult:
    """Fuse models of one architecture: align their units by optimal transport, then average.

    Widths may differ: hidden units, channels, heads, embedding. A wider parent's units are then averaged in
    groups where they are written and summed where they are read, a narrower one's copied and divided. For
    larger groups, repaired units and learned transports they are carried over first, then fused as equals.
    Depths may differ, too: layers of a repeated block are paired in order by what they compute.

    Parameters
    ----------
    models : sequence of torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram
        Two or more parents, whose widths may differ. They are not written.
    args, kwargs : sequence, mapping
        Example inputs.
    calibration : iterable, optional
        Batches of what the models take: tensors, tuples or dicts. Labels are not needed and ignored.
    features : {"activations", "weights"}, optional
        What is compared: weights alone, or activations too. Default: activations if there is calibration
        (they measured 11 points better), else weights.
    coupling : {"hard", "soft", "widening"} or Coupling
        Permutations, Sinkhorn couplings, or these only where a parent is narrower than the target. A
        :class:`Coupling` may differ from space to space. On six pairs of vision transformers (README) both
        measured alike in accuracy and hard better in loss; permutations also undo a planted twin exactly.
    weights : sequence of float, optional
        The parents' shares, scaled to sum to one; equal by default.
    target : int
        The parent whose basis, widths and class the result has.
    seed : int
        Draws the certificates' group elements; the same inputs and seed give the same bytes.
    outputs : sequence of str, optional
        As for :func:`plan`.
    regularisation : float, optional
        Softness of soft couplings, relative to the mean ground cost.
    flow : Flow, optional
        Solve transports layer by layer along the network, as the paper does, with the choices given. By
        default there is one transport per space, solved from everything that touches it: better, and the
        aligned parent keeps its function.
    rounds : int
        With three models or more: how often each is aligned anew with the average of the others, as long as
        that brings them closer together. By default every one is aligned with the target alone.
    layers : {"keep", "drop"}
        What becomes of the target's layers that have no counterpart in the shallowest parent: kept as they
        are, or dropped, so that the result is as shallow as that.
    layer_matching : {"outputs", "representations"}
        Which layers of a deeper parent take part: those that its outputs need most, or those that compute
        most nearly what the shallowest parent's layers do (centred kernel alignment).
    observe : Observe, optional
        Which calibration activations count: class tokens, a window, a random share, confident samples.
    symmetry : {"none", "permutation", "largest"}
        What may act on a space: nothing (the vanilla average), permutations, or whatever leaves the function
        unchanged. Residual streams may often turn as a whole, once norm weights are in what reads them,
        dimensions of heads take any invertible map, units before a ReLU a positive factor. By default the
        largest where hard couplings are solved from activations, permutations elsewhere.
    repair : {"norms", "units", "layers", "none"}
        What calibration data correct after averaging: statistics of batch normalisations; or also, of layers
        with a bias, mean and deviation of every unit; or layers as a whole, fitted one after the other to
        what the aligned parents' layers give on average (least squares), a parent of other widths being
        carried over and fitted to its own layers first; or nothing. By default units where neither symmetry
        nor repair nor method is given and hard couplings are solved from activations. Where widths differ,
        fitted layers are then compared with that on batches that they were not fitted to.
    refine : Refinement or int, optional
        Learn further transports, within the symmetry, by which the average says what the parents say on
        unlabelled calibration data: so many steps of gradient descent, a batch each. The better, the more
        data there are; closed forms before that are solved from the first thousand samples.
    method : {"vanilla", "permutation", "orthogonal", "learned", "auto"}, optional
        Names for ``symmetry``, ``repair`` and ``refine`` together (see :mod:`fxfusion.methods`). ``"auto"``
        tries them (learning only if ``refine`` is given) and keeps the one whose outputs on the calibration
        data are closest to the parents' average; the report says how close each came.
    untie : bool
        Give the output embedding, where it is tied to the input's, a tensor of its own, so that the residual
        stream may turn: the result is of the class with ``tie_word_embeddings=False`` (see :func:`untied`).
    into : torch.nn.Module, optional
        A network of the widths that the result shall have, where no parent has them: its weights do not
        count, and ``target`` is not needed. Its units are found in turns with the alignments (a free-support
        barycenter).
    progress : callable ``(stage, done, total)``, optional

    Returns
    -------
    FusionResult

    Raises
    ------
    TooFewModelsError, ArchitectureMismatchError, WidthMismatchError, TieMismatchError, InvalidWeightError
        If the models cannot be fused.
    OptionError, CalibrationRequiredError, CalibrationMismatchError
        If options or calibration data do not fit.
    CaptureError, OutputSelectionError
        As for :func:`plan`.
    CertificationError
        If the inferred symmetry changes a parent's function: the plan would be unsound.

    References
    ----------
    Imfeld et al., Transformer Fusion with Optimal Transport, ICLR 2024, arXiv 2310.05719.
    Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, arXiv 1910.05653.

    Examples
    --------
    >>> import torch
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(16, 4)
    >>> result = fuse([make(), make()], (x,), calibration=[x], coupling="hard")
    >>> result.module(x).shape
    torch.Size([16, 2])
    """
    settings = Settings.checked(
        calibrated=calibration is not None,
        features=features,
        coupling=coupling,
        regularisation=regularisation,
        flow=flow,
        rounds=rounds,
        layers=layers,
        layer_matching=layer_matching,
        observed=observe,
        symmetry=symmetry,
        repair=repair,
        refinement=refine,
        method=method,
        template=into is not None,
        target=target,
        seed=seed,
        outputs=outputs,
        progress=progress,
    )
    models = models if isinstance(models, torch.nn.Module) else list(models)
    if untie and not isinstance(models, torch.nn.Module):
        models = [untied(model) for model in models]
    if into is not None and not isinstance(models, torch.nn.Module):
        weights = [*check_shares(weights, len(models)), 0.0]
        models = [*models, into]
    paths = [] if isinstance(models, torch.nn.Module) or len(models) < 2 else unequal_stacks(models)
    if not paths:
        return _fuse(_paired(models, args, kwargs, calibration, weights, target, settings))
    return _fuse_depths(models, paths, args, kwargs, calibration, weights, target, settings)


@dataclasses.dataclass(eq=False)
class AlignedParents:
    """The parents in one basis: the result of :func:`align`.

    Attributes
    ----------
    plan : Plan
        The spaces, with the symmetry that was used.
    """

    plan: Plan
    _job: _Job = dataclasses.field(repr=False)
    _state: FusionState = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self._state.aligned)

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        """Return a parent's weights in the target's basis: they load into the target's class.

        Of parents of the target's widths and hard couplings or rotations, the function is the parent's own.
        """
        job = self._job
        return complete(self._state.capture, self._state.aligned[index], job.states[job.target])

    def average(self, weights: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
        """Return the parents' average, repaired as was asked for: a full state dict.

        Parameters
        ----------
        weights : sequence of float, optional
            The parents' shares, scaled to sum to one; equal by default.

        Raises
        ------
        OptionError
            If the weights do not fit.
        """
        job = self._job
        merged = _merged(job, self._state, check_shares(weights, len(self))).merged
        return complete(self._state.capture, merged, job.states[job.target])


def align(
    models: Sequence[Model],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    target: int = -1,
    features: str | None = None,
    coupling: str | Coupling = "hard",
    symmetry: str | None = None,
    repair: str | None = None,
    refine: Refinement | int | None = None,
    method: str | None = None,
    untie: bool = False,
    flow: Flow | None = None,
    rounds: int = 0,
    observe: Observe | None = None,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> AlignedParents:
    """Bring models into one basis without averaging them yet, for averages of any weights.

    Parameters
    ----------
    models, args, kwargs, calibration, target, features, coupling, symmetry, repair, refine, method, untie
    flow, rounds, observe, seed, outputs, progress
        As for :func:`fuse`; depths must be equal, and ``method="auto"`` is not for averages to come.

    Returns
    -------
    AlignedParents

    Raises
    ------
    FusionError
        As for :func:`fuse`.

    Examples
    --------
    >>> import torch
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x, first, second = torch.randn(16, 4), make(), make()
    >>> aligned = align([first, second], (x,))
    >>> before = first(x)
    >>> _ = first.load_state_dict(aligned.state_dict(0))
    >>> torch.allclose(first(x), before, atol=1e-6)
    True
    >>> sorted(aligned.average([0.25, 0.75])) == sorted(first.state_dict())
    True
    """
    if method == AUTO:
        raise OptionError('method="auto" compares averages: give one of the other methods')
    settings = Settings.checked(
        calibrated=calibration is not None,
        features=features,
        coupling=coupling,
        regularisation=None,
        flow=flow,
        rounds=rounds,
        layers="keep",
        layer_matching="outputs",
        observed=observe,
        symmetry=symmetry,
        repair=repair,
        refinement=refine,
        method=method,
        template=False,
        target=target,
        seed=seed,
        outputs=outputs,
        progress=progress,
    )
    if untie:
        models = [untied(model) for model in models]
    job = _paired(models, args, kwargs, calibration, None, target, settings)
    state = _aligned(job, settings)
    assert state.plan is not None
    return AlignedParents(state.plan, job, state)


def _fuse_depths(
    models: Sequence[Model],
    paths: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    calibration: Iterable[Any] | None,
    weights: Sequence[float] | None,
    target: int,
    settings: Settings,
) -> FusionResult:
    """Fuse the layers of deeper parents that go with those of the shallowest one."""
    check_models(models, target)
    modules = [model for model in models if isinstance(model, torch.nn.Module)]
    for index, module in enumerate(modules):
        check_finite(model_name(module, index), state_dict_of(module))
    target = range(len(models))[target]
    depth = [sum(len(stacks_of(module)[path]) for path in paths) for module in modules]
    base = min(range(len(models)), key=lambda index: (depth[index], index != target))
    capture = state_of(prepare(modules[base], args, kwargs)).capture
    batches = None if calibration is None else Batches(capture, calibration)
    kept: dict[int, Kept] = {}
    for index, module in enumerate(modules):
        if depth[index] != depth[base]:
            samples = [(capture.args, capture.kwargs)] if batches is None else batches.first(SOLVED_SAMPLES)
            sides = modules[base], module
            names = model_name(modules[base], base), model_name(module, index)
            if settings.layer_matching == "outputs":
                missed = difference(capture, module, samples, capture.select_outputs(settings.outputs))
                kept[index] = needed_layers(*sides, paths, missed, names)
            else:
                kept[index] = match_layers(*sides, paths, samples, names)
            settings.progress("match layers", index + 1, len(models))
    reduced = [
        shallow(module, kept[index]) if index in kept else module for index, module in enumerate(modules)
    ]
    seen = None if batches is None else batches.source
    job = _paired(reduced, args, kwargs, seen, weights, target, settings, equal=False)
    wholes: dict[int, fx.GraphModule] = {}
    if settings.refinement is not None or settings.auto:
        wholes = {index: prepare(modules[index], args, kwargs) for index in kept}
        full = {index: state_of(whole).capture for index, whole in wholes.items()}
        job.paired.teachers = tuple(
            (full[index], full[index].canonical(state_dict_of(modules[index])))
            if index in full
            else (parent.capture, parent.state)
            for index, parent in enumerate(job.paired.parents)
        )
    result = _fuse(job)
    notes = [
        f"of {path}, parent {index} takes part with layers {', '.join(map(str, positions))}"
        for index, found in kept.items()
        for path, positions in found.items()
    ]
    report = dataclasses.replace(result.report, notes=(*result.report.notes, *notes))
    if settings.layers == "drop" or target not in kept:
        return dataclasses.replace(result, report=report)
    whole = wholes[target] if target in wholes else prepare(modules[target], args, kwargs)
    state = restored(state_dict_of(modules[target]), result.state_dict(), kept[target])
    known = state_of(whole).capture
    write(whole, {name: state[name] for name in known.parameters}, known.aliases)
    whole.meta.pop(KEY)
    return FusionResult(whole, report, result.plan, state)


def _fuse(job: _Job) -> FusionResult:
    """Fuse paired parents, in the way asked for or by the best of several."""
    choices, judged = _choices(job)
    if len(choices) > 1:
        assert judged is not None
        state = _best(job, choices, judged)
    else:
        state = _merged(job, _aligned(job, job.settings), job.shares)
    settings = job.settings.by(state.method)
    report = fusion_report(
        state, job.models, settings.facts(job.target), state.certificates, job.clock.seconds
    )
    assert state.plan is not None
    fused = complete(state.capture, state.merged, job.states[job.target])
    job.module.meta.pop(KEY)  # the parents' weights need not outlive the fusion
    return FusionResult(job.module, report, state.plan, fused)


@dataclasses.dataclass(eq=False)
class _Job:
    """Parents that are captured, planned and paired: what every way to fuse them begins with."""

    module: fx.GraphModule
    models: Sequence[Model]
    states: list[dict[str, torch.Tensor]]  # the parents' weights in the target's precision
    shares: Sequence[float]
    target: int
    batches: Batches | None
    settings: Settings
    clock: _Clock
    paired: FusionState

    @property
    def equal(self) -> bool:
        """Whether all parents have the target's widths, and so its graph."""
        return all(parent.capture is self.paired.capture for parent in self.paired.parents)

    def begin(self, state: FusionState) -> FusionState:
        """Attach a copy of a state to the module, from which passes go on."""
        state = dataclasses.replace(state)
        self.module.meta[KEY] = state
        return state

    def run(self, item: FusionPass) -> None:
        """Run a pass on the module."""
        with self.clock.measure(type(item).__name__):
            self.module = _run([item], self.module)


def _paired(
    models: Sequence[Model],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    calibration: Iterable[Any] | None,
    weights: Sequence[float] | None,
    target: int,
    settings: Settings,
    equal: bool = True,
) -> _Job:
    """Capture and plan parents of equal depths, and pair their spaces.

    ``equal`` says whether their configurations say that depths are equal, too.
    """
    clock = _Clock()
    states = check_parents(models, target, equal)
    shares = check_shares(weights, len(models))
    target = range(len(models))[target]
    settings.progress("capture", 0, 1)
    with clock.measure("capture"):
        module = prepare(models[target], args, kwargs)
        others = {
            index: prepare(model, args, kwargs)
            for index, model in enumerate(models)
            if widths_differ([states[target], states[index]]) or heads_differ(models[target], models[index])
        }
    state = state_of(module)
    batches = None if calibration is None else Batches(state.capture, calibration)
    with clock.measure("compare"):
        alike = [index for index in range(len(models)) if index not in others]
        check_function(state.capture, models, states, alike, target)
        for index, other in others.items():
            check_function(state_of(other).capture, models, states, [index], index)
        states = [_as_target(parent, states[target]) for parent in states]
    with clock.measure("propagate"):
        for captured in (module, *others.values()):
            _run([Normalize(), Propagate(settings.outputs)], captured)
        module = _run([Pair(states, target, others)], module)
    if batches is not None and settings.refinement is not None and settings.refinement.labels:
        check_labels(state.capture, state.capture.canonical(states[target]), state.outputs, batches)
    return _Job(module, models, states, shares, target, batches, settings, clock, state)


def _aligned(job: _Job, settings: Settings) -> FusionState:
    """Bring the parents into the target's basis, and refine that if it is asked for.

    Where the larger group was nobody's wish and is not certified, spaces keep permutations.
    """
    fallback = settings.fallback
    way = _as_equals(job, settings)
    if fallback is None or fallback == settings.method:
        return _refined(way, _based(way, settings), settings)
    try:
        return _refined(way, _based(way, settings), settings)
    except CertificationError as error:
        note = f"the larger group is not certified, so that spaces keep permutations: {error}"
    settings = settings.by(fallback)
    way = _as_equals(job, settings)
    state = _refined(way, _based(way, settings), settings)
    state.notes = (*state.notes, note)
    return state


def _as_equals(job: _Job, settings: Settings) -> _Job:
    """Carry parents of other widths into the target's, and go on as if they had been trained at those.

    Transports of larger groups are square, and units are repaired one by one: only what goes without both
    fuses parents of other widths as they are. What is learned is learned from the parents as they came, and
    begins, as fitted layers do, where a carried parent's layers give what its own gave.
    """
    if job.equal or (settings.symmetry != "largest" and settings.repair not in ("units", "layers")):
        return job
    fitting = settings.repair == "layers" or settings.refinement is not None
    carrying = Method("permutation", "layers" if fitting else "norms")
    based = _based(job, settings.by(carrying))
    parents = []
    for index, parent in enumerate(job.paired.parents):
        weights = based.aligned[index]
        if parent.capture is not job.paired.capture:
            alone = [float(index == other) for other in range(len(job.models))]
            weights = _merged(job, dataclasses.replace(based, method=carrying), alone).merged
        assert based.plan is not None
        parents.append(Parent(job.paired.capture, based.plan, weights))
    teachers = job.paired.taught_by
    notes = (*job.paired.notes, *widths_told(job.paired))
    paired = dataclasses.replace(job.paired, parents=parents, teachers=teachers, notes=notes)
    return dataclasses.replace(job, paired=paired)


def _based(job: _Job, settings: Settings) -> FusionState:
    """Certify the parents under a symmetry, and solve and apply the transports."""
    state = job.begin(job.paired)
    if settings.symmetry == "none":
        _hold(state)
    if settings.symmetry == "largest":
        job.run(FoldNorms())
        job.run(Balance())
    with job.clock.measure("certify"):
        state.certificates = certify_all(state, job.models, settings.seed, settings.progress)
    seen = job.batches
    if seen is not None and (settings.refinement is not None or settings.auto):
        seen = seen.first(SOLVED_SAMPLES)
    passes: list[FusionPass] = [_solver(settings, seen), ApplyTransports()]
    if settings.template:
        with job.clock.measure("fit template"):
            job.module = _fit_template(job.module, [*passes, Merge(job.shares)], settings.progress)
    for item in passes:
        job.run(item)
    return state


def _refined(job: _Job, based: FusionState, settings: Settings) -> FusionState:
    """Learn further transports, if that is asked for; what was aligned before stays as it is."""
    state = job.begin(based)
    state.method = settings.method
    if settings.refinement is not None:
        assert job.batches is not None
        job.run(
            Refine(
                job.batches,
                settings.refinement,
                job.shares,
                settings.seed,
                settings.repair != "none",
                settings.coupling,
                settings.progress,
            )
        )
    job.run(Restore())
    return state


def _hold(state: FusionState) -> None:
    """Leave all units where they are: no space may move."""
    assert state.plan is not None
    if any(parent.plan is not state.plan for parent in state.parents):
        raise OptionError('symmetry="none" is for parents of equal widths: leave it out')
    state.plan = dataclasses.replace(state.plan, spaces=(), layouts={}, activations={})
    state.parents = [dataclasses.replace(parent, plan=state.plan) for parent in state.parents]


def _merged(job: _Job, aligned: FusionState, shares: Sequence[float]) -> FusionState:
    """Average aligned parents, and repair the average as their method says."""
    state = job.begin(aligned)
    repair = state.method.repair
    job.run(Merge(shares))
    batches = None if repair == "none" else job.batches
    job.run(Repair(batches, job.settings.progress, repair == "units", repair == "layers"))
    return state


def _choices(job: _Job) -> tuple[list[tuple[_Job, Method]], Batches | None]:
    """Return the ways to fuse that are to be compared, and the data: one way, unless several are asked for.

    Units of other widths are grouped either way. Where nobody asked for a method, it is left to the data
    whether parents are then fused as equals: carried into a narrow network, some lose too much. Fitting
    layers makes up for that, if there are enough data: where there are two batches, it is judged by others
    than it is given.
    """
    settings = job.settings
    single = settings.fallback in (None, settings.method) or job.equal or settings.refinement is not None
    if job.batches is None or (single and not settings.auto):
        return [(job, settings.method)], job.batches
    few = job.batches.first(SOLVED_SAMPLES)
    if settings.auto:
        equals = _as_equals(job, settings.by(Method("largest")))
        plain = [] if job.equal else [(job, Method("permutation"))]
        return [*plain, *((equals, method) for method in candidates(settings.refinement))], few
    assert settings.fallback is not None
    methods = settings.fallback, settings.method
    found = [(_as_equals(job, settings.by(method)), method) for method in methods]
    parts = few.halves()
    if parts is None or (settings.fallback.repair, settings.repair) != ("norms", "units"):  # asked for
        return found, few
    fitted = Method(settings.symmetry, "layers")
    way = _as_equals(dataclasses.replace(job, batches=parts[0]), settings.by(fitted))
    return [*found, (way, fitted)], parts[1]


def _best(job: _Job, choices: Sequence[tuple[_Job, Method]], judged: Batches) -> FusionState:
    """Return the fusion whose outputs are closest to the parents' average on calibration data."""
    paired = job.paired
    lessons = Lessons(paired.capture, paired.taught_by, paired.outputs, job.shares, judged)
    program = Program(paired.capture)
    based: dict[tuple[int, str], FusionState] = {}
    refined: dict[tuple[int, str, bool], FusionState] = {}
    refused: dict[tuple[int, str], CertificationError] = {}
    best: FusionState | None = None
    taken = job
    least = math.inf
    found: list[tuple[float, str]] = []
    for way, method in choices:
        settings = job.settings.by(method)
        base = id(way), method.symmetry
        key = *base, method.refinement is not None
        if base in refused:
            continue
        if base not in based:
            try:
                based[base] = _based(way, settings)
            except CertificationError as error:
                refused[base] = error
                continue
        if key not in refined:
            refined[key] = _refined(way, based[base], settings)
        state = _merged(way, dataclasses.replace(refined[key], method=method), job.shares)
        distance = lessons.judge(_runner(program, state.merged))
        if distance < least - TIE:
            best, taken, least = state, way, distance
        equals = "" if way is job or job.equal else ", as equals"
        found.append((distance, f"{method}{equals}"))
    if best is None:
        raise next(iter(refused.values()))
    if taken.batches is not job.batches:  # layers are fitted to a part of the data so far
        settings = job.settings.by(best.method)
        way = _as_equals(job, settings)
        best = _merged(way, _refined(way, _based(way, settings), settings), job.shares)
    state = job.begin(best)
    write(job.module, state.merged, state.capture.aliases)
    chosen = next(item for item in found if item[0] == least)
    others = sorted((item for item in found if item is not chosen), key=itemgetter(0))
    told = "; ".join(f"{name}: {distance:.4g}" for distance, name in (chosen, *others))
    note = f"chosen by distance from the parents' average outputs on the calibration data: {told}"
    left_out = [f"symmetry {name!r} is left out: {error}" for (_, name), error in refused.items()]
    state.notes = (*state.notes, note, *left_out)
    return state


def _runner(program: Program, state: Mapping[str, torch.Tensor]) -> Callable[[Inputs], list[Any]]:
    return lambda inputs: program.run([state], *inputs)[0]


def _fit_template(module: fx.GraphModule, passes: Sequence[FusionPass], progress: Progress) -> fx.GraphModule:
    """Give the last parent, whose weights do not count, the others' average aligned with it, in turns."""
    state = state_of(module)
    *parents, own = state.parents
    template = first_template(parents[0].plan, parents[0].state)
    for turn in range(REFITS):
        state.parents = [*parents, dataclasses.replace(own, state=template)]
        module = _run(passes, module)
        template = state.merged
        progress("fit template", turn + 1, REFITS)
    return module


def _as_target(state: dict[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a parent's weights in the target's precision."""
    return {name: tensor.to(target[name].dtype) for name, tensor in state.items()}


def _solver(settings: Settings, batches: Batches | None) -> FusionPass:
    compared = batches if settings.features == "activations" else None
    if settings.flow is None:
        return Align(compared, settings.coupling, settings.observed, settings.progress, settings.rounds)
    return AlignFlow(
        settings.flow, compared, settings.coupling, settings.observed, settings.progress, batches
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def planned(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, outputs: Sequence[str] | None
) -> FusionState:
    """Capture a model and infer its plan: the state of its graph module, as passes take it."""
    module = _run([Normalize(), Propagate(outputs)], prepare(model, args, kwargs))
    return state_of(module, "plan", "Propagate")


def _run(passes: Sequence[FusionPass], module: fx.GraphModule) -> fx.GraphModule:
    """Run passes in order. torch's ``PassManager`` would hide the class of their errors."""
    for item in passes:
        module = item(module).graph_module
    return module


def _real_state(model: Model) -> dict[str, torch.Tensor]:
    state = state_dict_of(model)
    for name, tensor in state.items():
        if tensor.is_meta:
            raise InvalidWeightError(f"{type(model).__name__} has no weights: {name} is on the meta device")
    return state


def certify_all(
    state: FusionState,
    models: Sequence[Model],
    seed: int,
    progress: Progress,
    diagnose: bool = True,
) -> list[Certificate]:
    """Certify the parents; ``diagnose`` as for :func:`fxfusion.certify.certify_plan`.

    Raises
    ------
    CertificationError
    """
    done = 0

    def certified(index: int) -> Certificate:
        nonlocal done
        parent = state.parents[index]
        certificate = certify_plan(
            parent.capture,
            parent.plan.source,
            parent.state,
            state.outputs,
            seed,
            samples=CERTIFIED_SAMPLES,
            diagnose=diagnose,
        )
        if not certificate.ok:
            raise CertificationError(_not_certified(models[index], index, certificate))
        done += 1
        progress("certify", done, len(models))
        return certificate

    return current().share(certified, range(len(models)))


def _not_certified(model: Model, index: int, certificate: Certificate) -> str:
    """Return the message of a certificate that failed."""
    return (
        f"a random element of the symmetry inferred for {model_name(model, index)} changes its "
        f"outputs by {certificate.max_relative_error:.1e} (at most {certificate.tolerance:.0e} is "
        f"allowed): nothing was fused. {_verdict(certificate)}"
    )


def _verdict(certificate: Certificate) -> str:
    """Say whether a failed certificate is the plan's fault, or rounding's."""
    rounding = certificate.rounding or 0.0
    if rounding > certificate.tolerance:
        return (
            f"But so do changes of its weights in their last place, by {rounding:.1e} in float64: its "
            "signals explode, and nothing can be certified. Check its norm statistics and its example inputs."
        )
    return "The plan is unsound. Please report the model."
