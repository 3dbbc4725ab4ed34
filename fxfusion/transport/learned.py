"""Transports refined on unlabelled data: the merged network learns what its parents say on average.

Closed forms compare one layer at a time. Here every space of an aligned parent gets a further element of its
own group: of rotations by the Cayley transform (inside the complement of the ones vector where the mean must
stay), of invertible maps by the matrix exponential, of permutations by scores, through Sinkhorn's algorithm,
which harden while they are learned (Mena et al. 2018): assignments forward and scores backward
(straight-through) swap units to and fro, and everything else learns to live with that.
Merged networks at random points near the wanted average are run on calibration data and brought to the
parents' average outputs by gradient descent on these elements alone. The group is never left, so the aligned
parents compute what they did.

After Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, section 3.3, and Theus et al., Generalized
Linear Mode Connectivity for Transformers, NeurIPS 2025, who take permutations straight-through; Mena et al.,
Learning Latent Permutations with Gumbel-Sinkhorn Networks, ICLR 2018.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx

from fxfusion.agreement import Lessons
from fxfusion.atomic import replacing
from fxfusion.capture import Capture
from fxfusion.errors import CheckpointError, OptionError
from fxfusion.execution import Program
from fxfusion.plan import Plan, Space, Symmetry
from fxfusion.progress import Progress, silent
from fxfusion.repair import batch_norms, measured_norms
from fxfusion.rules.registry import operator_name
from fxfusion.symmetry import act
from fxfusion.transport.assignment import assign
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.map import HardMap, Map, SoftMap, apart
from fxfusion.transport.rotation import complement, turned

State = Mapping[str, torch.Tensor]

EVALUATIONS = 10
PATIENCE = 3  # evaluations without an improvement, after which learning stops
_HELD_OUT = 10  # one batch in so many judges, and is not learned from
_SCORES = 0.1  # step size of scores, relative to that of rotations
_MARGIN = 20.0  # steps by which scores first favour the unit in its own place
_WARM_UP = 20
_KEPT = 0.95  # of a unit, in its own place, where couplings begin
_TURNS = 5  # of Sinkhorn's algorithm
_HARD = 0.6  # part of the steps after which permutations are hard, and all else goes on
_HARDENING = 30.0  # factor by which their scores count more until then
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Refinement:
    """How transports are refined.

    Parameters
    ----------
    steps : int
        Gradient steps at most, one calibration batch each.
    rate : float
        Largest step size (Adam, cosine decay) of rotations.
    spread : float
        How far the points at which the merged network is run lie from the wanted average, in [0, 1]: their
        shares are ``(1 - spread) * weights + spread * random``.
    labels : float
        Share of the loss that is the cross-entropy with the labels of the calibration batches, in [0, 1]; the
        rest is the distance from the parents' average outputs. Batches then are ``(inputs, ..., labels)``, or
        dicts with an entry ``labels``, as for :func:`fxfusion.barrier`.
    checkpoint : path, optional
        A safetensors file from which an interrupted refinement goes on, written now and then.

    Raises
    ------
    OptionError
        If a value is out of range.

    Examples
    --------
    >>> Refinement(steps=100).spread
    0.2
    """

    steps: int = 400
    rate: float = 0.01
    spread: float = 0.2
    labels: float = 0.0
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps={self.steps!r}: give a number above 0")
        if not 0 < self.rate < math.inf:
            raise OptionError(f"rate={self.rate!r}: give a positive number")
        if not 0 <= self.spread <= 1:
            raise OptionError(f"spread={self.spread!r}: give a number from 0 to 1")
        if not 0 <= self.labels <= 1:
            raise OptionError(f"labels={self.labels!r}: give a number from 0 to 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Refined:
    """What refinement found.

    Attributes
    ----------
    maps : list
        Per parent, further transports within the target's basis; None for the target.
    before, after : float
        Loss of the merged network on batches that were not learned from: its distance from the parents'
        average outputs (see :mod:`fxfusion.agreement`), and what labels say, if they count.
    steps : int
        Steps that were taken.
    """

    maps: list[dict[str, Map] | None]
    before: float
    after: float
    steps: int


class _Element(abc.ABC):
    """What transports of one space are learned by: a parameter, at first for none."""

    space: Space
    parameter: torch.Tensor

    @abc.abstractmethod
    def map(self, parameter: torch.Tensor, hardness: float) -> Map:
        """Return the transport at a value of the parameter, in its precision."""

    def final(self, parameter: torch.Tensor) -> Map:
        """Return the transport to keep."""
        return self.map(parameter.double(), 1.0)


class _Turn(_Element):
    """A rotation per unit of the outer spaces, near the identity."""

    def __init__(self, plan: Plan, space: Space, device: torch.device) -> None:
        self.space = space
        self.centred = space.symmetry is Symmetry.CENTRED
        outer = [plan.scope_size(name) for name in space.scope]
        size = space.size - self.centred
        self.parameter = torch.zeros(*outer, size, size, device=device, requires_grad=True)

    def map(self, parameter: torch.Tensor, hardness: float) -> Map:
        """Return the transport at a value of the parameter, in its precision."""
        skew = parameter - parameter.mT
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        rotation = torch.linalg.solve(eye - skew, eye + skew)
        if self.centred:
            basis = complement(self.space.size).to(skew)
            rotation = basis @ rotation @ basis.mT + 1.0 / self.space.size
        found = apart(rotation, len(self.space.scope))
        return SoftMap(self.space.scope, found, found)


class _Angles(_Element):
    """A rotation of every pair of dimensions, per unit of the outer spaces, near the identity."""

    def __init__(self, plan: Plan, space: Space, device: torch.device) -> None:
        self.space = space
        outer = [plan.scope_size(name) for name in space.scope]
        self.parameter = torch.zeros(*outer, len(space.planes), device=device, requires_grad=True)

    def map(self, parameter: torch.Tensor, hardness: float) -> Map:
        """Return the transport at a value of the parameter, in its precision."""
        found = apart(turned(parameter, self.space.planes, self.space.size), len(self.space.scope))
        return SoftMap(self.space.scope, found, found)


class _Invertible(_Element):
    """An invertible map per unit of the outer spaces, near the identity."""

    def __init__(self, plan: Plan, space: Space, device: torch.device) -> None:
        self.space = space
        outer = [plan.scope_size(name) for name in space.scope]
        self.parameter = torch.zeros(*outer, space.size, space.size, device=device, requires_grad=True)

    def map(self, parameter: torch.Tensor, hardness: float) -> Map:
        """Return the transport at a value of the parameter, in its precision."""
        count = len(self.space.scope)
        itself, inverse = torch.matrix_exp(parameter), torch.matrix_exp(-parameter).mT
        return SoftMap(self.space.scope, apart(itself, count), apart(inverse, count))


class _Blend(_Element):
    """A soft coupling per unit of the outer spaces: scores through Sinkhorn's algorithm."""

    def __init__(self, plan: Plan, space: Space, device: torch.device, margin: float) -> None:
        self.space = space
        outer = [plan.scope_size(name) for name in space.scope]
        scores = margin * torch.eye(space.size, device=device)
        self.parameter = scores.expand(*outer, -1, -1).clone().requires_grad_()
        odds = _KEPT / (1 - _KEPT) * (space.size - 1)
        self.sharpness = math.log(odds) / margin

    def map(self, parameter: torch.Tensor, hardness: float) -> Map:
        """Return the transport at a value of the parameter, in its precision."""
        return self._blended(parameter, self.sharpness)

    def _blended(self, parameter: torch.Tensor, sharpness: float) -> Map:
        logs = parameter * sharpness
        for _ in range(_TURNS):
            logs = logs - logs.logsumexp(-2, keepdim=True)
            logs = logs - logs.logsumexp(-1, keepdim=True)
        write, count = logs.exp(), len(self.space.scope)
        read = write / write.sum(-2, keepdim=True)
        return SoftMap(self.space.scope, apart(write, count), apart(read, count))


