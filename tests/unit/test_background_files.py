"""Files that a process of its own writes: content, errors, kills, and whose memory it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_gmpo.errors import RunError
from megatron_gmpo.weights.background_files import BackgroundFiles
from megatron_gmpo.weights.checksums import checksums_of

from ..support import held_write
from ..support.commands import ROOT
from ..support.held_saves import held
from ..support.small_disk import small_disk, unwritable

CONTENTS = {"__0_0.distcp": os.urandom(5_000_001), "random/rank_00000.safetensors": b"state", "empty": b""}


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the path of a file; the processes of the test write nothing before it exists."""
    monkeypatch.setenv("WRITE_AFTER", str(tmp_path / "go"))
    with held():
        yield tmp_path / "go"


def started(folder: Path) -> BackgroundFiles:
    files = BackgroundFiles(folder)
    for name, content in CONTENTS.items():
        with files.open(folder / name) as file:
            file.write(content)
    assert files.nbytes == sum(map(len, CONTENTS.values()))
    files.start()
    return files


def child(files: BackgroundFiles) -> psutil.Process:
    assert files._process
    return psutil.Process(files._process.pid)


def test_the_files_and_their_checksums(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    files = started(tmp_path)
    assert files.ended(wait=True)
    assert files.result() == checksums_of(tmp_path, [tmp_path / name for name in CONTENTS])
    assert {name: (tmp_path / name).read_bytes() for name in CONTENTS} == CONTENTS


def test_only_the_process_holds_the_memory_and_it_does_not_import_torch(tmp_path: Path, go: Path) -> None:
    (tmp_path / "random").mkdir()
    files = started(tmp_path)
    assert not files.ended(wait=False)
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if "memfd" in link]
    go.touch()
    process = child(files)
    maps: set[str] = set()
    while not files.ended(wait=False):
        try:
            maps |= {entry.path for entry in process.memory_maps()}
        except psutil.Error:  # it has just ended
            break
    assert maps
    assert not [path for path in maps if "torch" in path]
    assert files.ended(wait=True)
    assert files.result().keys() == CONTENTS.keys()


def test_a_missing_folder_and_one_that_may_not_be_written_are_named(tmp_path: Path) -> None:
    files = started(tmp_path)
    assert files.ended(wait=True)
    with pytest.raises(FileNotFoundError) as error:
        files.result()
    assert error.value.filename == str(tmp_path / "random" / "rank_00000.safetensors")

    with unwritable(tmp_path / "closed") as closed:
        files = started(closed)
        assert files.ended(wait=True)
        with pytest.raises(OSError, match=r"Permission denied|Read-only file system") as refused:
            files.result()
        assert refused.value.filename == str(closed / "__0_0.distcp")


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        files = started(disk)
        assert files.ended(wait=True)
        with pytest.raises(OSError, match="No space left") as error:
            files.result()
        assert error.value.errno == errno.ENOSPC


def test_a_killed_process_is_named(tmp_path: Path, go: Path) -> None:
    files = started(tmp_path)
    child(files).kill()
    assert files.ended(wait=True)
    with pytest.raises(RunError, match=f"the process that writes {tmp_path} ended with -9"):
        files.result()


def test_it_ends_with_its_parent_and_ignores_requests_to_stop(tmp_path: Path) -> None:
    """The parent has blocked SIGTERM, as ranks have: Slurm signals all processes of a job step."""
    program = (
        "import signal, sys, pathlib, time\n"
        "from megatron_gmpo.weights import background_files, write_files\n"
        f"write_files.__file__ = {held_write.__file__!r}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "files = background_files.BackgroundFiles(pathlib.Path(sys.argv[1]))\n"
        "with files.open(pathlib.Path(sys.argv[1]) / 'a') as file: file.write(b'a')\n"
        "files.start()\n"
        "print(files._process.pid, flush=True)\n"
        "time.sleep(100)\n"  # the test kills this process
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"WRITE_AFTER": str(tmp_path / "go")},
    )
    assert parent.stdout
    writer = psutil.Process(int(parent.stdout.readline()))
    writer.send_signal(signal.SIGTERM)
    with pytest.raises(psutil.TimeoutExpired):
        writer.wait(0.2)
    parent.kill()
    parent.wait()
    (tmp_path / "go").touch()
    writer.wait(30)
    assert not (tmp_path / "a").exists()
