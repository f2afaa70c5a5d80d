"""Another user of the machine cannot hold a lock, replace the synced weights, or have files removed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gmpo.config import WeightSyncConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.sglang import launch
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.supervision.lock import RunLock

NOBODY = 65534

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder in which every user can make files, like /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="several_users_"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_another_user(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("fork").Pool(1, os.setuid, (NOBODY,)) as pool:
        return pool.apply(function, arguments)


def why_refused(run_dir: Path) -> str:
    with pytest.raises(InputError) as error:
        RunLock(run_dir)
    return str(error.value)


def can_lock(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:
        return False
    return True


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@as_root
def test_only_the_owner_can_lock_a_run_folder(shared: Path) -> None:
    (shared / "run.lock").touch(0o666)  # as an older version left it
    RunLock(shared).release()
    assert mode_of(shared / "run.lock") == 0o600
    assert not as_another_user(can_lock, shared / "run.lock")
    assert as_another_user(why_refused, shared) == (
        f"{shared}/run.lock belongs to another user: choose another run_dir"
    )
    (shared / "run.lock").chmod(0o666)  # it can be opened, but its mode cannot be changed
    assert "belongs to another user" in as_another_user(why_refused, shared)


def begin_sync(shared: Path, run_dir: Path) -> Path:
    sync: Any = make_weight_sync(
        WeightSyncConfig(route="disk", folder=str(shared)), "disaggregated", torch.device("cpu"), run_dir
    )
    sync._begin(None, "run-1")
    return sync._draft


def make_world_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


@as_root
def test_servers_load_weights_only_from_a_folder_of_our_own(shared: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "runs/a", tmp_path / "runs/b", tmp_path / "runs_b", tmp_path / "runs/c"]
    draft = begin_sync(shared, runs[0])
    assert mode_of(draft.parent) == 0o700
    assert draft.parent.parent == shared
    names = {begin_sync(shared, run).parent.name for run in runs}
    assert len(names) == 4
    draft.parent.chmod(0o777)  # as an older version left it
    assert mode_of(begin_sync(shared, runs[0]).parent) == 0o700

    theirs = shared / str(tmp_path / "theirs")[1:].replace("/", "%2F")
    as_another_user(make_world_writable, theirs)
    with pytest.raises(InputError, match=r"weight_sync\.folder: '.*' is a link or belongs to another user"):
        begin_sync(shared, tmp_path / "theirs")
    link = shared / str(tmp_path / "link")[1:].replace("/", "%2F")
    link.symlink_to(draft.parent)
    with pytest.raises(InputError, match="is a link or belongs to another user"):
        begin_sync(shared, tmp_path / "link")


def make_server_folder(shared: Path, name: str) -> None:
    (shared / name).mkdir(0o777)
    (shared / name / "lock").touch(0o666)


@as_root
def test_a_start_removes_only_files_of_dead_servers_of_the_same_user(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another user, whatever its name, removes nothing. Nor does a folder whose lock is held."""
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    dead, alive = launch._locked_folder(), launch._locked_folder()
    files = {
        folder: [
            folder / "socket",
            Path(f"/dev/shm/sem.{folder.name}-1"),
            Path(f"/dev/shm/sglang_loads_{folder.name}_1.shm"),
        ]
        for folder in (dead, alive)
    }
    for file in files[dead] + files[alive]:
        file.touch()
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if os.path.exists(f"/proc/self/fd/{descriptor}") and os.path.samefile(
            f"/proc/self/fd/{descriptor}", dead / "lock"
        ):
            os.close(descriptor)
    try:
        as_another_user(launch._remove_files_of_killed_servers)
        assert dead.exists()
        as_another_user(make_server_folder, shared, "gmpo-server-*")
        launch._remove_files_of_killed_servers()
        assert not dead.exists()
        assert not [file for file in files[dead] if file.exists()]
        assert all(file.exists() for file in files[alive])
        assert (shared / "gmpo-server-*" / "lock").exists()
    finally:
        launch._remove_files(alive)
    assert not [file for file in files[alive] if file.exists()]
