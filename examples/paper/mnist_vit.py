"""One-shot fusion of Hugging Face ViTs trained on MNIST: the table of every method.

The protocol: 4 layers, width 64, 4 heads, patch 4; two parents that differ in initialisation and data
order; 200 unlabelled calibration images; accuracy on all 10,000 test images, no fine-tuning.

    python examples/paper/mnist_vit.py --data DIRECTORY [--seeds 0,1] [--epochs 4] [--checkpoints DIRECTORY]

The data directory holds ``mnist_train.npz`` and ``mnist_test.npz`` with arrays ``x`` (uint8, n x 28 x 28)
and ``y``. With ``--checkpoints``, parents are read from there if they exist (``seed0``, ``seed1``), else
trained (about 8 minutes each on one core) and saved there.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import fxfusion

CALIBRATION_IMAGES = 200
BATCH = 128
WARM_UP = 100

Images = tuple[torch.Tensor, torch.Tensor]


def load(directory: Path, part: str) -> Images:
    """Return normalised images ``[n, 1, 28, 28]`` and labels."""
    with np.load(directory / f"mnist_{part}.npz") as data:
        images = (data["x"].astype(np.float32) / 255 - 0.1307) / 0.3081
        return torch.from_numpy(images)[:, None], torch.from_numpy(data["y"].astype(np.int64))


def make_model() -> ViTForImageClassification:
    """Return the network of the protocol."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=28,
            patch_size=4,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def train(data: Images, seed: int, epochs: float) -> ViTForImageClassification:
    """Train one parent: AdamW, linear warm-up, cosine decay."""
    torch.manual_seed(seed)
    model = make_model().train()
    images, labels = data
    per_epoch = len(images) // BATCH
    steps = int(per_epoch * epochs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    order = torch.Generator().manual_seed(1000 + seed)
    batches = itertools.chain.from_iterable(
        torch.randperm(len(images), generator=order)[: per_epoch * BATCH].split(BATCH)
        for _ in itertools.count()
    )
    for batch in track(itertools.islice(batches, steps), f"training seed {seed}", total=steps):
        loss = functional.cross_entropy(model(images[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def parent(data: Images, seed: int, epochs: float, checkpoints: Path | None) -> ViTForImageClassification:
    """Read a parent from a checkpoint, or train and save it."""
    place = None if checkpoints is None else checkpoints / f"seed{seed}"
    if place is not None and place.is_dir():
        return ViTForImageClassification.from_pretrained(place, local_files_only=True).eval()
    model = train(data, seed, epochs)
    if place is not None:
        model.save_pretrained(place)
    return model


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Images) -> tuple[float, float]:
    """Return accuracy in per cent and cross-entropy."""
    logits = torch.cat([model(pixel_values=batch).logits for batch in data[0].split(500)])
    accuracy = (logits.argmax(-1) == data[1]).double().mean()
    return 100 * float(accuracy), float(functional.cross_entropy(logits, data[1]))


def average(models: list[ViTForImageClassification]) -> ViTForImageClassification:
    """Return the vanilla average."""
    states = [model.state_dict() for model in models]
    fused = make_model().eval()
    fused.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return fused


def main() -> None:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=float, default=4)
    arguments = parser.parse_args()
    training, test = load(arguments.data, "train"), load(arguments.data, "test")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    models = [parent(training, seed, arguments.epochs, arguments.checkpoints) for seed in seeds]
    picked = np.random.default_rng(0).permutation(len(training[0]))[:CALIBRATION_IMAGES]
    calibration = [{"pixel_values": batch} for batch in training[0][picked].split(50)]
    table = Table("network", "target", "accuracy", "loss", title="MNIST, HF ViT, one-shot")

    def add(name: str, target: str, network: torch.nn.Module) -> None:
        accuracy, loss = evaluate(network, test)
        table.add_row(name, target, f"{accuracy:.1f}", f"{loss:.3f}")

    for seed, model in zip(seeds, models, strict=True):
        add(f"parent, seed {seed}", "", model)
    add("vanilla average", "", average(models))
    example = {"pixel_values": training[0][:2]}
    for features, coupling in itertools.product(["weights", "activations"], ["hard", "soft"]):
        for target, seed in enumerate(seeds):
            result = fxfusion.fuse(
                models,
                kwargs=example,
                calibration=calibration if features == "activations" else None,
                coupling=coupling,
                target=target,
            )
            add(f"{coupling}, {features}", f"seed {seed}", result.module)
    Console().print(table)


if __name__ == "__main__":
    main()
