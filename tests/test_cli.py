"""The command line, with stand-ins for the core: what it passes on, prints, writes and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from rich.table import Table
from typer.testing import CliRunner, Result

import fxfusion
from fxfusion import Costs, Flow, checkpoints, cli, reference
from fxfusion.errors import CaptureError
from fxfusion.plan import Incidence, Limit, Plan, Role, Space, Symmetry
from tests.test_references import bert

MODEL = "timm:test_vit?num_classes=3"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    """Undo the terminal's line breaks."""
    return " ".join(text.split())


class Report:
    def __init__(self) -> None:
        self.fails = False

    def table(self) -> Table:
        table = Table("space", "cost")
        table.add_row("blocks.0", "0.25")
        return table

    def save_html(self, path: str | Path) -> None:
        Path(path).write_text("<html>half a repo")
        if self.fails:
            raise OSError("disk full")


@pytest.fixture
def report() -> Report:
    return Report()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, report: Report) -> list[SimpleNamespace]:
    """Replace fxfusion.fuse by a plain average that records how it was called."""
    recorded: list[SimpleNamespace] = []

    def fuse(
        models: list[Any], args: Any = (), kwargs: Any = None, *, progress: Any = None, **options: Any
    ) -> Any:
        recorded.append(SimpleNamespace(models=models, args=args, kwargs=kwargs, options=options))
        if progress is not None:
            progress("aligning", 1, 2)
            progress("aligning", 2, 2)
        states = [model.state_dict() for model in models]
        average = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        return SimpleNamespace(state_dict=lambda: average, report=report, module=models[-1])

    monkeypatch.setattr(fxfusion, "fuse", fuse, raising=False)
    return recorded


