"""What is written about the library is so: docstrings' examples, and all code blocks of the documentation."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from typer.main import get_command
from typer.testing import CliRunner

import fxfusion
from fxfusion.cli import app
from tests import zoo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fxfusion.__path__, "fxfusion.")
    if not module.ispkg and module.name != "fxfusion.__main__"
)
SHORTER = {r"refine=\d+": "refine=2", r'method="learned"\)': 'method="learned", refine=2)'}
"""How blocks are changed to end soon."""
DAILY = ROOT / "README.md"
"""The page whose blocks run every day; all others run at night."""
LONG = ("fxfusion sweep", "fxfusion demo", "fxfusion fuse timm", "torchrun")
"""Commands of minutes, which the nightly run runs."""
ELSEWHERE = ("pip install", "python examples/", "python -m pytest", "mkdocs", "git ")
"""Commands that set up, or that other tests run."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Code between fences."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return all blocks of a language, in order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] == language:
                found.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def commands() -> list[Any]:
    """Return the command lines of all blocks; long ones are for the nightly run."""
    found = []
    for block in blocks("bash"):
        for number, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
            if line.strip() and not line.startswith((*ELSEWHERE, "#")):
                marks = [pytest.mark.nightly] if line.startswith(LONG) or block.page != DAILY else []
                found.append(pytest.param(line, marks=marks, id=f"{block}+{number}"))
    return found


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def names() -> dict[str, Any]:
    """Return what blocks take for granted: models of one class, example inputs, calibration data."""
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8)
    models = [zoo.small_vit(0), zoo.small_vit(1)]
    return {
        "fxfusion": fxfusion,
        "torch": torch,
        "model_a": models[0],
        "model_b": models[1],
        "models": models,
        "model": models[1],
        "wide": zoo.small_vit(2, hidden=24),
        "narrow": models[1],
        "images": images,
        "example": {"pixel_values": images},
        "batches": [{"pixel_values": torch.randn(4, 1, 8, 8)} for _ in range(3)],
        "labelled": [{"pixel_values": images, "labels": torch.arange(4) % 2} for _ in range(3)],
    }


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block), marks=[] if block.page == DAILY else [pytest.mark.nightly])
        for block in blocks("python")
    ],
)
def test_python(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = block.text
    for pattern, shorter in SHORTER.items():
        text = re.sub(pattern, shorter, text)
    exec(compile("\n" * block.line + text, str(block.page), "exec"), names())


def language(folder: Path, seed: int, name: str) -> None:
    """Write a language model whose output embedding is the input embedding."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=23, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that commands name."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        language(tmp_path, seed, name)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "checkpoints" / "bert")
    tokens = np.random.default_rng(0).integers(0, 23, (12, 6))
    np.savez(tmp_path / "text.npz", input_ids=tokens)
    np.savez(tmp_path / "test.npz", input_ids=tokens, labels=tokens)
    for block in blocks("toml"):
        (tmp_path / block.text.split()[1].rstrip(":")).write_text(block.text)
    return tmp_path


@pytest.mark.parametrize("line", commands())
def test_command(line: str, folder: Path) -> None:
    words = shlex.split(line, comments=True)
    if "timm:resnet18@a.safetensors" in words:
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            weights = timm.create_model("resnet18").state_dict()
            fxfusion.checkpoints.save_weights(weights, folder / f"{name}.safetensors")
        images = np.random.default_rng(0).random((32, 3, 224, 224), dtype=np.float32)
        np.savez(folder / "images.npz", x=images)
    if words[0] == "torchrun":
        run_in_processes(words)
        return
    assert words[0] == "fxfusion"
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output


def run_in_processes(words: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    subprocess.run(command, check=True, timeout=600)


def test_the_page_of_the_command_line_knows_every_option() -> None:
    page = (ROOT / "docs" / "pages" / "reference" / "command-line.md").read_text(encoding="utf-8")
    group = get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"## fxfusion {name}\n" in page
        section = page.split(f"## fxfusion {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("--") or option in section, (name, option)


def test_blocks_are_found() -> None:
    """A pattern that finds none would pass."""
    assert len(blocks("python")) > 5
    assert len(commands()) > 8
    assert len(MODULES) > 60


def test_what_is_long_is_written_somewhere() -> None:
    lines = [line for block in blocks("bash") for line in block.text.splitlines()]
    for prefix in LONG:
        assert any(prefix in line for line in lines), prefix
