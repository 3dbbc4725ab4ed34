"""Why an axis is fixed: exact chains on small modules, and facts about every chain of every model."""

from __future__ import annotations

import inspect
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import fxfusion
from fxfusion import cli
from fxfusion.errors import OptionError, UnknownParameterError
from fxfusion.explain import Part, Step
from fxfusion.plan import Plan
from tests import zoo

CAUSES = {"input", "output", "order", "constant", "clash", "no rule"}


def plan_of(name: str) -> Plan:
    found = zoo.planned(name).plan
    assert found is not None
    return found


def fixed_parts(plan: Plan, parameter: str, axis: int) -> list[Part]:
    (explained,) = plan.explain(parameter, axis)
    return [part for part in explained.parts if not part.free]


def chain(plan: Plan, parameter: str, axis: int) -> list[tuple[str, str, str]]:
    """Return node, kind and message of every step of an axis with one fixed part."""
    (part,) = fixed_parts(plan, parameter, axis)
    return [(step.node, step.kind, step.message) for step in part.chain]


def line_of(function: Callable[..., Any], text: str) -> str:
    """Return ``file:line`` of the one line of ``forward`` that holds a text: torch records no others."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [index for index, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(function)}:{first + offset}"


# -- small modules ----------------------------------------------------------------------------------


class Scan(nn.Module):
    """One hidden layer, in which an operator is applied."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.head = nn.Linear(hidden, 3)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().cumsum(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.first(x)))


class Clash(Scan):
    """The hidden units are 3 times 4 in one place and 4 times 3 in another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(4, 4), nn.Linear(3, 3)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rows(x.unflatten(-1, (3, 4))).relu().flatten(-2) + x
        return x + self.columns(x.unflatten(-1, (4, 3))).relu().flatten(-2)


@torch.library.custom_op("fxfusion_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Opaque(Scan):
    """An operator about which nothing is known."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = opaque(x.relu())
        return found


class Residual(nn.Module):
    """A branch writes into a stream, which is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.stem(x)
        return stream + self.down(self.up(stream).relu())


class Vocabulary(nn.Module):
    """A table of rows, the output layer tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 11)
        self.decoder.weight = self.table.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.idle = nn.Linear(2, 2, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.hidden(self.table(ids)).relu() * self.gain)


def planned(model: nn.Module, *args: torch.Tensor) -> Plan:
    return fxfusion.plan(model.eval(), args or (torch.randn(2, 6),))


IS_INPUT = ("x", "input", "it is an axis of an input")
IS_OUTPUT = ("output", "output", "it is an axis of output 0")


def test_an_input_axis() -> None:
    met = ("linear", "same", "its units are those of an axis of the input x")
    assert chain(planned(Scan()), "first.weight", 1) == [met, IS_INPUT]


def test_an_output_axis() -> None:
    plan = planned(Scan())
    assert chain(plan, "head.weight", 0) == [IS_OUTPUT]
    met = ("linear_1", "same", "its units are those of head.weight[0]")
    assert chain(plan, "head.bias", 0) == [met, IS_OUTPUT]


def test_a_scan_and_both_sides_of_it() -> None:
    plan = planned(Scan())
    cause = ("cumsum", "order", "the order along it matters")
    assert chain(plan, "first.weight", 0) == [cause]
    met = ("linear", "same", "its units are those of first.weight[0]")
    assert chain(plan, "first.bias", 0) == [met, cause]
    # what comes out of the scan is another axis
    met = ("linear_1", "same", "its units are those of an axis of the result of cumsum")
    after = ("cumsum", "order", "positions along it have a meaning")
    assert chain(plan, "head.weight", 1) == [met, after]


def test_steps_name_operator_and_source_line() -> None:
    plan = planned(Scan())
    (part,) = fixed_parts(plan, "first.bias", 0)
    assert [step.operator for step in part.chain] == ["aten.linear.default", "aten.cumsum.default"]
    assert part.chain[1].source == line_of(Scan.forward, "self.between(")


