"""Work for a server under test: the motion is a wave.

In the prompt, "slowly" makes it last, "fails" makes it fail. "begins with NAME" and "waits for NAME" make it wait at its
beginning or at its end for a file in the server's folder, so that a test decides when it goes on.
"""

import os
import re
import time
from pathlib import Path

import numpy as np
from track4d_protocol.messages import Request, Result


def describe() -> dict[str, str]:
    return {"device": "tiny device", "model": "tiny model", "licence": "CC0 1.0"}


def run(request: Request, report, checkpoint=None) -> Result:
    """A vertical wave through the captured vertices, at rest in frame 0; film and motion are known after the first step."""
    settings, vertices = request.settings, request.arrays["vertices"]
    gates, steps = dict(re.findall(r"(begins with|waits for) (\w+)", settings.prompt)), 200 if "slowly" in settings.prompt else 8

    def wait(gate: str | None, step: int) -> None:
        while gate and not Path(os.environ["TINY_WORK_GATES"], gate).exists():
            report("fit", step, steps)
            time.sleep(0.05)

    wait(gates.get("begins with"), 0)
    time_axis = np.linspace(0, 1, settings.frames, dtype=np.float32)  # [F]
    lift = np.sin(2 * np.pi * time_axis)[:, None] * (1 + vertices[None, :, 0])  # [F, N]
    moved = np.repeat(vertices[None], settings.frames, 0)  # [F, N, 3]
    moved[..., 2] += 0.2 * lift
    film = np.full((6, 48, 64, 3), 20, np.uint8) * np.arange(6, dtype=np.uint8)[:, None, None, None]
    for step in range(steps):
        shade = np.full((64, 64, 3), int(255 * step / steps), np.uint8)
        if step == 2:
            report("generate", step, steps, preview=film, motion=moved)
        else:
            report("fit", step, steps, preview=shade if step % 4 == 0 else None)
        time.sleep(0.05)
    wait(gates.get("waits for"), steps - 1)
    if "fails" in settings.prompt:
        raise ValueError("the work was told to fail")
    warning = {"code": "tiny_work", "message": "This is not the real pipeline.", "action": "Ignore it."}
    return Result({"prompt": settings.prompt, "seed": settings.seed, "warnings": [warning]}, {"vertices": moved})
