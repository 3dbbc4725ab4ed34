"""A fusion from file to file that is killed: gone on with, it gives the bytes of one that was not."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxfusion import streaming
from fxfusion.hollow import hollow

CONFIG = LlamaConfig(
    vocab_size=3000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SHARD = 200_000  # bytes: a dozen files and more


def fuse(paths: list[Path], out: Path) -> None:
    """Fuse in the calling process; importable, for processes of their own."""
    torch.set_num_threads(1)
    inputs = {"input_ids": torch.arange(8).reshape(2, 4), "use_cache": False}
    models = [hollow(lambda: LlamaForCausalLM._from_config(CONFIG)) for _ in paths]
    streaming.fuse_files(paths, out, models, kwargs=inputs, shard_bytes=SHARD)


def content(directory: Path) -> dict[str, bytes]:
    """Return all files but the report, which says how long everything took."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix != ".html"}


def finished(partial: Path) -> dict[str, int]:
    """Return the shards that are there, with the time of their writing."""
    return {file.name: file.stat().st_mtime_ns for file in (partial / "result").glob("[!.]*.safetensors")}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"parent-{seed}")
        LlamaForCausalLM(CONFIG).save_pretrained(paths[-1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def run(out: Path, killed_after: float | None = None) -> float:
        """Run until the end, or so long after work began, and return how long that took."""
        process = context.Process(target=fuse, args=(paths, out))
        process.start()
        partial = out.parent / f".{out.name}.partial"
        while process.is_alive() and not partial.exists():
            time.sleep(0.005)
        start = time.perf_counter()
        process.join(killed_after)
        if process.is_alive():
            process.kill()
        process.join()
        assert process.exitcode == 0 or (killed_after is not None and process.exitcode == -9)
        return time.perf_counter() - start

    run(tmp_path / "first")  # what a process pays once
    whole = run(tmp_path / "expected")
    expected = content(tmp_path / "expected")
    assert sum(name.endswith(".safetensors") for name in expected) > 10
    moments = random.Random(0)
    interrupted = shards = 0
    for number in range(kills):
        out = tmp_path / f"out-{number}"
        run(out, whole * (number + moments.random()) / kills)
        partial = tmp_path / f".{out.name}.partial"
        left = finished(partial) if partial.exists() else {}
        interrupted += partial.exists()
        shards += len(left)
        if out.exists():
            assert content(out) == expected  # whole, or not there
        run(out)
        assert content(out) == expected
        written = {name: (out / name).stat().st_mtime_ns for name in left}
        assert sum(written[name] != left[name] for name in left) <= 1
        assert not partial.exists()
        shutil.rmtree(out)
    assert interrupted >= kills // 2
    assert shards > 0
