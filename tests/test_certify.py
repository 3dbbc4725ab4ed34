"""Certification: twins keep the function in float64, and one forgotten incidence does not."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import fxfusion
from fxfusion.certify import TOLERANCE, certify_plan, randomise
from fxfusion.errors import CertificationError
from fxfusion.execution import Program
from fxfusion.plan import Plan, Space
from fxfusion.symmetry import act, random_maps
from fxfusion.transport.map import HardMap
from tests import zoo

EVERY = [*zoo.MODELS, *zoo.ADVERSARIAL]
SMALL = ["hf_vit", "bert", "gpt2", "opt", "llama", "t5"]


def weights_of(name: str) -> dict[str, torch.Tensor]:
    return zoo.planned(name).capture.canonical(zoo.build(name).state_dict())


def plan_of(name: str) -> Plan:
    found = zoo.planned(name).plan
    assert found is not None
    return found


@pytest.mark.parametrize("name", EVERY)
def test_a_random_element_of_the_group_keeps_the_function(name: str) -> None:
    state = zoo.planned(name)
    certificate = certify_plan(state.capture, plan_of(name), weights_of(name), state.outputs, seed=1)
    assert certificate.ok
    assert certificate.max_relative_error <= TOLERANCE == 1e-9
    assert certificate.moved > (0.9 if name in zoo.MODELS else 0.4)


@pytest.mark.parametrize("name", EVERY)
def test_a_random_element_moves_every_parameter_that_holds_a_space(name: str) -> None:
    plan, state = plan_of(name), weights_of(name)
    twin = act(plan, random_maps(plan, torch.Generator().manual_seed(2)), state)
    for parameter, layout in plan.layouts.items():
        assert torch.equal(twin[parameter], state[parameter]) == (not layout.spaces()), parameter


@pytest.mark.parametrize("name", ["perceptron", "hf_vit"])
def test_certify_by_its_public_name(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    model = zoo.build(name)
    before = copy.deepcopy(model.state_dict())
    certificates = [fxfusion.certify(model, args, kwargs, seed=seed) for seed in (0, 0, 1)]
    assert all(item.ok and item.moved > 0.5 for item in certificates)
    assert certificates[0] == certificates[1]
    assert_equal_states(model.state_dict(), before)


# -- negative controls ------------------------------------------------------------------------------


def _leaves_no_trace(parameter: str, block: int) -> bool:
    """What adds the same to all scores of a query, a bias of keys above all: softmax forgets it."""
    names = ("key.bias", "k_proj.bias", "k_lin.bias", "k_norm.bias", "before.bias")
    return parameter.endswith(names) or (parameter.endswith(("qkv.bias", "c_attn.bias")) and block == 1)


def _only(plan: Plan, space: Space, seed: int) -> dict[str, HardMap]:
    found = random_maps(plan, torch.Generator().manual_seed(seed))[space.name]
    assert isinstance(found, HardMap)
    return {space.name: found}


CONTROLS = [*SMALL, "distilbert", *zoo.ADVERSARIAL]
MOST_VARIANTS = 40  # of a model of the zoo, spread evenly over its spaces


@pytest.mark.parametrize("name", CONTROLS)
def test_leaving_out_one_incidence_of_a_space_changes_the_output(name: str) -> None:
    captured, plan, state = zoo.planned(name), plan_of(name), weights_of(name)
    variants: list[dict[str, torch.Tensor]] = []
    labels: list[str] = []
    for number, space in enumerate(plan.spaces):
        moved = act(plan, _only(plan, space, number), state)
        for parameter, layout in plan.layouts.items():
            for index, block in enumerate(layout.blocks):
                if space.name not in {factor.space for factor in block.factors}:
                    continue
                tensor = moved[parameter].clone()
                block.view(tensor).copy_(block.view(state[parameter]))
                if not torch.equal(tensor, moved[parameter]) and not _leaves_no_trace(parameter, index):
                    variants.append({**moved, parameter: tensor})
                    labels.append(f"{space.name}: block {index} of {parameter}")
    assert len(variants) >= 2 * len(plan.spaces)
    step = -(-len(variants) // MOST_VARIANTS)
    variants, labels = variants[::step], labels[::step]
    program = Program(captured.capture, double=True)
    # A second input: an example that rectifiers silence would show nothing.
    inputs = randomise((captured.capture.args, captured.capture.kwargs), torch.Generator().manual_seed(3))
    worst = dict.fromkeys(labels, 0.0)
    for args, kwargs in ((captured.capture.args, captured.capture.kwargs), inputs):
        original, *changed = program.run([state, *variants], args, kwargs)
        for label, outputs in zip(labels, changed, strict=True):
            for position in captured.outputs:
                difference = (outputs[position] - original[position]).abs().max()
                relative = float(difference / original[position].abs().max())
                worst[label] = max(worst[label], relative)
    assert not {label: value for label, value in worst.items() if value < 1e-7}


def test_a_bias_of_keys_is_the_one_exception() -> None:
    captured, plan, state = zoo.planned("opt"), plan_of("opt"), weights_of("opt")
    twin = act(plan, random_maps(plan, torch.Generator().manual_seed(0)), state)
    twin = {name: state[name] if name.endswith("k_proj.bias") else value for name, value in twin.items()}
    program = Program(captured.capture, double=True)
    original, changed = program.run([state, twin], captured.capture.args, captured.capture.kwargs)
    for position in captured.outputs:
        torch.testing.assert_close(changed[position], original[position], rtol=1e-9, atol=1e-9)


def test_an_unsound_plan_is_not_certified() -> None:
    state, plan = zoo.planned("perceptron"), plan_of("perceptron")
    layouts = {name: layout for name, layout in plan.layouts.items() if name != "norm.running_mean"}
    unsound = dataclasses.replace(plan, layouts=layouts)
    certificate = certify_plan(state.capture, unsound, weights_of("perceptron"), state.outputs)
    assert not certificate.ok
    assert certificate.max_relative_error > 1e-4


def test_randomness_in_a_network_is_not_certified() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(6, 8)
            self.second = torch.nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.second(hidden + torch.randn_like(hidden))

    assert not fxfusion.certify(Noisy(), (torch.randn(4, 6),)).ok


# -- scramble ---------------------------------------------------------------------------------------


def assert_equal_states(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", ["gpt2", "llama", "perceptron", "tied_autoencoder", "dense_block"])
def test_scramble_leaves_the_model_as_it_is_and_its_twin_loads_strict(name: str) -> None:
    model, (args, kwargs) = zoo.build(name), zoo.inputs(name)
    before = copy.deepcopy(model.state_dict())
    twin = fxfusion.scramble(model, args, kwargs, seed=3)
    assert_equal_states(model.state_dict(), before)
    other = zoo.build(name, seed=9)
    other.load_state_dict(twin, strict=True)
    expected = zoo.outputs_of(model, args, kwargs)
    torch.testing.assert_close(zoo.outputs_of(other, args, kwargs), expected, rtol=1e-3, atol=1e-4)
    assert sum(int((twin[key] != before[key]).sum()) for key in before) > 0
    own = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    assert not own & {tensor.data_ptr() for tensor in twin.values() if tensor.numel()}


def test_scramble_by_seed() -> None:
    model, (args, kwargs) = zoo.build("perceptron"), zoo.inputs("perceptron")
    first, again, other = (fxfusion.scramble(model, args, kwargs, seed=seed) for seed in (0, 0, 1))
    assert_equal_states(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_mode_is_left_as_it_is() -> None:
    model, (args, kwargs) = zoo.build("perceptron"), zoo.inputs("perceptron")
    model.train()
    model.norm.eval()  # type: ignore[union-attr]
    assert fxfusion.certify(model, args, kwargs).ok
    assert model.training
    assert not model.norm.training  # type: ignore[union-attr]


def test_a_model_that_counts_its_calls_is_not_written() -> None:
    class Counting(torch.nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(6, 8)
            self.second = torch.nn.Linear(8, 3)
            self.register_buffer("calls", torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1.0)
            return self.second(self.first(x).relu())

    x = torch.randn(4, 6)
    for dtype in (torch.float32, torch.float64):
        models = [Counting().to(dtype), Counting().to(dtype)]
        inputs = x.to(dtype)
        assert fxfusion.certify(models[0], (inputs,)).ok
        fxfusion.fuse(models, (inputs,), calibration=[inputs, inputs])
        for model in models:
            assert not model.calls.any()


def test_a_network_that_amplifies_rounding_is_told_from_an_unsound_plan() -> None:
    class Chaos(torch.nn.Module):
        """A hidden layer, and a hundred steps of the logistic map."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 32), torch.nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(self.first(x).tanh()).sigmoid()
            for _ in range(100):
                x = 3.99 * x * (1 - x)
            return x

    torch.manual_seed(0)
    models, x = [Chaos(), Chaos()], torch.randn(4, 6)
    certificate = fxfusion.certify(models[0], (x,))
    assert not certificate.ok
    assert certificate.rounding is not None
    assert certificate.rounding > 1e-3
    with pytest.raises(CertificationError, match="last place"):
        fxfusion.fuse(models, (x,), features="weights")
