"""Files and folders get their name when they are complete; a kill at any moment keeps the old content."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_gmpo import files
from megatron_gmpo.command_line import one_line_errors
from megatron_gmpo.errors import Exit, InputError, disk_full

from ..support.small_disk import fill, small_disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_at(owner: object, name: str, action: Callable[[], object]) -> None:
    """Run ``action`` in a fork that kills itself with SIGKILL when it calls ``owner.name``."""
    pid = os.fork()
    if pid == 0:
        setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        action()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    files.write(file, "old")
    killed_at(Path, "rename", lambda: files.write(file, "new"))
    assert file.read_text() == "old"
    files.write(file, b"\xff", durable=False)
    assert file.read_bytes() == b"\xff"
    assert file.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    assert [name for name in names(tmp_path) if not name.startswith(".partial_")] == ["file.json"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused = pytest.raises(
        InputError, match=r"^out = 'x' cannot be written \(No space left on device\): free space$"
    )
    with refused, files.writable("out = 'x'", "free space"):
        files.write(tmp_path / "file", "text")
    with (
        pytest.raises(OSError, match="No space left"),
        files.written_aside(tmp_path / "folder") as partial,
    ):
        partial.mkdir()
    assert names(tmp_path) == []


def test_of_writers_of_a_new_file_one_succeeds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: files.write_new(tmp_path / "file", str(i)), range(32)))
    assert sum(written) == 1
    assert (tmp_path / "file").read_text() == str(written.index(True))
    assert names(tmp_path) == ["file"]


def test_a_folder_gets_its_name_once_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def fill() -> None:
        with files.written_aside(final) as partial:
            partial.mkdir()
            (partial / "file").write_text("text")

    killed_at(Path, "rename", fill)
    assert names(tmp_path) == [".partial_out"]
    final.mkdir()  # an empty folder may be replaced
    fill()
    assert names(tmp_path) == ["out"]
    assert names(final) == ["file"]
    with pytest.raises(OSError, match="not empty"):
        fill()
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_removed_is_never_seen_in_part(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "file").touch()
    killed_at(os, "unlink", lambda: files.remove(folder))
    assert names(tmp_path) == [".partial_old.removed"]
    folder.mkdir()
    files.remove(folder)
    assert names(tmp_path) == []


def test_a_removal_in_the_background_frees_the_name_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    held, clear = threading.Event(), files.clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "clear", lambda path: (path.exists() and held.wait(30), clear(path)))
        files.remove(folder, background=True)
        assert names(tmp_path) == [".partial_old.removed"]
        held.set()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(30)
    assert names(tmp_path) == []


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "not" / "there"
    files.check_room(final, 0)
    with pytest.raises(
        InputError,
        match=rf"^'{final}' needs 1000000000\.00 GB and its disk has \d+\.\d\d GB free: choose another disk$",
    ):
        files.check_room(final, 10**18)


def test_a_line_never_continues_an_unfinished_one(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    files.append_line(file, "1")
    with file.open("ab") as torn:
        torn.write(b'{"half')
    files.append_line(file, "2")
    files.append_line(file, "3")
    assert file.read_text().splitlines() == ["1", '{"half', "2", "3"]


def test_a_full_disk_is_named_with_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """/dev/full fails every write with ENOSPC; errors of write() do not name a file."""
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        files.append_line(tmp_path / "full", "x")
    full = disk_full(raised.value)
    assert full
    assert full.exit == Exit.BAD_INPUT
    mounted = next(folder for folder in (tmp_path, *tmp_path.parents) if folder.is_mount())
    line = (
        f"the file system {mounted} is full (No space left on device), so {tmp_path}/full cannot be written: "
        "free space, and start the same command again"
    )
    assert str(full) == str(pickle.loads(pickle.dumps(full))) == line
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise raised.value
    assert ended.value.code == Exit.BAD_INPUT
    assert capfd.readouterr().err == f"error: {line}\n"
    unnamed = "a file system is full (Disk quota exceeded): free space, and start the same command again"
    assert str(disk_full(OSError(errno.EDQUOT, "x"))) == unnamed
    assert disk_full(OSError(errno.EIO, "x")) is None
    with pytest.raises(OSError, match="x"), one_line_errors():
        raise OSError(errno.EIO, "x")


def test_a_whole_disk_fills_up(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        files.write(disk / "file", "old")
        fill(disk)
        for write in (files.write, files.write_new):
            with pytest.raises(OSError, match="No space left") as raised:
                write(disk / ("file" if write is files.write else "new"), "x" * 5000)
            full = disk_full(raised.value)
            assert full
            assert str(full).startswith(f"the file system {disk} is full")
        assert (disk / "file").read_text() == "old"
        assert names(disk) == ["ballast", "file"]
