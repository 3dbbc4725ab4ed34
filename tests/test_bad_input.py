"""Bad input: one typed error each, naming what is wrong, before any long work, the models untouched."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxfusion
import fxfusion.pipeline
from fxfusion import FusionError
from fxfusion.errors import (
    ArchitectureMismatchError,
    CalibrationMismatchError,
    CalibrationRequiredError,
    CaptureError,
    InvalidWeightError,
    OptionError,
    OutputSelectionError,
    TieMismatchError,
    TooFewModelsError,
)
from fxfusion.rules import RULES
from tests import zoo

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """A hidden layer of 8 units."""

    def __init__(self, width: int = 8, activation: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.activation = activation or nn.ReLU()
        self.second = nn.Linear(width, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x)))


class Other(Plain):
    """The same parameters under another class."""


class Square(Plain):
    """Two layers that may be tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        if tied:
            self.third.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.activation(super().forward(x)))


class Hidden(Plain):
    """A table outside the state dict takes part."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        table = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x)) * self.table)


class Branching(Plain):
    """Control flow depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


def _with(model: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


def _bad(model: Any, value: float) -> None:
    model.second.weight[1, 2] = value


def _bert(**options: Any) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        vocab_size=16,
        **{"num_attention_heads": 4, **options},
    )
    return transformers.BertForMaskedLM(config).eval()


