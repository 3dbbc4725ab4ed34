"""Layers fitted to the parents: exact where they can be, orthogonal to what they miss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxfusion
from fxfusion import regression
from fxfusion.calibration import Batches
from fxfusion.errors import CalibrationRequiredError
from fxfusion.execution import Program
from fxfusion.repair import Source
from fxfusion.state import state_of
from tests import zoo

SHARES = [0.25, 0.75]


def fitted(
    parents: Sequence[Any], merged: Any, data: list[torch.Tensor], **options: Any
) -> dict[str, torch.Tensor]:
    """Return what is fitted of a network to parents that are taken to be aligned."""
    capture = state_of(fxfusion.prepare(merged, (data[0],))).capture
    states = [dict(model.state_dict()) for model in (*parents, merged)]
    sources = [Source(capture, state) for state in states[:-1]]
    return regression.fitted_layers(capture, states[-1], sources, SHARES, Batches(capture, data), **options)


def three(make: Any) -> list[Any]:
    torch.manual_seed(0)
    return [make().double().eval() for _ in range(3)]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(5, 4), (5,)),
        (lambda: nn.Linear(5, 4, bias=False), (7, 5)),
        (lambda: Conv1D(4, 5), (7, 5)),
        (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 7)),
        (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (4, 8, 7)),
        (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 6, 6)),
    ],
)
def test_what_gets_the_same_input_is_averaged(
    layer: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layers see the same: whatever was merged, the average of their weights fits best."""
    monkeypatch.setattr(regression, "RIDGE", 1e-12)
    *parents, merged = three(layer)
    data = [torch.randn(40, *shape, dtype=torch.float64) for _ in range(3)]
    found = fitted(parents, merged, data)
    left, right = (model.state_dict() for model in parents)
    assert set(found) == set(left)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, SHARES[0] * left[name] + SHARES[1] * right[name])


class Residual(nn.Module):
    """A stream to which two branches add, one of them through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.mix = Conv1D(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).tanh()
        x = x + self.down(self.up(self.norm(x)).tanh())
        return x + self.mix(self.norm(x))


def inner(model: nn.Module, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer gets, and what its network gives."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        output = model(x)
    hook.remove()
    return seen[0], output


def test_what_a_skip_lacks_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last branch closes the sum: what is missing then is orthogonal to all that the branch gets."""
    monkeypatch.setattr(regression, "RIDGE", 1e-12)
    *parents, merged = three(Residual)
    x = torch.randn(50, 4, 6, dtype=torch.float64)
    merged.load_state_dict({**merged.state_dict(), **fitted(parents, merged, list(x.split(10)))})
    expected = sum(share * model(x).detach() for share, model in zip(SHARES, parents, strict=True))
    features, output = inner(merged, x, "mix")
    missing = (expected - output).flatten(0, -2)
    assert float(missing.abs().mean()) > 0.01  # it cannot all be made up for
    features = torch.cat([features, torch.ones_like(features[..., :1])], -1).flatten(0, -2)
    torch.testing.assert_close(
        features.mT @ missing, torch.zeros(7, 6, dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_each_layer_is_fitted_on_what_was_fitted_before() -> None:
    """Layer by layer by hand, with the ridge."""
    *parents, merged = three(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)))
    x = torch.randn(60, 4, dtype=torch.float64)
    found = fitted(parents, merged, [x[:35], x[35:]])
    hidden = x
    for name in ("0", "2"):
        layer = merged.get_submodule(name)
        targets = [model[: int(name) + 1](x).detach() for model in parents]
        missing = (
            sum(share * item for share, item in zip(SHARES, targets, strict=True)) - layer(hidden).detach()
        )
        centred = hidden - hidden.mean(0) if name == "0" else hidden
        covariance = centred.mT @ centred
        ridge = regression.RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype)
        rest = missing - missing.mean(0) if name == "0" else missing
        slope = torch.linalg.solve(covariance + ridge, centred.mT @ rest).mT
        torch.testing.assert_close(found[f"{name}.weight"], layer.weight.detach() + slope)
        layer.weight.data += slope
        if name == "0":
            shift = missing.mean(0) - slope @ hidden.mean(0)
            torch.testing.assert_close(found["0.bias"], layer.bias.detach() + shift)
            layer.bias.data += shift
        hidden = merged[: int(name) + 2](x).detach()


def test_equal_parents_stay_as_they_are() -> None:
    for name in ("hf_vit", "resnet26", "gpt2"):
        model = zoo.build(name, 0)
        args, kwargs = zoo.inputs(name, 4)
        capture = state_of(fxfusion.prepare(model, args, kwargs)).capture
        state = capture.canonical(dict(model.state_dict()))
        batches = Batches(capture, [kwargs or args])
        found = regression.fitted_layers(capture, state, [Source(capture, state)] * 2, SHARES, batches)
        for key, tensor in found.items():
            assert torch.equal(tensor, state[key]), key


