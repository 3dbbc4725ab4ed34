"""Fine-tune a fused network in a plain loop: from labels, and from the parents' averaged logits.

    python examples/fine_tune.py [--parent-steps 600] [--steps 200]

Two small vision transformers are trained on scikit-learn's digits, fused, and trained on; beside them stand
the parents, their ensemble, and a parent trained on for as long.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import fxfusion
from fxfusion.demo import DigitsViT

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of images, logits, labels


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images ``[n, 1, 8, 8]`` and labels, to train on and to test with."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    return images[train], labels[train], images[test], labels[test]


def from_labels(images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy."""
    return functional.cross_entropy(logits, labels)


def from_teachers(teachers: Sequence[nn.Module]) -> Loss:
    """Return a loss that asks for the teachers' averaged logits; labels are not looked at."""

    def loss(images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = torch.stack([teacher(images) for teacher in teachers]).mean(0)
        return functional.cross_entropy(logits, wanted.softmax(-1))

    return loss


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    rate: float,
    seed: int,
    loss: Loss,
) -> nn.Module:
    """Train a network in place."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(images), (64,))
        batch = images[picked] + 0.2 * torch.randn(64, 1, 8, 8)
        optimizer.zero_grad()
        loss(batch, model(batch), labels[picked]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = digits()
    parents = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = DigitsViT(width=32, depth=2, heads=4)
        parents.append(train(model, images, labels, arguments.parent_steps, 3e-3, seed, from_labels))

    result = fxfusion.fuse(parents, (images[:2],), calibration=images[:400].split(100))
    fused = copy.deepcopy(parents[-1])
    fused.load_state_dict(result.state_dict())

    @torch.no_grad()
    def show(name: str, *models: nn.Module) -> None:
        logits = torch.stack([model(test_images) for model in models]).mean(0)
        accuracy = 100 * float((logits.argmax(-1) == test_labels).double().mean())
        print(f"{name:32} {accuracy:5.1f} %")

    for seed, parent in enumerate(parents):
        show(f"parent {seed}", parent)
    show("ensemble", *parents)
    show("fused", fused)
    for name, start in (("parent 1", parents[1]), ("fused", fused)):
        for how, loss in (("labels", from_labels), ("the parents' logits", from_teachers(parents))):
            learner = copy.deepcopy(start)
            train(learner, images, labels, arguments.steps, 1e-3, 7, loss)
            show(f"{name}, tuned on {how}", learner)


if __name__ == "__main__":
    main()
