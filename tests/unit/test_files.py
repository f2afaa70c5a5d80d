"""Files and folders get their name when they are complete; a kill at any moment keeps the old content."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_gmpo import files
from megatron_gmpo.errors import InputError


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


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "not" / "there"
    files.check_room(final, 0)
    with pytest.raises(
        InputError,
        match=rf"^'{final}' needs 1000000000\.00 GB and its disk has \d+\.\d\d GB free: choose another disk$",
    ):
        files.check_room(final, 10**18)
