"""Point caches: the vertices of one mesh over time, for the Mesh Cache modifier and other programs. No Blender here."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_pc2(path: Path, frames: np.ndarray, start: float = 1.0, step: float = 1.0) -> None:
    """Writes vertices [F, N, 3] as PC2 (3ds Max's point cache, little-endian).

    Args:
        path: of the file.
        frames: vertices in the object's own space.
        start: scene frame of the first frame.
        step: scene frames from one frame to the next.
    """
    header = struct.pack("<12siiffi", b"POINTCACHE2\0", 1, frames.shape[1], start, step, len(frames))
    path.write_bytes(header + np.ascontiguousarray(frames, "<f4").tobytes())


def write_mdd(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes vertices [F, N, 3] as MDD (LightWave's motion designer file, big-endian); the first frame is at 0 s."""
    header = struct.pack(">ii", len(frames), frames.shape[1])
    times = (np.arange(len(frames)) / fps).astype(">f4").tobytes()
    path.write_bytes(header + times + np.ascontiguousarray(frames, ">f4").tobytes())
