"""The sweep: records that say what happened to a model, whatever happened to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fxfusion import cli
from fxfusion.errors import OptionError
from fxfusion.rules import RULES
from fxfusion.testing import summary, sweeps
from fxfusion.testing.catalogue import SOURCES, Entry, entries, perturb
from fxfusion.testing.catalogue.timm_models import SMALLEST
from fxfusion.testing.sweeps import Record, examine, read_records, sweep


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def entry(build: Any = small) -> Entry:
    return Entry("test", "test", "small", build, lambda model: ((torch.randn(2, 3, 8, 8),), {}))


def test_a_certified_model_and_its_twin() -> None:
    stages: list[str] = []
    record = examine(entry(), report=lambda item: stages.append(item.stage))
    assert (record.status, record.stage, record.message) == ("certified", "", "")
    assert (record.spaces, record.hidden) == (1, 8)
    assert record.error is not None
    assert record.error < 1e-12
    assert record.control is not None
    assert record.control > 1e-3
    assert record.recovered == 0.0
    assert 0.9 < record.covered <= 1
    assert stages == ["build", "capture", "propagate", "certify", "control", "recover", ""]
    assert set(record.seconds) == set(stages) - {""}


def test_the_largest_groups_are_certified() -> None:
    record = examine(entry(), recover=False, symmetry="largest")
    assert record.status == "certified"
    assert record.groups == {"permutation, positive scale": 1}


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).cumsum(-1))

    monkeypatch.setitem(RULES, "cumsum", RULES["relu"])
    record = examine(entry(Ordered))
    assert record.status == "unsound"
    assert record.error is not None
    assert record.error > 1e-3
    assert not record.certified
    assert record.recovered is None


def test_a_model_that_cannot_be_captured_says_so_and_one_that_branches_is_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.second(y.relu() if bool(y.sum() > -1e9) else y)

    record = examine(entry(Branching))
    assert (record.status, record.specialised, record.spaces) == ("certified", True, 1)
    assert "refused Branching" in record.message

    class Broken(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such luck")

    record = examine(entry(Broken))
    assert record.status == "refused"
    assert "no such luck" in record.message


def test_statistics_are_random_and_signals_stay_alive() -> None:
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(40)]
    )
    x = torch.randn(64, 16)
    perturb(model, ((x,), {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.running_mean.std() > 1e-3
            assert module.running_var.std() > 1e-3
            assert module.weight.std() > 0.1
            assert not module.training
    assert 1e-2 < model(x).std() < 1e2


def test_catalogues_are_complete() -> None:
    import timm

    assert set(SMALLEST) == set(timm.list_modules())
    assert len(entries("timm")) == len(SMALLEST)
    assert len(entries("torchvision")) == 80
    assert len(entries("transformers")) >= 216
    assert len({item.name for source in SOURCES for item in entries(source)}) >= 390
    assert [item.name for item in entries("timm", ["resnet18"])] == ["resnet18"]
    assert len(entries("timm", ["convnext"])) > 10, "a module's name stands for all its variants"
    with pytest.raises(OptionError, match="no model of timm matches 'nosuchnet'"):
        entries("timm", ["nosuchnet"])
    with pytest.raises(OptionError, match="there is no catalogue 'keras'"):
        entries("keras")


def test_a_sweep_runs_in_processes_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    names: list[str] = []
    found = sweep(
        "torchvision",
        tmp_path,
        ["squeezenet1_1"],
        recover=False,
        progress=lambda name, done, total: names.append(f"{name} {done}/{total}"),
    )
    assert [record.status for record in found] == ["certified"]
    assert names == ["squeezenet1_1 1/1"]
    path = tmp_path / "torchvision.jsonl"
    path.write_text(path.read_text() + '{"source": "cut sho')
    again = sweep("torchvision", tmp_path, ["squeezenet1_1"], progress=lambda *_: names.append("again"))
    assert [dataclasses.asdict(item) for item in again] == [dataclasses.asdict(item) for item in found]
    assert "again" not in names


def test_a_sweep_stops_what_takes_too_long(tmp_path: Path) -> None:
    (record,) = sweep("torchvision", tmp_path, ["squeezenet1_1"], time_limit=0.5)
    assert record.status == "too slow"
    assert "stopped after 0 s at stage" in record.message or "stopped after 1 s" in record.message
    assert read_records(tmp_path / "torchvision.jsonl") == [record]


RECORDS = [
    Record(
        "timm",
        "resnet",
        "resnet18",
        status="certified",
        nodes=600,
        spaces=12,
        hidden=2880,
        covered=0.999,
        error=5e-15,
        control=0.5,
        recovered=0.0,
        seconds={"capture": 2.0, "propagate": 0.1},
    ),
    Record(
        "timm",
        "cait",
        "cait_xxs24",
        status="certified",
        nodes=80,
        covered=0.5,
        error=1e-15,
        control=0.0,
        recovered=0.01,
        frozen=["50.00 %: a | varies (op at /usr/lib/python3/site-packages/timm/x.py:3)"],
    ),
    Record(
        "timm", "dla", "dla34", status="unsound", nodes=9, error=0.3, message="the function changed by 3e-01"
    ),
    Record("timm", "vgg", "vgg11", status="refused", message="torch.export refused VGG"),
]


def test_totals_and_page() -> None:
    count = summary.totals(RECORDS)
    assert (count.models, count.captured, count.certified, count.unsound) == (4, 3, 2, 1)
    assert (count.covered, count.recovered, count.insensitive) == (1, 1, 1)
    assert count.slowest == count.typical == pytest.approx(0.05)
    text = summary.page({"timm": RECORDS})
    assert "| timm | 4 | 3 | 2 | 1 | 1 | 1 | 0.050, 0.050 |" in text
    assert "- `dla34`: unsound: the function changed by 3e-01" in text
    assert "- `vgg11`: refused: torch.export refused VGG" in text
    assert "50.00 % covered. 50.00 %: a \\| varies (op at timm/x.py:3)" in text
    assert "twin not recovered (1e-02); the control changed nothing" in text
    assert "| resnet18 | certified | 600 | 12 | 0 | 2880 | 99.90 | 5e-15 | 0 | 2.00 | 0.10 |" in text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "sweep", lambda *args, **kwargs: RECORDS[: 1 if args[0] == "timm" else 4])
    page, data = tmp_path / "page.md", tmp_path / "all.json"
    arguments = ["--output", str(tmp_path), "--page", str(page), "--json", str(data)]
    result = CliRunner().invoke(cli.app, ["sweep", "timm", *arguments])
    assert result.exit_code == 0
    assert "timm: 1 of 1 captured, 1 certified, 0 silently wrong" in result.output.replace("\n", " ")
    assert page.read_text().startswith("# Sweep over model libraries")
    assert json.loads(data.read_text())["timm"][0]["name"] == "resnet18"
    assert CliRunner().invoke(cli.app, ["sweep", "torchvision", "--output", str(tmp_path)]).exit_code == 1
    missing = CliRunner().invoke(cli.app, ["sweep", "timm", "--page", str(tmp_path / "no" / "page.md")])
    assert missing.exit_code == 2
    assert "there is no directory" in missing.output
