"""Read and write weights: safetensors only, checked before use, written whole or not at all.

Pickle files (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) run code when they are opened, so they are refused.
"""

from __future__ import annotations

import difflib
import json
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfusion.atomic import replacing, share
from fxfusion.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
REPORT_SUFFIX = ".report.html"
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar"})

# What makes a Hugging Face directory usable beside its weights. The model card is left out: it describes
# the parent, not the fusion.
COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "feature_extractor.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "LICENSE*",
    "NOTICE*",
)

_LISTED = 8


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint without running any code that it could contain.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file, a Hugging Face index (``*.safetensors.index.json``) beside its shards, or
        a directory that holds either.

    Returns
    -------
    dict of str to Tensor
        The tensors by name, sorted by name.

    Raises
    ------
    CheckpointError
        The file is missing, truncated, not safetensors, a pickle, or its index names a shard that is
        missing, malformed or outside the index's directory.

    Examples
    --------
    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> save_weights({"layer.weight": torch.ones(2, 3)}, path)
    >>> read_weights(path)["layer.weight"].shape
    torch.Size([2, 3])
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of_directory(path)
    weights = _read_index(path) if path.name.endswith(".index.json") else _read_file(path)
    if not weights:
        raise CheckpointError(f"{path} holds no tensors")
    return dict(sorted(weights.items()))


def checkpoint_files(path: str | Path) -> tuple[Path, ...]:
    """The safetensors files that a file, an index or a directory stands for, each one checked to exist.

    Parameters
    ----------
    path : str or Path
        As for :func:`read_weights`.

    Returns
    -------
    tuple of Path
        The weight files, without the index.

    Raises
    ------
    CheckpointError
        As :func:`read_weights`, as far as it shows without reading tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of_directory(path)
    if not path.name.endswith(".index.json"):
        _require_safetensors(path)
        return (path,)
    return tuple(sorted({_shard_path(path, name) for name in _read_weight_map(path).values()}))


def load_into(model: nn.Module, weights: Mapping[str, Tensor], reference: str) -> None:
    """Load weights into a model, all of them, or say everything that does not fit.

    A name that the weights lack is filled from the name that it is tied to in the model.

    Parameters
    ----------
    model : torch.nn.Module
        Receives the values; its own dtype stays.
    weights : mapping of str to Tensor
        What to load, by the names of ``model.state_dict()``.
    reference : str
        How to call these weights in an error message.

    Raises
    ------
    CheckpointError
        Some names are missing or unexpected, some shapes or kinds of dtype differ, or names that are
        tied in the model have different values. The model is unchanged then.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> load_into(model, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}, "example")
    >>> model.bias
    Parameter containing:
    tensor([1., 1.], requires_grad=True)
    """
    check_fits(model, weights, weights, reference)
    complete = _fill_ties(weights, _tied_names(_tensors_of(model)))
    model.load_state_dict(complete, strict=True)


def check_fits(
    model: nn.Module | ExportedProgram,
    shells: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    reference: str,
) -> None:
    """Say everything in which weights do not fit a model.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
    shells : mapping of str to Tensor
        Names, shapes and kinds; what is in the tensors does not count.
    weights : mapping of str to Tensor
        The weights themselves, of which only those that the model ties are looked at.
    reference : str
        How to call these weights in an error message.

    Raises
    ------
    CheckpointError
        As :func:`load_into`.
    """
    state = _tensors_of(model)
    ties = _tied_names(state)
    complete = _fill_ties(shells, ties)
    given = [[name for name in names if name in shells] for names in ties]
    problems = (
        _name_problems(state, complete) + _value_problems(state, complete) + _tie_problems(weights, given)
    )
    if problems:
        raise CheckpointError(f"{reference} does not fit {type(model).__name__}:\n" + "\n".join(problems))


def _tensors_of(model: nn.Module | ExportedProgram) -> dict[str, Tensor]:
    content = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict(keep_vars=True)
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def save_weights(
    state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file: the same tensors give the same bytes, whole or not at all.

    Tied tensors are written once per name, so that any reader can load the file with ``strict=True``
    into the model's class, which ties them again.

    Parameters
    ----------
    state : mapping of str to Tensor
        What to write; nothing in it is changed.
    path : str or Path
        The file to write; an existing one is replaced.
    metadata : mapping of str to str, optional
        Goes into the header, beside ``format: pt``.

    Raises
    ------
    CheckpointError
        There is nothing to write, or a value is not a dense tensor with data.
    """
    with replacing(path) as temporary:
        write_safetensors(state, temporary, metadata)


