"""How much memory a job takes over all its processes."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
from track4d_protocol.keys import default_home
from track4d_protocol.local import SERVER_LOCK


class Footprint:
    """Samples the resident memory of the client, the server and their children while the block runs.

    Attributes:
        peak: bytes, the largest sum seen; memory that processes share counts once for each.
    """

    def __init__(self, client: int, home: Path | None, interval: float = 0.25) -> None:
        self.client, self.home, self.interval, self.peak = client, home, interval, 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Footprint:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(self.interval):
            self.peak = max(self.peak, sum(_tree_memory(pid) for pid in self._roots()))

    def _roots(self) -> set[int]:
        note = (self.home or default_home()) / SERVER_LOCK  # read, not locked: a server may be starting just now
        text = note.read_text("ascii").strip() if note.exists() else ""
        return {self.client} | ({int(text)} if text.isdigit() else set())


def _tree_memory(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:  # it ended meanwhile
        pass
    return total
