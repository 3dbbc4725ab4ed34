"""Output files that appear whole or not at all.

A reader, or a run that starts after a crash, must never find half a checkpoint under the name of a whole
one. So everything is written to a temporary beside the target (same file system, hence one rename),
flushed to disk, and only then moved into place.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Iterator

__all__ = ["replacing", "share", "take_place", "write_bytes", "write_text"]

_HERE = -100  # AT_FDCWD: relative paths count from the working directory
_BOTH = 2  # RENAME_EXCHANGE


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside ``path`` and move it into place when the block succeeds.

    The block creates the temporary as a file or as a directory. If the block raises, the temporary is
    removed and what was at ``path`` before stays as it was. A symbolic link at ``path`` is kept: what it
    points to is replaced. A file is replaced in one step, and so is a directory where the system can exchange
    two (Linux); elsewhere the old one is first moved aside, and moved back should the second rename fail.

    Parameters
    ----------
    path : str or os.PathLike
        The target, whose parent directory must exist.

    Yields
    ------
    pathlib.Path
        The temporary, which does not exist yet. It has the suffix of ``path``, because some writers
        choose a format by it.

    Raises
    ------
    FileNotFoundError
        If the parent directory does not exist (before the block runs), or the block wrote nothing.
    OSError
        If the temporary cannot be moved into place, such as a file onto a directory.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "weights.bin") as temporary:
    ...     _ = temporary.write_bytes(b"all of it")
    >>> [entry.name for entry in folder.iterdir()]
    ['weights.bin']
    """
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    temporary = _beside(target)
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {target}")
        take_place(temporary, target)
    finally:
        _remove(temporary)


def take_place(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Flush a file or directory to disk and move it to ``target`` on the same file system.

    Parameters
    ----------
    path, target : str or os.PathLike
        What is at ``target`` is replaced, as by :func:`replacing`.
    """
    path, target = pathlib.Path(path), pathlib.Path(os.path.realpath(target))
    _flush(path)
    _move(path, target)
    _flush_entry(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> pathlib.Path:
    """Write ``data`` to ``path``, whole or not at all.

    Parameters
    ----------
    path : str or os.PathLike
        The target, whose parent directory must exist.
    data : bytes
        The content.

    Returns
    -------
    pathlib.Path
        ``path``.

    Raises
    ------
    OSError
        If it cannot be written; what was there before stays as it was.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> write_bytes(pathlib.Path(tempfile.mkdtemp()) / "data.bin", b"abc").read_bytes()
    b'abc'
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return pathlib.Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> pathlib.Path:
    """Write ``text`` to ``path`` as UTF-8 with its line ends unchanged, whole or not at all.

    Parameters
    ----------
    path : str or os.PathLike
        The target, whose parent directory must exist.
    text : str
        The content.

    Returns
    -------
    pathlib.Path
        ``path``.

    Raises
    ------
    OSError
        If it cannot be written; what was there before stays as it was.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> write_text(pathlib.Path(tempfile.mkdtemp()) / "note.txt", "abc").read_text()
    'abc'
    """
    return write_bytes(path, text.encode())


def share(path: pathlib.Path) -> None:
    """Give a file the permissions of any new file here, where its writer kept it to its owner.

    Parameters
    ----------
    path : pathlib.Path

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> plain, private = folder / "plain", folder / "private"
    >>> _ = plain.write_bytes(b""), private.write_bytes(b"")
    >>> private.chmod(0o600)
    >>> share(private)
    >>> private.stat().st_mode == plain.stat().st_mode
    True
    """
    probe = _beside(path)  # the way to ask for the process's mask that is safe beside other threads
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        shutil.copymode(probe, path)
    finally:
        probe.unlink(missing_ok=True)


def _beside(target: pathlib.Path) -> pathlib.Path:
    # The name is cut so that a target of the longest allowed name still has room for the token.
    return target.with_name(f".{target.stem[:100]}.{secrets.token_hex(8)}{target.suffix[:20]}")


def _flush(path: pathlib.Path) -> None:
    """Force a file, or a directory and all that is in it, to disk."""
    if not path.is_dir():
        _flush_entry(path)
        return
    for folder, _, files in os.walk(path):
        for name in files:
            _flush_entry(pathlib.Path(folder, name))
        _flush_entry(pathlib.Path(folder))


def _flush_entry(path: pathlib.Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory, nor needs to.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: pathlib.Path, target: pathlib.Path) -> None:
    if not (temporary.is_dir() and target.is_dir()):
        if target.is_file() and temporary.is_file():
            shutil.copymode(target, temporary)  # A file that its owner made private stays private.
        os.replace(temporary, target)
        return
    aside = _beside(target)
    if _exchange(temporary, target):
        os.rename(temporary, aside)  # at once: removing it takes a while
    else:
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
    _remove(aside)


def _exchange(left: pathlib.Path, right: pathlib.Path) -> bool:
    """Exchange two directories in one step; return whether the system and the file system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # a C library without it
        return False
    return rename(_HERE, os.fsencode(left), _HERE, os.fsencode(right), _BOTH) == 0


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
