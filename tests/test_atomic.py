"""Output files appear whole or not at all."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest

from fxfusion import atomic


class Interrupted(Exception):
    """Stands for anything that stops a writer midway."""


def test_new_file_appears(tmp_path: pathlib.Path) -> None:
    assert atomic.write_text(tmp_path / "note.txt", "ä\r\n").read_bytes() == "ä\r\n".encode()
    assert os.listdir(tmp_path) == ["note.txt"]


def test_old_file_is_replaced_and_its_mode_kept(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    target.chmod(0o600)
    atomic.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("stop", [Interrupted, KeyboardInterrupt])
def test_exception_midway_leaves_the_old_file_and_no_temporary(
    tmp_path: pathlib.Path, stop: type[BaseException]
) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    with pytest.raises(stop), atomic.replacing(target) as temporary:  # noqa: PT012
        temporary.write_bytes(b"hal")
        raise stop
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_exception_before_anything_is_written_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Interrupted), atomic.replacing(tmp_path / "new"):
        raise Interrupted
    assert os.listdir(tmp_path) == []


def test_block_that_writes_nothing_is_refused(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic.replacing(target):
        pass
    assert target.read_bytes() == b"old"


def test_missing_folder_is_refused_before_the_block_runs(tmp_path: pathlib.Path) -> None:
    ran = False
    with pytest.raises(FileNotFoundError, match="does not exist"), atomic.replacing(tmp_path / "no" / "file"):
        ran = True
    assert not ran


@pytest.mark.parametrize("can_exchange", [True, False])
def test_directory_is_replaced_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *paths: False)
    target = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with atomic.replacing(target) as temporary:
            (temporary / "nested").mkdir(parents=True)
            (temporary / content).write_text(content)
            (temporary / "nested" / "shard").write_text(content)
    assert sorted(os.listdir(target)) == ["nested", "second"]
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="directories are exchanged on Linux")
def test_there_is_always_a_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader, or a kill, at any moment finds the old one or the new one at its place."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").touch()
    rename, found = os.rename, []

    def rename_and_look(source: pathlib.Path, destination: pathlib.Path) -> None:
        found.append(os.listdir(target))
        rename(source, destination)
        found.append(os.listdir(target))

    monkeypatch.setattr(os, "rename", rename_and_look)
    with atomic.replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert found == [["new"], ["new"]]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_exception_midway_leaves_the_old_directory(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(Interrupted), atomic.replacing(target) as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "new").touch()
        raise Interrupted
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_failed_rename_puts_the_old_directory_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename
    calls: list[str] = []

    def rename_fails_the_second_time(source: str, destination: str) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk gone")
        rename(source, destination)

    monkeypatch.setattr(atomic, "_exchange", lambda *paths: False)
    with pytest.raises(OSError, match="disk gone"), atomic.replacing(target) as temporary:  # noqa: PT012
        temporary.mkdir()
        monkeypatch.setattr(os, "rename", rename_fails_the_second_time)
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_file_does_not_replace_a_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(OSError):  # noqa: PT011
        atomic.write_bytes(tmp_path / "checkpoint", b"x")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_symbolic_link_is_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_temporary_keeps_the_suffix_and_fits_the_longest_name(tmp_path: pathlib.Path) -> None:
    with atomic.replacing(tmp_path / ("n" * 240 + ".safetensors")) as temporary:
        assert temporary.suffix == ".safetensors"
        temporary.touch()
