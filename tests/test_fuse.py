"""Fusion end to end: planted twins are undone, the result is an ordinary module of the target's class."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxfusion
from fxfusion import FusionResult
from fxfusion.capture import tied_groups
from fxfusion.errors import InvalidWeightError
from fxfusion.symmetry import act, complete, random_maps
from tests import zoo

FAST = ["hf_vit", "bert", "distilbert", "gpt2", "opt", "llama"]
PLAIN = ["perceptron", "packed_inner", "dense_block", "channel_shuffle", "grouped_convolution", "head_norm"]


def twin_of(name: str, seed: int = 5) -> nn.Module:
    """Return a scrambled instance of a model, as ``scramble`` does: another basis, the same function."""
    state, weights = zoo.planned(name), zoo.build(name).state_dict()
    assert state.plan is not None
    maps = random_maps(state.plan, torch.Generator().manual_seed(seed))
    moved = complete(state.capture, act(state.plan, maps, state.capture.canonical(weights)), weights)
    twin = zoo.build(name, seed=99)
    twin.load_state_dict(moved, strict=True)
    return twin


def batches_of(name: str, count: int = 3, size: int = 8) -> list[Any]:
    """Return random calibration batches: what the model takes, by name where it takes names."""
    found: list[Any] = []
    for seed in range(count):
        args, kwargs = zoo.inputs(name, size, seed=seed + 1)
        tensors = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        found.append(tensors or args)
    return found


def state_bytes(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in state.items()}


def loaded(name: str, result: FusionResult) -> nn.Module:
    model = zoo.build(name, seed=98)
    model.load_state_dict(result.state_dict(), strict=True)
    return model


def assert_same_function(name: str, left: nn.Module, right: nn.Module, batch: int = 3) -> None:
    args, kwargs = zoo.inputs(name, batch, seed=7)
    expected = zoo.outputs_of(right, args, kwargs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(zoo.outputs_of(left, args, kwargs), expected, rtol=1e-3, atol=1e-4 * scale)


def assert_undone(name: str, features: str, samples: int = 8) -> None:
    """Fuse a model with a scrambled twin of itself: the result is the model."""
    model = zoo.build(name)
    args, kwargs = zoo.inputs(name)
    calibration = batches_of(name, size=samples) if features == "activations" else None
    result = fxfusion.fuse(
        [twin_of(name), model], args, kwargs, calibration, features=features, coupling="hard"
    )
    fused, expected = result.state_dict(), model.state_dict()
    assert list(fused) == list(expected)
    floating = [key for key in fused if fused[key].is_floating_point()]
    largest = max(float((fused[key] - expected[key]).abs().max()) for key in floating)
    if largest > 1e-5:  # only units that compute the same may have changed places
        assert_same_function(name, loaded(name, result), model)
    assert all(row.cost_after <= row.cost_before for row in result.report.spaces)


# -- planted twins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("name", [*FAST, *PLAIN])
def test_a_planted_twin_is_undone(name: str, features: str) -> None:
    assert_undone(name, features)


@pytest.mark.nightly
@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.ADVERSARIAL])
def test_every_planted_twin_is_undone(name: str, features: str) -> None:
    assert_undone(name, features, samples=4 if name in zoo.MODELS else 16)


def test_three_models_with_shares() -> None:
    name = "packed_chunks"
    args, kwargs = zoo.inputs(name)
    model = zoo.build(name)
    parents = [twin_of(name, 1), twin_of(name, 2), model]
    result = fxfusion.fuse(parents, args, kwargs, features="weights", coupling="hard", weights=[2, 3, 5])
    assert result.report.weights == (0.2, 0.3, 0.5)
    assert len(result.report.parents) == len(result.report.certified) == 3
    for key, tensor in result.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=1e-5)


def test_shares_of_different_parents_weigh_their_parameters() -> None:
    """Units are matched to the target, so what has no unit (an output's bias) is a plain average."""
    name = "perceptron"
    args, kwargs = zoo.inputs(name)
    parents = [zoo.build(name, seed) for seed in range(3)]
    weights = (0.2, 0.3, 0.5)
    result = fxfusion.fuse(parents, args, kwargs, coupling="hard", weights=weights)
    expected = sum(
        share * parent.state_dict()["head.bias"] for share, parent in zip(weights, parents, strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(result.state_dict()["head.bias"], expected)


@pytest.mark.parametrize("target", [0, 1, -1])
def test_a_share_of_one_keeps_that_parents_function_in_the_targets_basis(target: int) -> None:
    name = "packed_outer"
    args, kwargs = zoo.inputs(name)
    parents = [zoo.build(name, seed) for seed in (0, 1)]
    result = fxfusion.fuse(parents, args, kwargs, coupling="hard", weights=[1, 0], target=target)
    assert_same_function(name, loaded(name, result), parents[0])
    if target == 0:
        for key, tensor in result.state_dict().items():
            assert torch.equal(tensor, parents[0].state_dict()[key])
    else:
        assert not torch.equal(result.state_dict()["qkv.weight"], parents[0].state_dict()["qkv.weight"])
        parameters = result.state_dict()["qkv.weight"], parents[0].state_dict()["qkv.weight"]
        assert torch.equal(*(tensor.flatten().sort().values for tensor in parameters))


@pytest.mark.parametrize(("name", "coupling"), [("bert", "hard"), ("dense_block", "soft")])
def test_parents_are_bit_identical_afterwards(name: str, coupling: str) -> None:
    parents = [zoo.build(name, seed) for seed in range(2)]
    before = [copy.deepcopy(parent.state_dict()) for parent in parents]
    modes = [[module.training for module in parent.modules()] for parent in parents]
    args, kwargs = zoo.inputs(name)
    result = fxfusion.fuse(parents, args, kwargs, batches_of(name), coupling=coupling)
    with torch.no_grad():  # nor does the result share memory with them
        for tensor in [*result.module.parameters(), *result.module.buffers()]:
            tensor.zero_()
    for parent, state, mode in zip(parents, before, modes, strict=True):
        assert state_bytes(parent.state_dict()) == state_bytes(state)
        assert [module.training for module in parent.modules()] == mode


# -- reproducibility --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "coupling"), [("hf_vit", "hard"), ("packed_outer", "soft"), ("dense_block", "soft")]
)
def test_same_inputs_and_seed_give_the_same_bytes(name: str, coupling: str) -> None:
    results = []
    for _ in range(2):
        parents = [zoo.build(name, seed) for seed in range(2)]
        args, kwargs = zoo.inputs(name)
        results.append(fxfusion.fuse(parents, args, kwargs, batches_of(name), coupling=coupling, seed=4))
    first, second = results
    assert state_bytes(first.state_dict()) == state_bytes(second.state_dict())
    assert first.report.to_json() == second.report.to_json()


def test_the_global_random_state_is_left_alone() -> None:
    name = "perceptron"
    args, kwargs = zoo.inputs(name)
    parents, calibration = [zoo.build(name, seed) for seed in range(2)], batches_of(name)
    before = torch.get_rng_state()
    fxfusion.fuse(parents, args, kwargs, calibration)
    assert torch.equal(torch.get_rng_state(), before)


# -- the result -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused() -> dict[str, FusionResult]:
    """Activation fusions of different parents."""
    found = {}
    for name in ("hf_vit", "llama", "gpt2", "t5", "dense_block"):
        args, kwargs = zoo.inputs(name)
        parents = [zoo.build(name, seed) for seed in range(2)]
        coupling = "soft" if name in ("hf_vit", "dense_block") else "hard"
        found[name] = fxfusion.fuse(parents, args, kwargs, batches_of(name, count=2), coupling=coupling)
    return found


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("name", ["hf_vit", "llama", "dense_block"])
def test_the_module_agrees_with_its_class_at_any_batch(
    fused: dict[str, FusionResult], name: str, batch: int
) -> None:
    args, kwargs = zoo.inputs(name, batch, seed=11)
    expected = zoo.outputs_of(loaded(name, fused[name]), args, kwargs)
    found = zoo.outputs_of(fused[name].module, args, kwargs)
    assert found.shape[0] == batch
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 30])
def test_the_module_runs_at_any_length(fused: dict[str, FusionResult], length: int) -> None:
    kwargs = {"input_ids": torch.randint(5, 100, (3, length)), "use_cache": False}
    expected = zoo.outputs_of(loaded("llama", fused["llama"]), (), kwargs)
    found = zoo.outputs_of(fused["llama"].module, (), kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_ties_are_kept(fused: dict[str, FusionResult], name: str) -> None:
    state = fused[name].state_dict()
    ties = tied_groups(zoo.build(name))
    assert ties
    for group in ties:
        assert len({state[key].data_ptr() for key in group}) == 1, group
    module_state = fused[name].module.state_dict()
    for group in ties:
        held = [module_state[key] for key in group if key in module_state]
        assert all(torch.equal(tensor, state[group[0]]) for tensor in held)
    model = loaded(name, fused[name])
    assert tied_groups(model) == ties


@pytest.mark.parametrize("name", ["hf_vit", "llama", "gpt2", "t5", "dense_block"])
def test_the_modules_weights_are_those_of_the_state_dict(fused: dict[str, FusionResult], name: str) -> None:
    state = fused[name].state_dict()
    for key, tensor in fused[name].module.state_dict().items():
        if key in state:
            assert torch.equal(tensor, state[key]), key
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("name", ["hf_vit", "llama"])
def test_the_module_is_compiled_and_exported_again(fused: dict[str, FusionResult], name: str) -> None:
    module = fused[name].module
    args, kwargs = zoo.inputs(name, 3, seed=12)
    expected = zoo.outputs_of(module, args, kwargs)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(zoo.outputs_of(compiled, args, kwargs), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(module, args, kwargs, strict=False)
    found = zoo.outputs_of(exported.module(), args, kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_the_module() -> None:
    name = "glu"
    args, kwargs = zoo.inputs(name)
    module = fxfusion.fuse([zoo.build(name, seed) for seed in range(2)], args, kwargs).module
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module)(*args, **kwargs), module(*args, **kwargs))


def test_the_module_can_be_trained_and_copied(fused: dict[str, FusionResult]) -> None:
    module = copy.deepcopy(fused["dense_block"].module)
    args, _ = zoo.inputs("dense_block")
    module(*args).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in fused["dense_block"].module.parameters())


