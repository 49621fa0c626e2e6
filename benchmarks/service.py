"""What the service adds to a job: python benchmarks/service.py [--repeats 20]

Starts a server whose worker returns at once and prints medians: a request's way to the disk, the first progress, and
the way back of a result of 16 x 20,000 vertices with a video of 12 MB. A copy of the same bytes in memory and to the
disk stand beside them, as what no service could avoid.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from track4d_protocol.client import Client
from track4d_protocol.keys import read_connection
from track4d_protocol.messages import Request, Result, Settings
from track4d_protocol.space import intrinsics, orbit_viewmats

VERTICES, FRAMES, SIZE = 20_000, 16, 256


def run(request: Request, report) -> Result:
    """What the worker does: one report, and a result of the usual size."""
    report("begin", 0, 1)
    return Result({}, {"vertices": np.zeros((FRAMES, VERTICES, 3), np.float32),
                       "video": np.zeros((4, FRAMES, SIZE, SIZE, 3), np.uint8)})


def make_request() -> Request:
    """A mesh of 20,000 vertices with a texture of 1024 pixels and four pictures."""
    dice = np.random.default_rng(0)
    faces = dice.integers(0, VERTICES, (2 * VERTICES, 3)).astype(np.int32)
    arrays = {"vertices": dice.random((VERTICES, 3), np.float32), "faces": faces,
              "uvs": dice.random((len(faces), 3, 2), np.float32), "materials": np.zeros(len(faces), np.int32),
              "texture_0": dice.integers(0, 255, (1024, 1024, 3)).astype(np.uint8),
              "views": dice.integers(0, 255, (4, SIZE, SIZE, 4)).astype(np.uint8),
              "viewmats": orbit_viewmats(), "Ks": intrinsics(SIZE, 4)}
    return Request(Settings("the fox is running"), ["fox"], arrays)


def measure(client: Client, home: Path, repeats: int) -> dict[str, list[float]]:
    """Milliseconds per repeat of everything that is measured."""
    times: dict[str, list[float]] = {}

    def note(name: str, since: float) -> None:
        times.setdefault(name, []).append((time.perf_counter() - since) * 1000)

    for _ in range(repeats):
        request, job_id = make_request(), uuid.uuid4().hex
        start = time.perf_counter()
        client.hello()
        note("hello and back", start)
        start = time.perf_counter()
        client.submit(job_id, request)
        note("submit to acknowledge (on disk)", start)
        client.watch(job_id)
        first, done = True, False
        while not done:
            for job in client.poll(1.0):
                if first and job.stage == "begin":
                    note("submit to first progress", start)
                    first = False
                done = job.state.final
        note("submit to done", start)
        start = time.perf_counter()
        result = client.fetch(job_id)
        note("fetch the result", start)
        start = time.perf_counter()
        for array in result.arrays.values():
            array.copy()
        note("(copy the result in memory)", start)
        start = time.perf_counter()
        with open(home / "probe", "wb") as file:
            for array in request.arrays.values():
                file.write(array.data)
            os.fsync(file.fileno())
        note("(write the request and fsync)", start)
        client.forget(job_id)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        code = f"from track4d.service import serve; serve({str(home)!r}, work='service:run')"
        start = time.perf_counter()
        server = subprocess.Popen([sys.executable, "-c", code],
                                  env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
        while not (home / "connection.json").exists():
            time.sleep(0.002)
        with Client(read_connection(home / "connection.json"), timeout=30) as client:
            client.hello()
            ready = time.perf_counter() - start
            while client.hello()["worker"] != "ready":
                time.sleep(0.01)
            times = measure(client, home, repeats)
            client.shutdown()
        server.wait()
    request_bytes = sum(array.nbytes for array in make_request().arrays.values())
    result_bytes = sum(array.nbytes for array in run(make_request(), lambda *_: None).arrays.values())
    table = Table(title=f"request {request_bytes / 1e6:.1f} MB, result {result_bytes / 1e6:.1f} MB, {repeats} repeats; "
                        f"server answers {ready:.2f} s after its start")
    for column in ("what", "median ms", "min ms", "max ms"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, values in times.items():
        table.add_row(name, *[f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))])
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
