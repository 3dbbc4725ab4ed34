"""The embedded demonstration: train two small vision transformers on handwritten digits and fuse them.

Both parents see the same images; their initialisations and the order of their data differ, so their
hidden units correspond only up to the symmetries that fxfusion infers. Averaging their weights as they
are destroys both, averaging them after alignment does not: the table says by how much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxfusion.errors import MissingDependencyError
from fxfusion.threads import one_thread

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

VARIANTS = (
    ("weights", "hard"),
    ("weights", "soft"),
    ("activations", "hard"),
    ("activations", "soft"),
)


class Block(nn.Module):
    """One pre-norm transformer block with packed queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, length, width) to the same shape."""
        batch, length, width = tokens.shape
        packed = self.qkv(self.norm1(tokens)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        attended = self.dropout(attended.transpose(1, 2).reshape(batch, length, width))
        tokens = tokens + self.dropout(self.projection(attended))
        hidden = self.dropout(functional.gelu(self.expand(self.norm2(tokens))))
        return tokens + self.dropout(self.contract(hidden))


class DigitsViT(nn.Module):
    """A vision transformer for images of 8 x 8 pixels; every row of pixels is a patch.

    Parameters
    ----------
    width : int, default 64
        Size of the residual stream.
    depth : int, default 3
        Number of blocks.
    heads : int, default 4
        Attention heads per block.
    dropout : float, default 0.1
        Share of hidden units that training leaves out at random. Units that cannot rely on each other
        survive an average better.

    Examples
    --------
    >>> import torch
    >>> DigitsViT()(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    # What the command line makes example inputs from, as for a timm model.
    default_cfg = {"input_size": (1, 8, 8)}  # noqa: RUF012

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 9, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 8, 8) to logits of shape (batch, 10)."""
        rows = self.embedding(images.squeeze(1))
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), rows], dim=1)
        tokens = self.dropout(tokens + self.positions)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the parents are and how long they train."""

    width: int = 64
    depth: int = 3
    heads: int = 4
    epochs: int = 25
    tuning_epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 3e-3
    tuning_rate: float = 2e-3
    weight_decay: float = 0.5
    noise: float = 0.2
    distortion: float = 0.1

    def build(self, seed: int = 0) -> DigitsViT:
        """Return an untrained network; torch's global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DigitsViT(self.width, self.depth, self.heads)


QUICK = Settings(width=32, depth=2, heads=2, epochs=12, tuning_epochs=3)


@dataclasses.dataclass(frozen=True)
class Digits:
    """The data: standardised images of shape (n, 1, 8, 8) and their labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy in per cent and mean cross-entropy in nats, on the test images."""

    accuracy: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ``tuned`` is None for what is not one network."""

    name: str
    one_shot: Score
    tuned: Score | None


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured and wrote.

    Attributes
    ----------
    rows : tuple of Row
        Parents, ensemble, vanilla average and every fused variant.
    output : Path
        The directory with parents, fused checkpoints, calibration images and reports.
    report : Path
        The report of the fused variant with the best one-shot accuracy.
    seconds : float
        How long everything took.
    """

    rows: tuple[Row, ...]
    output: Path
    report: Path
    seconds: float

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def table(self) -> Table:
        """Return the comparison as a rich table."""
        from rich.table import Table

        table = Table(title="Two vision transformers on handwritten digits")
        table.add_column("model")
        for heading in ("one-shot accuracy", "loss", "fine-tuned accuracy", "loss"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(row.name, *_cells(row.one_shot), *_cells(row.tuned))
            if row.name in ("parent B", "vanilla average"):
                table.add_section()
        return table


def run(
    seed: int = 0,
    output: str | Path = "fxfusion-demo",
    console: Console | None = None,
    quick: bool = False,
    settings: Settings | None = None,
) -> DemoResult:
    """Train two parents, fuse them in every way, fine-tune briefly, and print the comparison.

    Parameters
    ----------
    seed : int, default 0
        Determines initialisations, data order and fusion: the same seed gives the same table.
    output : str or Path, default "fxfusion-demo"
        Directory for checkpoints and reports; made if it does not exist.
    console : rich.console.Console, optional
        Where to print; by default the terminal.
    quick : bool, default False
        Train smaller parents for a few seconds only.
    settings : Settings, optional
        Sizes and training times, in place of those that ``quick`` selects.

    Returns
    -------
    DemoResult
        The scores and where the report is.

    Raises
    ------
    MissingDependencyError
        scikit-learn is not installed.
    """
    from rich.console import Console

    console = console or Console()
    settings = settings or (QUICK if quick else Settings())
    started = time.perf_counter()
    digits = load_digits()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with one_thread(), _progress(console) as progress:
        parents = [_train_parent(settings, digits, seed, name, progress) for name in ("A", "B")]
        fused = _fuse_all(settings, digits, parents, seed, output, progress)
        rows = _compare(settings, digits, parents, fused, seed, progress)
    best = max(rows[4:], key=lambda row: (row.one_shot.accuracy, -row.one_shot.loss))
    report = output / f"{_file_stem(best.name)}.report.html"
    result = DemoResult(rows, output, report, time.perf_counter() - started)
    console.print(result.table())
    console.print(_closing(result, settings), soft_wrap=True, highlight=False)
    return result


def load_digits() -> Digits:
    """Load scikit-learn's digits, three quarters for training, always the same ones.

    Returns
    -------
    Digits
        Standardised by the mean and deviation of the training images.

    Raises
    ------
    MissingDependencyError
        scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise MissingDependencyError(
            "the demo takes its images from scikit-learn, which is not installed: "
            "pip install 'fxfusion[demo]'"
        ) from error
    bunch = datasets.load_digits()
    parts = model_selection.train_test_split(
        bunch.images, bunch.target, test_size=0.25, random_state=0, stratify=bunch.target
    )
    images, test_images = (torch.from_numpy(part).float().unsqueeze(1) for part in parts[:2])
    labels, test_labels = (torch.from_numpy(part).long() for part in parts[2:])
    mean, deviation = images.mean(), images.std()
    return Digits((images - mean) / deviation, labels, (test_images - mean) / deviation, test_labels)