def write_safetensors(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """:func:`save_weights` straight to ``path``, for a caller that already replaces atomically."""
    from safetensors.torch import save_file

    if not state:
        raise CheckpointError(f"{path}: there are no tensors to write")
    save_file(_packed(state), path, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(path)
    share(path)  # newer safetensors write files that only their owner can read


def save_huggingface(model: Any, source: str | Path, state: Mapping[str, Tensor], out: str | Path) -> None:
    """Write a Hugging Face directory: configuration, tokenizer and processor files, ``model.safetensors``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The target; it knows the names of its checkpoint format. Its weights are not used.
    source : str or Path
        The target's directory, from which everything but the weights is copied.
    state : mapping of str to Tensor
        The weights to write.
    out : str or Path
        The directory to write. An empty directory or an earlier fusion is replaced.

    Raises
    ------
    CheckpointError
        ``out`` is a file or a directory with unrelated content.
    """
    check_output_directory(out)
    with replacing(out) as temporary:
        write_huggingface(model, source, state, temporary)


def write_huggingface(model: Any, source: str | Path, state: Mapping[str, Tensor], directory: Path) -> None:
    """:func:`save_huggingface` straight to ``directory``, for a caller that already replaces atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    # save_pretrained knows which tied names its format omits and turns converted weights back (experts
    # that transformers stacks after loading, say).
    model.save_pretrained(directory, state_dict={name: value.detach() for name, value in state.items()})
    for file in directory.glob("*.safetensors"):
        share(file)
    for file in companions(Path(source)):
        shutil.copyfile(file, directory / file.name)
    written = directory / "config.json"
    if written.is_file() and not getattr(model.config, "tie_word_embeddings", True):
        # The source's own may still tie what was untied; all else in it stays as its author wrote it.
        facts = json.loads(written.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
        written.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def check_output_directory(out: str | Path) -> None:
    """Refuse to replace a directory that is not an earlier fusion.

    Parameters
    ----------
    out : str or Path
        Where a Hugging Face directory is about to be written.

    Raises
    ------
    CheckpointError
        ``out`` is a file, or a directory that holds something but no fusion report.
    """
    out = Path(out)
    if out.is_dir():
        content = list(out.iterdir())
        if content and not any(file.name.endswith(REPORT_SUFFIX) for file in content):
            raise CheckpointError(
                f"{out} already holds {listed(sorted(file.name for file in content))}, which fxfusion did "
                "not write; name another output directory or empty this one"
            )
    elif out.exists():
        raise CheckpointError(f"{out} is a file, but a Hugging Face model is written as a directory")


def _weights_of_directory(directory: Path) -> Path:
    for name in (WEIGHTS_NAME, INDEX_NAME):
        # is_symlink: a dangling link should be reported as such, not as "no weights".
        if (directory / name).is_file() or (directory / name).is_symlink():
            return directory / name
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle_error(directory / pickles[0])
    raise CheckpointError(f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}")


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} looks like a pickle, which can run code when it is opened, so fxfusion does not open it. "
        "Convert it once where you trust it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def _require_safetensors(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file{_similar_file(path)}")
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_error(path)


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent}"
    names = [file.name for file in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require_safetensors(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error that says in words why a file is no safetensors file that can be read."""
    if _starts_like_pickle(path):
        return _pickle_error(path)
    return CheckpointError(f"{path} is {_what_is_wrong(path)} ({error})")


def _starts_like_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    # A zip (torch.save), or the protocol opcode of pickle 2 to 5.
    return start == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _what_is_wrong(path: Path) -> str:
    """Say in words what the parser's message means: the common cases are all an unfinished download."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`"
    if size < 10:  # A length and the shortest header, {}.
        return f"not a safetensors file: it has {size} bytes; copy or download it again"
    header = struct.unpack("<Q", start[:8])[0]
    if start[8:9] == b"{" and header + 8 > size:
        return "truncated inside its header: copy or download it again"
    if start[8:9] == b"{":
        return "truncated, or its header is malformed: copy or download it again"
    return "not a safetensors file: convert it with safetensors.torch.save_file"


def _read_weight_map(index: Path) -> dict[str, str]:
    if not index.is_file():
        raise CheckpointError(f"{index} does not exist or is not a file{_similar_file(index)}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{index} is not valid JSON ({error}): copy or download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to shard files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index} maps {name!r} to {shard!r}, which is not a file name")
    return weight_map


def _read_index(index: Path) -> dict[str, Tensor]:
    weight_map = _read_weight_map(index)
    names_of_shard: dict[str, set[str]] = defaultdict(set)
    for name, shard in weight_map.items():
        names_of_shard[shard].add(name)
    weights: dict[str, Tensor] = {}
    for shard, names in sorted(names_of_shard.items()):
        path = _shard_path(index, shard)
        content = _read_file(path)
        if set(content) != names:
            differing = sorted(set(content) ^ names)
            raise CheckpointError(
                f"{index} and its shard {shard} disagree about {listed(differing)}: they are not from one "
                "checkpoint"
            )
        weights.update(content)
    return weights


def _shard_path(index: Path, shard: str) -> Path:
    """Where a shard lies. An index must not make us read a file elsewhere on the disk."""
    directory = index.parent
    path = directory / shard
    if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
        raise CheckpointError(f"{index} names the shard {shard!r}, which is not a file beside it")
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    try:
        real, found = path.resolve(), path.is_file()
    except (OSError, ValueError):  # too long, a null byte, half a character
        raise CheckpointError(f"{index} names the shard {shard!r}, which is no file name") from None
    if real.parent != directory.resolve() and not _is_hub_blob(directory, real):
        raise CheckpointError(
            f"the shard {path} is a symbolic link to {real}, outside the directory of its index; replace the "
            "link by the file"
        )
    if not found:
        raise CheckpointError(f"{index} names the shard {shard!r}, which is missing{_similar_file(path)}")
    return path


def _is_hub_blob(directory: Path, real: Path) -> bool:
    """The Hub's cache keeps ``snapshots/<commit>/file -> ../../blobs/<hash>``: that link is its own."""
    snapshots = directory.resolve().parent
    return snapshots.name == "snapshots" and real.parent == snapshots.parent / "blobs"


def _tied_names(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that are one tensor in the model. A tensor without elements is tied to nothing."""
    names_of: dict[Any, list[str]] = defaultdict(list)
    for name, value in state.items():
        if value.numel():
            address = id(value) if value.is_meta else value.data_ptr()
            names_of[value.device, address, value.shape, value.stride()].append(name)
    return [names for names in names_of.values() if len(names) > 1]


def _fill_ties(weights: Mapping[str, Tensor], ties: Iterable[list[str]]) -> dict[str, Tensor]:
    complete = dict(weights)
    for names in ties:
        present = [name for name in names if name in weights]
        for name in names:
            if present and name not in weights:
                complete[name] = weights[present[0]]
    return complete


def _name_problems(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    missing = sorted(set(state) - set(weights))
    unexpected = sorted(set(weights) - set(state))
    problems = [f"  missing: {listed(missing)}"] if missing else []
    if unexpected:
        problems.append(f"  unexpected: {listed(unexpected)}{_prefix_hint(missing, unexpected)}")
    return problems


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    """Checkpoints of wrapped models (DataParallel, torch.compile, Lightning) carry one prefix everywhere."""
    if not missing:
        return ""
    for name in unexpected:
        if name.endswith(missing[0]):
            prefix = name[: -len(missing[0])]
            if prefix and {prefix + other for other in missing} <= set(unexpected):
                return f" (every name carries the prefix {prefix!r}: remove it)"
    return ""


def _value_problems(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name in sorted(set(state) & set(weights)):
        have, want = weights[name], state[name]
        if have.shape != want.shape:
            problems.append(f"  shape of {name}: {tuple(have.shape)}, but the model has {tuple(want.shape)}")
        elif _kind(have) != _kind(want):
            problems.append(f"  dtype of {name}: {have.dtype}, but the model has {want.dtype}")
    hidden = len(problems) - _LISTED
    return (
        problems if hidden <= 0 else [*problems[:_LISTED], f"  and {hidden} more of another shape or dtype"]
    )


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating point"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "integer"


def _tie_problems(weights: Mapping[str, Tensor], ties: Iterable[list[str]]) -> list[str]:
    problems = []
    for names in ties:
        for name in names[1:]:
            first, other = weights[names[0]], weights[name]
            same = first.shape == other.shape and torch.allclose(first, other, rtol=0, atol=0, equal_nan=True)
            if not same:
                problems.append(f"  {names[0]} and {name} differ, but the model ties them to one tensor")
    return problems


def _packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense, contiguous CPU tensors, no two of which share memory, as the format demands."""
    packed: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{name} is not a dense tensor with data and cannot be written")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    return packed


def _sort_metadata(path: Path) -> None:
    """Rewrite the header with sorted metadata: safetensors writes it in the random order of a hash map."""
    with path.open("r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The same entries in another order take the same space; spaces pad the header to its alignment.
        if len(text) > size:
            raise CheckpointError(f"{path}: the metadata {header['__metadata__']!r} cannot be written")
        file.seek(8)
        file.write(text.ljust(size))


def companions(directory: Path) -> list[Path]:
    """Return the files beside a Hugging Face model's weights that a fusion takes over."""
    found = {file for pattern in COMPANION_PATTERNS for file in directory.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.suffix not in PICKLE_SUFFIXES)


def listed(names: Iterable[str]) -> str:
    """The names for an error message, cut where they are many."""
    names = list(names)
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
