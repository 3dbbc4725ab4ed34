"""Example inputs and calibration files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from fxfusion import inputs
from fxfusion.calibration import Batches
from fxfusion.capture import capture
from fxfusion.errors import CalibrationMismatchError, InputError


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.linear = nn.Linear(3, 4)

    def forward(self, ids: Tensor, image: Tensor, scale: float = 1.0) -> Tensor:
        """Add an embedding of ids (batch, length) to a map of image (batch, 3)."""
        return scale * (self.embedding(ids).sum(1) + self.linear(image))


def tiny(name: str, **options: Any) -> Any:
    import transformers

    sizes: dict[str, dict[str, Any]] = {
        "Bert": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        "ViT": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
        "T5": {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16},
        "Whisper": {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "d_model": 16,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "max_source_positions": 20,
            "num_mel_bins": 8,
        },
        "Wav2Vec2": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "conv_dim": [8] * 7,
        },
    }
    family, _, task = name.partition("For")
    configuration = getattr(transformers, f"{family}Config")(**{**sizes[family], **options})
    model = getattr(transformers, f"{family}For{task}" if task else f"{family}Model")(configuration)
    return model.eval()


class TestParse:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("x=2x3x32x32:float32", inputs.InputSpec("x", (2, 3, 32, 32), torch.float32)),
            ("input_ids=2x16:int64", inputs.InputSpec("input_ids", (2, 16), torch.int64)),
            ("2x16", inputs.InputSpec("", (2, 16), torch.float32)),
            (" mask=4:bool ", inputs.InputSpec("mask", (4,), torch.bool)),
        ],
    )
    def test_read(self, text: str, expected: inputs.InputSpec) -> None:
        assert inputs.parse_input(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "x",
            "x=",
            "x=2x",
            "x=axb",
            "x=2,3",
            "x=2x3:",
            "x=2x3:float31",
            "x=2x0",
            "x=-1x3",
            "=2x3",
            "1x=2",
        ],
    )
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(InputError, match="the input"):
            inputs.parse_input(text)


class TestExamples:
    @pytest.mark.parametrize(
        ("name", "options", "shape"),
        [
            ("test_vit", {}, (2, 3, 160, 160)),
            ("test_vit", {"img_size": 64}, (2, 3, 64, 64)),
            ("resnet18", {"in_chans": 1}, (2, 1, 224, 224)),
        ],
    )
    def test_timm(self, name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
        example = inputs.example_inputs(timm.create_model(name, **options))
        assert example.args[0].shape == shape
        assert list(example.tensors) == ["x"]
        assert example.kwargs == {}

    @pytest.mark.parametrize(
        ("name", "options", "shapes"),
        [
            ("BertForMaskedLM", {}, {"input_ids": (2, 16), "attention_mask": (2, 16)}),
            (
                "T5ForConditionalGeneration",
                {},
                {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 8)},
            ),
            (
                "ViTForImageClassification",
                {"image_size": 32, "num_channels": 1},
                {"pixel_values": (2, 1, 32, 32)},
            ),
            (
                "WhisperForConditionalGeneration",
                {"pad_token_id": 0},
                {"input_features": (2, 8, 40), "decoder_input_ids": (2, 8)},
            ),
            ("Wav2Vec2ForCTC", {}, {"input_values": (2, 4000)}),
        ],
    )
    def test_transformers(
        self, name: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        model = tiny(name, **options)
        example = inputs.example_inputs(model)
        assert {key: tuple(value.shape) for key, value in example.tensors.items()} == shapes
        assert example.args == ()
        with torch.no_grad():
            model(**example.kwargs)

    def test_no_cache(self) -> None:
        example = inputs.example_inputs(tiny("T5ForConditionalGeneration"))
        assert example.constants == {"use_cache": False}

    def test_seed(self) -> None:
        model = timm.create_model("test_vit")
        first, same, other = (inputs.example_inputs(model, seed=seed).args[0] for seed in (0, 0, 1))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_exported_program(self) -> None:
        image = torch.randn(2, 3)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        program = torch.export.export(TwoInputs(), (ids,), {"image": image})
        example = inputs.example_inputs(program)
        assert list(example.tensors) == ["ids", "image"]
        assert torch.equal(example.args[0], ids)
        assert torch.equal(example.kwargs["image"], image)

    def test_unknown_model_says_what_to_do(self) -> None:
        with pytest.raises(
            InputError, match=r"TwoInputs .* \(ids, image, scale\) .*--input ids=.*--calibration"
        ):
            inputs.example_inputs(TwoInputs())

    def test_specified(self) -> None:
        specifications = [inputs.parse_input("image=4x3"), inputs.parse_input("4x7:int64")]
        example = inputs.example_inputs(TwoInputs(), specifications)
        assert [tuple(value.shape) for value in example.args] == [(4, 7), (4, 3)]
        assert example.args[0].dtype == torch.int64
        TwoInputs()(*example.args, **example.kwargs)

    def test_specified_for_transformers_keeps_the_constants(self) -> None:
        example = inputs.example_inputs(
            tiny("T5ForConditionalGeneration"),
            [inputs.parse_input("input_ids=1x4:int64"), inputs.parse_input("decoder_input_ids=1x2:int64")],
        )
        assert set(example.kwargs) == {"input_ids", "decoder_input_ids", "use_cache"}

    @pytest.mark.parametrize("texts", [["label=2x3"], ["ids=2x3:int64", "ids=2x3:int64"]])
    def test_specified_wrongly(self, texts: list[str]) -> None:
        with pytest.raises(InputError, match=r"no input 'label'|given twice"):
            inputs.example_inputs(TwoInputs(), [inputs.parse_input(text) for text in texts])

    def test_from_calibration(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, ids=np.arange(5)[:, None], image=np.ones((5, 3), np.float32))
        example = inputs.example_inputs(TwoInputs(), calibration=inputs.load_calibration(path, TwoInputs()))
        assert example.args[0].tolist() == [[0], [1]]
        TwoInputs()(*example.args)

    def test_from_one_sample(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, ids=np.array([[3]]), image=np.ones((1, 3), np.float32))
        example = inputs.example_inputs(TwoInputs(), calibration=inputs.load_calibration(path, TwoInputs()))
        assert example.args[0].tolist() == [[3], [3]]


def arrays(samples: int = 7) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "ids": generator.integers(0, 9, (samples, 5)),
        "image": generator.standard_normal((samples, 3)).astype(np.float32),
    }


def write(path: Path, content: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)  # type: ignore[arg-type]
    else:
        safetensors.torch.save_file({name: torch.from_numpy(value) for name, value in content.items()}, path)
    return path


@pytest.fixture(params=["a.npz", "a.safetensors"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


class TestCalibration:
    def test_batches(self, path: Path) -> None:
        content = arrays()
        calibration = inputs.load_calibration(write(path, content), TwoInputs(), batch_size=3)
        assert len(calibration) == 3
        for _ in range(2):  # As often as one likes.
            batches = list(calibration)
            assert [len(batch["ids"]) for batch in batches] == [3, 3, 1]
            for name, value in content.items():
                assert np.array_equal(torch.cat([batch[name] for batch in batches]).numpy(), value)

    def test_labels_are_ignored(self, path: Path) -> None:
        calibration = inputs.load_calibration(write(path, {**arrays(), "labels": np.arange(2)}), TwoInputs())
        assert set(next(iter(calibration))) == {"ids", "image"}

    def test_precision_follows_the_model(self, path: Path) -> None:
        content = arrays()
        content["image"] = content["image"].astype(np.float64)
        calibration = inputs.load_calibration(write(path, content), TwoInputs())
        assert next(iter(calibration))["image"].dtype == torch.float32

    def test_integers_follow_the_model(self, path: Path) -> None:
        calibration = inputs.load_calibration(
            write(path, {"input_ids": np.ones((3, 4), np.int32)}), tiny("BertForMaskedLM")
        )
        assert next(iter(calibration))["input_ids"].dtype == torch.int64

    def test_constants_go_along(self, path: Path) -> None:
        ids = np.ones((3, 4), np.int64)
        model = tiny("T5ForConditionalGeneration")
        calibration = inputs.load_calibration(
            write(path, {"input_ids": ids, "decoder_input_ids": ids.copy()}), model
        )
        batch = next(iter(calibration))
        assert batch["use_cache"] is False
        with torch.no_grad():
            model(**batch)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"image": np.ones((6, 3), np.float32)}, "ids has 7, image has 6"),
            (
                {"picture": np.ones((7, 3), np.float32)},
                "holds picture, .* ids, image, scale: name each array",
            ),
            ({"image": np.full((7, 3), np.nan, np.float32)}, "image holds NaN or infinite"),
            ({"image": np.array(3.0, np.float32)}, "scalar"),
        ],
    )
    def test_refusals(self, path: Path, change: dict[str, np.ndarray], expected: str) -> None:
        write(path, {**arrays(), **change})
        with pytest.raises(CalibrationMismatchError, match=expected):
            inputs.load_calibration(path, TwoInputs())

    def test_the_bad_sample_is_found(self, path: Path) -> None:
        content = arrays()
        content["image"][5, 1] = np.inf
        with pytest.raises(CalibrationMismatchError, match="among the samples 4 to 5"):
            inputs.load_calibration(write(path, content), TwoInputs(), batch_size=2)

    def test_missing_input(self, path: Path) -> None:
        content = arrays()
        del content["image"]
        with pytest.raises(CalibrationMismatchError, match="lacks image"):
            inputs.load_calibration(write(path, content), TwoInputs())

    def test_missing_decoder_input(self, path: Path) -> None:
        with pytest.raises(CalibrationMismatchError, match="lacks decoder_input_ids"):
            inputs.load_calibration(
                write(path, {"input_ids": np.ones((3, 4), np.int64)}), tiny("T5ForConditionalGeneration")
            )

    def test_empty(self, path: Path) -> None:
        with pytest.raises(CalibrationMismatchError, match="no samples"):
            inputs.load_calibration(write(path, arrays(0)), TwoInputs())
        with pytest.raises(CalibrationMismatchError, match="no arrays"):
            inputs.load_calibration(write(path, {}), TwoInputs())

    def test_truncated(self, path: Path) -> None:
        write(path, arrays())
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(CalibrationMismatchError, match="truncated"):
            inputs.load_calibration(path, TwoInputs())

    def test_missing_file(self, path: Path) -> None:
        with pytest.raises(CalibrationMismatchError, match="does not exist"):
            inputs.load_calibration(path, TwoInputs())

    @pytest.mark.parametrize(
        ("array", "expected"),
        [
            (np.zeros((3, 3, 160, 160), np.uint8), "torch.uint8, but the model takes torch.float32 .scale"),
            (np.zeros((3, 160, 160), np.float32), r"shape \(3, 160, 160\), but the model takes 4 axes"),
        ],
    )
    def test_against_the_models_own_example(self, path: Path, array: np.ndarray, expected: str) -> None:
        with pytest.raises(CalibrationMismatchError, match=expected):
            inputs.load_calibration(write(path, {"x": array}), timm.create_model("test_vit"))

    def test_against_an_exported_program(self, path: Path) -> None:
        program = torch.export.export(TwoInputs(), (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3)))
        assert len(inputs.load_calibration(write(path, arrays()), program)) == 1
        with pytest.raises(CalibrationMismatchError, match="lacks ids"):
            inputs.load_calibration(write(path, {"image": arrays()["image"]}), program)

    def test_pickled_array(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", ids=np.array([{}, {}]), image=arrays(2)["image"])
        with pytest.raises(CalibrationMismatchError, match="allow_pickle"):
            inputs.load_calibration(tmp_path / "a.npz", TwoInputs())

    def test_text_array(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", ids=np.array(["a", "b"]), image=arrays(2)["image"])
        with pytest.raises(CalibrationMismatchError, match="ids has dtype <U1"):
            inputs.load_calibration(tmp_path / "a.npz", TwoInputs())

    @pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.csv"])
    def test_other_formats(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CalibrationMismatchError, match=r"neither \.npz nor \.safetensors"):
            inputs.load_calibration(tmp_path / name, TwoInputs())

    def test_a_single_array_named_npz(self, tmp_path: Path) -> None:
        with (tmp_path / "a.npz").open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(CalibrationMismatchError, match=r"not an \.npz"):
            inputs.load_calibration(tmp_path / "a.npz", TwoInputs())


def test_halves_hold_every_other_batch() -> None:
    known = capture(nn.Linear(3, 2), (torch.ones(2, 3),))
    batches = [torch.full((4, 3), float(number)) for number in range(5)]
    halves = Batches(known, batches).halves()
    assert halves is not None
    even, odd = ([float(args[0][0, 0]) for args, _ in half] for half in halves)
    assert (even, odd) == ([0, 2, 4], [1, 3])
    assert Batches(known, batches[:1]).halves() is None


def test_there_are_no_halves_of_less_than_two_batches_of_a_fixed_size() -> None:
    known = dataclasses.replace(capture(nn.Linear(3, 2), (torch.ones(8, 3),)), dynamic=False)
    assert Batches(known, [torch.ones(4, 3)] * 3).halves() is None
    assert Batches(known, [torch.ones(4, 3)] * 4).halves() is not None