class _Swap(_Blend):
    """A permutation per unit of the outer spaces: a soft coupling that hardens while it is learned.

    Afterwards it is the assignment of largest total score, and the scores rest.
    """

    def map(self, parameter: torch.Tensor, hardness: float) -> Map:
        """Return the transport; of a hardness below one soft, in the parameter's precision."""
        if hardness >= 1:
            return self.final(parameter)
        return self._blended(parameter, self.sharpness * _HARDENING**hardness)

    def final(self, parameter: torch.Tensor) -> Map:
        """Return the transport to keep."""
        index, _ = assign(-parameter.detach().reshape(-1, *parameter.shape[-2:]).cpu())
        return HardMap(self.space.scope, index.reshape(parameter.shape[:-1]).to(parameter.device))


def _element(plan: Plan, space: Space, device: torch.device, margin: float, soft: bool) -> _Element:
    if space.symmetry is Symmetry.LINEAR:
        return _Invertible(plan, space, device)
    if space.symmetry is Symmetry.ROTARY:
        return _Angles(plan, space, device)
    if space.symmetry.rotates:
        return _Turn(plan, space, device)
    return (_Blend if soft else _Swap)(plan, space, device, margin)


def refine(
    plan: Plan,
    capture: Capture,
    aligned: Sequence[State],
    target: int,
    weights: Sequence[float],
    lessons: Lessons,
    options: Refinement,
    seed: int = 0,
    renormalised: bool = True,
    coupling: Coupling | None = None,
    progress: Progress = silent,
) -> Refined:
    """Refine the alignment of all parents but the target.

    Spaces below which others lie (heads) stay as they are aligned.

    Parameters
    ----------
    plan : Plan
        The target's.
    capture : Capture
        The target's.
    aligned : sequence of mapping
        The parents' weights in the target's basis.
    target : int
    weights : sequence of float
        The parents' shares.
    lessons : Lessons
        Calibration data with the parents' average outputs.
    options : Refinement
    seed : int
        Draws the points at which merged networks are run.
    renormalised : bool
        Whether batch normalisations will be given the merged network's own statistics.
    coupling : Coupling, optional
        Of which spaces that do not turn the further transports are soft; of none by default.
    progress : callable, optional

    Returns
    -------
    Refined

    Raises
    ------
    CheckpointError
        If the checkpoint to go on from is of another refinement, or damaged.
    """
    learner = _Learner(
        plan,
        capture,
        list(aligned),
        target,
        list(weights),
        lessons,
        options,
        seed,
        renormalised,
        coupling or Coupling(),
        progress,
    )
    return learner.run()


