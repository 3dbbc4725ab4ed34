"""Reading and writing weights, with emphasis on files that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fxfusion import checkpoints
from fxfusion.errors import CheckpointError


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "layer.bias": torch.randn(3, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
    }


def sharded(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    weight_map = {}
    for number, (name, value) in enumerate(state.items(), start=1):
        shard = f"model-{number:05d}-of-{len(state):05d}.safetensors"
        safetensors.torch.save_file({name: value}, directory / shard)
        weight_map[name] = shard
    index = directory / checkpoints.INDEX_NAME
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def rewrite(index: Path, change: Callable[[dict[str, object]], None]) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name])


class TestRead:
    def test_file(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        assert_same(checkpoints.read_weights(tmp_path / "a.safetensors"), dict(sorted(state.items())))

    def test_shards(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        index = sharded(tmp_path, state)
        assert_same(checkpoints.read_weights(index), dict(sorted(state.items())))
        assert_same(checkpoints.read_weights(tmp_path), dict(sorted(state.items())))
        assert len(checkpoints.checkpoint_files(tmp_path)) == 3

    def test_missing_file_suggests_a_neighbour(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match=r"did you mean weights\.safetensors"):
            checkpoints.read_weights(tmp_path / "weihgts.safetensors")

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no directory"):
            checkpoints.read_weights(tmp_path / "nowhere" / "a.safetensors")

    @pytest.mark.parametrize("length", [0, 4, 8, 20, 100, -1])
    def test_truncated(self, tmp_path: Path, state: dict[str, torch.Tensor], length: int) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(safetensors.torch.save(state)[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors .*copy or download it again"):
            checkpoints.read_weights(path)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
            (b"just some text, much longer than eight bytes", "not a safetensors file"),
            (b'\x10\0\0\0\0\0\0\0{"x":{"dtype":1}}', "malformed"),
            (b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
        ],
    )
    def test_malformed(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.read_weights(path)

    @pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "disguised.safetensors"])
    @pytest.mark.parametrize("form", ["zip", "plain"])
    def test_pickles_are_not_opened(self, tmp_path: Path, name: str, form: str) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
                return os.mkdir, (str(tmp_path / "opened"),)

        path = tmp_path / name
        if form == "zip":
            torch.save(Trap(), path)
        else:
            path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(CheckpointError, match=r"does not open it. Convert .*save_file"):
            checkpoints.read_weights(path)
        assert not (tmp_path / "opened").exists()

    def test_directory_with_a_pickle_only(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin looks like a pickle"):
            checkpoints.read_weights(tmp_path)

    def test_empty_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="neither"):
            checkpoints.read_weights(tmp_path)


class TestIndex:
    @pytest.mark.parametrize(
        "shard",
        ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "..\\a.safetensors"],
    )
    def test_escape(self, tmp_path: Path, state: dict[str, torch.Tensor], shard: str) -> None:
        safetensors.torch.save_file({"steps": state["steps"]}, tmp_path / "secret.safetensors")
        (tmp_path / "model").mkdir()
        index = sharded(tmp_path / "model", state)
        rewrite(index, lambda weight_map: weight_map.update(steps=shard))
        with pytest.raises(CheckpointError, match="not a file beside it"):
            checkpoints.read_weights(index)

    def test_link_outside(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        (tmp_path / "model").mkdir()
        index = sharded(tmp_path / "model", state)
        shard = tmp_path / "model" / "model-00001-of-00003.safetensors"
        shard.rename(tmp_path / "elsewhere.safetensors")
        shard.symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(CheckpointError, match="symbolic link"):
            checkpoints.read_weights(index)

    def test_hub_cache(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
        blobs = tmp_path / "models--a--b" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        sharded(snapshot, state)
        for number, file in enumerate(sorted(snapshot.iterdir())):
            file.rename(blobs / str(number))
            file.symlink_to(Path("../../blobs") / str(number))
        assert_same(checkpoints.read_weights(snapshot), dict(sorted(state.items())))

    def test_missing_shard(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        index = sharded(tmp_path, state)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors'?, which is missing"):
            checkpoints.read_weights(index)

    def test_truncated_shard(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        index = sharded(tmp_path, state)
        shard = tmp_path / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="model-00002-of-00003"):
            checkpoints.read_weights(index)

    def test_pickled_shard(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        index = sharded(tmp_path, state)
        torch.save({}, tmp_path / "shard.bin")
        rewrite(index, lambda weight_map: weight_map.update(steps="shard.bin"))
        with pytest.raises(CheckpointError, match="pickle"):
            checkpoints.read_weights(index)

    def test_disagreement(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        index = sharded(tmp_path, state)
        rewrite(index, lambda weight_map: weight_map.update(extra=weight_map["steps"]))
        with pytest.raises(CheckpointError, match="disagree about extra"):
            checkpoints.read_weights(index)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"]
    )
    def test_malformed(self, tmp_path: Path, content: str) -> None:
        index = tmp_path / checkpoints.INDEX_NAME
        index.write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            checkpoints.read_weights(index)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


class TestLoad:
    def test_everything_wrong_is_said_at_once(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        weights = dict(model.state_dict())
        del weights["1.running_mean"]
        weights["0.weight"] = torch.zeros(3, 5)
        weights["0.bias"] = torch.zeros(3, dtype=torch.int64)
        weights["2.weight"] = torch.zeros(1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load_into(model, weights, "a.safetensors")
        message = str(caught.value)
        assert "a.safetensors does not fit Sequential" in message
        assert "missing: 1.running_mean" in message
        assert "unexpected: 2.weight" in message
        assert "shape of 0.weight: (3, 5), but the model has (3, 4)" in message
        assert "dtype of 0.bias: torch.int64" in message
        assert_same(dict(model.state_dict()), before)

    def test_prefix(self) -> None:
        model = nn.Linear(4, 3)
        weights = {f"module.{name}": value for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"every name carries the prefix 'module\.'"):
            checkpoints.load_into(model, weights, "a")

    def test_many_names_are_cut(self) -> None:
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(50)])
        with pytest.raises(CheckpointError, match="and 92 more"):
            checkpoints.load_into(model, {"x": torch.zeros(1)}, "a")

    def test_tied_name_may_be_missing(self) -> None:
        model, weight = Tied(), torch.randn(5, 3)
        checkpoints.load_into(model, {"embedding.weight": weight, "head.bias": torch.zeros(5)}, "a")
        assert torch.equal(model.head.weight, weight)

    def test_unequal_ties(self) -> None:
        weights = {
            "embedding.weight": torch.zeros(5, 3),
            "head.weight": torch.ones(5, 3),
            "head.bias": torch.zeros(5),
        }
        with pytest.raises(CheckpointError, match=r"embedding\.weight and head\.weight differ"):
            checkpoints.load_into(Tied(), weights, "a")

    def test_precision_follows_the_model(self) -> None:
        model = nn.Linear(2, 1)
        weights = {
            "weight": torch.ones(1, 2, dtype=torch.float16),
            "bias": torch.ones(1, dtype=torch.float16),
        }
        checkpoints.load_into(model, weights, "a")
        assert model.weight.dtype == torch.float32
        assert torch.equal(model.weight.detach(), torch.ones(1, 2))


class TestSave:
    def test_round_trip(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        checkpoints.save_weights(state, tmp_path / "a.safetensors", {"b": "2", "ä": "1\n"})
        assert_same(checkpoints.read_weights(tmp_path / "a.safetensors"), dict(sorted(state.items())))
        with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert file.metadata() == {"b": "2", "ä": "1\n", "format": "pt"}

    def test_permissions_are_those_of_any_new_file(
        self, tmp_path: Path, state: dict[str, torch.Tensor]
    ) -> None:
        mask = os.umask(0o027)
        try:
            checkpoints.save_weights(state, tmp_path / "a.safetensors")
        finally:
            os.umask(mask)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
        assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]

    def test_same_bytes(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        metadata = {letter: letter for letter in "qwertyuiop"}
        written = set()
        for order in (list(state), list(reversed(state)), list(state)):
            checkpoints.save_weights(
                {name: state[name] for name in order}, tmp_path / "a.safetensors", metadata
            )
            written.add((tmp_path / "a.safetensors").read_bytes())
        assert len(written) == 1

    def test_ties_load_strict(self, tmp_path: Path) -> None:
        model = Tied()
        checkpoints.save_weights(model.state_dict(), tmp_path / "a.safetensors")
        other = Tied()
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"), strict=True)
        assert torch.equal(other.head.weight, model.embedding.weight)

    def test_views_are_packed(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4)
        checkpoints.save_weights({"t": base.t(), "row": base[1], "all": base}, tmp_path / "a.safetensors")
        read = checkpoints.read_weights(tmp_path / "a.safetensors")
        assert torch.equal(read["t"], base.t())
        assert torch.equal(read["row"], base[1])
        assert torch.equal(read["all"], base)

    @pytest.mark.parametrize(
        "bad", [{}, {"x": torch.zeros(2, 2).to_sparse()}, {"x": torch.zeros(2, device="meta")}]
    )
    def test_refusal_leaves_nothing(self, tmp_path: Path, bad: dict[str, torch.Tensor]) -> None:
        with pytest.raises(CheckpointError):
            checkpoints.save_weights(bad, tmp_path / "a.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_refusal_keeps_the_old_file(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "a.safetensors"
        checkpoints.save_weights(state, path)
        before = path.read_bytes()
        with pytest.raises(CheckpointError):
            checkpoints.save_weights({"x": torch.zeros(2, device="meta")}, path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


class TestOutputDirectory:
    def test_unrelated_content(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(CheckpointError, match=r"thesis\.tex, which fxfusion did not write"):
            checkpoints.check_output_directory(tmp_path)

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        with pytest.raises(CheckpointError, match="is a file"):
            checkpoints.check_output_directory(tmp_path / "out")

    def test_new_empty_or_earlier(self, tmp_path: Path) -> None:
        checkpoints.check_output_directory(tmp_path / "new")
        checkpoints.check_output_directory(tmp_path)
        (tmp_path / "model.safetensors").touch()
        (tmp_path / f"out{checkpoints.REPORT_SUFFIX}").touch()
        checkpoints.check_output_directory(tmp_path)
