"""From two exported programs to a fused one that runs without Python.

    python examples/deploy.py

Parents come as ``torch.export`` programs, as a model registry may hold them. The fused module is exported
again, with a free batch, and handed to AOTInductor (a shared library), to ONNX (run by onnxruntime) and,
where it is installed, to ExecuTorch. Needs ``pip install -e '.[examples]'`` and a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfusion

Run = Callable[[torch.Tensor], torch.Tensor]


def make_program(seed: int) -> ExportedProgram:
    """Return a small convolutional network, exported."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()
    return torch.export.export(model, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: Dim("batch")},))


def as_library(program: ExportedProgram, folder: Path) -> Run:
    """Compile to a shared library, and load it."""
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "fused.pt2"))
    return torch._inductor.aoti_load_package(package)


def as_onnx(program: ExportedProgram, folder: Path) -> Run:
    """Convert to ONNX, for onnxruntime."""
    path = folder / "fused.onnx"
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    converted.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def as_executorch(program: ExportedProgram) -> Run:
    """Lower to ExecuTorch, for what a device runs."""
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(to_edge(program).to_executorch().buffer).load_method("forward")
    return lambda images: method.execute([images])[0]


def main() -> None:
    """Fuse, export, and compare every way to run."""
    images = torch.randn(5, 1, 8, 8)
    fused = fxfusion.fuse([make_program(0), make_program(1)], (images,), calibration=[images]).module
    (expected,) = torch.utils._pytree.tree_leaves(fused(images))
    program = torch.export.export(fused, (images,), dynamic_shapes=({0: Dim("batch")},))
    with tempfile.TemporaryDirectory() as folder:
        ways = {"AOTInductor": as_library(program, Path(folder)), "ONNX": as_onnx(program, Path(folder))}
        for name, run in ways.items():
            for count in (5, 3):
                difference = (run(images[:count]) - expected[:count]).abs().max()
                print(f"{name}, {count} images: {difference:.1e}")
    if importlib.util.find_spec("executorch") is None:
        print("ExecuTorch is not installed")
    else:
        run = as_executorch(torch.export.export(fused, (images,)))
        print(f"ExecuTorch: {(run(images) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
