"""How long does a job hold up Blender's main thread? python benchmarks/main_thread.py [--vertices 2000 100000]

The add-on in this process presses Animate against a server whose work sends what the pipeline sends (a film, a coarse motion,
pictures) and moves the mesh. Every turn of the add-on's timer is measured on its own, in CPU time of the main thread and in wall
time; what a turn did is what stands in the table. A redraw by a window comes on top.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from track4d_protocol.messages import Request, Result

FRAMES, SECONDS = 16, 6.0


def run(request: Request, report: Any, checkpoint: Any = None) -> Result:
    """What the worker does: a film and a motion after a second, then pictures, then the result."""
    vertices = request.arrays["vertices"]  # [N, 3]
    moved = np.repeat(vertices[None], FRAMES, 0)  # [F, N, 3]
    moved[..., 2] += 0.1 * np.sin(np.arange(FRAMES) * 2 * np.pi / FRAMES)[:, None] * vertices[None, :, 0]
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, 512, 512, 3)).astype(np.uint8)
    steps = int(SECONDS / 0.1)
    for step in range(steps):
        if step == 10:
            report("generate", step, steps, preview=noise, motion=moved)
        else:
            report("fit", step, steps, preview=noise[step % FRAMES] if step % 5 == 0 else None)
        time.sleep(0.1)
    return Result({"prompt": request.settings.prompt, "seed": 0}, {"vertices": moved})


def switched_on(folder: Path) -> Any:
    """The add-on in this process, with a user folder of its own; its module `jobs`."""
    import bpy
    import track4d_addon
    from track4d_addon import jobs, orders

    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.context.preferences.addons.new().module = "track4d_addon"
    orders.folder = lambda: folder
    track4d_addon.register()
    chosen = bpy.context.preferences.addons["track4d_addon"].preferences
    chosen.connection_file, chosen.server = str(folder / "home" / "connection.json"), "FILE"
    return jobs


def add_grid(count: int) -> Any:
    """A wavy sheet of about `count` vertices, selected."""
    import bpy

    side = int(count**0.5)
    bpy.ops.mesh.primitive_grid_add(x_subdivisions=side - 1, y_subdivisions=side - 1)
    obj = bpy.context.object
    points = np.empty(len(obj.data.vertices) * 3, np.float32)
    obj.data.vertices.foreach_get("co", points)
    points = points.reshape(-1, 3)
    points[:, 2] = 0.2 * np.sin(4 * points[:, 0])
    obj.data.vertices.foreach_set("co", points.ravel())
    obj.data.update()
    return obj


def measure(jobs: Any, count: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds (CPU, wall) of every turn, by what it did."""
    import bpy

    obj = add_grid(count)
    bpy.context.scene.track4d.prompt = "the sheet waves"
    times: dict[str, list[tuple[float, float]]] = {}

    def timed(function: Any, kind: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        value = function()
        spent = ((time.thread_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
        times.setdefault(kind(), []).append(spent)
        return value

    from track4d_addon import capture, live_motion, turns

    took: list[str] = []
    kept = capture.render_view, live_motion.show
    capture.render_view = lambda *values: (took.append("a view"), kept[0](*values))[1]
    live_motion.show = lambda *values: (took.append("the motion arrives"), kept[1](*values))[1]

    def kind() -> str:
        what = took.pop() if took else doing or ("the motion plays" if live_motion._live else "running")
        took.clear()
        return what

    doing = ""
    timed(lambda: bpy.ops.track4d.animate(), lambda: "Animate is pressed")
    while jobs.state.active or turns.tasks:
        phase = next(iter(jobs.state.active.values())).phase if jobs.state.active else jobs.Phase.APPLYING
        looking = "the object is looked at" if phase is jobs.Phase.CAPTURING else "the result is applied"
        doing = looking if turns.tasks else ""
        time.sleep(min(timed(jobs.tick, kind), 0.1))
    capture.render_view, live_motion.show = kept
    assert jobs.state.problem is None, jobs.state.problem
    bpy.data.objects.remove(obj)
    return times


def main() -> None:
    import bpy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vertices", type=int, nargs="+", default=[2_000, 100_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = "import sys, pathlib, track4d.service as s; s.serve(pathlib.Path(sys.argv[1]), work='main_thread:run')"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        server = subprocess.Popen([sys.executable, "-c", code, str(folder / "home")], env=environment)
        try:
            while not (folder / "home" / "connection.json").exists():
                time.sleep(0.1)
            jobs = switched_on(folder)
            print(f"Blender {bpy.app.version_string}: ms of the main thread in one turn of the timer (bound: 30, but for views)")
            print(f"{'vertices':>9} {'turn':<24}{'turns':>6}{'CPU median':>12}{'CPU most':>10}{'wall most':>11}")
            for count in arguments.vertices:
                for kind, spent in measure(jobs, count).items():
                    cpu, wall = zip(*spent)
                    print(f"{count:>9} {kind:<24}{len(spent):>6}{np.median(cpu):>12.1f}{max(cpu):>10.1f}{max(wall):>11.1f}")
            jobs.shut_down()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