def test_vocabulary_rows_ties_and_what_cannot_move() -> None:
    plan = planned(Vocabulary(), torch.randint(0, 11, (2, 4)))
    rows = ("embedding", "order", "rows are a vocabulary")
    assert chain(plan, "table.weight", 0) == [rows]
    assert chain(plan, "decoder.weight", 0) == [rows]  # the same tensor
    met = ("linear_1", "same", "its units are those of decoder.weight[0]")
    assert chain(plan, "decoder.bias", 0) == [met, rows]
    columns = plan.explain("table.weight", -1)[0]
    assert columns.axis == 1
    assert columns.free
    assert [step.kind for part in fixed_parts(plan, "idle.weight", 0) for step in part.chain] == ["unused"]
    assert plan.explain("gain")[0].parts == ()
    assert {item.cause.kind: (item.elements, item.parameters) for item in plan.frozen} == {
        "order": (11, ("decoder.bias",)),
        "unused": (4, ("idle.weight",)),
        "single": (1, ("gain",)),
    }


def test_a_rotary_tables_constant() -> None:
    parts = fixed_parts(plan_of("rotary"), "qkv.bias", 0)
    assert [(part.block, part.factor, part.size) for part in parts] == [
        (block, 1, 2) for block in range(4)
    ]  # both halves of head_dim, of queries and of keys
    steps = [(step.node.split("_")[0], step.kind, step.message) for step in parts[0].chain]
    assert steps == [
        ("linear", "same", "its units are those of qkv.weight[0]"),
        ("split", "part", "it is 12+24, of which this is the part of 12"),
        ("view", "factor", "it is 3*4, of which this is the factor of 4"),
        ("slice", "part", "it is 2+2, of which this is the part of 2"),
        ("mul", "whole", "it is the part of 2 in an axis of the constant cos, 2+2"),
        ("cos", "constant", "a constant varies along it"),
    ]


def test_structures_that_clash() -> None:
    plan = planned(Clash())
    outer, inner = (
        [(step.node, step.kind, step.message) for step in part.chain]
        for part in fixed_parts(plan, "first.weight", 0)
    )
    cause = ("view_2", "clash", "a view of [2, 3*4] as [2, 4, 3] does not respect the structure")
    assert outer == [("view", "factor", "it is 3*4, of which this is the factor of 3"), cause]
    assert inner == [
        ("view", "factor", "it is 3*4, of which this is the factor of 4"),
        ("linear_1", "same", "its units are those of rows.weight[1]"),
        ("add", "same", "its units are those of rows.weight[0]"),
        cause,
    ]
    # what comes out of the view has the other structure, and meets this one in the sum
    for parameter, axis in (("columns.weight", 0), ("head.weight", 1)):
        assert {part.chain[-1].kind for part in fixed_parts(plan, parameter, axis)} == {"clash"}
    assert plan.limits[0].node == "view_2"
    assert plan.limits[0].reason == cause[2]
    assert {"first.weight", "first.bias", "rows.weight"} <= set(plan.limits[0].parameters)


def test_an_operator_without_a_rule_freezes_both_sides() -> None:
    plan = planned(Opaque())
    for parameter, axis in (("first.weight", 0), ("head.weight", 1)):
        cause = fixed_parts(plan, parameter, axis)[0].chain[-1]
        assert (cause.node, cause.kind) == ("opaque", "no rule")
        assert cause.operator == "fxfusion_tests.opaque.default"
        assert cause.source == line_of(Scan.forward, "self.between(")
    assert [(limit.node, limit.parameters) for limit in plan.limits] == [
        ("opaque", ("first.weight", "first.bias", "head.weight"))
    ]
    # first.weight's other axis is an input's: what could be lifted is to blame
    assert plan.frozen[0].cause.kind == "no rule"
    assert plan.frozen[0].parameters == ("first.weight", "first.bias", "head.weight")


