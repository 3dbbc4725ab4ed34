"""Fusion from file to file: the same as in memory, and gone on with where it was stopped."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fxfusion
from fxfusion import streaming
from fxfusion.archives import hollow_archive
from fxfusion.checkpoints import read_weights, save_weights, write_safetensors
from fxfusion.cli import app
from fxfusion.errors import (
    ArchitectureMismatchError,
    CheckpointError,
    FusionError,
    InvalidWeightError,
    MemoryLimitError,
    ModelReferenceError,
    OptionError,
)
from fxfusion.hollow import hollow
from fxfusion.references import module_of, resolve_hollow
from fxfusion.report import FusionReport
from fxfusion.stored import StoredWeights

TOKENS = torch.arange(12).reshape(2, 6) % 23
KWARGS = {"input_ids": TOKENS, "use_cache": False}
SHARD = 4_000  # bytes: several files


def llama(seed: int, hidden: int = 24, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints, in shards, one of them with a tokenizer."""
    paths = []
    for seed in range(2):
        path = tmp_path_factory.mktemp("parents") / f"parent-{seed}"
        llama(seed).save_pretrained(path, max_shard_size="4KB")
        paths.append(path)
    (paths[1] / "tokenizer.json").write_text("{}")
    (paths[1] / "README.md").write_text("The parent's own card.")
    return paths


def fuse(paths: list[Path], out: Path, **options: object) -> FusionReport:
    models = [module_of(resolve_hollow(f"hf:{path}")[0]) for path in paths]
    settings: dict[str, object] = {"shard_bytes": SHARD, **options}
    return streaming.fuse_files(paths, out, models, kwargs=KWARGS, **settings)  # type: ignore[arg-type]


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix != ".html"}


