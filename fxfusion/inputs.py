"""Example inputs and calibration data for models that the command line names.

A model's example inputs come from what it says about itself: timm's default configuration, a transformers
model's main input and configuration, an exported program's own example. Else they come from the
calibration file or from ``--input name=2x3x32x32:float32``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfusion.errors import CalibrationMismatchError, InputError

BATCH = 2
TOKENS = 16
AUDIO_SAMPLES = 4000
AUDIO_FRAMES = 64

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}

# Arrays that a data file may hold beside the inputs; fusion does not use labels.
_LABELS = frozenset({"label", "labels"})

_SPECIFICATION = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One ``--input``: the shape and dtype of an input.

    Attributes
    ----------
    name : str
        The parameter of the model's ``forward``; empty means the first one.
    shape : tuple of int
        Sizes, the batch first.
    dtype : torch.dtype
        What the values are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Example:
    """What to call a model with.

    Attributes
    ----------
    args : tuple
        Positional arguments.
    kwargs : dict of str to Any
        Keyword arguments, tensors and constants such as ``use_cache=False``.
    tensors : dict of str to Tensor
        The tensors among both by the model's name for them, which a calibration file uses as well.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def constants(self) -> dict[str, Any]:
        """The keyword arguments that are not tensors and so go with every batch."""
        return {name: value for name, value in self.kwargs.items() if name not in self.tensors}


def parse_input(text: str) -> InputSpec:
    """Read one ``--input`` option.

    Parameters
    ----------
    text : str
        ``name=2x3x32x32:float32``; the name may be left out (the first input) and so may the dtype
        (float32).

    Returns
    -------
    InputSpec
        What the text says.

    Raises
    ------
    InputError
        The text has another form, an unknown dtype or a size of zero.

    Examples
    --------
    >>> parse_input("x=2x3x32x32:float32")
    InputSpec(name='x', shape=(2, 3, 32, 32), dtype=torch.float32)
    """
    match = _SPECIFICATION.fullmatch(text.strip())
    if match is None:
        raise InputError(f"cannot read the input {text!r}: write name=2x3x32x32:float32, or 2x16:int64")
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise InputError(f"the input {text!r} has an unknown dtype: choose one of {', '.join(DTYPES)}")
    shape = tuple(int(size) for size in match["shape"].split("x"))
    if 0 in shape:
        raise InputError(f"the input {text!r} has a size of zero")
    return InputSpec(match["name"] or "", shape, DTYPES[dtype])


def example_inputs(
    model: nn.Module | ExportedProgram,
    specifications: Sequence[InputSpec] = (),
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Example:
    """Make inputs that a model accepts.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        The model.
    specifications : sequence of InputSpec
        Shapes that the user gave. They come first; what a model needs beside them it says itself.
    calibration : Calibration, optional
        Its first samples are used for a model that says nothing about its inputs, and wherever they are
        there: real inputs reach code that random ones may not.
    seed : int, default 0
        Of the random values.

    Returns
    -------
    Example
        Arguments and keyword arguments.

    Raises
    ------
    InputError
        The model does not say what it takes and nobody else did, or a name is not one of its inputs.

    Examples
    --------
    >>> import timm
    >>> example = example_inputs(timm.create_model("test_vit"))
    >>> example.args[0].shape
    torch.Size([2, 3, 160, 160])
    """
    generator = torch.Generator().manual_seed(seed)
    if specifications:
        return _specified(model, specifications, generator)
    if calibration is not None:
        return _from_calibration(model, calibration)
    example = _own_example(model, generator)
    if example is None or not example.tensors:
        names = input_names(model)
        raise InputError(
            f"{type(model).__name__} does not say what its inputs ({', '.join(names)}) look like: give "
            f"--input {names[0] if names else 'x'}=2x3x32x32:float32 or --calibration FILE"
        )
    return example


def input_names(model: nn.Module | ExportedProgram) -> list[str]:
    """The names of a model's inputs, in order.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        The model.

    Returns
    -------
    list of str
        Parameters of ``forward``, or the program's user inputs.
    """
    parameters = inspect.signature(_forward(model)).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind not in variadic]


def load_calibration(
    path: str | Path,
    model: nn.Module | ExportedProgram,
    batch_size: int = 32,
) -> Calibration:
    """Open calibration data and check all of it against a model.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` or safetensors file, one array per input name, first axis samples. An array named
        ``labels`` is ignored.
    model : torch.nn.Module or torch.export.ExportedProgram
        Whose inputs the arrays are.
    batch_size : int, default 32
        Samples per batch; the last batch may be smaller.

    Returns
    -------
    Calibration
        An iterable of batches, which may be walked any number of times.

    Raises
    ------
    CalibrationMismatchError
        The file is missing, truncated or empty; names are not inputs of the model or a required input
        is missing; sample counts differ; a dtype or the number of axes is not what the model takes; a
        value is NaN or infinite.
    """
    return _load(Path(path), model, batch_size)[0]


