"""A program computes what the module computes: one state or several, in single or double precision."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxfusion
from fxfusion.capture import capture
from fxfusion.errors import CalibrationMismatchError, InputError
from fxfusion.execution import Program, flat_outputs
from tests import zoo


class Masked(nn.Module):
    """Attention with a mask and a flag among its keyword arguments, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.register_buffer("shift", torch.randn(8))

    def forward(
        self, ids: torch.Tensor, *, mask: torch.Tensor, scale: bool = False
    ) -> dict[str, torch.Tensor]:
        x = self.embed(ids) + self.shift
        y, _ = self.attend(x, x, x, key_padding_mask=mask, need_weights=False)
        y = x + (y * 2 if scale else y)
        return {"logits": self.head(y), "hidden": y}


class Tied(nn.Module):
    """An embedding that is its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class Casting(nn.Module):
    """Casts to float32 in the way of RMSNorm, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.weight = nn.Parameter(torch.rand(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        wide = y.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.last(self.weight * wide.to(y.dtype) + torch.zeros(7, dtype=torch.float32))


def states_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4)
    ).eval()


CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)), (torch.randn(3, 4),), {}),
    "convolutional": (convolutional, (torch.randn(2, 3, 8, 8),), {}),
    "tied": (Tied, (torch.randint(9, (2, 5)),), {}),
    "masked": (
        lambda: Masked().eval(),
        (torch.randint(11, (2, 5)),),
        {"mask": torch.tensor([[False] * 5, [False, False, True, False, True]]), "scale": True},
    ),
    "casting": (Casting, (torch.randn(3, 5),), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_two_states_in_lock_step_equal_two_modules(name: str) -> None:
    make, args, kwargs = CASES[name]
    torch.manual_seed(0)
    models = [make(), make()]
    captured = capture(models[0], args, kwargs)
    states = [captured.canonical(states_of(model)) for model in models]
    if name == "masked":  # a buffer that is no parameter is still a weight of each
        assert "shift" in states[0]
    found = Program(captured).run(states, args, kwargs)
    with torch.no_grad():
        for model, outputs in zip(models, found, strict=True):
            expected = model(*args, **kwargs)
            flat = list(expected.values()) if isinstance(expected, dict) else [expected]
            assert len(outputs) == len(flat)
            for one, other in zip(outputs, flat, strict=True):
                assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(found[0][0], found[1][0])


@pytest.mark.parametrize("name", CASES)
def test_double_precision_equals_a_double_module(name: str) -> None:
    make, args, kwargs = CASES[name]
    torch.manual_seed(0)
    model = make()
    captured = capture(model, args, kwargs)
    (outputs,) = Program(captured, double=True).run([captured.canonical(states_of(model))], args, kwargs)
    assert outputs[0].dtype is torch.float64
    if name == "casting":
        return  # the module itself would compute in float32
    wide = model.double()
    with torch.no_grad():
        expected = wide(*(item.double() if item.is_floating_point() else item for item in args), **kwargs)
    expected = expected["logits"] if isinstance(expected, dict) else expected
    assert torch.allclose(outputs[0], expected, rtol=0, atol=1e-13)


def double_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """Return how far a symmetric twin is from the model in float64, and in float32."""
    captured = capture(model, args, kwargs)
    states = [captured.canonical(item) for item in (states_of(model), fxfusion.scramble(model, args, kwargs))]
    errors = []
    for double in (True, False):
        (one, *_), (other, *_) = Program(captured, double=double).run(states, args, kwargs)
        errors.append(float((one - other).abs().max() / one.abs().max()))
    assert any((states[0][name] != states[1][name]).any() for name in states[0])
    return errors[0], errors[1]


def test_casts_do_not_limit_double_precision() -> None:
    torch.manual_seed(0)
    double, single = double_error(Casting(), (torch.randn(3, 5),), {})
    assert double < 1e-14
    assert single > 1e-9


class Summing(nn.Module):
    """Multiplies by a matrix that it makes itself, of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tril(torch.ones(5, 5)) @ torch.relu(self.first(x)))


def test_tensors_made_inside_are_double_too() -> None:
    double, _ = double_error(Summing(), (torch.randn(2, 5, 4),), {})
    assert double < 1e-12


def test_llama_in_double_precision_has_no_single_precision_floor() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (2, 6))
    kwargs = {"input_ids": ids, "use_cache": False}
    double, single = double_error(model, (), kwargs)
    assert double < 1e-12
    assert single > 1e-9


def test_operators_are_named_by_their_order() -> None:
    """Whatever was traced before, and what is added later gets another name."""
    args, kwargs = zoo.inputs("resnet18")
    module = fxfusion.prepare(zoo.build("resnet18"), args, kwargs)
    names = [node.name for node in module.graph.nodes]
    assert len(set(names)) == len(names)
    added = [name for name in names if re.fullmatch(r"add(_\d+)?", name)]
    assert added[:3] == ["add", "add_1", "add_2"]
    last = list(module.graph.nodes)[-2]
    with module.graph.inserting_after(last):
        extra = module.graph.call_function(torch.ops.aten.sym_size.int, (last, 0))
    assert extra.name not in names


def test_other_batch_size_and_defaults_of_keyword_arguments() -> None:
    make, args, kwargs = CASES["masked"]
    model = make()
    captured = capture(model, args, kwargs)
    ids, mask = torch.randint(11, (4, 5)), torch.zeros(4, 5, dtype=torch.bool)
    (outputs,) = Program(captured).run([captured.canonical(states_of(model))], (ids,), {"mask": mask})
    with torch.no_grad():
        assert torch.allclose(outputs[0], model(ids, mask=mask, scale=True)["logits"], atol=1e-6)


def test_missing_inputs_are_named() -> None:
    make, args, kwargs = CASES["masked"]
    program = Program(capture(make(), args, kwargs))
    with pytest.raises(CalibrationMismatchError, match="missing: mask"):
        program.flatten(args, {})
    with pytest.raises(CalibrationMismatchError, match="inputs"):
        program.flatten((*args, *args), kwargs)


def test_observer_sees_what_depends_on_parameters_once_per_state() -> None:
    make, args, kwargs = CASES["masked"]
    model = make()
    captured = capture(model, args, kwargs)
    state = captured.canonical(states_of(model))
    seen: list[fx.Node] = []

    def observe(node: fx.Node, values: Any) -> None:
        assert len(values) == 3
        seen.append(node)

    Program(captured).run([state] * 3, args, kwargs, observe=observe)
    assert len(set(seen)) == len(seen)
    operators = {str(node.target).split(".")[1] for node in seen if "aten" in str(node.target)}
    assert {"linear", "embedding"} <= operators
    on_mask = [node for node in seen if all(item.op == "placeholder" for item in node.all_input_nodes)]
    assert on_mask == []


def test_override_replaces_a_node_of_one_state() -> None:
    make, args, kwargs = CASES["mlp"]
    model = make()
    captured = capture(model, args, kwargs)
    state = captured.canonical(states_of(model))

    def override(node: fx.Node, index: int, values: tuple[Any, ...]) -> Any:
        return torch.zeros_like(values[0]) if index == 1 and "gelu" in str(node.target) else None

    plain, replaced = Program(captured).run([state, state], args, kwargs, override=override)
    assert torch.allclose(replaced[0], model[2].bias.detach().expand(3, 2))
    assert not torch.allclose(plain[0], replaced[0])


def test_states_and_module_are_not_written() -> None:
    make, args, kwargs = CASES["convolutional"]
    model = make()
    captured = capture(model, args, kwargs)
    state = captured.canonical(states_of(model))
    before = {name: tensor.clone() for name, tensor in states_of(model).items()}
    Program(captured, double=True).run([state], args, kwargs)
    for name, tensor in states_of(model).items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype is before[name].dtype


def test_inputs_that_an_operator_refuses() -> None:
    model = Tied().eval()
    found = capture(model, (torch.tensor([[1, 2], [3, 4]]),))
    with pytest.raises(InputError, match=r"Tied: embedding at \S+test_execution\.py:\d+ fails"):
        Program(found).run([model.state_dict()], (torch.tensor([[1, 9]]),), {})
    with pytest.raises(InputError, match="Tied fails on these inputs: index out of range"):
        flat_outputs(model, (torch.tensor([[1, 9]]),), {})
    with pytest.raises(InputError, match="Tied fails on these inputs"):
        fxfusion.fuse([model, Tied().eval()], (torch.tensor([[1, 9]]),))