def _train_parent(settings: Settings, digits: Digits, seed: int, name: str, progress: Progress) -> DigitsViT:
    parent_seed = 1000 * seed + ord(name)
    model = settings.build(parent_seed)
    task = progress.add_task(f"training parent {name}", total=settings.epochs)
    _train(model, settings, digits, settings.epochs, settings.learning_rate, parent_seed, progress, task)
    return model


def _train(
    model: DigitsViT,
    settings: Settings,
    digits: Digits,
    epochs: int,
    rate: float,
    seed: int,
    progress: Progress,
    task: TaskID,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=settings.weight_decay)
    steps = epochs * -(-len(digits.images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.images)).split(settings.batch_size):
                images = _augmented(digits.images[batch], settings)
                loss = functional.cross_entropy(model(images), digits.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress.advance(task)
    model.eval()


def _augmented(images: Tensor, settings: Settings) -> Tensor:
    """Distort every image by its own random affine map, and add noise."""
    maps = torch.eye(2, 3) + settings.distortion * (2 * torch.rand(len(images), 2, 3) - 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + settings.noise * torch.randn_like(images)


def _fuse_all(
    settings: Settings, digits: Digits, parents: list[DigitsViT], seed: int, output: Path, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """Fuse in every way, write checkpoints and reports, and return the weights by variant."""
    import fxfusion
    from fxfusion import checkpoints

    task = progress.add_task("fusing", total=len(VARIANTS))
    batches = digits.images.split(128)
    fused: dict[str, dict[str, Tensor]] = {}
    for features, coupling in VARIANTS:
        result = fxfusion.fuse(
            parents,
            (digits.images[:2],),
            calibration=batches if features == "activations" else None,
            features=features,
            coupling=coupling,
            seed=seed,
        )
        name = f"{features}, {coupling}"
        fused[name] = dict(result.state_dict())
        checkpoints.save_weights(fused[name], output / f"{_file_stem(name)}.safetensors")
        result.report.save_html(output / f"{_file_stem(name)}.report.html")
        progress.advance(task)
    for label, parent in zip("ab", parents, strict=True):
        checkpoints.save_weights(parent.state_dict(), output / f"parent-{label}.safetensors")
    checkpoints.save_weights({"images": digits.images}, output / "calibration.safetensors")
    return fused


def _compare(
    settings: Settings,
    digits: Digits,
    parents: list[DigitsViT],
    fused: Mapping[str, Mapping[str, Tensor]],
    seed: int,
    progress: Progress,
) -> tuple[Row, ...]:
    states = [parent.state_dict() for parent in parents]
    average = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    networks: dict[str, Mapping[str, Tensor]] = {
        "parent A": states[0],
        "parent B": states[1],
        "vanilla average": average,
        **fused,
    }
    task = progress.add_task("fine-tuning", total=settings.tuning_epochs * len(networks))
    rows = []
    for name, state in networks.items():
        if name == "vanilla average":
            rows.append(Row("ensemble", _score(_mean_logits(parents, digits.test_images), digits), None))
        model = settings.build()
        model.load_state_dict(state, strict=True)
        one_shot = _score(_mean_logits([model], digits.test_images), digits)
        # The same images, order and noise for every network.
        _train(model, settings, digits, settings.tuning_epochs, settings.tuning_rate, seed, progress, task)
        rows.append(Row(name, one_shot, _score(_mean_logits([model], digits.test_images), digits)))
    return tuple(rows)


@torch.no_grad()
def _mean_logits(models: list[DigitsViT], images: Tensor) -> Tensor:
    return torch.stack([model.eval()(images) for model in models]).mean(0)


def _score(logits: Tensor, digits: Digits) -> Score:
    correct = (logits.argmax(1) == digits.test_labels).float().mean().item()
    return Score(100 * correct, functional.cross_entropy(logits, digits.test_labels).item())


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


def _cells(score: Score | None) -> tuple[str, str]:
    return ("", "") if score is None else (f"{score.accuracy:.1f} %", f"{score.loss:.3f}")


def _file_stem(name: str) -> str:
    return "fused-" + name.replace(", ", "-")


def _closing(result: DemoResult, settings: Settings) -> str:
    sizes = f"?width={settings.width}&depth={settings.depth}&heads={settings.heads}"
    options = "" if settings == Settings() else sizes
    parents = " ".join(
        f"'fxfusion.demo:DigitsViT{options}@{result.output}/parent-{name}.safetensors'" for name in "ab"
    )
    return (
        f"Took {result.seconds:.0f} s. The report of the best fused network: {result.report}\n"
        f"Fuse the parents yourself:\n  fxfusion fuse {parents} "
        f"--calibration {result.output}/calibration.safetensors -o fused.safetensors"
    )
