"""Files of ``torch.export.save``, opened without unpickling, and their weights, one at a time if need be.

Such an archive is a zip file. It holds the graph as JSON, every weight as the bytes of its storage, and a
table that says of each name where its bytes are, and its shape and strides.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfusion.checkpoints import listed
from fxfusion.errors import CheckpointError

SUFFIX = ".pt2"
_WEIGHTS = "data/weights/"
_TABLE = "_weights_config.json"
_PIECE = 2**24  # bytes
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}  # by their numbers in the format
_MALFORMED = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,  # encrypted, of an unknown compression, nested too deeply
    struct.error,
    zlib.error,
)  # what zipfile and json raise for files that are none of theirs


@dataclasses.dataclass(frozen=True)
class ArchivedTensor:
    """Where an archive keeps a tensor.

    Attributes
    ----------
    archive : Path
    entry : str
        The name, in the archive, of its storage's bytes. Tied tensors have one.
    shape, strides : tuple of int
    offset : int
        Of its first element in the storage, in elements.
    dtype : torch.dtype
    trained : bool
        Whether it is a parameter, else a buffer.
    """

    archive: Path
    entry: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    trained: bool

    @property
    def reach(self) -> int:
        """How many bytes of the storage the tensor needs."""
        if not math.prod(self.shape):
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor; it is the caller's own.

        Raises
        ------
        CheckpointError
            The archive is damaged there.
        """
        try:
            with zipfile.ZipFile(self.archive) as archive, archive.open(self.entry) as content:
                storage = bytearray(archive.getinfo(self.entry).file_size)
                view, filled = memoryview(storage), 0
                while piece := content.read(_PIECE):  # its end is where zipfile compares the checksum
                    view[filled : filled + len(piece)] = piece
                    filled += len(piece)
        except _MALFORMED as error:
            raise _damaged(self.archive, error) from error
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(storage, dtype=self.dtype, count=len(storage) // self.dtype.itemsize)
        return flat.as_strided(self.shape, self.strides, self.offset).contiguous()


def load_archive(path: Path) -> ExportedProgram:
    """Load a program with its weights.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        The file is missing, damaged, of an old format, or would have to be unpickled or executed.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.pt2"
    >>> torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),)), path)
    >>> sorted(load_archive(path).state_dict)
    ['bias', 'weight']
    """
    require_plain(path)
    return _load(path, path)


def archived_tensors(path: Path) -> dict[str, ArchivedTensor]:
    """List the tensors of an archive by name, without reading them.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        As :func:`load_archive`, or if a tensor is of a kind that is not known here, or does not fit into
        its bytes.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.pt2"
    >>> torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),)), path)
    >>> archived_tensors(path)["weight"].shape
    (2, 3)
    """
    require_plain(path, whole=False)
    with zipfile.ZipFile(path) as archive:
        stored = [item for item in archive.infolist() if item.compress_type == zipfile.ZIP_STORED]
        sizes = {item.filename: min(item.file_size, path.stat().st_size) for item in stored}
        folder, table = _table(path, archive)
    found = {name: _tensor(path, folder, name, facts) for name, facts in table.items()}
    for name, item in found.items():
        if sizes.get(item.entry, -1) < item.reach:
            raise CheckpointError(f"{path} has too few bytes for {name}: export or copy it again")
    return found


def hollow_archive(path: Path) -> ExportedProgram:
    """Load a program whose parameters are reserved but not read; its buffers and constants are.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        As :func:`archived_tensors`.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.pt2"
    >>> torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),)), path)
    >>> hollow_archive(path).state_dict["weight"].shape
    torch.Size([2, 3])
    """
    tensors = archived_tensors(path)
    read = {item.entry for item in tensors.values() if not item.trained}
    left = {item.entry: item for item in tensors.values() if item.trained and item.entry not in read}
    try:
        emptied = _without_weights(path, left)
    except _MALFORMED as error:
        raise _damaged(path, error) from error
    program = _load(path, emptied)
    made: dict[str, nn.Parameter] = {}
    for name, item in tensors.items():
        if item.entry not in left:
            continue
        if item.entry not in made:
            given = program.state_dict[name]
            empty = torch.empty(item.shape, dtype=item.dtype)
            made[item.entry] = nn.Parameter(empty, requires_grad=given.requires_grad)
        program.state_dict[name] = made[item.entry]
    return program


def require_plain(path: Path, whole: bool = True) -> None:
    """Refuse an archive that ``torch.export.load`` would have to unpickle or execute.

    Parameters
    ----------
    path : Path
    whole : bool
        Whether to read all of it, so that damage anywhere is found.

    Raises
    ------
    CheckpointError
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if whole else None
            if damaged is None:
                _check_archive(path, archive)
    except _MALFORMED as error:
        raise _damaged(path, error) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged at {damaged}: export or copy it again")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or not a file of torch.export.save ({error})")


def _load(path: Path, content: Path | io.BytesIO) -> ExportedProgram:
    try:
        return torch.export.load(content)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error


def _without_weights(path: Path, left: Mapping[str, ArchivedTensor]) -> io.BytesIO:
    """Copy an archive, of whose tensors one element each stands for all.

    A stride of zero is what lets an element do so: the loader needs nothing but this file.
    """
    copied = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copied, "w") as goal:
        for item in source.infolist():
            if item.filename in left:
                content = bytes(left[item.filename].dtype.itemsize)
            else:
                content = source.read(item)
            if item.filename.endswith(_TABLE):
                content = _spread(item.filename.rpartition("/")[0], json.loads(content), left)
            goal.writestr(item.filename, content)
    copied.seek(0)
    return copied


def _spread(folder: str, table: Any, left: Mapping[str, ArchivedTensor]) -> bytes:
    for facts in table["config"].values():
        if f"{folder}/{facts['path_name']}" in left:
            meta = facts["tensor_meta"]
            meta["strides"] = [{"as_int": 0} for _ in meta["strides"]]
            meta["storage_offset"] = {"as_int": 0}
    return json.dumps(table).encode()


def _table(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, Any]]:
    """Return the folder of an archive's weights, and what is said of each."""
    found = [
        name
        for name in archive.namelist()
        if name.partition("/")[2].startswith(_WEIGHTS) and name.endswith(_TABLE)
    ]
    if len(found) != 1:
        raise CheckpointError(f"{path} holds {len(found)} models: save one alone with torch.export.save")
    return found[0].rpartition("/")[0], json.loads(archive.read(found[0]))["config"]


def _tensor(path: Path, folder: str, name: str, facts: Any) -> ArchivedTensor:
    try:
        meta = facts["tensor_meta"]
        shape, strides = (tuple(int(item["as_int"]) for item in meta[key]) for key in ("sizes", "strides"))
        offset = int(meta["storage_offset"]["as_int"])
        entry, number, trained = f"{folder}/{facts['path_name']}", int(meta["dtype"]), bool(facts["is_param"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not say where {name} is: export it again") from error
    if number not in _DTYPES:
        raise CheckpointError(f"{path} holds {name} as kind {number}, which is not known here: convert it")
    if len(shape) != len(strides) or min((*shape, *strides, offset)) < 0:
        raise CheckpointError(f"{path} gives {name} the shape {shape} and the strides {strides}")
    return ArchivedTensor(path, entry, shape, strides, offset, _DTYPES[number], trained)


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    # An archive of today keeps everything in one folder; torch.export.load falls back to unpickling files
    # at the top. Of two files with one name we could see another than torch does.
    if len(set(names)) < len(names) or any("/" not in name for name in names):
        raise CheckpointError(f"{path} is in an old format: save it again with torch.export.save")
    if not any("/models/" in name and name.endswith(".json") for name in names):
        raise CheckpointError(f"{path} holds no exported program: write it with torch.export.save")
    for name in names:
        _check_entry(path, archive, name)


def _check_entry(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    inner = name.partition("/")[2]
    is_payload = inner.startswith((_WEIGHTS, "data/constants/"))
    if inner == "byteorder" and (order := archive.read(name).strip()) != sys.byteorder.encode():
        # Nobody below would turn the bytes round: its weights would be other numbers.
        raise CheckpointError(f"{path} was written in another byte order ({order!r}): export it here")
    if inner.startswith("data/aotinductor/"):
        raise CheckpointError(f"{path} holds compiled code ({name}), which fxfusion does not run")
    if is_payload and inner.endswith(".pt"):
        raise CheckpointError(f"{path} pickles its weights: save it again with torch.export.save")
    if is_payload and inner.endswith("_config.json"):
        entries = json.loads(archive.read(name))["config"]
        pickled = sorted(key for key, entry in entries.items() if entry["use_pickle"])
        if pickled:
            raise CheckpointError(f"{path} pickles {listed(pickled)}, which fxfusion does not open")
    if inner.startswith("data/sample_inputs/"):
        _check_sample_inputs(path, archive.read(name))


def _check_sample_inputs(path: Path, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} holds example inputs that are more than tensors and plain values, which would have to "
            f"be unpickled: {error}"
        ) from error
