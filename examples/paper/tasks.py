"""What networks are trained on: images and text, models of any size, one training loop for all.

``digits`` comes with scikit-learn and needs no data folder; ``mnist``, ``cifar10``, ``gpt2``, ``llama`` and
``bert`` read theirs from one (see :func:`load`). ``digits-resnet`` and ``cifar10-resnet`` are residual
networks with batch normalisation on the same images, the others transformers.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import fxfusion

TASKS = ("digits", "digits-resnet", "mnist", "cifar10", "cifar10-resnet", "gpt2", "llama", "bert")
CAUSAL = ("gpt2", "llama")  # the next character is predicted
IGNORED = -100  # label of a position that is not predicted
MASKED_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes
    ----------
    width, heads, hidden, depth : int
        Residual stream, attention heads, hidden units of the feed-forward layers, layers. Of a residual
        network: channels of the first stage, none, none, blocks per stage.
    """

    width: int
    heads: int
    hidden: int
    depth: int

    def __str__(self) -> str:
        return f"{self.width}w{self.heads}h{self.hidden}f{self.depth}d"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Data, a family of networks, and how long they are trained.

    Attributes
    ----------
    name : str
    inputs : str
        Name of the networks' input.
    train, test : tuple of torch.Tensor
        Examples and labels; for text, labels per position.
    make : callable of Size
        An untrained network.
    size : Size
        Of the networks unless a table varies it.
    steps : int
        Training steps of a parent.
    rate : float
        Largest learning rate.
    augment : callable
        Applied to training batches.
    batch : int
        Examples per training step.
    untie : bool
        After a parent's training, give its output embedding a tensor of its own.
    """

    name: str
    inputs: str
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    make: Callable[[Size], nn.Module]
    size: Size
    steps: int
    rate: float = 1e-3
    augment: Callable[[torch.Tensor], torch.Tensor] = lambda batch: batch
    batch: int = 128
    untie: bool = False

    def build(self, size: Size, seed: int) -> nn.Module:
        """Return an untrained network."""
        return self._finished(self._drawn(size, seed))

    def _drawn(self, size: Size, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(size).eval()

    def _finished(self, model: nn.Module) -> nn.Module:
        return fxfusion.untied(model) if self.untie else model

    def example(self) -> dict[str, torch.Tensor]:
        """Return inputs to capture a network with."""
        return {self.inputs: self.train[0][:2], **({"use_cache": False} if self.name in CAUSAL else {})}

    def calibration(
        self, count: int, labelled: bool = False, batch: int = 100
    ) -> list[dict[str, torch.Tensor]]:
        """Return examples in batches, drawn from the training data; with their labels if that is wanted."""
        order = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(0))[:count]
        names = (self.inputs, "labels")[: 1 + labelled]
        columns = [tensor[order].split(batch) for tensor in self.train]
        return [dict(zip(names, examples, strict=False)) for examples in zip(*columns, strict=True)]

    def logits(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Return a network's logits."""
        extra = {"use_cache": False} if self.name in CAUSAL else {}
        found = model(**{self.inputs: batch}, **extra)
        logits: torch.Tensor = found.logits
        return logits

    @torch.no_grad()
    def score(self, *models: nn.Module) -> tuple[float, float]:
        """Return accuracy in per cent and cross-entropy of a network, or of an ensemble (averaged logits)."""
        right = total = 0
        loss = 0.0
        for batch, labels in zip(self.test[0].split(500), self.test[1].split(500), strict=True):
            logits = torch.stack([self.logits(model, batch) for model in models]).mean(0).flatten(0, -2)
            labels = labels.flatten()
            kept = labels != IGNORED
            right += int((logits.argmax(-1) == labels)[kept].sum())
            total += int(kept.sum())
            loss += float(functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        return 100 * right / total, loss / total

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield training batches without end, in an order of their own."""
        order = torch.Generator().manual_seed(1000 + seed)
        images, labels = self.train
        for _ in itertools.count():
            for picked in torch.randperm(len(images), generator=order).split(self.batch):
                if len(picked) == min(self.batch, len(images)):
                    yield self.augment(images[picked]), labels[picked]

    def fit(
        self,
        model: nn.Module,
        steps: int,
        seed: int,
        rate: float | None = None,
        teachers: list[nn.Module] | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> nn.Module:
        """Train a network in place: AdamW, linear warm-up, cosine decay.

        Parameters
        ----------
        model : torch.nn.Module
        steps, seed : int
            The seed draws batches and dropout.
        rate : float, optional
            The task's by default.
        teachers : list of torch.nn.Module, optional
            Learn their averaged logits in place of the labels (distillation).
        watch : callable of int, optional
            Called with the number of steps done, after every tenth of them.
        """
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate or self.rate, weight_decay=0.01)
        warm_up = max(steps // 20, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step, (batch, labels) in enumerate(itertools.islice(self.batches(seed), steps), start=1):
                logits = self.logits(model, batch).flatten(0, -2)
                if teachers is None:
                    loss = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
                else:
                    loss = functional.cross_entropy(logits, self._soft_labels(teachers, batch))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                if watch is not None and step % max(steps // 10, 1) == 0:
                    model.eval()
                    watch(step)
                    model.train()
        return model.eval()

    @torch.no_grad()
    def _soft_labels(self, teachers: list[nn.Module], batch: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([self.logits(teacher, batch) for teacher in teachers]).mean(0)
        return logits.flatten(0, -2).softmax(-1)

    def parent(self, size: Size, seed: int, checkpoints: Path | None = None) -> nn.Module:
        """Return a trained network, read from ``checkpoints`` if it is there, else trained and saved."""
        model = self._drawn(size, seed)
        place = None if checkpoints is None else checkpoints / f"{self.name}-{size}-{seed}.safetensors"
        if place is not None and place.exists():
            model.load_state_dict(load_file(place), strict=False)
            return self._finished(model)
        self.fit(model, self.steps, seed)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in _named_once(model).items()}, place)
        return self._finished(model)


def _named_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict that names every tensor once."""
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        seen.setdefault(tensor.data_ptr(), name)
    return {name: tensor for name, tensor in model.state_dict().items() if seen[tensor.data_ptr()] == name}


# -- models --------------------------------------------------------------------------------------------


def _vit(image: int, patch: int, channels: int) -> Callable[[Size], nn.Module]:
    def make(size: Size) -> nn.Module:
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=size.width,
                num_hidden_layers=size.depth,
                num_attention_heads=size.heads,
                intermediate_size=size.hidden,
                image_size=image,
                patch_size=patch,
                num_channels=channels,
                num_labels=10,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    return make


def _resnet(channels: int) -> Callable[[Size], nn.Module]:
    def make(size: Size) -> nn.Module:
        widths = [size.width, 2 * size.width, 4 * size.width]
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=channels,
                embedding_size=size.width,
                hidden_sizes=widths,
                depths=[size.depth] * 3,
                layer_type="basic",
                num_labels=10,
            )
        )
        # The class begins with a stride of two and a pooling: meant for large images, these are small.
        stem = model.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(channels, size.width, 3, 1, 1, bias=False)
        stem.pooler = nn.Identity()
        return model

    return make


