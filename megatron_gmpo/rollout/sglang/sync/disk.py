"""Route ``disk``: a safetensors folder that trainer and servers see under the same path."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from .... import files
from ....config import WeightSyncConfig
from ....errors import InputError
from ....weights.safetensors_folder import SafetensorsFile
from .buckets import Bucket
from .route import WeightSync
from .session import Session


class DiskSync(WeightSync):
    """Write every bucket to a file; after the last bucket the servers load the folder.

    Args:
        cfg: the ``weight_sync`` section.
        folder: receives a subfolder for each version; the previous version is removed after the next sync.
        quantized: send linear weights in block-wise FP8.
    """

    def __init__(self, cfg: WeightSyncConfig, folder: Path, quantized: bool) -> None:
        super().__init__(cfg, torch.device("cpu"), quantized)
        self._folder = folder.absolute()
        self._draft = self._current = self._folder / "none"
        self._files = 0

    def close(self) -> None:
        for folder in (self._draft, self._current):
            shutil.rmtree(folder, ignore_errors=True)

    def _begin(self, session: Session, version: str) -> None:
        with self._writing():
            self._make_private()
            # remove folders left by an interrupted sync or a killed run
            for leftover in set(self._folder.glob("*")) - {self._current}:
                shutil.rmtree(leftover, ignore_errors=True)
            self._draft, self._files = self._folder / f"{version}.incomplete", 0
            self._draft.mkdir()

    def _send(self, session: Session, payload: Bucket, fields: dict[str, Any], last: bool) -> None:
        with self._writing():
            self._files += 1
            path = self._draft / f"model-{self._files:05}.safetensors"
            header = [(name, dtype, tuple(shape)) for name, dtype, shape, _ in payload.contents]
            with SafetensorsFile(path, header) as file:
                for name, tensor in payload.named_tensors():
                    file.write(name, tensor)
            if not last:
                return
            complete = self._folder / fields["weight_version"]
            shutil.rmtree(complete, ignore_errors=True)
            self._draft.rename(complete)
        body = {"model_path": str(complete), "load_format": "safetensors", **fields}
        session.request("/update_weights_from_disk", body)

    def _end(self, session: Session, version: str) -> None:
        previous, self._current = self._current, self._folder / version
        if previous != self._current:
            shutil.rmtree(previous, ignore_errors=True)

    def _make_private(self) -> None:
        """Make the folder for this user alone: servers load whatever is in it.

        Raises:
            InputError: another user has made it, or it is a link.
        """
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        found = self._folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise InputError(
                f"weight_sync.folder: {str(self._folder)!r} is a link or belongs to another user: "
                "choose another folder"
            )
        self._folder.chmod(0o700)  # an older version made it with the umask

    def _writing(self) -> AbstractContextManager[None]:
        return files.writable(f"weight_sync.folder = {str(self._folder)!r}", "choose another folder")
