"""What things cost; run with ``-m benchmark``."""

from __future__ import annotations

import time

import pytest

import fxfusion
from fxfusion.passes.normalize import Normalize
from fxfusion.passes.propagate import Propagate
from tests import zoo


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet26"])
def test_propagate_costs_at_most_a_tenth_of_capture(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, (args, kwargs) = zoo.build(name), zoo.inputs(name)
    fxfusion.prepare(model, args, kwargs)  # the first capture imports and compiles much of torch
    captures, propagations = [], []
    for _ in range(3):
        start = time.perf_counter()
        module = fxfusion.prepare(model, args, kwargs)
        captured = time.perf_counter()
        Normalize()(module)
        Propagate()(module)
        captures.append(captured - start)
        propagations.append(time.perf_counter() - captured)
    capture, propagate = min(captures), min(propagations)
    with capsys.disabled():
        print(f"\n{name}: capture {capture:.2f} s, propagate {propagate:.3f} s: {propagate / capture:.3f}")
    assert propagate <= 0.1 * capture