def _gpt2(vocabulary: int, length: int) -> Callable[[Size], nn.Module]:
    def make(size: Size) -> nn.Module:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=length,
                n_embd=size.width,
                n_layer=size.depth,
                n_head=size.heads,
                n_inner=size.hidden,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    return make


def _llama(vocabulary: int, length: int) -> Callable[[Size], nn.Module]:
    def make(size: Size) -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                max_position_embeddings=length,
                hidden_size=size.width,
                num_hidden_layers=size.depth,
                num_attention_heads=size.heads,
                num_key_value_heads=size.heads // 2,
                intermediate_size=size.hidden,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    return make


def _bert(vocabulary: int, length: int) -> Callable[[Size], nn.Module]:
    def make(size: Size) -> nn.Module:
        return BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary,
                max_position_embeddings=length,
                hidden_size=size.width,
                num_hidden_layers=size.depth,
                num_attention_heads=size.heads,
                intermediate_size=size.hidden,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.05,
            )
        )

    return make


# -- data ----------------------------------------------------------------------------------------------


def load(name: str, data: Path | None) -> Task:
    """Return a task.

    Parameters
    ----------
    name : str
        One of :data:`TASKS`.
    data : Path, optional
        Folder with ``mnist_train.npz`` and ``mnist_test.npz`` (``x`` uint8 ``[n, 28, 28]``, ``y``),
        ``cifar10_train_0.npz`` to ``_4`` and ``cifar10_test.npz`` (``jpeg``: all files end to end,
        ``offsets``, ``labels``), ``tinyshakespeare.txt``.
    """
    family, _, architecture = name.partition("-")
    if family == "digits":
        task = _digits()
    elif data is None:
        raise SystemExit(f"{name} needs --data DIRECTORY")
    elif family == "mnist":
        task = _mnist(data)
    elif family == "cifar10":
        task = _cifar10(data)
    else:
        task = _text(name, data)
    if not architecture:
        return task
    make = _resnet(task.train[0].shape[1])
    size = Size(16, 0, 0, 1) if family == "digits" else Size(16, 0, 0, 3)
    return dataclasses.replace(task, name=name, make=make, size=size)


