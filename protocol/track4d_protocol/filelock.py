"""A lock between processes that ends with its holder, however that ends."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

_FAR = 1 << 30  # the locked byte lies beyond the content, which Windows would hide from readers otherwise


class FileLock:
    """An exclusive lock on a file. The operating system frees it when the process ends, also by kill -9.

    Args:
        path: of the lock file; made when absent, never removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, timeout: float = 0.0) -> bool:
        """Takes the lock, waiting up to `timeout` seconds; False when another process holds it.

        Raises:
            OSError: the file can't be made.
        """
        deadline = time.monotonic() + timeout
        file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii")
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                file.close()
                return False
            time.sleep(0.02)
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def note(self, text: str) -> None:
        """Writes a short text (the holder's process id) that others can read."""
        assert self._file is not None, "the lock is not held"
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def __enter__(self) -> FileLock:
        assert self._file is not None, "the lock is not held"
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder(path: Path) -> int | None:
    """The process id that the lock's holder noted, or None when nobody holds it."""
    lock = FileLock(path)
    if not path.exists() or lock.acquire():
        lock.release()
        return None
    text = path.read_text("ascii").strip()
    return int(text) if text.isdigit() else 0


if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[str]) -> bool:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            return True
        except OSError:
            return False
else:
    import fcntl

    def _try_lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False
