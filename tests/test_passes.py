"""The passes as torch knows them, and how they are packaged."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint

import fxfusion
from fxfusion.calibration import Batches
from fxfusion.errors import OutputSelectionError, PassOrderError
from fxfusion.passes.align import Align
from fxfusion.passes.align_flow import AlignFlow
from fxfusion.passes.apply_transports import ApplyTransports
from fxfusion.passes.base import FusionPass
from fxfusion.passes.merge import Merge
from fxfusion.passes.normalize import Normalize
from fxfusion.passes.pair import Pair
from fxfusion.passes.propagate import Propagate
from fxfusion.passes.repair import Repair
from fxfusion.state import state_of
from fxfusion.transport.hierarchy import Coupling
from tests import zoo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def prepared(name: str = "perceptron") -> tuple[fx.GraphModule, list[dict[str, torch.Tensor]]]:
    """Return a captured model, and its state dict with another's."""
    args, kwargs = zoo.inputs(name)
    models = [zoo.build(name, seed) for seed in range(2)]
    return fxfusion.prepare(models[0], args, kwargs), [dict(model.state_dict()) for model in models]


# -- alone and in torch's PassManager ---------------------------------------------------------------


def test_all_passes_run_in_torchs_pass_manager() -> None:
    module, parents = prepared()
    args, kwargs = zoo.inputs("perceptron", 8)
    batches = Batches(state_of(module).capture, [args])
    align = Align(batches)
    manager = PassManager(
        [Normalize(), Propagate(), Pair(parents), align, ApplyTransports(), Merge(), Repair(batches)]
    )
    result = manager(module)
    assert result.modified
    fused = fxfusion.fuse([zoo.build("perceptron", 0), zoo.build("perceptron", 1)], args, kwargs, [args])
    assert result.graph_module(*args).shape == fused.module(*args).shape


def test_the_passes_are_what_fuse_runs() -> None:
    module, parents = prepared()
    for item in (
        Normalize(),
        Propagate(),
        Pair(parents),
        Align(coupling=Coupling()),
        ApplyTransports(),
        Merge(),
    ):
        module = item(module).graph_module
    args, kwargs = zoo.inputs("perceptron")
    models = [zoo.build("perceptron", seed) for seed in range(2)]
    fused = fxfusion.fuse(models, args, kwargs, coupling="hard").state_dict()
    for name, tensor in state_of(module).merged.items():
        assert torch.equal(tensor, fused[name])


def test_passes_obey_constraints_on_their_order() -> None:
    module, _ = prepared()
    first, second = Normalize(), Propagate()
    manager = PassManager([second, first])
    manager.add_constraint(this_before_that_pass_constraint(first, second))
    manager.solve_constraints()
    assert manager.passes == [first, second]
    assert state_of(manager(module).graph_module, "plan").plan is not None


def test_passes_are_passes_with_options_as_fields() -> None:
    for kind in (Normalize, Propagate, Pair, Align, ApplyTransports, Merge, Repair):
        assert issubclass(kind, PassBase)
        assert dataclasses.is_dataclass(kind)


def test_a_pass_may_run_twice() -> None:
    module, parents = prepared()
    PassManager([Normalize(), Propagate(), Pair(parents), Align(), ApplyTransports(), Merge()])(module)
    first = dict(state_of(module).merged)
    PassManager([Propagate(), Pair(parents), Align(), ApplyTransports(), Merge()])(module)
    assert all(torch.equal(first[name], tensor) for name, tensor in state_of(module).merged.items())


# -- order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(5))
def test_a_pass_before_the_one_that_it_needs_says_so(position: int) -> None:
    module, parents = prepared()
    passes: list[FusionPass] = [Propagate(), Pair(parents), Align(), ApplyTransports(), Merge(), Repair()]
    for item in passes[:position]:
        item(module)
    with pytest.raises(PassOrderError, match=rf"not set yet: run {type(passes[position]).__name__} first"):
        passes[position + 1](module)
    for late in passes[position + 2 :]:
        with pytest.raises(PassOrderError):
            late(module)


def test_a_module_that_fxfusion_did_not_capture_is_refused() -> None:
    module = torch.fx.symbolic_trace(zoo.build("glu"))
    with pytest.raises(PassOrderError, match="prepare"):
        Propagate()(module)


def test_the_pass_manager_names_the_cause() -> None:
    module, parents = prepared()
    with pytest.raises(Exception, match="Pair") as caught:
        PassManager([Normalize(), Pair(parents)])(module)
    assert isinstance(caught.value.__cause__, PassOrderError)


def test_the_pipeline_raises_a_passs_own_error() -> None:
    model, (args, kwargs) = zoo.build("glu"), zoo.inputs("glu")
    with pytest.raises(OutputSelectionError):
        fxfusion.plan(model, args, kwargs, outputs=["nothing"])


# -- what a result says -----------------------------------------------------------------------------