def test_two_steps_through_a_residual() -> None:
    plan = planned(Residual())
    joins = ("add", "same", "its units are those of stem.weight[0]")
    assert chain(plan, "down.weight", 0) == [joins, IS_OUTPUT]
    written = ("linear_2", "same", "its units are those of down.weight[0]")
    assert chain(plan, "down.bias", 0) == [written, joins, IS_OUTPUT]
    read = ("linear_1", "same", "its units are those of stem.weight[0]")
    assert chain(plan, "up.weight", 1) == [read, IS_OUTPUT]


def test_the_first_cause_is_what_fixes() -> None:
    """Without it, the axis is free."""
    model, (args, kwargs) = zoo.build("perceptron_showing"), zoo.inputs("perceptron_showing")
    shown = fxfusion.plan(model, args, kwargs)
    cause = fixed_parts(shown, "second.weight", 0)[0].chain[-1]
    index = int(cause.message.rsplit(" ", 1)[1])
    assert cause.kind == "output"
    assert index == 1
    hidden = fxfusion.plan(model, args, kwargs, outputs=["scores"])
    assert hidden.explain("second.weight", 0)[0].free


def test_free_parts_name_space_and_scope() -> None:
    plan = plan_of("packed_outer")
    rows, columns = plan.explain("qkv.weight")
    assert (columns.structure, columns.parts[0].space) == ("12", "embed.weight[0]")
    inner = next(part for part in rows.parts if (part.block, part.factor) == (2, 1))
    assert (inner.size, inner.space, inner.scope) == (4, "qkv.weight[0].2.1", ("qkv.weight[0]",))
    assert inner.chain == ()


# -- every model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.ADVERSARIAL])
def test_every_fixed_part_has_a_chain_of_graph_nodes_to_a_first_cause(name: str) -> None:
    plan = plan_of(name)
    nodes = {node.name for node in zoo.planned(name).capture.module.graph.nodes}
    free = {space.name: space for space in plan.spaces}
    for parameter in plan.parameters:
        for axis in plan.explain(parameter):
            places = [(part.block, part.factor) for part in axis.parts]
            assert len(set(places)) == len(places) or "{" in axis.structure
            for part in axis.parts:
                if part.free:
                    assert (free[part.space].size, free[part.space].scope) == (part.size, part.scope)
                    continue
                *way, cause = part.chain
                assert cause.kind in CAUSES
                assert {step.node for step in part.chain} <= nodes
                assert all(step.message and step.operator for step in part.chain)
                assert not {step.kind for step in way} & CAUSES
                assert len(set(part.chain)) == len(part.chain)


@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.ADVERSARIAL])
def test_first_causes_account_for_all_that_is_not_covered(name: str) -> None:
    plan, capture = plan_of(name), zoo.planned(name).capture
    sizes = {name: torch.Size(shape).numel() for name, shape in capture.parameters.items()}
    read = sum(size for name, size in sizes.items() if name not in capture.unused)
    by_kind = {item.cause.kind == "unused": 0 for item in plan.frozen}
    for item in plan.frozen:
        by_kind[item.cause.kind == "unused"] += item.elements
    assert by_kind.get(False, 0) == pytest.approx((1 - plan.covered) * read, abs=1e-3)
    assert by_kind.get(True, 0) == sum(sizes[name] for name in capture.unused)
    for item in plan.frozen:
        for parameter in item.parameters:
            assert any(not part.free for axis in plan.explain(parameter) for part in axis.parts)


def test_explanations_are_plain_and_the_same_every_time() -> None:
    first, second = planned(Clash()), planned(Clash())
    assert first.explain("first.weight") == second.explain("first.weight")
    assert first.frozen == second.frozen
    stored = pickle.dumps(first.evidence)
    assert b"fxfusion.axes" not in stored
    again = pickle.loads(stored)
    assert again.explain("first.weight") == first.explain("first.weight")


