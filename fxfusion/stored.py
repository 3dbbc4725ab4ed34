"""Weights that stay in their files: read tensor by tensor, each time they are asked for.

A checkpoint larger than memory is a mapping like any other: what is read from it lives as long as it is used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fxfusion.archives import SUFFIX, archived_tensors
from fxfusion.checkpoints import checkpoint_files, unreadable
from fxfusion.errors import CheckpointError, InvalidWeightError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, none of them in memory.

    Parameters
    ----------
    path : str or Path
        A safetensors file, an index beside its shards, a directory that holds either, or a file of
        ``torch.export.save``.
    aliases : mapping of str to str, optional
        Further names of tensors, as tied weights have.

    Attributes
    ----------
    files : tuple of Path
    shapes : dict of str to tuple of int
    dtypes : dict of str to torch.dtype
    reads : dict of str to int
        How often each tensor was read.
    bytes_read : int
    seconds : float
        Spent reading.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated or malformed, or holds numbers of a kind that is not known, or two
        files hold one name.
    InvalidWeightError
        On the first access to a tensor with values that are not finite.

    Examples
    --------
    >>> import tempfile
    >>> from fxfusion.checkpoints import save_weights
    >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> save_weights({"layer.weight": torch.ones(2, 3)}, path)
    >>> stored = StoredWeights(path, {"head.weight": "layer.weight"})
    >>> stored.shapes["layer.weight"], stored["head.weight"].sum()
    ((2, 3), tensor(6.))
    >>> stored.reads["layer.weight"]
    1
    """

    def __init__(self, path: str | Path, aliases: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        archived = self.path.suffix == SUFFIX
        self.files = (self.path,) if archived else checkpoint_files(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.reads: dict[str, int] = {}
        self.bytes_read = 0
        self.seconds = 0.0
        self._file: dict[str, Path] = {}
        self._read: dict[str, Callable[[], torch.Tensor]] = {}
        for file in self.files:
            (self._list_archive if archived else self._list)(file)
        if not self._file:
            raise CheckpointError(f"{path} holds no tensors")
        known = self._file
        self._aliases = {
            name: kept for name, kept in (aliases or {}).items() if name not in known and kept in known
        }

    def _list(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as content:
                for name in sorted(content.keys()):
                    if name in self._file:
                        raise CheckpointError(f"{file} and {self._file[name]} both hold {name}")
                    part = content.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise CheckpointError(
                            f"{file} holds {name} as {part.get_dtype()}, which is not known here: convert it"
                        )
                    self._file[name] = file
                    self._read[name] = functools.partial(_read, file, name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _DTYPES[part.get_dtype()]
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(file, error) from error

    def _list_archive(self, file: Path) -> None:
        for name, item in archived_tensors(file).items():
            self._file[name], self._read[name] = file, item.read
            self.shapes[name], self.dtypes[name] = item.shape, item.dtype

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.bytes_of, self._file))

    def shells(self) -> dict[str, torch.Tensor]:
        """Return tensors without memory, of the shapes and kinds of those in the files."""
        return {
            name: torch.empty(shape, dtype=self.dtypes[name], device="meta")
            for name, shape in self.shapes.items()
        }

    def bytes_of(self, name: str) -> int:
        """Return how many bytes a tensor takes."""
        kept = self._aliases.get(name, name)
        return torch.Size(self.shapes[kept]).numel() * self.dtypes[kept].itemsize

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor; it is the caller's own."""
        kept = self._aliases.get(name, name)
        file = self._file[kept]
        start = time.perf_counter()
        found = self._read[kept]()
        self.seconds += time.perf_counter() - start
        self.bytes_read += found.nbytes
        if kept not in self.reads and found.is_floating_point() and not bool(found.isfinite().all()):
            raise InvalidWeightError(
                f"{file} has values in {kept} that are not finite: repair or retrain that parent"
            )
        self.reads[kept] = self.reads.get(kept, 0) + 1
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the files, sorted."""
        return iter(sorted(self._file))

    def __len__(self) -> int:
        return len(self._file)

    def __contains__(self, name: Any) -> bool:
        return name in self._file or name in self._aliases


def _read(file: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as content:
            # The file is mapped: only a copy lets go of its pages.
            found: torch.Tensor = content.get_tensor(name).clone()
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(file, error) from error
    return found


def bytes_of(state: Mapping[str, torch.Tensor], name: str) -> int:
    """Return how many bytes a weight takes, which is not read for it if it stays in its file.

    Examples
    --------
    >>> bytes_of({"weight": torch.ones(2, 3)}, "weight")
    24
    """
    return state.bytes_of(name) if isinstance(state, StoredWeights) else state[name].nbytes