def _timm_vit(heads: int) -> nn.Module:
    import timm

    sizes: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", num_heads=heads, **sizes).eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """Parents and options that must be refused, and what the message must name."""

    error: type[FusionError]
    names: tuple[str, ...]
    models: Callable[[], Any] = lambda: [Plain(), Plain()]
    args: tuple[Any, ...] = (X,)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PARENTS: dict[str, Case] = {
    "one model": Case(TooFewModelsError, ("at least two", "1 given"), lambda: [Plain()]),
    "no model": Case(TooFewModelsError, ("at least two",), list),
    "a model, not a list": Case(OptionError, ("sequence",), Plain),
    "a Sequential, not a list": Case(
        OptionError, ("sequence",), lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    ),
    "not a module": Case(OptionError, ("model 1", "str"), lambda: [Plain(), "resnet18"]),
    "a class": Case(OptionError, ("model 1",), lambda: [Plain(), Plain]),
    "another class": Case(
        ArchitectureMismatchError, ("model 0 (Other)", "model 1 (Plain)"), lambda: [Other(), Plain()]
    ),
    "another architecture": Case(
        ArchitectureMismatchError,
        ("model 0 (Glu)", "model 1 (Plain)"),
        lambda: [zoo.build("glu"), Plain()],
    ),
    "a missing parameter": Case(
        ArchitectureMismatchError,
        ("model 0 (Plain)", "lacks second.bias"),
        lambda: [Plain(bias=False), Plain()],
    ),
    "an extra parameter": Case(
        ArchitectureMismatchError,
        ("model 0 (Plain)", "second.bias in addition"),
        lambda: [Plain(), Plain(bias=False)],
    ),
    "another activation": Case(
        ArchitectureMismatchError,
        ("model 0 (Plain)", "'activation'", "GELU", "ReLU"),
        lambda: [Plain(activation=nn.GELU()), Plain()],
    ),
    "another slope": Case(
        ArchitectureMismatchError,
        ("model 0 (Plain)",),
        lambda: [Plain(activation=nn.LeakyReLU(0.5)), Plain(activation=nn.LeakyReLU(0.1))],
    ),
    "another approximation": Case(
        ArchitectureMismatchError,
        ("model 0 (Plain)",),
        lambda: [Plain(activation=nn.GELU("tanh")), Plain(activation=nn.GELU())],
    ),
    "another table outside the state dict": Case(
        ArchitectureMismatchError, ("model 0 (Hidden)",), lambda: [Hidden(0), Hidden(1)]
    ),
    "another configuration": Case(
        ArchitectureMismatchError,
        ("model 0 (BertForMaskedLM)", "layer_norm_eps", "1e-05", "1e-12"),
        lambda: [_bert(layer_norm_eps=1e-5), _bert()],
        (torch.zeros(2, 5, dtype=torch.long),),
    ),
    "other heads without a configuration": Case(
        ArchitectureMismatchError,
        ("model 0 (VisionTransformer)",),
        lambda: [_timm_vit(2), _timm_vit(3)],
        (torch.randn(2, 3, 32, 32),),
    ),
    "another width and another activation": Case(
        ArchitectureMismatchError,
        ("model 0 (Plain)", "module 'activation'"),
        lambda: [Plain(9, nn.Tanh()), Plain()],
    ),
    "other ties": Case(
        TieMismatchError,
        ("model 0 (Square)", "second.weight = third.weight"),
        lambda: [Square(True), Square(False)],
    ),
    "NaN": Case(
        InvalidWeightError,
        ("model 0 (Plain)", "NaN", "second.weight"),
        lambda: [_with(Plain(), lambda model: _bad(model, float("nan"))), Plain()],
    ),
    "infinite": Case(
        InvalidWeightError,
        ("model 1 (Plain)", "infinite", "second.weight"),
        lambda: [Plain(), _with(Plain(), lambda model: _bad(model, float("inf")))],
    ),
    "NaN in a buffer": Case(
        InvalidWeightError,
        ("model 1 (Perceptron)", "norm.running_mean"),
        lambda: [
            zoo.build("perceptron"),
            _with(zoo.build("perceptron"), lambda model: model.norm.running_mean.fill_(torch.nan)),  # type: ignore[operator, union-attr]
        ],
    ),
    "no weights": Case(
        InvalidWeightError,
        ("model 0 (Plain)", "meta", "first.weight"),
        lambda: [Plain().to("meta"), Plain()],
    ),
}

OPTIONS: dict[str, Case] = {
    "features": Case(OptionError, ("features='gradients'", "'weights'"), options={"features": "gradients"}),
    "coupling": Case(OptionError, ("coupling='medium'", "'soft'"), options={"coupling": "medium"}),
    "too few weights": Case(OptionError, ("1 weights for 2 models",), options={"weights": [1.0]}),
    "a negative weight": Case(OptionError, ("-0.5",), options={"weights": [-0.5, 1.5]}),
    "all weights zero": Case(OptionError, ("not all 0",), options={"weights": [0, 0]}),
    "a weight of NaN": Case(OptionError, ("nan",), options={"weights": [float("nan"), 1]}),
    "weights that are no numbers": Case(OptionError, ("weights",), options={"weights": ["a", "b"]}),
    "one number for all weights": Case(OptionError, ("weights",), options={"weights": 0.5}),
    "target too large": Case(OptionError, ("target=2", "2 models"), options={"target": 2}),
    "target too small": Case(OptionError, ("target=-3",), options={"target": -3}),
    "target no number": Case(OptionError, ("target='last'",), options={"target": "last"}),
    "regularisation zero": Case(OptionError, ("regularisation=0.0",), options={"regularisation": 0.0}),
    "regularisation negative": Case(OptionError, ("regularisation=-1.0",), options={"regularisation": -1.0}),
    "no calibration": Case(
        CalibrationRequiredError, ("calibration", "activations"), options={"features": "activations"}
    ),
}

CALIBRATION: dict[str, Case] = {
    "of another shape": Case(
        CalibrationMismatchError, ("(8, 5)", "Plain", "(8, 6)"), options={"calibration": [torch.randn(8, 5)]}
    ),
    "of another rank": Case(
        CalibrationMismatchError, ("(6,)", "(8, 6)"), options={"calibration": torch.randn(8, 6)}
    ),
    "of integers": Case(CalibrationMismatchError, ("int64", "float32"), options={"calibration": [X.long()]}),
    "of doubles": Case(
        CalibrationMismatchError, ("float64", "float32"), options={"calibration": [X.double()]}
    ),
    "of halves": Case(CalibrationMismatchError, ("float16", "float32"), options={"calibration": [X.half()]}),
    "too few tensors": Case(
        CalibrationMismatchError, ("Plain takes 1 input", "(x)", "has 0"), options={"calibration": [()]}
    ),
    "a missing name": Case(
        CalibrationMismatchError,
        ("Plain", "lacks x", "it has pixels"),
        options={"calibration": [{"pixels": X}]},
    ),
    "no batch": Case(CalibrationMismatchError, ("empty",), options={"calibration": []}),
    "an empty generator": Case(CalibrationMismatchError, ("empty",), options={"calibration": iter([])}),
    "no sample": Case(CalibrationMismatchError, ("Plain",), options={"calibration": [X[:0]]}),
    "NaN": Case(CalibrationMismatchError, ("NaN",), options={"calibration": [X * torch.nan]}),
    "infinite": Case(CalibrationMismatchError, ("infinite",), options={"calibration": [X / 0.0]}),
    "no tensor": Case(CalibrationMismatchError, ("ndarray",), options={"calibration": [X.numpy()]}),
    "nothing to iterate over": Case(CalibrationMismatchError, ("int",), options={"calibration": 5}),
}

LATER: dict[str, Case] = {
    "a later batch of another shape": Case(
        CalibrationMismatchError, ("(8, 5)", "(8, 6)"), options={"calibration": [X, torch.randn(8, 5)]}
    ),
    "a later batch with NaN": Case(
        CalibrationMismatchError, ("NaN",), options={"calibration": [X, X * torch.nan]}
    ),
    "a later batch of text": Case(CalibrationMismatchError, ("str",), options={"calibration": [X, "text"]}),
    "a later batch of another dtype": Case(
        CalibrationMismatchError, ("float64",), options={"calibration": [X, X.double()]}
    ),
}

CAPTURE: dict[str, Case] = {
    "unknown output": Case(
        OutputSelectionError, ("Plain", "nothing", "it has: output"), options={"outputs": ["nothing"]}
    ),
    "no output": Case(OutputSelectionError, ("Plain",), options={"outputs": []}),
    "data-dependent control flow": Case(
        CaptureError, ("Branching", "test_bad_input.py:"), lambda: [Branching(), Branching()]
    ),
    "inputs of another shape": Case(CaptureError, ("Plain",), args=(torch.randn(8, 5),)),
    "no inputs": Case(CaptureError, ("Plain", "'x'"), args=()),
}


def _refused(case: Case) -> str:
    models = case.models()
    modules = [model for model in models if isinstance(model, nn.Module)] if isinstance(models, list) else []
    before = [copy.deepcopy(model.state_dict()) for model in modules]
    with pytest.raises(case.error) as caught:
        fxfusion.fuse(models, case.args, **case.options)
    assert type(caught.value) is case.error
    for model, state in zip(modules, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert tensor.is_meta or torch.equal(tensor.nan_to_num(), state[name].nan_to_num())
    message = str(caught.value)
    for name in case.names:
        assert name in message, message
    return message


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is captured."""

    def captured(*_: object, **__: object) -> None:
        raise AssertionError("the model was captured before the mistake was found")

    monkeypatch.setattr(torch.export, "export", captured)