def test_the_report_has_a_row_per_space(fused: dict[str, FusionResult]) -> None:
    result = fused["hf_vit"]
    assert [row.name for row in result.report.spaces] == [space.name for space in result.plan.spaces]
    assert result.report.covered == result.plan.covered > 0.97
    assert max(result.report.certified) <= 1e-9
    assert all(row.cost_after <= row.cost_before + 1e-9 for row in result.report.spaces)
    assert all(0.0 <= row.moved <= 1.0 for row in result.report.spaces)
    assert all(row.writers and row.readers for row in result.report.spaces if row.size == 128)


# -- calibration in every form ----------------------------------------------------------------------


def _forms(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    return {
        "tuples": [(part, label) for part, label in zip(x.split(8), y.split(8), strict=True)],
        "lists": [[part, label] for part, label in zip(x.split(8), y.split(8), strict=True)],
        "dicts": [{"labels": label, "x": part} for part, label in zip(x.split(8), y.split(8), strict=True)],
        "generator": (part for part in x.split(8)),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8),
        "other sizes": x.split(5),
        "one batch": [x],
    }


def test_calibration_in_any_form() -> None:
    name = "perceptron"
    parents = [zoo.build(name, seed) for seed in range(2)]
    args, kwargs = zoo.inputs(name)
    x, y = torch.randn(20, 6), torch.zeros(20)  # the last batch is smaller
    # Units are repaired on one batch after the other, so that there the cut matters.
    reference = fxfusion.fuse(parents, args, kwargs, x.split(8), method="permutation").state_dict()
    for form, calibration in _forms(x, y).items():
        state = fxfusion.fuse(parents, args, kwargs, calibration, method="permutation").state_dict()
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, reference[key], rtol=1e-4, atol=1e-5, msg=f"{form}: {key}")