# -- refusals ---------------------------------------------------------------------------------------


def test_unknown_parameters_and_axes() -> None:
    plan = planned(Scan())
    with pytest.raises(
        UnknownParameterError, match=r"no parameter 'first.wieght'; did you mean first.weight"
    ):
        plan.explain("first.wieght")
    with pytest.raises(UnknownParameterError, match=r"there are first.weight, first.bias, head.weight, head"):
        plan.explain("zzz")
    with pytest.raises(OptionError, match=r"first.weight has no axis 2: it has 2, of sizes \[12, 6\]"):
        plan.explain("first.weight", 2)


# -- the command ------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture
def residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the model of every reference."""
    monkeypatch.setattr(cli, "_plan", lambda *_: planned(Residual()))


GOLDEN = """\
down.weight
├── axis 0: 8!
│   └── 8 fixed
│       ├── add: its units are those of stem.weight[0]
│       │   aten.add.Tensor, FILE
│       └── output: it is an axis of output 0
└── axis 1: 5
    └── 5 free: up.weight[0]
"""


@pytest.mark.usefixtures("residual")
class TestCommand:
    def test_golden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # a short file name, so that no line is broken
        short = Step("add", "aten.add.Tensor", "FILE", "same", "its units are those of stem.weight[0]")
        original = cli._step_text
        monkeypatch.setattr(cli, "_step_text", lambda step: original(short if step.node == "add" else step))
        result = run("explain", "timm:test_vit", "down.weight")
        assert result.exit_code == 0, result.output
        assert "\n".join(line.rstrip() for line in result.output.splitlines()) + "\n" == GOLDEN

    def test_one_axis(self) -> None:
        result = run("explain", "timm:test_vit", "down.weight", "--axis", 1)
        assert "5 free" in result.output
        assert "axis 0" not in result.output

    def test_a_pattern_gives_a_table(self) -> None:
        result = run("explain", "timm:test_vit", "*.bias")
        assert result.exit_code == 0, result.output
        for text in (
            "│ up.bias   │    0 │ 5         │ 5    │",
            "│ 8!        │      │ 8: it is an axis of output 0",
        ):
            assert text in result.output
        assert "weight" not in result.output

    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "why.json"
        result = run("explain", "timm:test_vit", "down.*", "--json", path)
        assert result.exit_code == 0, result.output
        found = json.loads(path.read_text())
        assert list(found) == ["down.weight", "down.bias"]
        part = found["down.bias"][0]["parts"][0]
        assert [step["node"] for step in part["chain"]] == ["linear_2", "add", "output"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["down.wait"], "there is no parameter 'down.wait'; did you mean down.weight"),
            (["nothing.*"], "there is no parameter 'nothing.*'"),
            (["down.bias", "--axis", "1"], "down.bias has no axis 1"),
            (["down.bias", "--json", "/nowhere/why.json"], "there is no directory"),
        ],
    )
    def test_refusals(self, arguments: list[str], message: str) -> None:
        result = run("explain", "timm:test_vit", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_plan_lists_first_causes(self) -> None:
        result = run("plan", "timm:test_vit")
        assert result.exit_code == 0, result.output
        assert "elements without a free axis, by first cause" in result.output
        assert "64 │ it is an axis of output 0" in result.output
        assert "fxfusion explain MODEL PARAMETER" in result.output

    def test_help_has_an_example(self) -> None:
        assert "Example: fxfusion explain" in " ".join(run("explain", "--help").output.split())


def test_an_axis_without_units_is_explained_too() -> None:
    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.empty, self.second = nn.Linear(6, 8), nn.Linear(8, 0), nn.Linear(0, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.empty(self.first(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it cannot initialise nothing
        model = Adaptive()
    plan = fxfusion.plan(model, (torch.randn(4, 6),))
    assert len(plan.explain("empty.weight")) == 2
    assert all(item.cause.message for item in plan.frozen)