@pytest.fixture
def no_certification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything after capture starts."""

    def certified(*_: object, **__: object) -> None:
        raise AssertionError("certification started before the mistake was found")

    monkeypatch.setattr(fxfusion.pipeline, "certify_plan", certified)


# Equal names and shapes hide another function: it shows only when the parents' outputs are compared.
AFTER_CAPTURE = {
    "another slope",
    "another approximation",
    "another table outside the state dict",
    "other heads without a configuration",
}


@pytest.mark.usefixtures("no_capture")
@pytest.mark.parametrize("name", [name for name in PARENTS if name not in AFTER_CAPTURE])
def test_parents(name: str) -> None:
    _refused(PARENTS[name])


@pytest.mark.parametrize("name", sorted(AFTER_CAPTURE))
def test_parents_of_equal_names_and_another_function(name: str) -> None:
    _refused(PARENTS[name])


@pytest.mark.usefixtures("no_capture")
@pytest.mark.parametrize("name", list(OPTIONS))
def test_options(name: str) -> None:
    _refused(OPTIONS[name])


@pytest.mark.usefixtures("no_certification")
@pytest.mark.parametrize("name", list(CALIBRATION))
def test_calibration(name: str) -> None:
    _refused(CALIBRATION[name])


@pytest.mark.parametrize("name", list(LATER))
def test_later_calibration(name: str) -> None:
    _refused(LATER[name])


@pytest.mark.usefixtures("no_certification")
@pytest.mark.parametrize("name", list(CAPTURE))
def test_capture(name: str) -> None:
    _refused(CAPTURE[name])


@pytest.mark.parametrize("function", [fxfusion.plan, fxfusion.certify, fxfusion.scramble])
def test_every_function_refuses_alike(function: Callable[..., Any]) -> None:
    with pytest.raises(OutputSelectionError, match="nothing"):
        function(Plain(), (X,), outputs=["nothing"])
    with pytest.raises(CaptureError, match=r"Branching.*test_bad_input\.py:\d+"):
        function(Branching(), (X,))


@pytest.mark.parametrize("features", ["weights", "activations"])
def test_parents_of_several_dtypes_take_the_targets(features: str) -> None:
    parents = [Plain().double(), Plain().half(), Plain()]
    result = fxfusion.fuse(parents, (X,), calibration=[X], features=features)
    assert {tensor.dtype for tensor in result.state_dict().values()} == {torch.float32}
    assert result.module(X).shape == (8, 3)


@pytest.mark.parametrize("function", [fxfusion.certify, fxfusion.scramble])
def test_meta_models_have_no_twins(function: Callable[..., Any]) -> None:
    with pytest.raises(InvalidWeightError, match=r"first\.weight is on the meta device"):
        function(Plain().to("meta"), (X,))


def test_an_exported_program_without_inputs_is_refused() -> None:
    program = torch.export.export(Plain(), (X,))
    program._example_inputs = None
    with pytest.raises(CaptureError, match="example inputs"):
        fxfusion.plan(program)


def test_an_operator_without_a_rule_is_a_limit_that_is_named() -> None:
    class Neighbouring(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.second(torch.nextafter(hidden, -hidden))

    plan = fxfusion.plan(Neighbouring(), (X,))
    assert not plan.spaces
    assert any("nextafter" in limit.operator and "first.weight" in limit.parameters for limit in plan.limits)
    assert any("test_bad_input.py:" in limit.source for limit in plan.limits)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Noisy(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.second(hidden + torch.randn_like(hidden))

    with pytest.raises(CaptureError, match=r"model 1 \(Noisy\) computes something else"):
        fxfusion.fuse([Noisy(), Noisy()], (X,))


def test_an_unsound_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ordered(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).cumsum(-1))

    monkeypatch.setitem(RULES, "cumsum", RULES["relu"])
    with pytest.raises(fxfusion.errors.CertificationError, match=r"model 0 \(Ordered\)"):
        fxfusion.fuse([Ordered(), Ordered()], (X,))
