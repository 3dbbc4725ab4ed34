"""What planning and calibration cost. Figures depend on the machine; run with ``-m benchmark -s``."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfusion
from tests import zoo


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet26", "swin_tiny_patch4_window7_224"])
def test_planning_takes_at_most_a_tenth_of_capture(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    model = zoo.build(name)
    start = time.perf_counter()
    prepared = fxfusion.prepare(model, args, kwargs)
    captured = time.perf_counter() - start
    planned = _best(lambda: fxfusion.plan(prepared))
    print(f"{name}: capture {captured:.2f} s, planning {planned:.3f} s, ratio {planned / captured:.3f}")
    assert planned <= 0.1 * captured


SEVENTY_BILLION = """
import resource, time, torch, transformers, fxfusion
config = transformers.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
ids = torch.randint(5, 100, (2, 16))
start = time.perf_counter()
prepared = fxfusion.prepare(model, (), {"input_ids": ids, "use_cache": False})
captured = time.perf_counter() - start
start = time.perf_counter()
plan = fxfusion.plan(prepared)
planned = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
print(len(prepared.graph.nodes), captured, planned, peak, len(plan.spaces), plan.covered)
"""


@pytest.mark.benchmark
def test_a_seventy_billion_parameter_shape_is_planned_in_seconds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY_BILLION], capture_output=True, text=True, check=True, timeout=900
    )
    nodes, captured, planned, peak, spaces, covered = map(float, done.stdout.split())
    print(f"{nodes:.0f} nodes: capture {captured:.1f} s, planning {planned:.2f} s, {peak:.2f} GiB at most")
    assert nodes > 5000
    assert planned < 10
    assert peak < 2
    assert spaces == 1 + 4 * 80
    assert covered > 0.999


CALIBRATION = """
import sys, torch, transformers
from pathlib import Path
from fxfusion.hollow import hollow
from fxfusion.planning import make_plan
from fxfusion.capture import capture
from fxfusion.pairing import Parent
from fxfusion.staging import MemoryLimit
from fxfusion.statistics import gather
from fxfusion.stored import StoredWeights

folder, limited = Path(sys.argv[1]), sys.argv[2] == "limited"
config = transformers.LlamaConfig(hidden_size=1024, intermediate_size=2752, num_hidden_layers=10,
    num_attention_heads=16, num_key_value_heads=4, vocab_size=8000, tie_word_embeddings=False)
if sys.argv[2] == "make":
    for seed in range(2):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / str(seed))
    raise SystemExit

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])

ids = torch.randint(7000, (2, 16), generator=torch.Generator().manual_seed(0))
model = hollow(lambda: transformers.LlamaForCausalLM._from_config(config))
found = capture(model, (), {"input_ids": ids, "use_cache": False})
plan = make_plan(found, found.select_outputs(None))
stored = [StoredWeights(folder / str(seed)) for seed in range(2)]
size = stored[0].size
states = stored if limited else [{name: one[name] for name in one} for one in stored]
parents = [Parent(found, plan, state) for state in states]
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS") - (0 if limited else 2 * size)
batches = [((), {"input_ids": ids + number, "use_cache": False}) for number in range(8)]
limit = MemoryLimit(size // 2, folder) if limited else None
digest, parts = {}, 0
for part in gather(parents, 1, batches, limit=limit):
    parts += 1
    for name, number in sorted(part[0]):
        moments = part[0].pop((name, number))
        signs = torch.arange(moments.cross.shape[-1]).double().cos()
        digest[f"{name} {number}"] = [moments.cross.abs().sum(), (moments.cross @ signs).norm()]
torch.save(digest, folder / f"{sys.argv[2]}.pt")
print(parts, size, resident("VmHWM") - before)
"""


@pytest.mark.benchmark
def test_calibration_in_half_of_a_models_size(tmp_path: Path) -> None:
    """Weights of both parents, statistics, activations: all that calibration adds to the process."""

    def run(what: str) -> list[int]:
        command = [sys.executable, "-c", CALIBRATION, str(tmp_path), what]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
        return [int(word) for word in done.stdout.split()]

    run("make")
    parts, size, limited = run("limited")
    _, _, whole = run("resident")
    print(f"{size / 1e6:.0f} MB: {limited / 1e6:.0f} MB in {parts} stages, {whole / 1e6:.0f} MB at once")
    assert limited <= size / 2
    assert whole > 2 * size
    expected, found = (torch.load(tmp_path / f"{what}.pt") for what in ("resident", "limited"))
    assert expected.keys() == found.keys()
    for name, numbers in expected.items():
        torch.testing.assert_close(found[name], numbers, rtol=1e-5, atol=0.0)


def _timm(name: str, size: int) -> Callable[[], tuple[torch.nn.Module, torch.Tensor]]:
    def make() -> tuple[torch.nn.Module, torch.Tensor]:
        import timm

        return timm.create_model(name, pretrained=False).eval(), torch.randn(1, 3, size, size)

    return make


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "resnet50", "convnext_tiny"])
def test_planning_beats_torch_pruning_on_the_same_model(name: str) -> None:
    pruning = pytest.importorskip("torch_pruning")
    model, x = _timm(name, 224)()
    prepared = fxfusion.prepare(model, (x,))
    ours = _best(lambda: fxfusion.plan(prepared))
    theirs = _best(lambda: pruning.DependencyGraph().build_dependency(model, example_inputs=x))
    print(f"{name}: planning {ours:.3f} s, DependencyGraph.build_dependency {theirs:.3f} s")
    assert ours < theirs


def _best(call: Callable[[], Any], repeats: int = 3) -> float:
    found = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
