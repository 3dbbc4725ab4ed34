"""Recipes: the command line's options in a file, checked before anything is loaded; what a fusion takes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import fxfusion
from fxfusion.checkpoints import read_weights
from fxfusion.cli import app
from fxfusion.errors import (
    CalibrationRequiredError,
    FusionError,
    ModelReferenceError,
    OptionError,
    RecipeError,
    TooFewModelsError,
)
from fxfusion.estimate import comparisons, estimate
from fxfusion.recipes import Recipe
from fxfusion.transport.hierarchy import Coupling
from tests import zoo

LEAST = 'models = ["hf:a", "hf:b"]\noutput = "out"\n'
FULL = """
models = ["hf:a", "hf:b", "hf:c"]
output = "merged"
target = 1
weights = [2, 1, 1.0]
calibration = "text.npz"
batch_size = 8
method = "learned"
refine = 100
labels = 0.25
inputs = ["input_ids=2x6:int64"]
outputs = ["logits"]
seed = 3
rounds = 2
gap = 0.0

[coupling]
share = 0.9

[coupling.overrides."*.mlp.*"]
regularisation = 0.1
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_is_read(tmp_path: Path) -> None:
    found = Recipe.read(write(tmp_path, FULL))
    assert found == Recipe(
        ("hf:a", "hf:b", "hf:c"),
        Path("merged"),
        target=1,
        weights=(2.0, 1.0, 1.0),
        calibration=Path("text.npz"),
        batch_size=8,
        method="learned",
        refine=100,
        labels=0.25,
        inputs=("input_ids=2x6:int64",),
        outputs=("logits",),
        seed=3,
        rounds=2,
        coupling=Coupling(share=0.9, overrides={"*.mlp.*": Coupling(0.1)}),
    )
    assert found.options() == {
        "method": "learned",
        "refine": fxfusion.Refinement(steps=100, labels=0.25),
        "rounds": 2,
        "outputs": ["logits"],
        "coupling": found.coupling,
    }


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", RecipeError, "does not say what models is"),
        ('models = ["hf:a", "hf:b"]', RecipeError, "does not say what output is"),
        ('models = ["hf:a"]\noutput = "x"', TooFewModelsError, "only hf:a"),
        ('models = "hf:a"\noutput = "x"', RecipeError, "must be a list"),
        (LEAST + "wieghts = [1, 1]", RecipeError, "did you mean weights"),
        (LEAST + "weights = [1]", OptionError, "1 numbers for 2 models"),
        (LEAST + 'weights = ["a", 1]', RecipeError, "must be a list"),
        (LEAST + "weights = [true, 1]", RecipeError, "must be a number"),
        (LEAST + "target = 2", OptionError, "choose -2 to 1"),
        (LEAST + "target = true", RecipeError, "whole number"),
        (LEAST + "refine = 0", RecipeError, "give 1 or more"),
        (LEAST + "refine = 9\nlabels = 2", OptionError, "from 0 to 1"),
        (LEAST + "labels = 0.5", OptionError, "give refine"),
        (LEAST + "stream = true\nlabels = 0.5", OptionError, "leave out untie, labels"),
        (LEAST + "batch_size = 1.5", RecipeError, "whole number"),
        (LEAST + "untie = 1", RecipeError, "true or false"),
        (LEAST + 'features = "activations"', CalibrationRequiredError, "calibration"),
        (LEAST + 'stream = true\nmethod = "auto"', OptionError, "leave out"),
        (LEAST + "shard_size = 0", OptionError, "0.001 or more"),
        (LEAST + "shard_size = nan", OptionError, "0.001 or more"),
        (LEAST + 'flow = "nonsense"', OptionError, "nonsense"),
        (LEAST + 'observe = "nonsense"', OptionError, "nonsense"),
        (LEAST + "[coupling]\nsoftness = 1", RecipeError, "no coupling.softness"),
        (LEAST + "[coupling]\nshare = 2", OptionError, "share"),
        (LEAST + "gap = 1", OptionError, "gap"),
        (LEAST + 'gap = 0.1\ncoupling = "soft"', OptionError, "gap is of hard"),
        (LEAST + 'gap = 0.1\nflow = "reference"', OptionError, "gap is of hard"),
        (LEAST + "[coupling]\noverrides = 3", RecipeError, "table by pattern"),
        (LEAST + "[coupling.overrides]\na = 3", RecipeError, "a table such as"),
        ("models = [", RecipeError, "not valid TOML"),
        (LEAST + 'calibration = "a\\u0000b"', RecipeError, "no path"),
    ],
)
def test_a_bad_recipe_says_what_to_do(tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Recipe.read(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path / "missing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.read(tmp_path / "bytes.toml")


NAMES = st.sampled_from([*Recipe.__dataclass_fields__, "other"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
COUPLINGS = st.dictionaries(
    st.sampled_from(["share", "regularisation", "absolute", "widening", "relaxation", "gap", "overrides"]),
    VALUES,
)


def _holds(table: dict[str, Any]) -> None:
    """Read a table: a recipe, or an error of ours."""
    with contextlib.suppress(FusionError):
        Recipe.from_table(table).options()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES), COUPLINGS | st.none())
def test_any_table_is_a_recipe_or_refused(table: dict[str, Any], coupling: dict[str, Any] | None) -> None:
    given_models = {"models": ["hf:a", "hf:b"], "output": "out"}
    _holds({**given_models, **table, **({} if coupling is None else {"coupling": coupling})})
    _holds(table)


@pytest.mark.nightly
@settings(max_examples=25_000, deadline=None)
@given(st.dictionaries(NAMES, VALUES), COUPLINGS | st.none())
def test_any_of_many_tables(table: dict[str, Any], coupling: dict[str, Any] | None) -> None:
    given_models = {"models": ["hf:a", "hf:b"], "output": "out"}
    _holds({**given_models, **table, **({} if coupling is None else {"coupling": coupling})})
    _holds(table)


# -- from the command line -----------------------------------------------------------------------------


def recipe(tmp_path: Path, **more: object) -> Path:
    """Write a recipe of two language models; values as JSON, which TOML reads alike here."""
    models = [f"hf:{zoo.saved_llama(tmp_path, seed)}" for seed in (0, 1)]
    facts = {"models": models, "output": str(tmp_path / "out"), **more}
    return write(tmp_path, "".join(f"{name} = {json.dumps(value)}\n" for name, value in facts.items()))


def test_a_recipe_fuses_as_options_do(tmp_path: Path) -> None:
    path = recipe(tmp_path, weights=[3, 1], target=0, inputs=["input_ids=2x6:int64"])
    ran = CliRunner().invoke(app, ["run", str(path)])
    assert ran.exit_code == 0, ran.output
    models = [f"hf:{tmp_path / str(seed)}" for seed in (0, 1)]
    options = ["--weights", "3,1", "--target", "0", "--input", "input_ids=2x6:int64"]
    options += ["--json", str(tmp_path / "report.json")]
    other = CliRunner().invoke(app, ["fuse", *models, "-o", str(tmp_path / "other"), *options])
    assert other.exit_code == 0, other.output
    assert "report.json" in other.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights"] == [0.75, 0.25]
    assert report["seconds"]
    assert len(report["spaces"]) == 5
    first, second = read_weights(tmp_path / "out"), read_weights(tmp_path / "other")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_couplings_differ_by_space(tmp_path: Path) -> None:
    """What only a file can say: hidden units soft, all else hard."""
    path = recipe(tmp_path, inputs=["input_ids=2x6:int64"])
    path.write_text(path.read_text() + '[coupling.overrides."*.mlp.*"]\nregularisation = 0.5\n')
    ran = CliRunner().invoke(app, ["run", str(path)])
    assert ran.exit_code == 0, ran.output
    models = [LlamaForCausalLM.from_pretrained(tmp_path / str(seed)) for seed in (0, 1)]
    tokens = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}
    coupling = Coupling(overrides={"*.mlp.*": Coupling(0.5)})
    expected = fxfusion.fuse(models, kwargs=tokens, coupling=coupling).state_dict()
    found = read_weights(tmp_path / "out")
    hard = fxfusion.fuse(models, kwargs=tokens).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    assert any(not torch.allclose(found[name], hard[name]) for name in found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dry_run_reads_and_writes_nothing(tmp_path: Path, stream: bool) -> None:
    path = recipe(tmp_path, stream=stream)
    for seed in (0, 1):  # a weight that could be read no more
        weights = tmp_path / str(seed) / "model.safetensors"
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    ran = CliRunner().invoke(app, ["run", str(path), "--dry-run", "--json", str(tmp_path / "takes.json")])
    assert ran.exit_code == 0, ran.output
    assert "what it takes" in ran.output
    takes = json.loads((tmp_path / "takes.json").read_text())
    assert takes["parents"] == 2
    assert takes["memory"] > 0
    assert takes["seconds"] > 0
    assert "free spaces" in ran.output
    assert not (tmp_path / "out").exists()
    (tmp_path / "0" / "model.safetensors").unlink()
    refused = CliRunner().invoke(app, ["run", str(path), "--dry-run"])
    assert refused.exit_code == 2
    assert isinstance(refused.exception, SystemExit)


def test_a_reference_that_names_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelReferenceError):
        estimate(Recipe(("timm:nothing", "timm:nothing"), tmp_path / "out"))


def test_what_is_told_is_what_is_counted(tmp_path: Path) -> None:
    plan, found = estimate(Recipe.read(recipe(tmp_path)))
    files = [tmp_path / str(seed) / "model.safetensors" for seed in (0, 1)]
    assert found.files == sum(file.stat().st_size for file in files)
    assert found.parameters == sum(tensor.numel() for tensor in read_weights(tmp_path / "0").values())
    assert found.seconds > 0
    # One layer: per token 2 operations a weight (the embedding is looked up), and attention over 16 tokens.
    linear = found.parameters - 23 * 16 - 3 * 16
    assert found.calibrating == pytest.approx(16 * 2 * linear + 4 * 16 * 16 * 16)
    assert comparisons(plan) > 0


def test_every_space_of_a_weight_is_compared() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = fxfusion.plan(model, (torch.ones(2, 4),))
    assert comparisons(plan) == 2 * ((32 + 8) * 8 + 48 * (8 + 6) + 6 * 6 + 12 * 6)


def test_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    np.savez(tmp_path / "calibration.npz", input_ids=np.zeros((4, 6), dtype=np.int64))
    path = recipe(tmp_path)
    _, loaded = estimate(Recipe.read(path))
    assert loaded.memory >= 2 * loaded.files
