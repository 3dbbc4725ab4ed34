"""Transports learned on unlabelled data: they lead to the parents' outputs, and never out of the group."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import fxfusion
from fxfusion import Certificate, Plan, Refinement, pipeline
from fxfusion.agreement import Distance, Lessons
from fxfusion.calibration import Batches
from fxfusion.errors import (
    CalibrationMismatchError,
    CalibrationRequiredError,
    CertificationError,
    CheckpointError,
    OptionError,
)
from fxfusion.execution import Program
from fxfusion.methods import METHODS
from fxfusion.passes.align import Align
from fxfusion.passes.apply_transports import ApplyTransports
from fxfusion.passes.fold_norms import FoldNorms
from fxfusion.passes.normalize import Normalize
from fxfusion.passes.pair import Pair
from fxfusion.passes.propagate import Propagate
from fxfusion.passes.refine import Refine
from fxfusion.state import state_of
from fxfusion.symmetry import act
from fxfusion.transport import learned
from fxfusion.transport.map import HardMap, SoftMap
from fxfusion.transport.rotation import random_rotation
from tests import zoo


def aligned(
    name: str, turning: bool = True, samples: int = 32, seeds: tuple[int, int] = (0, 1)
) -> tuple[fx.GraphModule, Batches]:
    """Return a graph module with two aligned parents, and calibration batches of eight samples."""
    models = [zoo.build(name, seed) for seed in seeds]
    for model in models:  # outputs of random networks hardly differ
        if isinstance(head := getattr(model, "classifier", None), nn.Linear):
            head.weight.data.mul_(20)
    module = fxfusion.prepare(models[1], *zoo.inputs(name, 2))
    batches = Batches(state_of(module).capture, [batch(name, seed) for seed in range(samples // 8)])
    passes = [Normalize(), Propagate(), Pair([dict(model.state_dict()) for model in models], 1)]
    passes += [FoldNorms()] if turning else []
    for item in [*passes, Align(batches), ApplyTransports()]:
        module = item(module).graph_module
    return module, batches


def batch(name: str, seed: int) -> Any:
    args, kwargs = zoo.inputs(name, 8, seed)
    return kwargs or args


# -- distances ----------------------------------------------------------------------------------------


def test_logits_are_compared_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    parents = [[torch.randn(5, 7, generator=generator)] for _ in range(3)]
    fused = [torch.randn(5, 7, generator=generator)]
    distance = Distance({0: -1}, ())
    average = distance.average(parents, [0.5, 0.25, 0.25])
    expected = torch.stack([parent[0] for parent in parents]).softmax(-1)
    expected = (torch.tensor([0.5, 0.25, 0.25])[:, None, None] * expected).sum(0)
    torch.testing.assert_close(average[0], expected)
    divergence = functional.kl_div(fused[0].log_softmax(-1), expected, reduction="batchmean")
    torch.testing.assert_close(distance(fused, average), divergence)


def test_classes_that_are_ruled_out_do_not_count() -> None:
    logits = [torch.tensor([[0.0, 1.0, float("-inf")]])]
    distance = Distance({0: -1}, ())
    assert float(distance(logits, distance.average([logits], [1.0]))) == pytest.approx(0.0, abs=1e-6)


def test_values_are_compared_relative_to_their_spread() -> None:
    values = torch.arange(8.0).reshape(2, 4)
    distance = Distance({}, (0,))
    average = distance.average([[values - 1], [values + 1]], [0.5, 0.5])
    torch.testing.assert_close(average[0], values)
    assert float(distance([values + 2], average)) == pytest.approx(4 / float(values.var(correction=0)))
    assert float(distance([10 * (values + 2)], [10 * values])) == pytest.approx(
        4 / float(values.var(correction=0))
    )


def test_data_beyond_memory_are_read_anew_and_say_the_same() -> None:
    module, batches = aligned("hf_vit")
    state = state_of(module)
    program = Program(state.capture)
    found = []
    for memory in (0, 2**30):
        lessons = Lessons(state.capture, state.taught_by, state.outputs, [0.5, 0.5], batches, memory)
        found.append(lessons.judge(lambda inputs: program.run([state.aligned[0]], *inputs)[0]))
        assert [position for position, _ in lessons.once()] == [0, 1, 2, 3]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] > 0


# -- refinement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_vit", "llama", "bert"])
def test_the_parents_keep_their_function_and_the_average_comes_closer(name: str) -> None:
    module, batches = aligned(name)
    before = state_of(module).aligned[0]
    module = Refine(batches, Refinement(steps=60))(module).graph_module
    state = state_of(module)
    assert state.refined is not None
    assert state.refined.after < state.refined.before
    after = state.aligned[0]
    assert any(not torch.equal(before[key], after[key]) for key in before)
    program = Program(state.capture)
    args, kwargs = next(iter(batches))
    old, new = program.run([before, after], args, kwargs)
    for index in state.outputs:
        torch.testing.assert_close(new[index], old[index], rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """Convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(4 * self.body(x).mean((-2, -1)))


