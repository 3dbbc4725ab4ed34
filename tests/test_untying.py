"""Tied embeddings get tensors of their own, where the class can be told so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxfusion
from fxfusion.capture import tied_groups
from fxfusion.cli import app
from fxfusion.errors import OptionError
from tests import zoo


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "t5"])
def test_an_untied_copy_computes_the_same_and_loads_into_its_class(name: str) -> None:
    model = zoo.build(name)
    args, kwargs = zoo.inputs(name)
    before = tied_groups(model)
    separate = fxfusion.untied(model)
    assert tied_groups(model) == before
    assert len(tied_groups(separate)) < len(before) or not before
    ends: Any = separate
    assert ends.get_output_embeddings().weight is not ends.get_input_embeddings().weight
    torch.testing.assert_close(separate(*args, **kwargs)[0], model(*args, **kwargs)[0])
    fresh = type(model)(copy.deepcopy(separate.config)).eval()
    assert tied_groups(fresh) == tied_groups(separate)
    fresh.load_state_dict(separate.state_dict())
    torch.testing.assert_close(fresh(*args, **kwargs)[0], model(*args, **kwargs)[0])


def test_nothing_else_is_copied() -> None:
    model = zoo.build("gpt2")
    pointers = {tensor.data_ptr() for tensor in model.parameters()}
    separate = fxfusion.untied(model)
    assert sum(tensor.data_ptr() not in pointers for tensor in separate.parameters()) == 1


def test_what_loading_would_tie_again_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(OptionError, match="no configuration"):
        fxfusion.untied(model)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_stream_of_an_untied_model_turns(name: str) -> None:
    """A tied head cannot take the last norm's weight; a head of its own can, and the function is kept."""
    args, kwargs = zoo.inputs(name)
    models = [zoo.build(name, seed) for seed in range(2)]
    tied = fxfusion.align(models, args, kwargs, symmetry="largest")
    free = fxfusion.align(models, args, kwargs, symmetry="largest", untie=True)
    config: Any = models[0].config
    size = config.hidden_size
    assert not any(space.symmetry.rotates for space in tied.plan if space.size == size and not space.scope)
    assert any(space.symmetry.rotates for space in free.plan if space.size == size and not space.scope)
    separate = fxfusion.untied(models[0])
    expected = models[0](*args, **kwargs)[0]
    fresh: Any = type(separate)(copy.deepcopy(separate.config)).eval()
    fresh.load_state_dict(free.state_dict(0))
    torch.testing.assert_close(fresh(*args, **kwargs)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_written_configuration_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model: Any = zoo.build("gpt2", "ab".index(name))
        model.save_pretrained(tmp_path / name)
    command = ["fuse", f"hf:{tmp_path / 'a'}", f"hf:{tmp_path / 'b'}", "--untie", "--symmetry", "largest"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    kind: Any = type(zoo.build("gpt2"))
    loaded = kind.from_pretrained(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    args, kwargs = zoo.inputs("gpt2")
    models = [zoo.build("gpt2", seed) for seed in range(2)]
    expected = fxfusion.fuse(models, args, kwargs, symmetry="largest", untie=True).module
    torch.testing.assert_close(
        loaded.eval()(*args, **kwargs)[0], expected(*args, **kwargs)[0], rtol=1e-4, atol=1e-5
    )
