"""How fast does the add-on capture a mesh, and put a motion onto it? CPU seconds of all threads, and wall seconds.

python benchmarks/blender_mesh.py [--vertices 100000] [--frames 64] [--threads 2]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import bpy
import numpy as np
from track4d_addon import apply, capture
from track4d_protocol.messages import Result, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vertices", type=int, default=100_000)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    obj = sphere(arguments.vertices)
    bpy.context.scene.render.threads_mode = "FIXED"
    bpy.context.scene.render.threads = arguments.threads
    print(f"Blender {bpy.app.version_string}, {len(obj.data.vertices)} vertices, {arguments.frames} frames")
    print("| what | CPU s (min) | wall s (min) |")
    print("|---|---:|---:|")
    seen = measured("snapshot", lambda: capture.snapshot([obj]), arguments.rounds)
    settings = Settings(prompt="it turns")
    measured("capture: four pictures, 256 px, 16 samples", lambda: capture.capture([obj], settings), arguments.rounds)
    measured("of it, without the samples (1 sample)", lambda: capture.capture([obj], settings, samples=1), arguments.rounds)
    head = subdivided_monkey()
    measured(f"capture of a monkey of {len(head.data.vertices)} vertices", lambda: capture.capture([head], settings),
             arguments.rounds)
    angles = np.linspace(0, 1, arguments.frames)[:, None]
    frames = np.repeat(seen.vertices[None], arguments.frames, 0)
    frames[..., 2] += 0.1 * np.sin(angles * 6 + seen.vertices[:, 0])
    result = Result({"prompt": "it turns"}, {"vertices": frames})
    measured("for comparison: one picture of a monkey, 16 samples", monkey(), arguments.rounds)
    measured("shape keys", lambda: apply.apply(seen, result), arguments.rounds)


def sphere(count: int) -> bpy.types.Object:
    """A sphere of quads with about as many vertices."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    rings = round((count / 2) ** 0.5)
    bpy.ops.mesh.primitive_uv_sphere_add(segments=2 * rings, ring_count=rings)
    return bpy.context.object


def subdivided_monkey() -> bpy.types.Object:
    """Blender's monkey with 125,954 vertices."""
    bpy.ops.mesh.primitive_monkey_add()
    obj = bpy.context.object
    bpy.ops.object.modifier_add(type="SUBSURF")
    obj.modifiers[0].levels = 4
    bpy.ops.object.modifier_apply(modifier=obj.modifiers[0].name)
    return obj


def monkey() -> Callable:
    """Rendering a plain scene of Blender's own, which says how busy the machine is."""
    scene = bpy.data.scenes.new("Monkey")
    for name, data, place in (
        ("lamp", bpy.data.lights.new("lamp", "POINT"), (3, -3, 3)),
        ("eye", bpy.data.cameras.new("eye"), (0, -4, 0)),
    ):
        made = bpy.data.objects.new(name, data)
        made.location, made.rotation_euler.x = place, np.pi / 2
        scene.collection.objects.link(made)
    scene.camera = made
    with bpy.context.temp_override(scene=scene, view_layer=scene.view_layers[0]):
        bpy.ops.mesh.primitive_monkey_add()
    render, scene.cycles.samples = scene.render, 16
    render.engine, scene.cycles.use_denoising, scene.cycles.use_adaptive_sampling = "CYCLES", False, False
    render.resolution_x = render.resolution_y = 256
    render.threads_mode, render.threads = "FIXED", bpy.context.scene.render.threads
    return lambda: bpy.ops.render.render(scene=scene.name)


def measured(what: str, work: Callable, rounds: int):
    cpu, wall = [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        made = work()
        now = resource.getrusage(resource.RUSAGE_SELF)
        wall.append(time.perf_counter() - start)
        cpu.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    print(f"| {what} | {min(cpu):.2f} | {min(wall):.2f} |", flush=True)
    return made


if __name__ == "__main__":
    main()
