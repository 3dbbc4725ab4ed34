"""Fine-tune a fused Hugging Face model with ``transformers.Trainer``, from labels and by distillation.

    pip install accelerate   # which Trainer needs
    python examples/fine_tune_with_trainer.py [--parent-steps 600] [--steps 200]

Fusing changes weights only: what comes out is an instance of the class, and Trainer takes it as any other.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fxfusion


class Digits(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Scikit-learn's digits, the first 1,347 of a fixed order to train on."""

    def __init__(self, training: bool) -> None:
        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32)[:, None]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        picked = order[:1347] if training else order[1347:]
        self.images = ((images - images.mean()) / images.std())[picked]
        self.labels = torch.tensor(bunch.target, dtype=torch.int64)[picked]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Distilling(Trainer):
    """A trainer that learns the teachers' averaged logits in place of the labels."""

    def __init__(self, *arguments: Any, teachers: list[nn.Module], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.teachers = teachers

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the cross-entropy with the teachers' softened classes."""
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            teachers = [teacher(pixel_values=inputs["pixel_values"]).logits for teacher in self.teachers]
        loss = functional.cross_entropy(outputs.logits, torch.stack(teachers).mean(0).softmax(-1))
        return (loss, outputs) if return_outputs else loss


def make_model(seed: int) -> ViTForImageClassification:
    """Return an untrained network."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
        )
    )


def train(
    model: nn.Module, steps: int, rate: float, seed: int, teachers: list[nn.Module] | None = None
) -> nn.Module:
    """Train a network in place."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=64,
            seed=seed,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        kind = Trainer if teachers is None else Distilling
        extra = {} if teachers is None else {"teachers": teachers}
        kind(model=model, args=arguments, train_dataset=Digits(True), **extra).train()
    return model.eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parents = [train(make_model(seed), arguments.parent_steps, 2e-3, seed) for seed in range(2)]
    images = Digits(True).images[:400]
    result = fxfusion.fuse(
        parents,
        kwargs={"pixel_values": images[:2]},
        calibration=[{"pixel_values": batch} for batch in images.split(100)],
    )
    fused = copy.deepcopy(parents[-1])
    fused.load_state_dict(result.state_dict())
    test = Digits(False)

    @torch.no_grad()
    def show(name: str, *models: nn.Module) -> None:
        logits = torch.stack([model(pixel_values=test.images).logits for model in models]).mean(0)
        accuracy = 100 * float((logits.argmax(-1) == test.labels).double().mean())
        print(f"{name:32} {accuracy:5.1f} %")

    for seed, parent in enumerate(parents):
        show(f"parent {seed}", parent)
    show("ensemble", *parents)
    show("fused", fused)
    show("fused, tuned on labels", train(copy.deepcopy(fused), arguments.steps, 1e-3, 7))
    show("fused, distilled", train(copy.deepcopy(fused), arguments.steps, 1e-3, 7, parents))


if __name__ == "__main__":
    main()