class Normed(nn.Module):
    """Convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((-2, -1)))


def test_batch_normalisations_get_statistics_of_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RIDGE", 1e-12)
    *parents, merged = three(Normed)
    data = [torch.randn(16, 1, 9, 9, dtype=torch.float64) for _ in range(3)]
    for model in (*parents, merged):
        model.train()
        for norm in (model.body[1], model.body[4]):
            norm.momentum = None  # the average over all batches
        for x in data:
            model(x)
        model.eval()
    found = fitted(parents, merged, data)
    assert {"body.1.running_mean", "body.4.running_var", "body.0.weight", "head.bias"} <= set(found)
    before = torch.cat([merged(x).detach() for x in data])
    merged.load_state_dict({**merged.state_dict(), **found})
    after = torch.cat([merged(x).detach() for x in data])
    both = [torch.cat([model(x).detach() for x in data]) for model in parents]
    expected = SHARES[0] * both[0] + SHARES[1] * both[1]
    assert float((after - expected).square().mean()) < 0.1 * float((before - expected).square().mean())
    # The first convolution sees what all see: the average of the parents' gives their average.
    inputs = torch.cat(data)
    given = [model.body[0](inputs).detach() for model in (*parents, merged)]
    torch.testing.assert_close(given[2], SHARES[0] * given[0] + SHARES[1] * given[1])


def test_activations_that_wait_in_files_say_the_same() -> None:
    *parents, merged = three(Residual)
    data = [torch.randn(10, 4, 6, dtype=torch.float64) for _ in range(4)]
    kept, written = (fitted(parents, merged, data, memory=memory) for memory in (2**30, 0))
    assert kept.keys() == written.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, written[name])
    assert not list(Path.cwd().glob("batch-*"))


class Shared(nn.Module):
    """A layer called twice, one whose bias something else reads, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice, self.watched, self.own = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.embed(x)).tanh())
        x = self.watched(x.tanh()) * self.watched.bias
        return self.head(self.own(x).tanh())


class Picking(nn.Module):
    """Half of the tokens, by a score of its own, go through a layer; a first one sees its input as a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.inside = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        index = self.score(x).squeeze(-1).topk(2, dim=-1).indices
        picked = x.gather(1, index.unsqueeze(-1).expand(-1, -1, 6))
        return self.inside(picked)


def test_samples_that_a_network_chooses_are_not_compared() -> None:
    torch.manual_seed(0)
    *parents, merged = [Picking().eval() for _ in range(3)]
    found = fitted(parents, merged, [torch.randn(8, 5, 6) for _ in range(3)])
    assert set(found) == {"first.weight", "first.bias", "score.weight", "score.bias"}


def test_activations_that_overflow_teach_nothing() -> None:
    torch.manual_seed(0)
    networks: list[Any] = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval() for _ in range(3)]
    *parents, merged = networks
    parents[0][0].bias.data.fill_(float("inf"))
    assert not fitted(parents, merged, [torch.randn(8, 3)])


def test_what_has_another_use_stays() -> None:
    torch.manual_seed(0)
    *parents, merged = [Shared().eval() for _ in range(3)]
    found = fitted(parents, merged, [torch.randint(0, 11, (8, 5)) for _ in range(3)])
    assert set(found) == {"own.weight", "own.bias"}


# -- as an option of fuse -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hf_vit", "bert", "mobilenetv3_small_050", pytest.param("resnet26", marks=pytest.mark.nightly)]
)
def test_the_average_comes_closer_to_its_parents(name: str) -> None:
    models = [zoo.build(name, seed) for seed in range(2)]
    args, kwargs = zoo.inputs(name, 2)
    data = [pair[1] or pair[0] for pair in (zoo.inputs(name, 8, seed) for seed in range(4))]
    seen_args, seen = zoo.inputs(name, 8, 2)
    distances = []
    for repair in ("norms", "layers"):
        result = fxfusion.fuse(models, args, kwargs, calibration=data, method="permutation", repair=repair)
        capture = state_of(fxfusion.prepare(models[1], args, kwargs)).capture
        states = [capture.canonical(dict(model.state_dict())) for model in models]
        program = Program(capture)
        states.append(capture.canonical(result.state_dict()))
        first, second, own = (item[0] for item in program.run(states, seen_args, seen))
        distances.append(float((own - (first + second) / 2).square().mean()))
        twin = copy.deepcopy(models[1])
        twin.load_state_dict(result.state_dict())
        given = result.module(*seen_args, **seen)
        module = given if isinstance(given, torch.Tensor) else next(iter(pytree.tree_leaves(given)))
        torch.testing.assert_close(module, own, rtol=1e-4, atol=1e-5)
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12)])
def test_parents_of_other_widths_are_fitted_as_equals(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)) for size in sizes]
    x = torch.randn(200, 4)
    expected = sum(model(x).detach() for model in models) / 2
    errors = []
    for repair in ("none", "layers"):
        result = fxfusion.fuse(models, (x,), calibration=[x], method="permutation", repair=repair)
        errors.append(float((result.module(x).detach() - expected).square().mean()))
    assert errors[1] < errors[0]


def test_it_needs_data() -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    with pytest.raises(CalibrationRequiredError, match="layers"):
        fxfusion.fuse(models, (torch.ones(2, 3),), repair="layers")


def test_progress_is_told_layer_by_layer() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    told: list[tuple[int, int]] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "repair":
            told.append((done, total))

    x = torch.randn(20, 4)
    fxfusion.fuse(models, (x,), calibration=[x], repair="layers", progress=note)
    assert told == [(1, 2), (2, 2)]
