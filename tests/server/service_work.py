"""Work functions for tests of the service; the worker process imports this module by name."""

import os
import time
from pathlib import Path

import numpy as np
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.messages import Result


def describe() -> dict[str, str]:
    return {"device": "test device", "model": "test model"}


def run(request, report) -> Result:
    """Does what the prompt says: "sleep 2", "ignore cancel", "fail input", "fail bug", "die", "die once", "quick"."""
    words = request.settings.prompt.split()
    shift = np.float32(request.settings.seed)
    frames = request.settings.frames
    preview = np.full((8, 8, 3), 7, np.uint8)
    if words[0] == "sleep":
        steps = int(float(words[1]) / 0.05)
        for step in range(steps):
            report("sleep", step, steps, preview if step % 10 == 0 else None)
            time.sleep(0.05)
    elif words[0] == "ignore":
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                report("ignore", 0, 1)
            except Cancelled:
                pass
            time.sleep(0.05)
    elif words[:2] == ["fail", "input"]:
        raise InputError("bad_thing", "The thing is bad.", "Use another thing.")
    elif words[:2] == ["fail", "bug"]:
        raise KeyError("no such thing")
    elif words[:2] == ["fail", "memory"]:
        raise MemoryError
    elif words[0] == "die":
        marker = Path(os.environ["SERVICE_TEST_MARKER"])
        if words[1:] != ["once"] or not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)
    elif words[0] == "big":
        frames, count = 16, 20_000
        return Result({}, {"vertices": np.zeros((frames, count, 3), np.float32), "video": np.zeros((4, frames, 256, 256, 3), np.uint8)})
    report("done", 1, 1, preview)
    vertices = np.repeat(request.arrays["vertices"][None], frames, 0) + shift
    return Result({"prompt": request.settings.prompt}, {"vertices": vertices})
