"""A fusion from file to file that is killed: gone on with, it gives the bytes of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxfusion import streaming
from fxfusion.hollow import hollow
from fxfusion.threads import one_thread

CONFIG = LlamaConfig(
    vocab_size=3000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SHARD = 200_000  # bytes: a dozen files and more


def fuse(paths: list[Path], out: Path, moves: int | None = None) -> None:
    """Fuse in the calling process; die before a file takes its place for the so-manieth time."""
    if moves is not None:
        left = iter(range(moves - 1))

        def die(event: str, _: tuple[Any, ...]) -> None:
            if event == "os.rename" and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    inputs = {"input_ids": torch.arange(8).reshape(2, 4), "use_cache": False}
    models = [hollow(lambda: LlamaForCausalLM._from_config(CONFIG)) for _ in paths]
    with one_thread():
        streaming.fuse_files(paths, out, models, kwargs=inputs, shard_bytes=SHARD)


def content(directory: Path) -> dict[str, bytes]:
    """Return all files but the report, which says how long everything took."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix != ".html"}


def finished(out: Path) -> dict[str, int]:
    """Return the shards that a killed run left, with the time of their writing."""
    directory = out.parent / f".{out.name}.partial" / "result"
    return {file.name: file.stat().st_mtime_ns for file in directory.glob("[!.]*.safetensors")}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parents")
    paths = [folder / "parent-0", folder / "parent-1"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        LlamaForCausalLM(CONFIG).save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(scope="module")
def expected(parents: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what a fusion gives that nobody kills."""
    out = tmp_path_factory.mktemp("expected") / "out"
    fuse(parents, out)
    whole = content(out)
    assert sum(name.endswith(".safetensors") for name in whole) > 10
    return whole


def go_on(parents: list[Path], out: Path, expected: dict[str, bytes]) -> None:
    """Run again after a kill: the same bytes, and at most one shard is written twice."""
    left = finished(out)
    if out.exists():
        assert content(out) == expected  # whole, or not there
    fuse(parents, out)
    assert content(out) == expected
    assert sum((out / name).stat().st_mtime_ns != time for name, time in left.items()) <= 1
    assert not (out.parent / f".{out.name}.partial").exists()


@pytest.mark.parametrize(("moves", "shards"), [pytest.param(1, 0, marks=pytest.mark.nightly), (16, 7)])
def test_killed_before_a_file_takes_its_place(
    parents: list[Path],
    context: ForkServerContext,
    expected: dict[str, bytes],
    tmp_path: Path,
    moves: int,
    shards: int,
) -> None:
    process = context.Process(target=fuse, args=(parents, tmp_path / "out", moves))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(finished(tmp_path / "out")) == shards
    go_on(parents, tmp_path / "out", expected)


@pytest.mark.nightly
def test_killed_at_random_moments(
    parents: list[Path], context: ForkServerContext, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def run(out: Path, killed_after: float | None = None) -> float:
        """Run until the end, or so long after work began, and return how long that took."""
        process = context.Process(target=fuse, args=(parents, out))
        process.start()
        partial = out.parent / f".{out.name}.partial"
        while process.is_alive() and not partial.exists():
            time.sleep(0.005)
        start = time.perf_counter()
        process.join(killed_after)
        if process.is_alive():
            process.kill()
        process.join()
        assert process.exitcode == 0 or (killed_after is not None and process.exitcode == -signal.SIGKILL)
        return time.perf_counter() - start

    run(tmp_path / "first")  # what a process pays once
    whole = run(tmp_path / "whole")
    moments = random.Random(0)
    kills, interrupted, shards = 20, 0, 0
    for number in range(kills):
        out = tmp_path / f"out-{number}"
        run(out, whole * (number + moments.random()) / kills)
        interrupted += (tmp_path / f".{out.name}.partial").exists()
        shards += len(finished(out))
        go_on(parents, out, expected)
        shutil.rmtree(out)
    assert interrupted >= kills // 2
    assert shards > 0