@dataclasses.dataclass(eq=False)
class _Learner:
    plan: Plan
    capture: Capture
    aligned: list[State]
    target: int
    weights: list[float]
    lessons: Lessons
    options: Refinement
    seed: int
    renormalised: bool
    coupling: Coupling
    progress: Progress

    def __post_init__(self) -> None:
        plan, target = self.plan, self.target
        self.program = Program(self.capture)
        self.norms = batch_norms(self.capture) if self.renormalised else {}
        if self.norms:
            self._see_norms()
        # A unit that may change sign has a space below it, and keeps the sign that it was aligned with.
        outer = {name for space in plan.spaces if space.symmetry is not Symmetry.SIGN for name in space.scope}
        device = next((tensor.device for tensor in self.aligned[target].values()), torch.device("cpu"))
        margin = self.options.rate * _SCORES * _MARGIN
        self.elements: dict[int, list[_Element]] = {
            index: [
                _element(plan, space, device, margin, self._soft(space))
                for space in plan.spaces
                if space.name not in outer and space.size > 1
            ]
            for index in range(len(self.aligned))
            if index != target
        }
        self.parameters = [element.parameter for elements in self.elements.values() for element in elements]
        kinds = {type(item) for items in self.elements.values() for item in items}
        # Where there are only permutations, nothing is left to learn once they are hard.
        part = 0.0 if _Swap not in kinds else _HARD if len(kinds) > 1 else 1.0
        self.settled = part * self.options.steps
        self.held_out = max(len(self.lessons.batches) // _HELD_OUT, 1)

    def _soft(self, space: Space) -> bool:
        found = self.coupling.of(space.name)
        return found.regularisation is not None and not found.widening

    def _see_norms(self) -> None:
        """Give every parent, beside its stored statistics, those of the calibration data.

        They lie in its units as the stored ones do, so that transports carry them along.
        """
        seen = measured_norms(
            self.program, self.norms, self.aligned, (item for _, item in self.lessons.once())
        )
        layouts = dict(self.plan.layouts)
        for names in self.norms.values():
            layouts |= {_seen(name): layouts[name] for name in names if name in layouts}
        self.plan = dataclasses.replace(self.plan, layouts=layouts)
        self.aligned = [
            {**state, **{_seen(name): values for name, values in statistics.items()}}
            for state, statistics in zip(self.aligned, seen, strict=True)
        ]

    def run(self) -> Refined:
        if not self.parameters:
            distance = self._judge()
            return Refined([None] * len(self.aligned), distance, distance, 0)
        options, steps = self.options, self.options.steps
        optimizer = torch.optim.Adam(
            [
                {
                    "params": [element.parameter],
                    "lr": options.rate * (_SCORES if isinstance(element, _Blend) else 1.0),
                }
                for elements in self.elements.values()
                for element in elements
            ]
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        memory = _Memory(self.parameters, optimizer)
        if options.checkpoint is not None:
            memory.keep(Path(options.checkpoint), self._fingerprint())
        if not memory.step:
            before = self._judge()
            memory.best, memory.least, memory.before = self._snapshot(), before, before
        interval = max(steps // EVALUATIONS, _WARM_UP)
        for position, inputs in itertools.islice(self._batches(), memory.step, None):
            if memory.step >= steps or memory.stale >= PATIENCE:
                break
            # Rates, shares and data depend on the step alone, so that an interrupted run goes on as it would.
            decay = min((memory.step + 1) / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * memory.step / steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * decay
            loss = self._loss(position, inputs, memory.step)
            if not torch.isfinite(loss):  # steps were too large: the best so far is kept
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory.step += 1
            self.progress("refine", memory.step, steps)
            if memory.step % interval == 0 or memory.step == steps:
                distance = self._judge()
                if memory.step >= self.settled:  # before, what is judged is not what is learned
                    memory.stale += 1
                if distance < memory.least:
                    memory.best, memory.least, memory.stale = self._snapshot(), distance, 0
                memory.save()
        found = self._final(memory.best)
        return Refined(found, memory.before, memory.least, memory.step)

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Yield what is learned from: what does not judge, or that, too, if it is all there is."""
        found = self.lessons.endless(self.held_out)
        first = next(found, None)
        return self.lessons.endless(0) if first is None else itertools.chain([first], found)

    def _shares(self, step: int) -> list[float]:
        """Draw shares near the wanted ones, uniformly in the simplex around them."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = torch.empty(len(self.weights)).exponential_(generator=generator)
        spread = self.options.spread
        return [
            (1 - spread) * weight + spread * share
            for weight, share in zip(self.weights, (drawn / drawn.sum()).tolist(), strict=True)
        ]

    def _merged(self, shares: Sequence[float], hardness: float = 1.0) -> dict[str, torch.Tensor]:
        states = []
        for index, state in enumerate(self.aligned):
            if index != self.target:
                maps = {item.space.name: item.map(item.parameter, hardness) for item in self.elements[index]}
                state = act(self.plan, maps, state)
            states.append(state)
        merged = {}
        for name, own in states[self.target].items():
            if not own.is_floating_point():
                merged[name] = own
                continue
            total = torch.zeros_like(own)
            for share, state in zip(shares, states, strict=True):
                total = total + share * state[name]
            merged[name] = torch.where(own.isinf(), own, total)  # infinite limits are alike in all
        return merged

    def _outputs(self, state: State, inputs: Any) -> Sequence[Any]:
        override = _renormalised(state, self.norms) if self.norms else None
        gradients = torch.is_grad_enabled()
        args, kwargs = inputs
        return self.program.run([state], args, kwargs, override=override, gradients=gradients)[0]

    def _loss(self, position: int, inputs: Any, step: int) -> torch.Tensor:
        hardness = min(step / self.settled, 1.0) if self.settled else 1.0
        merged = self._merged(self._shares(step), hardness)
        return self.lessons.loss(position, inputs, self._outputs(merged, inputs))

    def _judge(self) -> float:
        """Return the distance of the wanted average on what is not learned from."""
        with torch.no_grad():
            merged = self._merged(self.weights)
        return self.lessons.judge(lambda inputs: self._outputs(merged, inputs), self.held_out)

    def _snapshot(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _final(self, values: Sequence[torch.Tensor]) -> list[dict[str, Map] | None]:
        left = iter(values)
        with torch.no_grad():
            return [
                {element.space.name: element.final(next(left)) for element in self.elements[index]}
                if index in self.elements
                else None
                for index in range(len(self.aligned))
            ]

    def _fingerprint(self) -> str:
        """Return what tells one refinement from another: its options and its weights."""
        facts = hashlib.sha256(
            repr(
                (
                    self.options.rate,
                    self.options.steps,
                    self.options.spread,
                    self.options.labels,
                    self.coupling,
                    self.seed,
                    self.weights,
                )
            ).encode()
        )
        for state in self.aligned:
            for name, tensor in state.items():
                wide = tensor.detach().double()
                facts.update(f"{name} {tuple(tensor.shape)} {wide.sum()!r} {wide.abs().sum()!r}".encode())
        return facts.hexdigest()


class _Memory:
    """What a refinement goes on from: values, the optimizer's moments, and the best so far."""

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.path: Path | None = None
        self.fingerprint = ""
        self.parameters, self.optimizer = parameters, optimizer
        self.step = self.stale = 0
        self.best: list[torch.Tensor] = []
        self.before = self.least = math.inf

    def save(self) -> None:
        """Write all of it, if a place was given."""
        if self.path is None:
            return
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            tensors[f"{index}.value"] = parameter.detach()
            tensors[f"{index}.best"] = self.best[index]
            tensors[f"{index}.mean"] = moments["exp_avg"]
            tensors[f"{index}.square"] = moments["exp_avg_sq"]
        facts = {
            "fingerprint": self.fingerprint,
            "step": str(self.step),
            "stale": str(self.stale),
            "before": self.before.hex(),
            "least": self.least.hex(),
        }
        with replacing(self.path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, facts)

    def keep(self, path: Path, fingerprint: str) -> None:
        """Go on from a file, if it is there, and save to it from now on."""
        self.path, self.fingerprint = path, fingerprint
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Remove it to begin anew") from error
        if facts.get("fingerprint") != fingerprint:
            raise CheckpointError(f"{path} is of another refinement: remove it, or give another path")
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"{index}.value"])
                self.best.append(tensors[f"{index}.best"].to(parameter.device))
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(facts["step"])),
                    "exp_avg": tensors[f"{index}.mean"].to(parameter.device),
                    "exp_avg_sq": tensors[f"{index}.square"].to(parameter.device),
                }
        self.step, self.stale = int(facts["step"]), int(facts["stale"])
        self.before, self.least = float.fromhex(facts["before"]), float.fromhex(facts["least"])


def _seen(name: str) -> str:
    """Return under which name a buffer's values on the calibration data are kept."""
    return f"{name} seen"


def _renormalised(
    state: State, norms: Mapping[str, tuple[str, str]]
) -> Callable[[fx.Node, int, tuple[Any, ...]], Any]:
    """Return what normalises as repair will: by stored statistics, corrected by how the batch's differ.

    Stored ones that are corrected only once the network is merged would teach something else.
    """

    def override(node: fx.Node, index: int, args: tuple[Any, ...]) -> Any:
        if node.name not in norms:
            return None
        x, weight, bias, mean, variance = args[:5]
        expected = [state[_seen(name)].to(x.dtype) for name in norms[node.name]]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean = mean + x.mean(axes) - expected[0]
        variance = variance * x.var(axes, correction=0) / expected[1].clamp_min(_TINY)
        tuple_valued = operator_name(node.target) != "batch_norm"
        epsilon = args[6] if tuple_valued else args[7]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        normal = (x - mean.reshape(shape)) * (variance + epsilon).rsqrt().reshape(shape)
        normal = normal if weight is None else normal * weight.reshape(shape)
        normal = normal if bias is None else normal + bias.reshape(shape)
        return (normal, x.new_zeros(0), x.new_zeros(0)) if tuple_valued else normal

    return override