def _digits() -> Task:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    return Task(
        "digits",
        "pixel_values",
        (images[train], labels[train]),
        (images[test], labels[test]),
        _vit(8, 2, 1),
        Size(32, 4, 64, 3),
        1000,
        2e-3,
        lambda batch: batch + 0.2 * torch.randn_like(batch),
    )


def _mnist(data: Path) -> Task:
    parts = []
    for part in ("train", "test"):
        with np.load(data / f"mnist_{part}.npz") as file:
            images = torch.from_numpy((file["x"].astype(np.float32) / 255 - 0.1307) / 0.3081)[:, None]
            parts.append((images, torch.from_numpy(file["y"].astype(np.int64))))
    return Task("mnist", "pixel_values", parts[0], parts[1], _vit(28, 4, 1), Size(64, 4, 128, 4), 1872)


def _cifar10(data: Path) -> Task:
    parts = []
    for names in ([f"train_{index}" for index in range(5)], ["test"]):
        images, labels = zip(*[_jpegs(data / f"cifar10_{name}.npz") for name in names], strict=True)
        parts.append((torch.cat(images), torch.cat(labels)))
    size = Size(128, 8, 256, 6)
    return Task("cifar10", "pixel_values", parts[0], parts[1], _vit(32, 4, 3), size, 3900, augment=_flip)


def _jpegs(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from PIL import Image

    with np.load(path) as file:
        raw, offsets = file["jpeg"].tobytes(), file["offsets"]
        images = [
            np.asarray(Image.open(io.BytesIO(raw[start:stop])).convert("RGB"))
            for start, stop in itertools.pairwise(offsets)
        ]
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.473) / 0.251, labels


def _text(name: str, data: Path) -> Task:
    """Characters: the next one (GPT-2, Llama), or hidden ones (BERT)."""
    length = 64
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    characters = sorted(set(text))
    table = {character: index for index, character in enumerate(characters)}
    codes = torch.tensor([table[character] for character in text])
    split = len(codes) * 9 // 10
    parts = [
        part[: len(part) // length * length].reshape(-1, length) for part in (codes[:split], codes[split:])
    ]
    vocabulary = len(characters) + 1  # the last one hides
    if name in CAUSAL:
        make, inner = (_gpt2, 384) if name == "gpt2" else (_llama, 256)
        shifted = [functional.pad(part[:, 1:], (0, 1), value=IGNORED) for part in parts]
        return Task(
            name,
            "input_ids",
            (parts[0], shifted[0]),
            (parts[1], shifted[1]),
            make(vocabulary, length),
            Size(96, 4, inner, 3),
            2000,
        )
    hidden = [_hide(part, vocabulary - 1, seed) for seed, part in enumerate(parts)]
    # Until it attends to neighbours, a network learns how frequent characters are and no more: it takes about
    # a thousand steps to find out, however many examples each has.
    make, size = _bert(vocabulary, length), Size(64, 4, 128, 2)
    return Task(name, "input_ids", hidden[0], hidden[1], make, size, 4000, 2e-3, batch=32)


def _hide(codes: torch.Tensor, mask: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
    return codes.masked_fill(chosen, mask), codes.masked_fill(~chosen, IGNORED)


def _flip(batch: torch.Tensor) -> torch.Tensor:
    """Mirror half of a batch, and move it by up to three pixels."""
    mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
    batch = torch.where(mirrored, batch.flip(-1), batch)
    padded = functional.pad(batch, (3, 3, 3, 3))
    top, left = (int(torch.randint(0, 7, ())) for _ in range(2))
    return padded[..., top : top + 32, left : left + 32]