def test_batch_normalisations_are_those_of_the_merged_network() -> None:
    """What is judged while learning is what repair makes of the average."""
    torch.manual_seed(0)
    models = [Small(), Small()]
    data = [torch.randn(16, 1, 8, 8) for _ in range(4)]
    for model in models:
        for x in data:
            model(x)
        model.eval()
    result = fxfusion.fuse(models, (data[0],), calibration=data, refine=60)
    told = next(note for note in result.report.notes if "refined" in note)
    before, after = (float(told.split(word)[0].split()[-1]) for word in (" before", " after"))
    assert after <= before
    parents = [torch.softmax(model(data[0]), -1) for model in models]
    expected = (parents[0] + parents[1]) / 2
    fused = result.module(data[0]).log_softmax(-1)
    divergence = functional.kl_div(fused, expected, reduction="batchmean")
    assert float(divergence.detach()) == pytest.approx(after, rel=0.3)


def test_a_planted_rotation_is_undone() -> None:
    """The other parent is the target itself, a little turned within the group."""
    module, batches = aligned("hf_vit", seeds=(1, 1))
    state = state_of(module)
    assert state.plan is not None
    space = next(space for space in state.plan.spaces if space.symmetry.rotates and not space.scope)
    drawn = random_rotation(space.size, torch.Generator().manual_seed(0), True)[0]
    skew = 0.3 * (drawn - drawn.mT)
    skew = skew - skew.mean(0, keepdim=True) - skew.mean(1, keepdim=True) + skew.mean()
    turned = torch.linalg.matrix_exp(skew)
    state.aligned = [
        act(state.plan, {space.name: SoftMap((), turned, turned)}, state.aligned[1]),
        state.aligned[1],
    ]
    module = Refine(batches, Refinement(steps=150, spread=0.0))(module).graph_module
    refined = state_of(module).refined
    assert refined is not None
    assert refined.before > 1e-4
    assert refined.after < 0.02 * refined.before


def test_a_permutation_is_learned_through_its_scores() -> None:
    """Soft at first, harder step by step, then the best assignment, from which no gradient flows."""
    plan = fxfusion.plan(zoo.build("perceptron", 0), *zoo.inputs("perceptron"))
    space = plan.spaces[0]
    swap = learned._Swap(plan, space, torch.device("cpu"), margin=0.02)
    wanted = torch.eye(space.size).roll(1, 0)
    optimizer = torch.optim.Adam([swap.parameter], lr=0.001)
    entropies = []
    for step in range(100):
        found = swap.map(swap.parameter, step / 100)
        assert isinstance(found, SoftMap)
        entropies.append(float(-(found.write * found.write.clamp_min(1e-30).log()).sum().detach()))
        optimizer.zero_grad()
        (-(found.write * wanted).sum()).backward()
        optimizer.step()
    last = swap.final(swap.parameter)
    assert isinstance(last, HardMap)
    assert isinstance(swap.map(swap.parameter, 1.0), HardMap)
    assert last.index.tolist() == wanted.argmax(-1).tolist()
    assert entropies[-1] < 0.01 * max(entropies)