def _load(path: Path, model: nn.Module | ExportedProgram, batch_size: int) -> tuple[Calibration, list[Array]]:
    """Return the inputs that a file holds, and its labels if there are any."""
    if batch_size < 1:
        raise CalibrationMismatchError(f"the calibration batch size is {batch_size}, but must be at least 1")
    held = _open(path)
    arrays = {name: array for name, array in held.items() if name not in _LABELS}
    own = _own_example(model, torch.Generator().manual_seed(0))
    _check_names(path, arrays, model, own)
    samples = _check_counts(path, arrays)
    dtypes = {name: _target_dtype(path, name, array, model, own) for name, array in arrays.items()}
    constants = own.constants if own is not None else {}
    calibration = Calibration(path, arrays, dtypes, samples, batch_size, constants)
    _check_finite(calibration)
    return calibration, [array for name, array in held.items() if name in _LABELS]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Batches of data with labels: inputs, and ``labels``.

    Attributes
    ----------
    inputs : Calibration
    labels : Array
        Integers, first axis samples.
    """

    inputs: Calibration
    labels: Array

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = 0
        for batch in self.inputs:
            stop = min(start + self.inputs.batch_size, self.inputs.samples)
            yield {**batch, "labels": self.labels.read(start, stop)}
            start = stop


def load_evaluation(
    path: str | Path,
    model: nn.Module | ExportedProgram,
    batch_size: int = 32,
) -> Evaluation:
    """Open data with labels: as :func:`load_calibration`, and an array ``labels`` of integers.

    Raises
    ------
    CalibrationMismatchError
        As for :func:`load_calibration`, or if there are no labels, or not one per sample.
    """
    inputs, labels = _load(Path(path), model, batch_size)
    if not labels:
        raise CalibrationMismatchError(f"{path} has no labels: add an array named 'labels'")
    if labels[0].shape[:1] != (inputs.samples,):
        raise CalibrationMismatchError(
            f"{path} has labels of shape {tuple(labels[0].shape)} for {inputs.samples} samples"
        )
    return Evaluation(inputs, labels[0])


class Array(Protocol):
    """An array on disk or in memory that is read in slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, samples first."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return the samples from ``start`` to ``stop``."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Batches of calibration data, read from the file as they are asked for.

    Attributes
    ----------
    path : Path
        The file.
    arrays : dict of str to Array
        The data by input name.
    dtypes : dict of str to torch.dtype
        What each input is converted to.
    samples : int
        How many samples there are.
    batch_size : int
        Samples per batch, but for the last.
    constants : dict of str to Any
        Arguments that go with every batch, such as ``use_cache=False``.
    """

    path: Path
    arrays: dict[str, Array]
    dtypes: dict[str, torch.dtype]
    samples: int
    batch_size: int
    constants: dict[str, Any]

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.samples, self.batch_size):
            yield {**self.read(start, min(start + self.batch_size, self.samples)), **self.constants}

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return the samples from ``start`` to ``stop`` of every input."""
        return {name: array.read(start, stop).to(self.dtypes[name]) for name, array in self.arrays.items()}


def _forward(model: nn.Module | ExportedProgram) -> Callable[..., Any]:
    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    return module.forward


def _is_transformers(model: Any) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def _own_example(model: nn.Module | ExportedProgram, generator: torch.Generator) -> Example | None:
    """What the model itself says that it takes, or None."""
    if isinstance(model, ExportedProgram):
        return _exported_example(model)
    if _is_transformers(model):
        return _transformers_example(model, generator)
    return _timm_example(model, generator)


def _exported_example(program: ExportedProgram) -> Example | None:
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    names = input_names(program)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return Example(tuple(args), dict(kwargs), tensors)


def _timm_example(model: nn.Module, generator: torch.Generator) -> Example | None:
    # pretrained_cfg holds the input size that the model was built for, where it differs from the default.
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if config is None:
        return None
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    if size is None:
        return None
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built_for if built_for is not None else size[1:]
    channels = getattr(model, "in_chans", None) or size[0]
    images = torch.randn(BATCH, channels, height, width, generator=generator)
    return Example((images,), {}, {input_names(model)[0]: images})


