"""Models by name: what resolves, what is refused, and that nothing is downloaded or unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfusion import checkpoints
from fxfusion.errors import CheckpointError, ModelReferenceError
from fxfusion.references import ResolvedModel, resolve


def weights(found: ResolvedModel) -> dict[str, torch.Tensor]:
    assert isinstance(found.model, nn.Module)
    return dict(found.model.state_dict())


def bert(directory: Path, **overrides: object) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(directory)
    if overrides:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **overrides}))
    return model


@pytest.fixture
def program(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(2, 4),)), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's in the working directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    path = tmp_path / "my_models.py"
    path.write_text(
        "from torch import nn\n"
        "def make_linear(width=3): return nn.Sequential(nn.Linear(2, width), nn.Dropout())\n"
        "def make_nothing(): return 3\n"
        "def fail(): raise KeyError('no data')\n"
        "instance = make_linear()\n"
    )
    return path


class TestTimm:
    def test_options_and_weights(self, tmp_path: Path) -> None:
        first = resolve("timm:test_vit?num_classes=7&global_pool=avg")
        assert isinstance(first.model, nn.Module)
        assert first.kind == "timm"
        assert not first.model.training
        assert first.model.num_classes == 7
        state = {name: value + 1 for name, value in first.model.state_dict().items()}
        first.save(state, tmp_path / "a@b?.safetensors")
        second = resolve(f"timm:test_vit?num_classes=7&global_pool=avg@{tmp_path}/a@b?.safetensors")
        assert isinstance(second.model, nn.Module)
        assert all(torch.equal(value, state[name]) for name, value in second.model.state_dict().items())
        assert second.reads(tmp_path / "a@b?.safetensors")

    def test_initialisation_is_the_same_every_time(self) -> None:
        first, second = (weights(resolve("timm:test_vit")) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_random_state_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        resolve("timm:test_vit")
        assert torch.equal(before, torch.get_rng_state())

    def test_unknown_name_suggests(self) -> None:
        with pytest.raises(ModelReferenceError, match=r"no model 'resnet_18'; did you mean resnet18"):
            resolve("timm:resnet_18")

    @pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp", ""])
    def test_sources_that_timm_would_download_from(self, name: str) -> None:
        with pytest.raises(ModelReferenceError, match="no model"):
            resolve(f"timm:{name}")

    @pytest.mark.parametrize("option", ["pretrained=True", "checkpoint_path=x.pth", "pretrained_cfg=a"])
    def test_options_that_download_or_unpickle(self, option: str) -> None:
        with pytest.raises(ModelReferenceError, match="download or unpickle"):
            resolve(f"timm:test_vit?{option}")

    @pytest.mark.parametrize("options", ["", "num_classes", "a-b=3", "num_classes=1&num_classes=2"])
    def test_malformed_options(self, options: str) -> None:
        with pytest.raises(ModelReferenceError, match="is not an option"):
            resolve(f"timm:test_vit?{options}")

    def test_option_that_the_model_does_not_have(self) -> None:
        with pytest.raises(ModelReferenceError, match=r"building the model failed: .*colour"):
            resolve("timm:test_vit?colour=3")

    def test_weights_of_another_model(self, tmp_path: Path) -> None:
        checkpoints.save_weights({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"timm:test_vit@.* does not fit"):
            resolve(f"timm:test_vit@{tmp_path}/a.safetensors")

    def test_no_file_after_the_sign(self) -> None:
        with pytest.raises(ModelReferenceError, match="no file after @"):
            resolve("timm:test_vit@")


class TestHuggingFace:
    def test_load_and_save(self, tmp_path: Path) -> None:
        model = bert(tmp_path / "a")
        (tmp_path / "a" / "vocab.txt").write_text("one\ntwo\n")
        (tmp_path / "a" / "README.md").write_text("the card of the parent")
        found = resolve(f"hf:{tmp_path}/a")
        assert isinstance(found.model, nn.Module)
        assert type(found.model).__name__ == "BertForMaskedLM"
        state = {name: value + 1 for name, value in model.state_dict().items()}
        found.save(state, tmp_path / "b")
        names = {file.name for file in (tmp_path / "b").iterdir()}
        assert {"config.json", "model.safetensors", "vocab.txt"} <= names
        assert "README.md" not in names
        assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "a" / "config.json").read_text()
        again = resolve(f"hf:{tmp_path}/b").model
        assert isinstance(again, nn.Module)
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())

    def test_same_bytes(self, tmp_path: Path) -> None:
        model = bert(tmp_path / "a")
        found = resolve(f"hf:{tmp_path}/a")
        for name in ("b", "c"):
            found.save(model.state_dict(), tmp_path / name)
        first, second = (tmp_path / name / "model.safetensors" for name in ("b", "c"))
        assert first.read_bytes() == second.read_bytes()

    def test_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bert(tmp_path / "a")
        found = resolve(f"hf:{tmp_path}/a")

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(checkpoints.shutil, "copyfile", fail)
        with pytest.raises(OSError, match="disk full"):
            found.save({}, tmp_path / "b")
        assert [file.name for file in tmp_path.iterdir()] == ["a"]

    def test_own_directory_is_no_output(self, tmp_path: Path) -> None:
        model = bert(tmp_path / "a")
        found = resolve(f"hf:{tmp_path}/a")
        assert found.reads(tmp_path / "a")
        with pytest.raises(CheckpointError, match="did not write"):
            found.save(model.state_dict(), tmp_path / "a")

    def test_without_weights(self, tmp_path: Path) -> None:
        bert(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        found = resolve(f"hf:{tmp_path}", weights=False).model
        assert isinstance(found, nn.Module)
        assert all(value.is_meta for value in found.parameters())

    def test_missing_directory(self, tmp_path: Path) -> None:
        (tmp_path / "my-bert").mkdir()
        with pytest.raises(ModelReferenceError, match="did you mean my-bert"):
            resolve(f"hf:{tmp_path}/my_bert")

    def test_hub_name_is_not_downloaded(self) -> None:
        with pytest.raises(ModelReferenceError, match="models are not downloaded"):
            resolve("hf:google/bert-base")

    def test_unknown_class(self, tmp_path: Path) -> None:
        bert(tmp_path, architectures=["BertForMaskedML"])
        with pytest.raises(ModelReferenceError, match="did you mean BertForMaskedLM"):
            resolve(f"hf:{tmp_path}")

    def test_remote_code(self, tmp_path: Path) -> None:
        bert(tmp_path, architectures=["Mine"], auto_map={"AutoModel": "modeling.Mine"})
        (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ModelReferenceError, match="does not run"):
            resolve(f"hf:{tmp_path}")

    @pytest.mark.parametrize("architectures", [None, [], [3], "BertForMaskedLM"])
    def test_no_class(self, tmp_path: Path, architectures: object) -> None:
        bert(tmp_path, architectures=architectures)
        with pytest.raises(ModelReferenceError, match="architectures"):
            resolve(f"hf:{tmp_path}")

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_malformed_config(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelReferenceError, match=r"config\.json"):
            resolve(f"hf:{tmp_path}")

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda state: state.pop("cls.predictions.bias"), r"missing: .*cls\.predictions"),
            (lambda state: state.update(extra=torch.zeros(2)), "unexpected: extra"),
            (
                lambda state: state.update(
                    {"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(2, 2)}
                ),
                r"of another shape: .*query\.weight",
            ),
        ],
    )
    def test_weights_that_do_not_fit(
        self, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], expected: str
    ) -> None:
        bert(tmp_path)
        state = checkpoints.read_weights(tmp_path)
        change(state)
        checkpoints.save_weights(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=expected):
            resolve(f"hf:{tmp_path}")

    def test_truncated(self, tmp_path: Path) -> None:
        bert(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
            resolve(f"hf:{tmp_path}")

    def test_pickle_only(self, tmp_path: Path) -> None:
        model = bert(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="pickle"):
            resolve(f"hf:{tmp_path}")


class TestFactory:
    def test_from_the_working_directory(self, module: Path) -> None:
        found = resolve("my_models:make_linear?width=5")
        assert isinstance(found.model, nn.Sequential)
        assert found.model[0].out_features == 5
        assert not found.model.training

    def test_weights(self, module: Path, tmp_path: Path) -> None:
        state = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3)}
        checkpoints.save_weights(state, tmp_path / "a.safetensors")
        found = resolve("my_models:make_linear@a.safetensors").model
        assert isinstance(found, nn.Sequential)
        assert torch.equal(found.state_dict()["0.weight"], state["0.weight"])

    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            ("my_modls:make_linear", "no module my_modls, .*did you mean my_models"),
            ("my_models:make_liner", "did you mean make_linear"),
            ("my_models:instance", "is a Sequential; name a class or function"),
            ("my_models:make_nothing", "gives a int"),
            ("my_models:fail", "building the model failed: KeyError: 'no data'"),
            ("my_models:make_linear?height=3", "unexpected keyword"),
            ("./my_models.py:make_linear", "names no model"),
            ("my_models", "names no model"),
            ("weights.safetensors", "weights alone do not say"),
        ],
    )
    def test_refusals(self, module: Path, reference: str, expected: str) -> None:
        with pytest.raises(ModelReferenceError, match=expected):
            resolve(reference)

    def test_import_that_fails(self, module: Path) -> None:
        module.write_text("import not_installed_anywhere")
        with pytest.raises(
            ModelReferenceError, match="importing my_models failed: No module named 'not_inst"
        ):
            resolve("my_models:make_linear")
        module.write_text("1 / 0")
        with pytest.raises(ModelReferenceError, match="importing my_models failed: ZeroDivisionError"):
            resolve("my_models:make_linear")


def repack(program: Path, change: Callable[[str, bytes], bytes | None], **extra: bytes) -> None:
    """Rewrite the archive's entries; None leaves one out, extra ones are added at their path."""
    with zipfile.ZipFile(program) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in entries.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)
        for name, content in extra.items():
            archive.writestr(name, content)