def test_an_input_named_like_a_builtin_is_found_in_a_dict() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.second = nn.Linear(8, 3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(input).relu())

    x = torch.randn(8, 6)
    result = fxfusion.fuse([Model(), Model()], (x,), calibration=[{"input": x, "labels": torch.zeros(8)}])
    assert result.module(x).shape == (8, 3)


class Optional(nn.Module):
    """Takes a mask or none, a number, and a nested input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float = 1.0,
        more: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        hidden = self.first(x).relu() * scale
        if mask is not None:
            hidden = hidden * mask[:, None]
        if more is not None:
            hidden = hidden + more["shift"]
        return self.second(hidden)


def test_inputs_that_are_no_tensors_need_not_be_calibrated() -> None:
    x, mask, shift = torch.randn(8, 6), torch.ones(8), torch.randn(8, 1)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = [
        ((x,), {"mask": mask, "scale": 2.0}, {"x": x, "mask": mask}),
        ((x,), {"scale": 2.0, "mask": mask}, (x, mask)),
        ((x,), {"mask": None, "scale": 2.0}, x),
        ((x, None, 2.0), {}, x),
        ((x, None, 2.0), {}, {"x": x}),
        ((x,), {"more": {"shift": shift}}, {"x": x, "more": {"shift": shift}}),
        ((x, mask, 2.0, {"shift": shift}), {}, {"x": x, "mask": mask, "more": {"shift": shift}}),
    ]
    torch.manual_seed(0)
    parents = [Optional(), Optional()]
    for args, kwargs, batch in cases:
        result = fxfusion.fuse(parents, args, kwargs, [batch], coupling="hard")
        assert result.module(*args, **kwargs).shape == (8, 3)


def test_calibration_of_sequences_of_different_lengths() -> None:
    name = "llama"
    parents = [zoo.build(name), twin_of(name)]
    args, kwargs = zoo.inputs(name)
    shapes = ((8, 9), (5, 14), (3, 30))
    batches = [{"input_ids": torch.randint(5, 100, shape)} for shape in shapes]
    result = fxfusion.fuse(parents, args, kwargs, batches, coupling="hard")
    assert_same_function(name, loaded(name, result), parents[0])


class FixedBatch(nn.Module):
    """Works on batches of four alone: four is written into a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.reshape(4, -1)).relu())


