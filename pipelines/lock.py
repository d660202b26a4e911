"""One run in a folder at a time: a second one is refused while the first lives, on this machine or another.
What the folder holds is left to pipeline.py."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distill.settings import UserError

NAME = ".lock"
"""In the run folder while a run is in it; what a killed run leaves of it locks nothing."""
_log = logging.getLogger(__name__)


class FolderLock:
    """The kernel holds the lock for the process and drops it when the process ends, however it does."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = folder / NAME, accelerator
        self._file: int | None = None
        self._taken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
        self._file, self._taken = None, False

    def take(self) -> None:
        """Lock the folder, which must be there; all processes must call it together. Again, it does nothing.

        Raises:
            UserError: another run is in it, or it cannot be written.
        """
        if self._taken:
            return
        refusal = [self._try() if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        self._taken = True

    def _try(self) -> str | None:
        folder = self.path.parent
        try:
            while True:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.read(file, 500).decode(errors="replace")
                    os.close(file)
                    return (
                        f"output: another run{_told(holder)} is in {folder}. Wait for it or stop it, or name another "
                        "folder with --output."
                    )
                # The run before may have removed the file between our opening it and our locking it.
                if self.path.exists() and os.path.samestat(os.fstat(file), self.path.stat()):
                    break
                os.close(file)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                _log.warning("%s: this file system has no locks; see that no other run is in it.", folder)
                return None
            return f"output: {folder} cannot be written: {error.strerror}. Correct its permissions, or name another."
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        self._file = file
        return None


def _told(holder: str) -> str:
    try:
        known = json.loads(holder)
        return f" (process {known['process']} on {known['host']})"
    except (ValueError, KeyError, TypeError):
        return ""