class TestExported:
    def test_load(self, program: Path, tmp_path: Path) -> None:
        found = resolve(str(program))
        assert isinstance(found.model, torch.export.ExportedProgram)
        assert found.kind == "pt2"
        found.save(found.model.state_dict, tmp_path / "out.safetensors")
        assert set(checkpoints.read_weights(tmp_path / "out.safetensors")) == set(found.model.state_dict)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve(f"{tmp_path}/a.pt2")

    @pytest.mark.parametrize("length", [0, 100, -100])
    def test_truncated(self, program: Path, length: int) -> None:
        program.write_bytes(program.read_bytes()[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            resolve(str(program))

    def test_damaged(self, program: Path) -> None:
        content = bytearray(program.read_bytes())
        content[content.index(b"nodes") + 1] ^= 1
        program.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=r"damaged at .*model\.json"):
            resolve(str(program))

    def test_plain_pickle(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "a.pt2")
        with pytest.raises(CheckpointError, match="no exported program"):
            resolve(f"{tmp_path}/a.pt2")

    @pytest.mark.parametrize("place", ["weights", "constants", "sample_inputs", "old"])
    def test_pickles_are_not_opened(self, program: Path, tmp_path: Path, place: str) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
                return os.mkdir, (str(tmp_path / "opened"),)

        buffer = io.BytesIO()
        torch.save(Trap(), buffer)
        trap = buffer.getvalue()
        if place == "old":
            repack(
                program,
                lambda name, content: content,
                **{"serialized_state_dict.pt": trap, "version": b"8.0"},
            )
        elif place == "sample_inputs":
            repack(program, lambda name, content: trap if "sample_inputs" in name else content)
        else:
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            config = json.dumps({"config": {"trap": entry}}).encode()
            repack(
                program,
                lambda name, content: config if name.endswith(f"model_{place}_config.json") else content,
                **{f"model/data/{place}/opaque_obj_0": pickle.dumps(Trap())},
            )
        with pytest.raises(CheckpointError, match=r"pickle|old format"):
            resolve(str(program))
        assert not (tmp_path / "opened").exists()

    def test_other_byte_order(self, program: Path) -> None:
        other = {"little": b"big", "big": b"little"}[sys.byteorder]
        repack(program, lambda name, content: other if name.endswith("/byteorder") else content)
        with pytest.raises(CheckpointError, match="byte order"):
            resolve(str(program))

    def test_compiled_code(self, program: Path) -> None:
        repack(program, lambda name, content: content, **{"model/data/aotinductor/model/a.so": b"\x7fELF"})
        with pytest.raises(CheckpointError, match="compiled code"):
            resolve(str(program))


class TestOutput:
    def test_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is a \.safetensors file"):
            resolve("timm:test_vit").check_output(tmp_path / "a.bin")

    def test_no_such_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no directory"):
            resolve("timm:test_vit").check_output(tmp_path / "nowhere" / "a.safetensors")

    def test_directory(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").mkdir()
        with pytest.raises(CheckpointError, match="is a directory"):
            resolve("timm:test_vit").check_output(tmp_path / "a.safetensors")