def test_an_interrupted_refinement_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Refinement(steps=50, checkpoint=tmp_path / "refinement.safetensors")
    module, batches = aligned("hf_vit")
    start = list(state_of(module).aligned)
    whole = state_of(Refine(batches, dataclasses.replace(options, checkpoint=None))(module).graph_module)

    class Interruption(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "refine" and done == 31:
            raise Interruption

    again, batches = aligned("hf_vit")
    with pytest.raises(Interruption):
        Refine(batches, options, progress=stop)(again)
    steps: list[int] = []
    state_of(again).aligned = start
    resumed = Refine(batches, options, progress=lambda stage, done, total: steps.append(done))(again)
    assert steps[0] == 21
    found = state_of(resumed.graph_module)
    for name, tensor in whole.aligned[0].items():
        torch.testing.assert_close(found.aligned[0][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_refinement_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "refinement.safetensors"
    module, batches = aligned("hf_vit")
    start = list(state_of(module).aligned)
    Refine(batches, Refinement(steps=4, checkpoint=place))(module)
    state_of(module).aligned = start
    with pytest.raises(CheckpointError, match="another refinement"):
        Refine(batches, Refinement(steps=5, checkpoint=place))(module)
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Refine(batches, Refinement(steps=4, checkpoint=place))(module)


def test_nothing_to_learn_is_no_error() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    result = fxfusion.fuse([model, copy.deepcopy(model)], (x,), calibration=[x], refine=2)
    torch.testing.assert_close(result.state_dict()["weight"], model.weight.detach())


@pytest.mark.parametrize(("rate", "ends"), [(0.5, "without an improvement"), (5.0, "at a loss of no number")])
def test_what_does_not_help_is_not_kept(rate: float, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far too large lead away: the alignment that was there stays, and learning ends early."""
    monkeypatch.setattr(learned, "_WARM_UP", 10)
    module, batches = aligned("hf_vit", seeds=(1, 1))
    before = state_of(module).aligned[0]
    state = state_of(Refine(batches, Refinement(steps=100, rate=rate))(module).graph_module)
    assert state.refined is not None
    patient = state.refined.steps == 100 * learned._HARD + 10 * (learned.PATIENCE - 1)
    assert patient == (ends == "without an improvement")
    for name, tensor in before.items():
        torch.testing.assert_close(state.aligned[0][name], tensor, rtol=1e-6, atol=1e-7)


# -- labels -------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A class per pixel, and a number beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 1), nn.GELU(), nn.Conv2d(6, 3, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.body(x)
        return {"logits": found, "level": x.mean((-2, -1)) + found.mean((1, 2, 3))[:, None]}


def test_labels_count_by_their_share() -> None:
    """Classes of images lie on the second axis; what is ignored does not count."""
    torch.manual_seed(0)
    models = [Pixels(), Pixels()]
    data = []
    for _ in range(3):
        classes = torch.randint(0, 3, (4, 5, 5))
        classes[0, 0] = -100
        data.append((torch.randn(4, 1, 5, 5), classes))
    captured = state_of(fxfusion.prepare(models[1], (data[0][0],))).capture
    batches = Batches(captured, data)
    parents = [(captured, dict(model.state_dict())) for model in models]
    flat = frozenset(range(len(captured.outputs)))

    def taught(share: float, memory: int = 2**20) -> Lessons:
        return Lessons(captured, parents, flat, [0.5, 0.5], batches, memory, labels=share)

    position, inputs = list(taught(0.3).once())[1]
    outputs = Program(captured).run([parents[0][1]], *inputs)[0]
    logits = models[0](data[1][0])["logits"].detach()
    expected = functional.cross_entropy(logits, data[1][1], ignore_index=-100)
    torch.testing.assert_close(taught(1.0).loss(position, inputs, outputs), expected)
    distance = taught(0.0).loss(position, inputs, outputs)
    torch.testing.assert_close(taught(0.0, 0).loss(position, inputs, outputs), distance)
    for memory in (0, 2**20):
        found = taught(0.3, memory).loss(position, inputs, outputs)
        torch.testing.assert_close(found, 0.7 * distance + 0.3 * expected)


def _outputs(program: Program, state: Any, inputs: Any) -> list[Any]:
    return program.run([state], *inputs)[0]


def test_what_labels_say_is_learned() -> None:
    """Labels that no parent gives: learned from them, an average says them more than one learned without."""
    module, batches = aligned("hf_vit", samples=64)
    start = list(state_of(module).aligned)
    capture = state_of(module).capture
    truth = zoo.build("hf_vit", 5)
    data = []
    for _, kwargs in batches:
        with torch.no_grad():
            data.append({**kwargs, "labels": truth(**kwargs).logits.argmax(-1)})
    found = []
    for share in (0.0, 1.0):
        state_of(module).aligned = list(start)
        module = Refine(Batches(capture, data), Refinement(steps=80, spread=1.0, labels=share))(
            module
        ).graph_module
        state = state_of(module)
        assert state.refined is not None
        assert state.refined.after < state.refined.before
        merged = {name: (state.aligned[0][name] + state.aligned[1][name]) / 2 for name in state.aligned[1]}
        lessons = Lessons(
            capture, state.taught_by, state.outputs, [0.5, 0.5], Batches(capture, data), labels=1.0
        )
        run = functools.partial(_outputs, Program(capture), merged)
        found.append(lessons.judge(run))
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: x, "no labels"),
        (lambda x, y: (x,), "no labels"),
        (lambda x, y: {"input": x}, "no labels"),
        (lambda x, y: (x, y.float()), "integers"),
        (lambda x, y: (x, y[:, None]), "shape"),
        (lambda x, y: (x, y + 1), "from 1 to 3"),
        (lambda x, y: (x, y - 1), "from -1 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_the_work(
    spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any) -> None:
        raise AssertionError("alignment has begun")

    monkeypatch.setattr(pipeline, "_aligned", late)
    models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    data = [spoil(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))]
    with pytest.raises(CalibrationMismatchError, match=message):
        fxfusion.fuse(models, (torch.randn(2, 4),), calibration=data, refine=Refinement(labels=0.5))


def test_later_labels_that_do_not_fit_are_refused() -> None:
    models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for later in ((x, y + 1), (x,)):
        with pytest.raises(CalibrationMismatchError, match=r"from 1 to 3|no labels"):
            fxfusion.fuse(models, (x,), calibration=[(x, y), later], refine=Refinement(labels=0.5))


def test_labels_are_cut_with_their_batches() -> None:
    """Where a model fixes its batch size, labels stay with their inputs."""
    x = torch.arange(40.0).reshape(10, 4)
    model = nn.Linear(4, 2)
    captured = state_of(fxfusion.prepare(model, (x[:4],))).capture
    fixed = Batches(
        dataclasses.replace(captured, dynamic=False), [(x[:7], x[:7, 0].long()), (x[7:], x[7:, 0].long())]
    )
    found = list(fixed.labelled())
    assert [len(labels) for _, labels in found] == [4, 4]
    for (args, _), labels in found:
        assert torch.equal(args[0][:, 0].long(), labels)


# -- soft transports ----------------------------------------------------------------------------------


def test_a_soft_coupling_is_learned_through_its_scores() -> None:
    plan = fxfusion.plan(zoo.build("perceptron", 0), *zoo.inputs("perceptron"))
    space = plan.spaces[0]
    blend = learned._Blend(plan, space, torch.device("cpu"), margin=0.02)
    first = blend.map(blend.parameter, 0.0)
    assert isinstance(first, SoftMap)
    torch.testing.assert_close(first.write.diagonal(), torch.full((space.size,), learned._KEPT))
    wanted = torch.eye(space.size).roll(1, 0)
    optimizer = torch.optim.Adam([blend.parameter], lr=0.001)
    for _ in range(60):
        found = blend.map(blend.parameter, 0.0)
        assert isinstance(found, SoftMap)
        optimizer.zero_grad()
        (-(found.write * wanted).sum()).backward()
        optimizer.step()
    last = blend.final(blend.parameter.detach())
    assert isinstance(last, SoftMap)
    assert last.write.dtype is torch.float64
    assert float((last.write * wanted).sum()) > 0.9 * space.size
    ones = torch.ones_like(last.write[0])
    torch.testing.assert_close(last.write.sum(1), ones)
    torch.testing.assert_close(last.read.sum(0), ones)
    torch.testing.assert_close(last.write, last.read, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("soft", ["*", "first*", "nothing"])
def test_transports_are_learned_soft_where_the_coupling_is(soft: str) -> None:
    module, batches = aligned("perceptron", turning=False)
    plan = state_of(module).plan
    assert plan is not None
    coupling = fxfusion.Coupling(overrides={soft: fxfusion.Coupling(0.01)})
    module = Refine(batches, Refinement(steps=40), coupling=coupling)(module).graph_module
    refined = state_of(module).refined
    assert refined is not None
    assert refined.after < refined.before or soft == "nothing"
    assert refined.maps[0] is not None
    for space in plan.spaces:
        expected = SoftMap if coupling.of(space.name).regularisation is not None else HardMap
        assert isinstance(refined.maps[0][space.name], expected)


# -- methods ------------------------------------------------------------------------------------------


def pair(name: str = "hf_vit") -> dict[str, Any]:
    args, kwargs = zoo.inputs(name, 2)
    models = [zoo.build(name, seed) for seed in range(2)]
    return {"models": models, "args": args, "kwargs": kwargs, "calibration": [batch(name, 0)]}


def test_vanilla_is_the_average() -> None:
    given = pair()
    state = fxfusion.fuse(**given, method="vanilla").state_dict()
    for name, tensor in state.items():
        both = [model.state_dict()[name] for model in given["models"]]
        torch.testing.assert_close(tensor, (both[0] + both[1]) / 2)


@pytest.mark.parametrize("name", ["hf_vit", "perceptron"])
def test_auto_is_the_best_of_what_it_tries(name: str) -> None:
    given = pair(name)
    result = fxfusion.fuse(**given, method="auto")
    told = result.report.notes[-1]
    assert told.startswith("chosen by distance")
    distances = {
        method: float(value)
        for method, value in (item.rsplit(": ", 1) for item in told.partition("data: ")[2].split("; "))
    }
    chosen, *others = distances.values()
    assert others == sorted(others)
    assert chosen <= others[0] + pipeline.TIE
    assert {"vanilla", "permutation", "orthogonal, units repaired"} <= distances.keys()
    best, _, units = next(iter(distances)).partition(", ")
    alone = fxfusion.fuse(**given, method=best, repair="units" if units else None)
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(result.state_dict()[key], tensor)
    for key, tensor in result.module.state_dict().items():
        torch.testing.assert_close(tensor, result.state_dict()[key])


def test_learned_is_a_method() -> None:
    given = pair()
    result = fxfusion.fuse(**given, method="learned", refine=3)
    assert any("refined in 3 steps" in note for note in result.report.notes)
    assert METHODS["learned"].refinement is not None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "best"}, OptionError),
        ({"method": "learned", "symmetry": "permutation"}, OptionError),
        ({"method": "vanilla", "refine": 3}, OptionError),
        ({"method": "auto", "repair": "units"}, OptionError),
        ({"method": "auto", "flow": fxfusion.Flow()}, OptionError),
        ({"refine": 0}, OptionError),
        ({"refine": 5, "calibration": None}, CalibrationRequiredError),
        ({"method": "auto", "calibration": None}, CalibrationRequiredError),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    given = pair("perceptron") | options
    if options.get("refine") == 0:
        with pytest.raises(error):
            Refinement(steps=0)
    with pytest.raises(error):
        fxfusion.fuse(**given)


@pytest.mark.parametrize("field", [{"rate": 0.0}, {"spread": 1.5}, {"steps": 0}, {"labels": -0.1}])
def test_values_out_of_range_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Refinement(**field)


# -- the default --------------------------------------------------------------------------------------


def test_the_default_turns_and_repairs_where_it_can() -> None:
    given = pair()
    plain = fxfusion.fuse(**given)
    asked = fxfusion.fuse(**given, symmetry="largest", repair="units")
    for name, tensor in asked.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    assert plain.report.options["symmetry"] == "largest"


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12)])
@pytest.mark.parametrize("options", [{}, {"repair": "none"}, {"repair": "norms"}])
def test_the_default_is_what_the_data_say_for_other_widths(
    sizes: tuple[int, int], options: dict[str, Any]
) -> None:
    """Parents of other widths are fused as they are, or as equals: kept is what says more nearly the same."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)) for size in sizes]
    x = torch.randn(16, 4)
    given: dict[str, Any] = {"models": models, "args": (x,), "calibration": [x]}
    result = fxfusion.fuse(**given, **options)
    units = options or {"repair": "units"}
    both = [
        fxfusion.fuse(**given, symmetry="permutation", **options),
        fxfusion.fuse(**given, symmetry="largest", **units),
    ]
    expected = [sum(model(x).softmax(-1) for model in models) / 2]
    with torch.no_grad():
        distances = [
            float((expected[0] * (expected[0].log() - item.module(x).log_softmax(-1))).sum(-1).mean())
            for item in both
        ]
    best = both[distances.index(min(distances))]
    for name, tensor in best.state_dict().items():
        assert torch.equal(result.state_dict()[name], tensor)
    told = " ".join(result.report.notes)
    assert all(f"{distance:.4g}" in told for distance in distances)
    assert f"{sizes[0]} to {sizes[1]}" in told


@pytest.mark.parametrize("sizes", [(24, 8), (8, 24)])
def test_the_default_for_other_widths_fits_layers_where_data_that_it_has_not_seen_say_so(
    sizes: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)) for size in sizes]
    x = torch.randn(256, 4)
    given: dict[str, Any] = {"models": models, "args": (x[:2],), "calibration": list(x.split(64))}
    result = fxfusion.fuse(**given)
    told = result.report.notes[-1].partition("data: ")[2].split("; ")
    assert sorted(item.rsplit(": ", 1)[0] for item in told) == [
        "orthogonal, layers fitted, as equals",
        "orthogonal, units repaired, as equals",
        "permutation",
    ]
    assert told[0].startswith("orthogonal, layers fitted")
    fitted = fxfusion.fuse(**given, symmetry="largest", repair="layers")
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(result.state_dict()[name], tensor)
    half = fxfusion.fuse(
        **{**given, "calibration": list(x.split(64))[::2]}, symmetry="largest", repair="layers"
    )
    unseen = torch.cat(x.split(64)[1::2])
    expected = sum(model(unseen).softmax(-1) for model in models) / 2
    with torch.no_grad():
        found = half.module(unseen).log_softmax(-1)
        distance = float((expected * (expected.log() - found)).sum(-1).mean())
    assert f"{distance:.4g}" == told[0].rsplit(": ", 1)[1]


@pytest.mark.parametrize("options", [{"repair": "units"}, {"repair": "norms"}, {"symmetry": "largest"}])
def test_who_asks_for_another_repair_gets_no_fitted_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)) for size in (24, 8)]
    x = torch.randn(256, 4)
    result = fxfusion.fuse(models, (x[:2],), calibration=list(x.split(64)), **options)
    assert "layers fitted" not in " ".join(result.report.notes)


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12)])
def test_transports_of_parents_of_other_widths_are_learned_from_the_parents(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)) for size in sizes]
    x = torch.randn(64, 4)
    result = fxfusion.fuse(models, (x,), calibration=list(x.split(8)), refine=40)
    expected = sum(model(x).softmax(-1) for model in models) / 2
    with torch.no_grad():
        found = result.module(x[:8])  # the first batch judges
        distance = float((expected[:8] * (expected[:8].log() - found.log_softmax(-1))).sum(-1).mean())
    (told,) = (note for note in result.report.notes if "refined" in note)
    assert f"{distance:.4g} after" in told


def test_the_default_is_permutations_where_a_larger_group_is_not_certified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certified = pipeline.certify_plan

    def refused(capture: Any, plan: Plan, *arguments: Any, **options: Any) -> Certificate:
        found = certified(capture, plan, *arguments, **options)
        return dataclasses.replace(found, ok=found.ok and not plan.rotates)

    monkeypatch.setattr(pipeline, "certify_plan", refused)
    given = pair()
    result = fxfusion.fuse(**given)
    assert result.report.options["symmetry"] == "permutation"
    assert any("not certified" in note for note in result.report.notes)
    expected = fxfusion.fuse(**given, method="permutation").state_dict()
    for name, tensor in result.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert not any(space.symmetry.rotates for space in fxfusion.align(**given).plan)
    with pytest.raises(CertificationError):
        fxfusion.fuse(**given, symmetry="largest")
