"""Fuse a checkpoint and its planted twin from file to file, and account for the time and the memory.

    python examples/large.py make DIRECTORY [--size large]
    python examples/large.py fuse DIRECTORY
    torchrun --nproc-per-node 2 examples/large.py fuse DIRECTORY --output DIRECTORY/by-two
    python examples/large.py check DIRECTORY

``make`` writes a Llama shape with random weights in bfloat16 and its twin: noise added, then every space
permuted at random. ``fuse`` averages the two without loading either, and prints where the time went, how fast
weights were compared beside the machine's own matrix products, and the most memory that was resident.
``check`` says how far every parameter of the result is from the target: by half of the noise if the planted
permutations were found, by more than half of its size if not. Sizes: *large* has 1.1 billion parameters
(22 layers of width 2,048, as TinyLlama) and needs 7 GB of disk, *small* 4 million, *tiny* 40 thousand.
"""

from __future__ import annotations

import enum
import hashlib
import mmap
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import fxfusion
from fxfusion.estimate import measured_rate
from fxfusion.hollow import hollow
from fxfusion.processes import launched
from fxfusion.stored import StoredWeights
from fxfusion.symmetry import act, random_maps

NOISE = 0.1  # of a parameter's root mean square
RECOVERED = 0.08  # largest relative distance to the target; unaligned twins average to 0.7

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Argument(help="Where both checkpoints and the result are.")]


class Size(str, enum.Enum):
    """How large the checkpoints are."""

    LARGE = "large"
    SMALL = "small"
    TINY = "tiny"


SHAPES: Mapping[Size, dict[str, int]] = {
    Size.LARGE: {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    Size.SMALL: {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2000,
    },
    Size.TINY: {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    },
}


def network(config: LlamaConfig) -> LlamaForCausalLM:
    """Return the network without weights of its own."""
    model = hollow(lambda: LlamaForCausalLM._from_config(config, dtype=torch.bfloat16))
    assert isinstance(model, LlamaForCausalLM)
    return model


def example() -> dict[str, Any]:
    """Return inputs to capture it with."""
    return {"input_ids": torch.arange(16).view(2, 8) + 5, "use_cache": False}


@app.command()
def make(directory: Folder, size: Annotated[Size, typer.Option(help="Of the network.")] = Size.LARGE) -> None:
    """Write a random checkpoint and its twin."""
    config = LlamaConfig(**SHAPES[size], tie_word_embeddings=False)
    model = network(config)
    plan = fxfusion.plan(model, kwargs=example())
    maps = random_maps(plan, torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(0)
    states: dict[str, dict[str, torch.Tensor]] = {"target": {}, "twin": {}}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # the weights of norms
            target = 1 + 0.1 * torch.randn(parameter.shape, generator=draw)
        else:
            target = torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
        target = target.bfloat16()
        noise = torch.randn(parameter.shape, generator=draw) * (NOISE * target.float().square().mean().sqrt())
        twin = (target.float() + noise).bfloat16()
        states["target"][name] = target
        states["twin"][name] = act(plan.only({name}), maps, {name: twin})[name]
    for name, state in states.items():
        model.load_state_dict(state, assign=True)
        model.save_pretrained(directory / name, max_shard_size="1GB")
    bytes_each = sum(tensor.nbytes for tensor in states["target"].values())
    print(f"{sum(map(torch.numel, states['target'].values())):,} parameters, {bytes_each / 1e9:.2f} GB each")


@app.command("fuse")
def fuse_twins(
    directory: Folder,
    output: Annotated[Path | None, typer.Option(help="DIRECTORY/fused by default.")] = None,
) -> None:
    """Fuse both from file to file; say where time and memory went."""
    paths = [directory / "twin", directory / "target"]
    out = output or directory / "fused"
    models = [network(LlamaConfig.from_pretrained(path)) for path in paths]
    rate, before, start = measured_rate(), _resident(), time.perf_counter()
    with launched() as processes, FlopCounterMode(display=False) as counter:
        report = fxfusion.fuse_files(paths, out, models, kwargs=example())
    # Beside the comparisons, what capture and the certificate compute for two short texts is nothing.
    seconds, compared = time.perf_counter() - start, int(counter.get_total_flops())
    if not processes.leads:
        return
    rate = (rate + measured_rate()) / 2  # other work on the machine comes and goes
    table = Table(
        "", "seconds", "", title=f"{processes.count} process(es), {torch.get_num_threads()} threads each"
    )
    for name, taken in report.seconds.items():
        share = f"{100 * compared / taken / rate:.0f} % of the rate of matrix products"
        table.add_row(name, f"{taken:.1f}", share if name == "compare" else "")
    table.add_row("in all", f"{seconds:.1f}", "")
    Console().print(table)
    parent = sum(file.stat().st_size for file in paths[-1].glob("*.safetensors")) / 1e9
    print(
        f"matrix products: {rate / 1e9:.0f} GFLOP/s; one parent: {parent:.2f} GB; resident memory before: "
        f"{before:.2f} GB, at most: {_resident():.2f} GB ({_resident() / parent:.2f} times one parent)"
    )
    print(f"result: {_digest(out)}")


@app.command()
def check(
    directory: Folder,
    output: Annotated[Path | None, typer.Option(help="DIRECTORY/fused by default.")] = None,
) -> None:
    """Say how far the result is from the target."""
    out = output or directory / "fused"
    fused, target = StoredWeights(out), StoredWeights(directory / "target")
    apart = {}
    for name in target:
        wanted = target[name].float()
        apart[name] = float((fused[name].float() - wanted).norm() / wanted.norm())
    worst = max(apart, key=apart.__getitem__)
    print(f"{len(apart)} parameters; furthest from the target: {worst}, by {100 * apart[worst]:.1f} %")
    if apart[worst] > RECOVERED:
        sys.exit("the planted permutations were not recovered")


def _resident() -> float:
    """Return the most memory that this process has held so far, in GB."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (1e9 if sys.platform == "darwin" else 1e9 / 1024)


def _digest(directory: Path) -> str:
    """Return a hash of all weights."""
    found = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            found.update(hashlib.sha256(mapped).digest())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    app()
