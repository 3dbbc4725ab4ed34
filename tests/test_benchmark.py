"""What planning costs. Figures depend on the machine; run with ``-m benchmark -s``."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
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