def test_modified_is_truthful() -> None:
    module, parents = prepared()
    batches = Batches(state_of(module).capture, [zoo.inputs("perceptron", 8)[0]])
    expected = {"Propagate": False, "Pair": False, "Align": False, "ApplyTransports": False, "Merge": True}
    Normalize()(module)
    passes: list[FusionPass] = [Propagate(), Pair(parents), Align(), ApplyTransports(), Merge()]
    for item in passes:
        code, state = module.code, copy.deepcopy(module.state_dict())
        result = item(module)
        after = result.graph_module.state_dict()
        changed = result.graph_module.code != code or any(
            not torch.equal(state[name], after[name]) for name in state
        )
        assert result.modified == changed == expected[type(item).__name__], item
    assert not Repair()(module).modified
    assert Repair(batches)(module).modified


def test_normalize_says_whether_it_removed_anything() -> None:
    class Casting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float64).sum(-1)

    module = fxfusion.prepare(Casting(), (torch.randn(2, 3),))
    asserted = any("_assert_tensor_metadata" in str(node.target) for node in module.graph.nodes)
    nodes = len(module.graph.nodes)
    result = Normalize()(module)
    assert asserted
    assert result.modified
    assert len(module.graph.nodes) < nodes
    assert not Normalize()(module).modified


def test_repair_without_batch_normalisation_changes_nothing() -> None:
    module, parents = prepared("glu")
    batches = Batches(state_of(module).capture, [zoo.inputs("glu", 8)[0]])
    PassManager([Normalize(), Propagate(), Pair(parents), Align(), ApplyTransports(), Merge()])(module)
    assert not Repair(batches)(module).modified


@pytest.mark.parametrize(
    ("align", "fitted"),
    [
        (lambda batches: Align(batches), True),
        (lambda batches: Align(batches, Coupling(share=0.8)), False),
        (lambda batches: AlignFlow(batches=batches), False),
    ],
    ids=["one basis", "partial", "flow"],
)
def test_layers_are_fitted_to_a_wide_parents_own_where_one_basis_carries_them(
    align: Callable[[Batches], FusionPass], fitted: bool
) -> None:
    """Else the carried parent is what they are fitted to: of that alone nothing is missing."""
    torch.manual_seed(0)
    narrow, wide = (
        torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3)).eval()
        for width in (6, 12)
    )
    module, other = (fxfusion.prepare(model, (torch.randn(2, 4),)) for model in (narrow, wide))
    Propagate()(other)
    batches = Batches(state_of(module).capture, [torch.randn(50, 4)])
    pair = Pair([dict(narrow.state_dict()), dict(wide.state_dict())], target=0, others={1: other})
    for item in (Propagate(), pair, align(batches), ApplyTransports(), Merge([0.0, 1.0])):
        item(module)
    assert Repair(batches, layers=True)(module).modified == fitted


def test_ensures_sees_the_result() -> None:
    @dataclasses.dataclass
    class Replacing(FusionPass):
        checked: list[fx.GraphModule] = dataclasses.field(default_factory=list)

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            return PassResult(copy.deepcopy(graph_module), True)

        def ensures(self, graph_module: fx.GraphModule) -> None:
            self.checked.append(graph_module)

    module = torch.fx.symbolic_trace(zoo.build("glu"))
    item = Replacing()
    result = item(module)
    assert item.checked == [result.graph_module]
    assert item.checked[0] is not module


def test_a_broken_postcondition_is_noticed() -> None:
    class Careless(Merge):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            result = super().call(graph_module)
            state_of(graph_module).merged["head.bias"] = torch.full((3,), torch.nan)
            return result

    module, parents = prepared()
    for item in (Normalize(), Propagate(), Pair(parents), Align(), ApplyTransports()):
        item(module)
    with pytest.raises(AssertionError):
        Careless()(module)


def test_merge_leaves_the_captured_tensors_alone() -> None:
    module, parents = prepared()
    before = [copy.deepcopy(parent) for parent in parents]
    PassManager([Normalize(), Propagate(), Pair(parents), Align(), ApplyTransports(), Merge()])(module)
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(parent[name], state[name]) for name in state)


# -- packaging --------------------------------------------------------------------------------------


def test_the_package_list_is_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fxfusion").rglob("__init__.py")
    }
    folders.add("fxfusion.passes")  # rglob does not follow the link
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {"fxfusion": "fxfusion", "fxfusion.passes": "passes"}
    link = ROOT / "fxfusion" / "passes"
    assert link.resolve() == ROOT / "passes"


def test_passes_are_no_package_of_their_own() -> None:
    ran = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "ImportError" in ran.stderr
    assert "fxfusion.passes" in ran.stderr


def _imports(path: pathlib.Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_only_the_pipeline_imports_passes() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fxfusion").rglob("*.py")
        if path.resolve().is_relative_to(ROOT / "fxfusion")
        and any(name.startswith("fxfusion.passes") for name in _imports(path))
    }
    assert importing == {"fxfusion/pipeline.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=lambda path: path.stem)
def test_passes_import_fxfusion_and_torch_alone(path: pathlib.Path) -> None:
    allowed = {"fxfusion", "torch", *sys.stdlib_module_names}
    imported = _imports(path)
    assert {name.partition(".")[0] for name in imported} <= allowed
    assert "fxfusion.pipeline" not in imported
