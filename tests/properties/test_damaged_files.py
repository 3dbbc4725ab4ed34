"""Damaged checkpoints: read, or refused with an error of ours, never anything else."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fxfusion.archives import hollow_archive, load_archive
from fxfusion.checkpoints import read_weights
from fxfusion.errors import FusionError
from fxfusion.inputs import load_calibration
from fxfusion.stored import StoredWeights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SHARD = save(TENSORS, {"format": "pt"})
NAME = "model-00001-of-00001.safetensors"
INDEX = {"metadata": {"total_size": 32}, "weight_map": dict.fromkeys(TENSORS, NAME)}
SMALL = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(SMALL, max_examples=25_000)
FEW = settings(SMALL, max_examples=60)  # each loads two programs
THOUSANDS = settings(SMALL, max_examples=5_000)


def read_stored(path: Path) -> dict[str, torch.Tensor]:
    return dict(StoredWeights(path))


def read_inputs(path: Path) -> object:
    return load_calibration(path, torch.nn.Linear(3, 2), 4)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw bytes near a file's: cut, repeated, overwritten, or with another header length."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["overwrite", "cut", "drop", "insert", "length"]))
        if kind == "overwrite" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + draw(st.integers(1, 9))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        else:
            data[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FILES = st.sampled_from(
    [NAME, "long" * 99, "../x.safetensors", "/etc/passwd", ".", "", "a\0b", "x.bin", "\ud800"]
)
INDEXES = st.one_of(
    VALUES,
    st.fixed_dictionaries({"weight_map": VALUES}),
    st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from([*TENSORS, "c", ""]), FILES)}),
)


@functools.cache
def archive() -> bytes:
    file = io.BytesIO()
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    torch.export.save(torch.export.export(model, (torch.ones(4, 3),)), file)
    return file.getvalue()


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Draw an archive of which one part says something else, or is damaged, or is not there."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as source, zipfile.ZipFile(made, "w") as goal:
        names = source.namelist()
        tables = [name for name in names if name.endswith("config.json")]
        chosen = draw(st.sampled_from([*names, *tables * 9]))
        for name in names:
            content = source.read(name)
            if name != chosen:
                goal.writestr(name, content)
            elif name.endswith("config.json") and draw(st.booleans()):
                goal.writestr(name, json.dumps(draw(altered(json.loads(content)))))
            elif draw(st.integers(0, 9)):
                goal.writestr(name, draw(damaged(content)))
    return made.getvalue()


@st.composite
def altered(draw: st.DrawFn, content: Any) -> Any:
    """Draw JSON of which one value is another."""
    if not isinstance(content, dict | list) or not content or not draw(st.integers(0, 5)):
        return draw(VALUES | st.integers(-(2**70), 2**70))
    changed = dict(content) if isinstance(content, dict) else dict(enumerate(content))
    key = draw(st.sampled_from(sorted(changed)))
    changed[key] = draw(altered(changed[key]))
    return changed if isinstance(content, dict) else [changed[index] for index in sorted(changed)]


def outcome(read: Callable[[Path], Any], path: Path) -> None:
    """Read a file; anything but an error of ours is a crash."""
    with contextlib.suppress(FusionError):
        read(path)


def check(name: str, content: bytes, *readers: Callable[[Path], Any]) -> None:
    """Read what a file of some name holds in all ways that there are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in readers:
            outcome(read, path)


def check_file(content: bytes) -> None:
    check("model.safetensors", content, read_weights, read_stored, read_inputs)


def check_archive(content: bytes) -> None:
    check("model.pt2", content, read_stored, hollow_archive, load_archive)


def check_index(index: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / NAME).write_bytes(SHARD)
        (place / "model.safetensors.index.json").write_bytes(index.encode(errors="surrogatepass"))
        for read in (read_weights, read_stored):
            outcome(read, place)


def test_what_is_not_damaged_is_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(SHARD)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    for read in (read_weights, read_stored):
        found = read(tmp_path)
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@SMALL
@given(damaged(SHARD))
def test_damaged_files(content: bytes) -> None:
    check_file(content)


@SMALL
@given(INDEXES.map(json.dumps) | damaged(json.dumps(INDEX).encode()).map(lambda item: item.decode("latin1")))
def test_damaged_indexes(index: str) -> None:
    check_index(index)


@FEW
@given(st.deferred(lambda: damaged(archive())) | archives())
def test_damaged_archives(content: bytes) -> None:
    check_archive(content)


@pytest.mark.nightly
@MANY
@given(damaged(SHARD))
def test_many_damaged_files(content: bytes) -> None:
    check_file(content)


@pytest.mark.nightly
@MANY
@given(INDEXES.map(json.dumps) | damaged(json.dumps(INDEX).encode()).map(lambda item: item.decode("latin1")))
def test_many_damaged_indexes(index: str) -> None:
    check_index(index)


@pytest.mark.nightly
@THOUSANDS
@given(st.deferred(lambda: damaged(archive())) | archives())
def test_many_damaged_archives(content: bytes) -> None:
    check_archive(content)
