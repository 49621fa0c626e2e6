"""What does the tab cost while nothing happens? Registering in fresh processes, and redraws into a layout that does nothing.

    python benchmarks/panel.py [--redraws 1000] [--starts 5]

Without a window there is no `UILayout`, so the stand-in below takes its calls: what is measured is the Python of the panel.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bpy

START = """
import os, time, bpy
cpu, wall = time.process_time(), time.perf_counter()
import track4d_addon
track4d_addon.register()
print((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3, flush=True)
os._exit(0)  # bpy 4.2 crashes when Python shuts it down
"""


class Layout:
    """Takes every call of a `UILayout`; a new one for each part, as Blender makes them."""

    def _part(self, *_: Any, **__: Any) -> Layout:
        return Layout()

    row = column = box = split = operator = _part

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    label = prop = prop_search = menu = progress = template_icon = operator_menu_enum = separator = _nothing


def context(obj: bpy.types.Object | None) -> Any:
    region = SimpleNamespace(width=320)
    return SimpleNamespace(scene=bpy.context.scene, object=obj, region=region, preferences=bpy.context.preferences)


def states(jobs: Any, marks: Any) -> dict[str, tuple[Any, bpy.types.Object | None]]:
    """A state of the add-on and the active object for each case."""
    connected = {"server": jobs.link.Server.CONNECTED, "hello": {"device": "CPU, 2 cores", "worker": "ready", "model": "shipped"}}
    bpy.ops.mesh.primitive_monkey_add()
    plain = bpy.context.object
    bpy.ops.mesh.primitive_monkey_add()
    animated = bpy.context.object
    for number in range(8):
        marks.remember(animated, str(number), title="the monkey nods", seed=number, frames=[1, 16], made=1.7e9, settings={})
    running = {f"{n}": jobs.ActiveJob(f"{n}", "the monkey nods", ["Suzanne"], step=3, total=16, stage="fit") for n in range(3)}
    problem = jobs.Problem("in_edit_mode", "'Suzanne' is in edit mode.", "Switch to object mode (Tab).")
    return {
        "nothing selected": (jobs.State(**connected), None),
        "a mesh": (jobs.State(**connected), plain),
        "8 results": (jobs.State(**connected), animated),
        "8 results, 3 jobs, an error": (jobs.State(**connected, active=running, problem=problem), animated),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraws", type=int, default=1000)
    parser.add_argument("--starts", type=int, default=5)
    arguments = parser.parse_args()

    command = [sys.executable, "-c", START]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(arguments.starts)]
    lines = [run.stdout.strip().splitlines()[-1].split() for run in runs]
    cpu, wall = (statistics.median(float(line[k]) for line in lines) for k in (0, 1))
    print(f"Blender {bpy.app.version_string}: registering takes {cpu:.0f} ms CPU, {wall:.0f} ms in all "
          f"(median of {arguments.starts} fresh processes)\n")  # fmt: skip

    import track4d_addon
    from track4d_addon import jobs, marks, orders, panels
    from track4d_protocol.client import Client

    bpy.context.preferences.addons.new().module = "track4d_addon"
    unsent = tempfile.TemporaryDirectory()
    orders.folder = lambda: Path(unsent.name)  # this package isn't installed as an extension, which would have its own folder
    track4d_addon.register()
    calls: list[str] = []
    for name in ("__init__", "hello", "submit", "watch", "poll", "jobs", "cancel", "fetch", "forget"):
        original = getattr(Client, name)

        def spy(*values: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                calls.append(_name)
            return _original(*values, **named)

        setattr(Client, name, spy)
    sys.addaudithook(lambda event, _: calls.append(event) if event.startswith("socket.") and on_main() else None)

    print("| tab | ms CPU per redraw | network calls |")
    print("|---|---:|---:|")
    for case, (state, obj) in states(jobs, marks).items():
        jobs.wake(bpy.context)
        calls.clear()
        seen = context(obj)
        start = time.thread_time()
        for _ in range(arguments.redraws):
            jobs.wake(seen)
            panels.draw_main(Layout(), seen, state)
            panels.draw_settings(Layout(), seen)
            panels.draw_lights(Layout(), seen)
        print(f"| {case} | {(time.thread_time() - start) / arguments.redraws * 1e3:.3f} | {len(calls)} |")
    jobs.shut_down()
    track4d_addon.unregister()


def on_main() -> bool:
    return threading.current_thread() is threading.main_thread()


if __name__ == "__main__":
    main()
