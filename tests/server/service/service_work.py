"""What the worker of the tests does with a request; the worker process imports this module by name."""

import os
import time
from pathlib import Path

import numpy as np
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.messages import Result

MARKER = Path(os.environ["SERVICE_TEST_MARKER"])
PREVIEW = np.full((8, 8, 3), 7, np.uint8)


def describe() -> dict[str, str]:
    return {"device": "test device", "model": "test model"}


def run(request, report, checkpoint) -> Result:
    """Does what the first words of the prompt say."""
    what, *words = request.settings.prompt.split()
    with open(MARKER, "a") as file:
        file.write(f"{request.settings.prompt}\n")
    if what == "resume":
        resume(checkpoint)
    else:
        {"quick": quick, "sleep": sleep, "until": until, "ignore": ignore, "fail": fail, "die": die}[what](report, *words)
    report("done", 1, 1, PREVIEW)
    if what == "quick" and words:
        return Result({}, {"vertices": np.zeros((16, int(words[0]), 3), np.float32)})
    shift = np.arange(request.settings.frames, dtype=np.float32)[:, None, None]
    return Result({"prompt": request.settings.prompt}, {"vertices": request.arrays["vertices"][None] + shift})


def quick(report, size="0") -> None:
    report("quick", 0, 1)


def sleep(report, seconds) -> None:
    steps = int(float(seconds) / 0.05)
    for step in range(steps):
        report("sleep", step, steps, PREVIEW if step % 10 == 0 else None)
        time.sleep(0.05)


def until(report, name) -> None:
    """Goes on until the test opens this gate."""
    step = 0
    while not MARKER.with_name(name).exists():
        report("until", step, 1000, PREVIEW)
        time.sleep(0.05)
        step += 1


def ignore(report) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            report("ignore", 0, 1)
        except Cancelled:
            pass
        time.sleep(0.05)


def fail(report, how) -> None:
    raise {"input": InputError("bad_thing", "The thing is bad.", "Use another thing."),
           "bug": KeyError("no such thing"),
           "memory": MemoryError()}[how]


def resume(checkpoint) -> None:
    """The first worker leaves its state behind and dies, the second goes on from there."""
    if not checkpoint.exists():
        checkpoint.write_text("half of it")
        os.kill(os.getpid(), 9)
    assert checkpoint.read_text() == "half of it"


def die(report, how="always") -> None:
    if how == "always" or MARKER.read_text().count("die once") == 1:
        os.kill(os.getpid(), 9)
