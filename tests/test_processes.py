"""Several processes under torchrun: the same bytes as one, and no process left waiting for a failed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfusion.checkpoints import read_weights, save_weights
from fxfusion.processes import Processes, current, handed_out, together
from tests import zoo

NETWORK = """
from torch import nn

def network():
    convolution = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    head = nn.Sequential(nn.Linear(96, 12), nn.LayerNorm(12), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 4))
    return nn.Sequential(*convolution, *head)
"""
FAILING = """
from pathlib import Path
import torch
from fxfusion.processes import launched

def work(item):
    if item == 3:
        raise ValueError("item 3 is bad")
    return torch.full((2,), item)

with launched() as processes:
    found = processes.share(work, [1, 2, 4], [1.0, 5.0, 2.0])
    assert [int(item[0]) for item in found] == [1, 2, 4], found
    assert processes.once(lambda: processes.rank) == 0
    try:
        processes.share(work, [1, 2, 3, 4])
    except ValueError as error:
        said = f"raised in {processes.rank} of {processes.count}: {error}"
        Path(f"{processes.rank}.txt").write_text(said)  # what two print at once may be torn

assert processes.group is None  # else its threads may abort the interpreter's end
"""


def run(folder: Path, count: int, *arguments: str) -> str:
    """Run a command in as many processes, each on one thread: more would add numbers in another order."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launcher if count > 1 else []), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_file_to_file(tmp_path: Path) -> None:
    paths = [zoo.saved_llama(tmp_path, seed, vocabulary=5000, width=64, layers=2) for seed in (0, 1)]
    tokens = np.random.default_rng(0).integers(0, 5000, (7, 6))
    np.savez(tmp_path / "text.npz", input_ids=tokens)
    for count in (1, 2):
        options = ["--stream", "--shard-size", "0.001", "--input", "input_ids=2x6:int64"]
        options += ["--calibration", "text.npz", "--batch-size", "3", "--max-memory", "0.008"]
        models = [f"hf:{path}" for path in paths]
        printed = run(tmp_path, count, "-m", "fxfusion.cli", "fuse", *models, "-o", f"out-{count}", *options)
        assert printed.count("wrote") == 1
    alone, both = tmp_path / "out-1", tmp_path / "out-2"
    shards = sorted(alone.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert shard.read_bytes() == (both / shard.name).read_bytes()
    parent = read_weights(paths[1])
    assert any(not torch.equal(parent[name], tensor) for name, tensor in read_weights(both).items())


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_calibrated(tmp_path: Path, count: int) -> None:
    """Five batches, the last smaller, on two and three processes, which do not divide them."""
    (tmp_path / "networks.py").write_text(NETWORK)
    sys.path.insert(0, str(tmp_path))
    try:
        from networks import network  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("networks")
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_weights(network().state_dict(), tmp_path / f"{seed}.safetensors")
    np.savez(tmp_path / "images.npz", input=np.random.default_rng(0).random((35, 1, 6, 6), dtype=np.float32))
    models = [f"networks:network@{seed}.safetensors" for seed in (0, 1)]
    for number in (1, count):
        options = ["--calibration", "images.npz", "--batch-size", "8", "-o", f"{number}-fused.safetensors"]
        printed = run(tmp_path, number, "-m", "fxfusion.cli", "fuse", *models, *options)
        assert printed.count("wrote") == 1
    alone, shared = (tmp_path / f"{number}-fused.safetensors" for number in (1, count))
    assert alone.read_bytes() == shared.read_bytes()
    averaged = {
        name: (read_weights(tmp_path / "0.safetensors")[name] + tensor) / 2
        for name, tensor in read_weights(tmp_path / "1.safetensors").items()
    }
    assert any(not torch.allclose(averaged[name], tensor) for name, tensor in read_weights(shared).items())


def test_an_error_of_one_is_raised_in_all(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    run(tmp_path, 2, "failing.py")
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text() == f"raised in {rank} of 2: item 3 is bad"


def test_alone_nothing_is_sent() -> None:
    with together() as processes:
        assert processes.count == 1
        assert processes.leads
        assert processes.share(lambda item: item + 1, [1, 2]) == [2, 3]
        assert processes.once(lambda: "done") == "done"
    assert current() == current()
    assert isinstance(current(), Processes)


@given(st.lists(st.floats(0, 100), max_size=20), st.integers(1, 5))
def test_work_is_handed_out_evenly(sizes: list[float], count: int) -> None:
    owners = handed_out(sizes, count)
    assert len(owners) == len(sizes)
    loads = [0.0] * count
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    # Whoever has most had least before its last item, so no more than the mean (Graham, 1966).
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0) + 1e-9