def _transformers_example(model: Any, generator: torch.Generator) -> Example:
    names = set(input_names(model))
    main = model.main_input_name
    make = _MAIN_INPUTS.get(main)
    constants = {"use_cache": False} if "use_cache" in names else {}
    if make is None or main not in names:
        return Example((), constants, {})
    tensors = {main: make(model.config, generator)}
    if main == "input_ids":
        tokens = tensors[main].shape
        if "attention_mask" in names:
            tensors["attention_mask"] = torch.ones(tokens, dtype=torch.int64)
        if "bbox" in names:
            tensors["bbox"] = torch.zeros(*tokens, 4, dtype=torch.int64)
        if "pixel_values" in names and (
            hasattr(model.config, "vision_config") or hasattr(model.config, "image_size")
        ):
            tensors["pixel_values"] = _images(model.config, generator)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        tensors["decoder_input_ids"] = _tokens(model.config, generator, TOKENS // 2)
    return Example((), {**tensors, **constants}, tensors)


def _tokens(config: Any, generator: torch.Generator, length: int = TOKENS) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None) or getattr(text, "vocab_size", None) or BATCH
    # The first few ids are padding, start and end in most vocabularies, which some models search for.
    low = min(5, vocabulary // 2)
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        length = min(length, max(positions - 4, 1))  # some count positions from behind the padding's
    return torch.randint(low, vocabulary, (BATCH, length), generator=generator)


def _images(config: Any, generator: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 64
    height, width = tuple(size)[-2:] if isinstance(size, Sequence) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    frames = getattr(vision, "num_frames", None)
    shape = (channels, height, width) if frames is None else (frames, channels, height, width)
    return torch.randn(BATCH, *shape, generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor:
    bins = getattr(config, "num_mel_bins", None)
    positions = getattr(config, "max_source_positions", None)
    width = getattr(config, "input_feat_per_channel", None)
    if bins and positions and width is None:
        return torch.randn(BATCH, bins, 2 * positions, generator=generator)  # Whisper: frequency first.
    width = width or getattr(config, "feature_projection_input_dim", None) or bins or 80
    return torch.randn(BATCH, AUDIO_FRAMES, width, generator=generator)


def _values(config: Any, generator: torch.Generator) -> Tensor:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        # A spectrogram, not a waveform.
        return torch.randn(BATCH, config.max_length, config.num_mel_bins, generator=generator)
    return torch.randn(BATCH, AUDIO_SAMPLES, generator=generator)


_MAIN_INPUTS: dict[str, Callable[[Any, torch.Generator], Tensor]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "input_features": _features,
    "input_values": _values,
}


def _specified(
    model: nn.Module | ExportedProgram, specifications: Sequence[InputSpec], generator: torch.Generator
) -> Example:
    names = input_names(model)
    given: dict[str, Tensor] = {}
    for specification in specifications:
        name = specification.name or next((name for name in names if name not in given), "")
        if name not in names:
            raise InputError(f"the model has no input {name!r}: its inputs are {', '.join(names)}")
        if name in given:
            raise InputError(f"the input {name!r} is given twice")
        given[name] = _random(specification, generator)
    return _complete(model, given, _own_example(model, generator))


def _random(specification: InputSpec, generator: torch.Generator) -> Tensor:
    shape, dtype = specification.shape, specification.dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    # Zeros and ones are valid indices into any vocabulary, and valid masks.
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _from_calibration(model: nn.Module | ExportedProgram, calibration: Calibration) -> Example:
    count = min(BATCH, calibration.samples)
    samples = calibration.read(0, count)
    if count == 1:  # A batch of one is taken for a constant by torch.export.
        samples = {name: torch.cat([value, value]) for name, value in samples.items()}
    return _complete(model, samples, Example((), dict(calibration.constants), {}))


def _complete(model: nn.Module | ExportedProgram, given: dict[str, Tensor], own: Example | None) -> Example:
    """Arguments from the tensors given and, for a model that takes constants, those."""
    names = input_names(model)
    constants = own.constants if own is not None else {}
    if own is None or own.args or not own.kwargs:
        leading = []
        for name in names:
            if name not in given:
                break
            leading.append(given[name])
        rest = {name: value for name, value in given.items() if name not in names[: len(leading)]}
        return Example(tuple(leading), {**rest, **constants}, given)
    return Example((), {**given, **constants}, given)


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """An array of an ``.npz``, which is compressed and so has to be read whole."""

    data: np.ndarray
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.data[start:stop]))


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A tensor of a safetensors file, read slice by slice."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        tensor: Tensor = self.file.get_slice(self.name)[start:stop]
        return tensor


def _open(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise CalibrationMismatchError(f"the calibration file {path} does not exist or is not a file")
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise CalibrationMismatchError(
        f"the calibration file {path} is neither .npz nor .safetensors: write it with "
        "numpy.savez(FILE, input_name=array) or safetensors.torch.save_file"
    )


def _open_npz(path: Path) -> dict[str, Array]:
    try:
        if not zipfile.is_zipfile(path):  # np.load would also take a single array.
            raise zipfile.BadZipFile("not a zip file")
        with np.load(path, allow_pickle=False) as file:
            contents = {name: file[name] for name in sorted(file.files)}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CalibrationMismatchError(
            f"the calibration file {path} is truncated, pickled or not an .npz ({error}): write it with "
            "numpy.savez(FILE, input_name=array)"
        ) from error
    arrays: dict[str, Array] = {}
    for name, data in contents.items():
        try:
            dtype = torch.from_numpy(data[:0] if data.ndim else data.reshape(1)).dtype
        except TypeError:
            raise CalibrationMismatchError(
                f"{path}: {name} has dtype {data.dtype}, which is not a dtype of tensors"
            ) from None
        arrays[name] = _InMemory(data, data.shape, dtype)
    return arrays


def _open_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        arrays: dict[str, Array] = {}
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            # A slice of no samples tells the dtype as torch names it.
            dtype = part[:0].dtype if shape else file.get_tensor(name).dtype
            arrays[name] = _Lazy(file, name, shape, dtype)
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationMismatchError(
            f"the calibration file {path} is truncated or not safetensors ({error}): write it again"
        ) from error
    return arrays


def _check_names(
    path: Path, arrays: Mapping[str, Array], model: nn.Module | ExportedProgram, own: Example | None
) -> None:
    if not arrays:
        raise CalibrationMismatchError(f"the calibration file {path} holds no arrays")
    names = input_names(model)
    if unknown := sorted(set(arrays) - set(names)):
        raise CalibrationMismatchError(
            f"{path} holds {', '.join(unknown)}, but the inputs of {type(model).__name__} are "
            f"{', '.join(names)}: name each array after an input"
        )
    if missing := [name for name in _required(model, own) if name not in arrays]:
        raise CalibrationMismatchError(
            f"{path} lacks {', '.join(missing)}, which {type(model).__name__} needs"
        )


def _required(model: nn.Module | ExportedProgram, own: Example | None) -> list[str]:
    if _is_transformers(model) and own is not None:
        # Everything has a default there; only a mask is one that the model fills in rightly.
        return [name for name in own.tensors if name not in ("attention_mask", "bbox")]
    if isinstance(model, ExportedProgram):
        return list(own.tensors) if own is not None else input_names(model)
    parameters = inspect.signature(model.forward).parameters
    return [name for name in input_names(model) if parameters[name].default is inspect.Parameter.empty]


def _check_counts(path: Path, arrays: Mapping[str, Array]) -> int:
    if scalars := [name for name, array in arrays.items() if not array.shape]:
        raise CalibrationMismatchError(
            f"{path}: {scalars[0]} is a scalar, but the first axis must be the samples"
        )
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise CalibrationMismatchError(f"{path}: the sample counts (first axis) differ: {listed}")
    samples = next(iter(counts.values()))
    if samples == 0:
        raise CalibrationMismatchError(f"{path} holds no samples")
    return samples


def _target_dtype(
    path: Path, name: str, array: Array, model: nn.Module | ExportedProgram, own: Example | None
) -> torch.dtype:
    """The dtype that the model takes. Precision may change, the kind of number may not."""
    expected = own.tensors.get(name) if own is not None else None
    if expected is None:
        return _default_dtype(array, model)
    wanted = expected.dtype
    if array.dtype.is_floating_point != wanted.is_floating_point or array.dtype.is_complex:
        hint = " (scale and standardise images as for training)" if array.dtype == torch.uint8 else ""
        raise CalibrationMismatchError(
            f"{path}: {name} has dtype {array.dtype}, but the model takes {wanted}{hint}"
        )
    if len(array.shape) != expected.ndim:
        raise CalibrationMismatchError(
            f"{path}: {name} has the shape {array.shape}, but the model takes {expected.ndim} axes, "
            f"such as {tuple(expected.shape)}"
        )
    return _default_dtype(array, model) if wanted.is_floating_point else wanted


def _default_dtype(array: Array, model: nn.Module | ExportedProgram) -> torch.dtype:
    """Floating-point data follow the model's weights; everything else stays as it is."""
    if not array.dtype.is_floating_point:
        return array.dtype
    values = model.state_dict.values() if isinstance(model, ExportedProgram) else model.parameters()
    return next((value.dtype for value in values if value.is_floating_point()), array.dtype)


def _check_finite(calibration: Calibration) -> None:
    for index, batch in enumerate(calibration):
        for name in calibration.arrays:
            value = batch[name]
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                first = index * calibration.batch_size
                raise CalibrationMismatchError(
                    f"{calibration.path}: {name} holds NaN or infinite values among the samples {first} to "
                    f"{first + len(value) - 1}"
                )