def test_the_result_is_that_of_a_fusion_in_memory(parents: list[Path], tmp_path: Path) -> None:
    report = fuse(parents, tmp_path / "out")
    expected = fxfusion.fuse([llama(0), llama(1)], kwargs=KWARGS)
    found = read_weights(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert report.spaces == expected.report.spaces
    assert report.certified == expected.report.certified
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**KWARGS).logits, expected.module(**KWARGS)[0])
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "out.report.html"} <= files
    assert len([name for name in files if name.startswith("model-")]) > 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "parent-0 (0.5), parent-1 (0.5)" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_assignments_within_a_gap(
    parents: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same as in memory; how far from the best is in the report, and in the log beside the stages."""
    with caplog.at_level(logging.INFO, "fxfusion"):
        report = fuse(parents, tmp_path / "out", gap=0.3)
    expected = fxfusion.fuse([llama(0), llama(1)], kwargs=KWARGS, coupling=fxfusion.Coupling(gap=0.3))
    found = read_weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    assert any("certified to cost at most" in note for note in report.notes)
    assert set(report.notes) <= {record.message for record in caplog.records}
    assert any(record.message.startswith("write shards: done in") for record in caplog.records)


def test_a_planted_twin_is_recovered(tmp_path: Path) -> None:
    model = llama(3)
    twin = llama(3)
    twin.load_state_dict(fxfusion.scramble(model, kwargs=KWARGS, seed=5))
    paths = [tmp_path / "twin", tmp_path / "model"]
    for path, item in zip(paths, (twin, model), strict=True):
        item.to(torch.bfloat16).save_pretrained(path)
    fuse(paths, tmp_path / "out")
    found = read_weights(tmp_path / "out")
    own = read_weights(paths[1])
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize("target", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_widths_and_shares_may_differ(parents: list[Path], tmp_path: Path, target: int) -> None:
    llama(7, hidden=40).save_pretrained(tmp_path / "wide")
    fuse([tmp_path / "wide", parents[1]], tmp_path / "out", weights=[3, 1], target=target)
    expected = fxfusion.fuse([llama(7, hidden=40), llama(1)], kwargs=KWARGS, weights=[3, 1], target=target)
    found = read_weights(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_tied_weights_are_written_as_the_target_has_them(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=16, n_layer=1, n_head=2, n_inner=20)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel(config).eval())
        models[-1].save_pretrained(tmp_path / str(seed))
    fuse([tmp_path / "0", tmp_path / "1"], tmp_path / "out", shard_bytes=10**9)
    expected = fxfusion.fuse(models, kwargs=KWARGS).state_dict()
    found = read_weights(tmp_path / "out")
    assert list(found) == list(read_weights(tmp_path / "1"))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (tmp_path / "out" / "model.safetensors").is_file()


class Batched(nn.Module):
    """A network with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.shift


def batch_norm_network(seed: int) -> Batched:
    torch.manual_seed(seed)
    model = Batched().eval()
    model.layers[1].get_buffer("running_var").uniform_(0.5, 2)
    model.get_buffer("shift").fill_(3.0)
    return model


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small checkpoints of one file each."""
    folder = tmp_path_factory.mktemp("batched")
    paths = [folder / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        save_weights(batch_norm_network(seed).state_dict(), path)
    return paths


def test_buffers_come_from_the_files(batched: list[Path], tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    streaming.fuse_files(batched, tmp_path / "out", [hollow(Batched) for _ in batched], (x,))
    expected = fxfusion.fuse([batch_norm_network(0), batch_norm_network(1)], (x,)).state_dict()
    found = read_weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


DATA = [
    {"input_ids": torch.randint(23, (8, 6), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
]
LEAST = 110_000  # bytes; a layer takes three eighths of it


def test_calibrated_as_in_memory(parents: list[Path], tmp_path: Path) -> None:
    report = fuse(parents, tmp_path / "out", calibration=DATA, memory=LEAST)
    expected = fxfusion.fuse(
        [llama(0), llama(1)], kwargs=KWARGS, calibration=DATA, method="permutation", repair="none"
    )
    found = read_weights(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert report.spaces == expected.report.spaces
    by_weights = fxfusion.fuse([llama(0), llama(1)], kwargs=KWARGS).state_dict()
    assert any(not torch.equal(found[name], tensor) for name, tensor in by_weights.items())
    assert report.seconds["calibrate"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.nightly
def test_calibrated_across_widths(parents: list[Path], tmp_path: Path) -> None:
    llama(7, hidden=40).save_pretrained(tmp_path / "wide")
    fuse([tmp_path / "wide", parents[1]], tmp_path / "out", calibration=DATA, memory=2 * LEAST)
    expected = fxfusion.fuse(
        [llama(7, hidden=40), llama(1)], kwargs=KWARGS, calibration=DATA, method="permutation"
    )
    found = read_weights(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_memory_limit_that_is_too_low(parents: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MemoryLimitError, match="raise it"):
        fuse(parents, tmp_path / "out", calibration=DATA, memory=1000)
    assert not (tmp_path / "out").exists()


def test_statistics_of_batch_normalisations_are_said_to_be_averages(
    batched: list[Path], tmp_path: Path
) -> None:
    report = streaming.fuse_files(
        batched, tmp_path / "out", [hollow(Batched) for _ in batched], (torch.ones(4, 5),)
    )
    assert any("batch normalisations" in note for note in report.notes)


def test_tensors_are_read_a_bounded_number_of_times(
    parents: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StoredWeights] = []

    class Counted(StoredWeights):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(streaming, "StoredWeights", Counted)
    report = fuse(parents, tmp_path / "out")
    assert len(made) == 2
    sweeps = 5
    for stored in made:
        assert set(stored.reads) == set(stored)
        # Certified on two inputs, once as they are and once moved, and counted; compared; written.
        assert max(stored.reads.values()) <= 6 + 3 * sweeps + 1
    assert report.seconds["read for writing"] > 0


# -- going on ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


def stop(*_: object) -> None:
    raise Killed


def killed_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Let the ``moment``-th step of a run be its last."""
    steps = itertools.count(1)

    def stepping(original: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object) -> object:
            if next(steps) == moment:
                raise Killed
            return original(*args)

        return step

    for name in ("write_text", "write_safetensors", "take_place", "_hash", "_fused"):
        patch.setattr(streaming, name, stepping(getattr(streaming, name)))


class Written:
    """Writes files and keeps their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, state: dict[str, torch.Tensor], path: Path, *rest: dict[str, str]) -> None:
        self.names.append(path.name)
        write_safetensors(state, path, *rest)


def test_an_interrupted_run_is_gone_on_with(batched: list[Path], tmp_path: Path) -> None:
    """At whatever moment it stops, a second run gives the same bytes, and writes one shard twice at most."""

    def run(out: Path) -> None:
        models = [hollow(Batched) for _ in batched]
        streaming.fuse_files(batched, out, models, (torch.ones(4, 5),), shard_bytes=200)

    run(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    count = sum(name.startswith("model-") for name in whole)
    assert count > 2
    stopped = 0
    for moment in itertools.count(1, 3):
        out = tmp_path / f"out-{moment}"
        with pytest.MonkeyPatch.context() as patch:
            killed_at(moment, patch)
            try:
                run(out)
                break
            except Killed:
                stopped += 1
        kept = len(list((tmp_path / f".{out.name}.partial").glob("*.sha256")))
        written = Written()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streaming, "write_safetensors", written)
            run(out)
        assert sum("model-" in name for name in written.names) == count - kept
        found = content(out)
        assert {**found, "README.md": b""} == {**whole, "README.md": b""}
    assert stopped > 6


def test_a_run_that_ended_just_before_tidying_up(parents: list[Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(Killed):
            fuse(parents, tmp_path / "out")
    before = content(tmp_path / "out")
    fuse(parents, tmp_path / "out")
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["parent", "option", "shard", "data"])
def test_another_job_begins_anew(batched: list[Path], tmp_path: Path, change: str) -> None:
    paths = [Path(shutil.copy(path, tmp_path / path.name)) for path in batched]
    options: dict[str, Any] = {}

    def run(out: str) -> None:
        models = [hollow(Batched) for _ in paths]
        streaming.fuse_files(paths, tmp_path / out, models, (torch.ones(4, 5),), shard_bytes=200, **options)

    if change == "data":
        options["calibration"] = [torch.randn(8, 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "take_place", stop)
        with pytest.raises(Killed):
            run("out")
    if change == "parent":
        save_weights(batch_norm_network(9).state_dict(), paths[0])
    elif change == "option":
        options["weights"] = [1, 2]
    elif change == "data":
        options["calibration"] = [torch.randn(8, 5)]
    else:
        shard = next((tmp_path / ".out.partial" / "result").glob("model-00002*"))
        shard.write_bytes(shard.read_bytes()[:-4] + b"0000")
    run("out")
    run("fresh")
    found, fresh = content(tmp_path / "out"), content(tmp_path / "fresh")
    assert {**found, "README.md": b""} == {**fresh, "README.md": b""}


# -- what is refused ---------------------------------------------------------------------------------


def damaged(parents: list[Path], tmp_path: Path) -> Path:
    return shutil.copytree(parents[0], tmp_path / "damaged")


def test_a_truncated_shard_is_refused(parents: list[Path], tmp_path: Path) -> None:
    path = damaged(parents, tmp_path)
    shard = next(iter(sorted(path.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        fuse([path, parents[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(parents: list[Path], tmp_path: Path) -> None:
    model = llama(0)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(InvalidWeightError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        fuse([tmp_path / "broken", parents[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["missing", "extra", "shape"])
def test_other_names_and_shapes_are_refused(parents: list[Path], tmp_path: Path, what: str) -> None:
    path = damaged(parents, tmp_path)
    weights = read_weights(path)
    for file in path.glob("model*"):
        file.unlink()
    if what == "missing":
        del weights["model.norm.weight"]
    elif what == "extra":
        weights["extra.weight"] = torch.ones(1)
    else:
        weights["model.norm.weight"] = torch.ones(3)
    save_weights(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM"):
        fuse([path, parents[1]], tmp_path / "out")


def test_other_configurations_are_refused(parents: list[Path], tmp_path: Path) -> None:
    llama(0, rms_norm_eps=1e-3).save_pretrained(tmp_path / "other")
    with pytest.raises(ArchitectureMismatchError, match="rms_norm_eps"):
        fuse([tmp_path / "other", parents[1]], tmp_path / "out")


def test_a_directory_with_something_else_stays(parents: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FusionError, match=r"mine\.txt"):
        fuse(parents, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_tied_names_with_other_values_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    for seed in range(2):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / str(seed))
    weights = read_weights(tmp_path / "0")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    save_weights(weights, tmp_path / "0" / "model.safetensors")
    with pytest.raises(CheckpointError, match="ties them to one tensor"):
        fuse([tmp_path / "0", tmp_path / "1"], tmp_path / "out")


def test_two_shards_with_one_name_are_refused(parents: list[Path], tmp_path: Path) -> None:
    path = damaged(parents, tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    shutil.copyfile(path / first, path / second)
    with pytest.raises(CheckpointError, match="both hold"):
        fuse([path, parents[1]], tmp_path / "out")


# -- networks without weights, and the command line --------------------------------------------------


def test_a_hollow_network_keeps_ties_and_buffers() -> None:
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = hollow(lambda: GPT2LMHeadModel(config))
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    rotary = hollow(lambda: llama(0))
    name = "model.rotary_emb.inv_freq"
    assert torch.equal(rotary.get_buffer(name), llama(0).get_buffer(name))
    assert isinstance(nn.Linear(2, 2).weight.data, torch.Tensor)
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_command_streams(parents: list[Path], tmp_path: Path) -> None:
    references = [f"hf:{path}" for path in parents]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["fuse", *references, "-o", str(out), "--stream"])
    assert result.exit_code == 0, result.output
    expected = fxfusion.fuse([llama(0), llama(1)], kwargs=KWARGS).state_dict()
    found = read_weights(out)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    again = CliRunner().invoke(app, ["fuse", *references, "-o", str(out), "--stream", "--repair", "norms"])
    assert again.exit_code != 0
    assert isinstance(again.exception, OptionError) or "--stream solves permutations" in again.output


class Folding(nn.Module):
    """Tied weights, statistics, a constant, and a weight that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.inner = nn.Parameter(torch.randn(12, 12).T)
        self.leave = nn.Linear(12, 6)
        self.leave.weight = nn.Parameter(torch.randn(12, 6).T.contiguous())
        self.again = nn.Linear(6, 12, bias=False)
        self.again.weight = self.enter.weight
        self.register_buffer("scale", torch.arange(6.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.enter(x)) + self.again(x)) @ self.inner
        return self.leave(torch.relu(hidden)) * self.scale


def archived(folder: Path, count: int = 2) -> tuple[list[Path], list[ExportedProgram]]:
    paths, programs = [], []
    for seed in range(count):
        torch.manual_seed(seed)
        model = Folding()
        model.norm.running_mean = torch.randn(12)
        x = torch.randn(4, 6)
        programs.append(torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch")},)))
        paths.append(folder / f"{seed}.pt2")
        torch.export.save(programs[-1], paths[-1])
    return paths, programs


@pytest.mark.parametrize("calibrated", [False, True])
def test_archives_are_fused_from_file_to_file(tmp_path: Path, calibrated: bool) -> None:
    """The same as two programs in memory, however their tensors are laid out; no weight is in the network."""
    paths, programs = archived(tmp_path)
    batches = list(torch.randn(3, 8, 6)) if calibrated else None
    models = [hollow_archive(path) for path in paths]
    assert {name: value.shape for name, value in models[1].state_dict.items()} == {
        name: value.shape for name, value in programs[1].state_dict.items()
    }
    assert models[1].state_dict["enter.weight"] is models[1].state_dict["again.weight"]
    report = streaming.fuse_files(paths, tmp_path / "out", models, calibration=batches)
    expected = fxfusion.fuse(programs, calibration=batches, method="permutation", repair="none")
    found = read_weights(tmp_path / "out")
    assert sorted(found) == sorted(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert report.spaces == expected.report.spaces


def test_an_archive_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    (path,), (program,) = archived(tmp_path, 1)
    stored = StoredWeights(path)
    assert set(stored) == set(program.state_dict)
    for name, tensor in program.state_dict.items():
        assert torch.equal(stored[name], tensor), name
        assert stored.shapes[name] == tuple(tensor.shape)
    assert set(stored.reads.values()) == {1}
    content = bytearray(path.read_bytes())
    place = content.index(program.state_dict["inner"].detach().T.contiguous().numpy().tobytes())
    content[place + 5] ^= 1
    path.write_bytes(bytes(content))
    damaged = StoredWeights(path)
    assert torch.equal(damaged["leave.weight"], program.state_dict["leave.weight"])
    with pytest.raises(CheckpointError, match="truncated or not a file"):
        damaged["inner"]


def test_the_command_streams_archives(tmp_path: Path) -> None:
    paths, programs = archived(tmp_path)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["fuse", *map(str, paths), "-o", str(out), "--stream"])
    assert result.exit_code == 0, result.output
    expected = fxfusion.fuse(programs).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_weights(out).items())


def test_a_reference_without_weights_is_refused() -> None:
    with pytest.raises(ModelReferenceError, match="names no weights"):
        resolve_hollow("timm:test_vit")