@pytest.fixture
def parents(tmp_path: Path) -> list[str]:
    import timm

    references = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", num_classes=3)
        checkpoints.save_weights(model.state_dict(), tmp_path / f"{seed}.safetensors")
        references.append(f"{MODEL}@{tmp_path}/{seed}.safetensors")
    return references


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestBasics:
    def test_help_is_quick_and_complete(self) -> None:
        heavy = ("timm", "transformers")
        code = f"import sys, fxfusion.cli; print([name for name in {heavy} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
        result = run("--help")
        assert result.exit_code == 0
        for word in ("demo", "plan", "certify", "fuse", "timm:NAME[@weights.safetensors]"):
            assert word in flat(result.output).replace(" ", "") or word in flat(result.output)

    @pytest.mark.parametrize("command", ["demo", "plan", "certify", "fuse"])
    def test_every_command_has_an_example(self, command: str) -> None:
        assert f"Example: fxfusion {command}" in flat(run(command, "--help").output)

    def test_version(self) -> None:
        result = run("--version")
        assert result.exit_code == 0
        assert result.output.startswith("fxfusion")

    def test_unknown_option(self) -> None:
        result = run("plan", MODEL, "--colour", "red")
        assert result.exit_code == 2
        assert "--colour" in result.output

    def test_one_message_and_no_traceback(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "fxfusion.cli", "plan", "timm:resnet_18"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: timm has no model 'resnet_18'; did you mean resnet18 or ")
        assert done.stderr.count("\n") == 1

    def test_brackets_in_a_message(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise CaptureError("aten.foo[default] at [bold]model.py:3")

        monkeypatch.setattr(fxfusion, "certify", refuse, raising=False)
        result = run("certify", MODEL)
        assert result.exit_code == 2
        assert "aten.foo[default] at [bold]model.py:3" in result.stderr


class TestPlan:
    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        recorded: list[dict[str, Any]] = []
        incidence = Incidence("blocks.0.attn.qkv.weight", 0, 0, 0, Role.WRITES)
        outer = Space("blocks.0.attn.qkv.weight[0]", 3, Symmetry.PERMUTATION, (incidence,))
        inner = Space(
            "blocks.0.attn.qkv.weight[0].0.1", 16, Symmetry.PERMUTATION, (incidence,), (outer.name,)
        )
        limit = Limit("cumsum", "aten.cumsum.default", "no rule [yet]", "vit.py:7", ("pos_embed",))
        found = Plan((outer, inner), (), 0.9731, (limit,), nx.MultiDiGraph(), {}, {})

        def plan(model: Any, args: Any, kwargs: Any, **options: Any) -> Plan:
            recorded.append({"model": model, "args": args, "kwargs": kwargs, **options})
            return found

        monkeypatch.setattr(fxfusion, "plan", plan)
        return recorded

    def test_table(self) -> None:
        result = run("plan", MODEL)
        assert result.exit_code == 0, result.output
        text = flat(result.output)
        assert "2 free spaces, 97.31 % of the parameter elements covered" in text
        for word in (
            "permutation",
            "16 │ permutation │ 3 │",
            "aten.cumsum",
            "no rule [yet]",
            "vit.py:7",
        ):
            assert word in text

    def test_options(self, stand_in: list[dict[str, Any]]) -> None:
        assert run("plan", MODEL, "--input", "x=1x3x160x160", "--outputs", "a, b").exit_code == 0
        assert stand_in[0]["args"][0].shape == (1, 3, 160, 160)
        assert stand_in[0]["outputs"] == ["a", "b"]

    def test_drawings(self, tmp_path: Path) -> None:
        files = {kind: tmp_path / f"graph.{kind}" for kind in ("svg", "json", "dot", "mermaid")}
        options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
        result = run("plan", MODEL, *options)
        assert result.exit_code == 0, result.output
        assert files["svg"].read_text().startswith("<svg")
        assert files["json"].read_text().startswith("{")
        assert "digraph" in files["dot"].read_text()
        assert files["mermaid"].read_text()

    def test_a_drawing_that_cannot_be_written_is_refused_first(
        self, tmp_path: Path, stand_in: list[dict[str, Any]]
    ) -> None:
        result = run("plan", MODEL, "--svg", tmp_path / "nowhere" / "a.svg")
        assert result.exit_code == 2
        assert "there is no directory" in result.stderr
        assert stand_in == []

    def test_nonsense_input(self) -> None:
        result = run("plan", MODEL, "--input", "x=3y3")
        assert result.exit_code == 2
        assert "cannot read the input 'x=3y3'" in result.stderr


class TestCertify:
    @pytest.mark.parametrize(("kept", "code"), [(True, 0), (False, 1)])
    def test_exit_code(self, monkeypatch: pytest.MonkeyPatch, kept: bool, code: int) -> None:
        seeds = []

        def certify(model: Any, args: Any, kwargs: Any, seed: int, symmetry: str) -> Any:
            seeds.append((seed, symmetry))
            return SimpleNamespace(ok=kept, max_relative_error=3e-14, moved=0.99)

        monkeypatch.setattr(fxfusion, "certify", certify, raising=False)
        result = run("certify", MODEL, "--seed", 5, "--symmetry", "largest")
        assert result.exit_code == code
        assert "3.00e-14" in result.output
        assert "99.00 %" in result.output
        assert seeds == [(5, "largest")]


class TestFuse:
    def test_file_and_report(self, parents: list[str], calls: list[SimpleNamespace], tmp_path: Path) -> None:
        out = tmp_path / "out.safetensors"
        result = run("fuse", *parents, "-o", out)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "out.report.html").is_file()
        first, second = (checkpoints.read_weights(tmp_path / f"{seed}.safetensors") for seed in range(2))
        fused = checkpoints.read_weights(out)
        assert all(torch.equal(fused[name], (first[name] + second[name]) / 2) for name in first)
        assert "blocks.0" in result.output
        assert "out.report.html" in flat(result.output).replace(" ", "")
        # What the user leaves out is the library's to choose.
        assert calls[0].options == {"calibration": None, "weights": None, "target": -1, "seed": 0}

    def test_options_are_passed_on(
        self, parents: list[str], calls: list[SimpleNamespace], tmp_path: Path
    ) -> None:
        np.savez(tmp_path / "data.npz", x=np.zeros((5, 3, 160, 160), np.float32))
        result = run(
            *("fuse", *parents, "-o", tmp_path / "out.safetensors", "--features", "activations"),
            *("--coupling", "soft", "--calibration", tmp_path / "data.npz", "--batch-size", 2),
            *("--symmetry", "largest", "--repair", "units"),
            *("--weights", "0.25,0.75", "--target", 0, "--seed", 9, "--outputs", "logits"),
        )
        assert result.exit_code == 0, result.output
        options = calls[0].options
        assert [len(batch["x"]) for batch in options.pop("calibration")] == [2, 2, 1]
        assert options == {
            "features": "activations",
            "coupling": "soft",
            "symmetry": "largest",
            "repair": "units",
            "weights": [0.25, 0.75],
            "target": 0,
            "seed": 9,
            "outputs": ["logits"],
        }

    def test_flow(self, parents: list[str], calls: list[SimpleNamespace], tmp_path: Path) -> None:
        out = ("-o", tmp_path / "out.safetensors")
        assert run("fuse", *parents, *out, "--flow", "residual=skip,metric=cosine").exit_code == 0
        assert calls[0].options["flow"] == Flow(residual="skip", costs=Costs(metric="cosine"))
        assert run("fuse", *parents, *out, "--flow", "reference", "--coupling", "hard").exit_code == 0
        assert calls[1].options["flow"] == reference("weights", "hard")["flow"]
        refused = run("fuse", *parents, *out, "--flow", "residual=average")
        assert refused.exit_code != 0
        assert "weighted_matrix" in flat(refused.output)

    def test_directory(self, calls: list[SimpleNamespace], tmp_path: Path) -> None:
        for name in ("a", "b"):
            bert(tmp_path / name)
        result = run("fuse", f"hf:{tmp_path}/a", f"hf:{tmp_path}/b", "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert {"config.json", "model.safetensors", "out.report.html"} <= set(names(tmp_path / "out"))
        # An earlier fusion may be replaced.
        assert run("fuse", f"hf:{tmp_path}/a", f"hf:{tmp_path}/b", "-o", tmp_path / "out").exit_code == 0
        assert names(tmp_path) == ["a", "b", "out"]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda a, b: [a, "-o", "x.safetensors"], "at least two models"),
            (lambda a, b: [a, b, "-o", "x.bin"], "is a .safetensors file"),
            (lambda a, b: [a, b, "-o", "nowhere/x.safetensors"], "no directory"),
            (lambda a, b: [a, b, "-o", "0.safetensors"], "was read from"),
            (lambda a, b: [a, b, "-o", "1.safetensors"], "was read from"),
            (lambda a, b: [a, b, "-o", "x.safetensors", "--weights", "a,b"], "not a list of numbers"),
            (lambda a, b: [a, b, "-o", "x.safetensors", "--weights", "1"], "1 numbers for 2 models"),
            (lambda a, b: [a, b, "-o", "x.safetensors", "--target", "2"], "choose -2 to 1"),
            (lambda a, b: [a, b, "-o", "x.safetensors", "--features", "activations"], "give --calibration"),
            (lambda a, b: [a, b, "-o", "x.safetensors", "--calibration", "none.npz"], "does not exist"),
            (lambda a, b: [a, b, "-o", "x.safetensors", "--coupling", "firm"], "firm"),
            (lambda a, b: [a, "timm:test_vi", "-o", "x.safetensors"], "did you mean test_vit"),
        ],
    )
    def test_refused_before_any_work(
        self,
        parents: list[str],
        calls: list[SimpleNamespace],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        change: Callable[[str, str], list[str]],
        expected: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        result = run("fuse", *change(*parents))
        assert result.exit_code == 2
        assert expected in flat(result.stderr)
        assert calls == []
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def test_truncated_parent(self, parents: list[str], calls: list[SimpleNamespace], tmp_path: Path) -> None:
        path = tmp_path / "1.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        result = run("fuse", *parents, "-o", tmp_path / "out.safetensors")
        assert result.exit_code == 2
        assert "1.safetensors is truncated" in result.stderr
        assert names(tmp_path) == ["0.safetensors", "1.safetensors"]

    def test_neither_if_the_report_fails(
        self, parents: list[str], calls: list[SimpleNamespace], report: Report, tmp_path: Path
    ) -> None:
        report.fails = True
        result = run("fuse", *parents, "-o", tmp_path / "out.safetensors")
        assert isinstance(result.exception, OSError)
        assert names(tmp_path) == ["0.safetensors", "1.safetensors"]

    def test_neither_if_the_weights_cannot_be_put_in_place(
        self,
        parents: list[str],
        calls: list[SimpleNamespace],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        replace = os.replace

        def fail(source: Any, target: Any) -> None:
            if str(target).endswith("out.safetensors"):
                raise PermissionError("no")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        result = run("fuse", *parents, "-o", tmp_path / "out.safetensors")
        assert isinstance(result.exception, PermissionError)
        assert names(tmp_path) == ["0.safetensors", "1.safetensors"]

    def test_no_directory_if_the_report_fails(
        self, calls: list[SimpleNamespace], report: Report, tmp_path: Path
    ) -> None:
        for name in ("a", "b"):
            bert(tmp_path / name)
        report.fails = True
        result = run("fuse", f"hf:{tmp_path}/a", f"hf:{tmp_path}/b", "-o", tmp_path / "out")
        assert isinstance(result.exception, OSError)
        assert names(tmp_path) == ["a", "b"]

    def test_unrelated_directory(self, calls: list[SimpleNamespace], tmp_path: Path) -> None:
        bert(tmp_path / "a")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").touch()
        result = run("fuse", f"hf:{tmp_path}/a", f"hf:{tmp_path}/a", "-o", tmp_path / "home")
        assert result.exit_code == 2
        assert "thesis.tex" in result.stderr
        assert calls == []
        assert names(tmp_path / "home") == ["thesis.tex"]


class TestDemo:
    def test_options(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from fxfusion import demo

        recorded = []
        monkeypatch.setattr(
            demo, "run", lambda seed, output, console, quick: recorded.append((seed, output, quick))
        )
        assert run("demo", "--seed", 4, "--output", tmp_path / "x", "--quick").exit_code == 0
        assert recorded == [(4, tmp_path / "x", True)]

    def test_output_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        result = run("demo", "--output", tmp_path / "x")
        assert result.exit_code == 2
        assert "must be a directory" in result.stderr


class TestWithoutStandIns:
    """Once through everything, on networks of the user's own."""

    MODEL = "fxfusion.demo:DigitsViT?width=16&depth=1&heads=2"

    @pytest.fixture
    def parents(self, tmp_path: Path) -> list[str]:
        from fxfusion.demo import DigitsViT

        for seed in range(2):
            torch.manual_seed(seed)
            state = DigitsViT(width=16, depth=1, heads=2).state_dict()
            checkpoints.save_weights(state, tmp_path / f"{seed}.safetensors")
        images = np.random.default_rng(0).standard_normal((9, 1, 8, 8))
        np.savez(tmp_path / "images.npz", images=images, labels=np.arange(9))
        return [f"{self.MODEL}@{tmp_path}/{seed}.safetensors" for seed in range(2)]

    def test_plan_and_certify(self, parents: list[str]) -> None:
        result = run("plan", parents[0])
        assert result.exit_code == 0, result.output
        assert "5 free spaces, 99.63 %" in flat(result.output)  # All but the bias of the head.
        result = run("certify", parents[0])
        assert result.exit_code == 0, result.output
        assert "the function is kept" in result.output

    def test_fuse(self, parents: list[str], tmp_path: Path) -> None:
        written = []
        for name in ("x", "y"):
            out = tmp_path / f"{name}.safetensors"
            options = ("--calibration", tmp_path / "images.npz", "--batch-size", 4, "--coupling", "soft")
            result = run("fuse", *parents, "-o", out, *options)
            assert result.exit_code == 0, result.output
            assert "<svg" in (tmp_path / f"{name}.report.html").read_text()
            written.append(out.read_bytes())
        assert written[0] == written[1]
        assert run("certify", f"{self.MODEL}@{tmp_path}/x.safetensors").exit_code == 0

    def test_nan(self, parents: list[str], tmp_path: Path) -> None:
        state = checkpoints.read_weights(tmp_path / "1.safetensors")
        state["head.bias"][3] = float("nan")
        checkpoints.save_weights(state, tmp_path / "1.safetensors")
        before = names(tmp_path)
        result = run("fuse", *parents, "-o", tmp_path / "out.safetensors")
        assert result.exit_code == 2
        assert "head.bias" in result.stderr
        assert names(tmp_path) == before

    def test_another_architecture(self, parents: list[str], tmp_path: Path) -> None:
        before = names(tmp_path)
        result = run("fuse", parents[0], MODEL, "-o", tmp_path / "out.safetensors")
        assert result.exit_code == 2
        assert names(tmp_path) == before