def test_a_model_that_fixes_its_batch_gets_batches_of_that_size() -> None:
    torch.manual_seed(0)
    parents = [FixedBatch(), FixedBatch()]
    x = torch.randn(12, 6)
    results = [
        fxfusion.fuse(parents, (x[:4],), calibration=x.split(size), coupling="hard") for size in (4, 5, 12)
    ]
    assert any("batch" in note for note in results[0].report.notes)
    first, *others = (state_bytes(result.state_dict()) for result in results)
    assert all(other == first for other in others)
    assert results[0].module(x[:4]).shape == (4, 3)


def test_a_model_that_takes_one_sample_only_is_captured() -> None:
    class Single(FixedBatch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.reshape(1, 6)).relu())

    x = torch.randn(5, 6)
    result = fxfusion.fuse([Single(), Single()], (x[:1],), calibration=[x])
    assert result.module(x[:1]).shape == (1, 3)


# -- other kinds of parents -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["perceptron", "dense_block", "glu"])
def test_graph_modules_and_exported_programs_are_parents_too(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    parents = [zoo.build(name, seed) for seed in range(2)]
    calibration = batches_of(name)
    reference = fxfusion.fuse(parents, args, kwargs, calibration, coupling="hard").state_dict()
    traced = [torch.fx.symbolic_trace(parent) for parent in parents]
    programs = [torch.export.export(parent, args, kwargs) for parent in parents]
    for kind in (traced, programs):
        result = fxfusion.fuse(kind, args, kwargs, calibration if kind is traced else None, coupling="hard")
        assert set(result.state_dict()) == set(reference)
        assert zoo.build(name).load_state_dict(result.state_dict(), strict=True)
        if kind is traced:
            for key, tensor in result.state_dict().items():
                torch.testing.assert_close(tensor, reference[key])
    assert fxfusion.fuse(programs, features="weights").report.covered > 0.9  # with their own examples


# -- batch normalisation ----------------------------------------------------------------------------


class Normalised(nn.Module):
    """Two convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm1 = nn.BatchNorm2d(16, momentum=None)
        self.second = nn.Conv2d(16, 24, 3)
        self.norm2 = nn.BatchNorm2d(24, momentum=None)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


def _trained(seed: int, batches: list[torch.Tensor]) -> Normalised:
    """Return a model whose statistics are those of the data, as training leaves them."""
    torch.manual_seed(seed)
    model = zoo.perturb(Normalised())
    assert isinstance(model, Normalised)
    for norm in (model.norm1, model.norm2):
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model.eval()


def _measured(model: Normalised, x: torch.Tensor) -> Iterator[tuple[nn.BatchNorm2d, torch.Tensor]]:
    """Yield every batch normalisation with the input that it gets."""
    seen: dict[nn.BatchNorm2d, torch.Tensor] = {}
    hooks = [
        norm.register_forward_hook(lambda module, args, _: seen.update({module: args[0]}))
        for norm in (model.norm1, model.norm2)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    yield from seen.items()


def _errors(model: Normalised, x: torch.Tensor) -> list[float]:
    """Return how far stored statistics are from those of the data, relative to the latter's deviation."""
    found = []
    for norm, values in _measured(model, x):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance, mean = torch.var_mean(values, (0, 2, 3))
        found.append(float(((norm.running_mean - mean) / variance.sqrt()).abs().mean()))
        found.append(float((norm.running_var / variance).log().abs().mean()))
    return found


def test_repair_measures_the_statistics_of_the_fused_network() -> None:
    torch.manual_seed(0)
    batches = list(torch.randn(160, 3, 10, 10).split(32))
    parents = [_trained(seed, batches) for seed in range(2)]
    data = torch.cat(batches)
    options: dict[str, Any] = {"features": "weights", "coupling": "hard"}
    plain, repaired = (
        fxfusion.fuse(parents, (batches[0],), calibration=calibration, **options)
        for calibration in (None, batches)
    )
    errors = []
    for result in (plain, repaired):
        model = Normalised()
        model.load_state_dict(result.state_dict(), strict=True)
        errors.append(_errors(model.eval(), data))
    assert max(_errors(parents[0], data)) < 0.05  # the parents' own are right
    assert max(errors[0]) > 0.2, "averaging alone must need repair, else this shows nothing"
    assert max(errors[1]) < 0.05, errors
    weights = [name for name in plain.state_dict() if "running" not in name]
    assert all(torch.equal(plain.state_dict()[name], repaired.state_dict()[name]) for name in weights)


def test_identical_parents_keep_their_statistics_exactly() -> None:
    torch.manual_seed(0)
    batches = list(torch.randn(40, 3, 10, 10).split(16))
    model = _trained(0, batches)
    parents = [model, copy.deepcopy(model)]
    result = fxfusion.fuse(parents, (batches[0],), calibration=batches, method="permutation")
    for key, tensor in result.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    balanced = fxfusion.fuse(
        parents, (batches[0],), calibration=batches
    )  # other weights, the same statistics
    for key, tensor in balanced.state_dict().items():
        if "running" in key:
            assert torch.equal(tensor, model.state_dict()[key]), key
    fused = Normalised()
    fused.load_state_dict(balanced.state_dict())
    torch.testing.assert_close(fused.eval()(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-5)


class Clipped(nn.Module):
    """A layer whose input is kept between limits that need not bind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.least: torch.Tensor
        self.register_buffer("least", torch.tensor(-torch.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Clip and compute."""
        hidden: torch.Tensor = self.first(x).clamp(min=self.least)
        return self.second(hidden.relu())


@pytest.mark.parametrize("weights", [None, [1.0, 0.0]])
def test_limits_that_do_not_bind_stay_infinite(weights: list[float] | None) -> None:
    parents = [Clipped(), Clipped()]
    result = fxfusion.fuse(parents, (torch.randn(4, 4),), weights=weights)
    assert float(result.state_dict()["least"]) == -torch.inf
    assert result.module(torch.randn(3, 4)).isfinite().all()
    parents[0].least = torch.tensor(0.0)
    with pytest.raises(InvalidWeightError, match="least"):
        fxfusion.fuse(parents, (torch.randn(4, 4),))
