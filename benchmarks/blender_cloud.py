"""How fast does Blender take and play a Gaussian cloud? Needs bpy and numpy alone, so any version of bpy can run it.

    python benchmarks/blender_cloud.py [--count 100000] [--frames 16]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
from pathlib import Path

import bpy
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def cloud_module() -> types.ModuleType:
    """addon/apply/gaussian_cloud.py without the rest of the add-on, which needs more packages."""
    sys.path.insert(0, str(ROOT / "protocol"))
    for name, folder in (("track4d_cloud", "addon"), ("track4d_cloud.apply", "addon/apply")):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / folder)]
        sys.modules[name] = package
    return importlib.import_module("track4d_cloud.apply.gaussian_cloud")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--frames", type=int, default=16)
    arguments = parser.parse_args()
    module = cloud_module()
    from track4d_protocol.splats import Splats

    print("| Blender | Gaussians | frames | SH degree | load s (CPU) | first frame ms | next frames ms (CPU), median |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rng = np.random.default_rng(0)
    count, frames = arguments.count, arguments.frames
    for degree, terms in ((0, 1), (0, 4), (1, 4), (3, 4)):
        bpy.ops.wm.read_factory_settings(use_empty=True)
        scene = bpy.context.scene
        camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
        scene.collection.objects.link(camera)
        scene.camera, camera.location = camera, (0, -5, 1)
        quats = rng.normal(size=(frames, count, 4)).astype(np.float32)
        quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
        means = rng.normal(size=(frames, count, 3)).astype(np.float32)
        sh = rng.normal(0, 0.3, (count, (degree + 1) ** 2, terms, 3)).astype(np.float32)
        splats = Splats(means, quats, np.full((count, 3), 0.01, np.float32), np.full(count, 0.9, np.float32), sh)
        start, cpu = time.perf_counter(), time.process_time()
        module.gaussian_cloud(splats, "cloud")
        load, load_cpu = time.perf_counter() - start, time.process_time() - cpu
        steps = []
        for frame in range(1, frames + 1):
            start, cpu = time.perf_counter(), time.process_time()
            scene.frame_set(frame)
            steps.append((time.perf_counter() - start, time.process_time() - cpu))
        wall, busy = np.median(steps[1:], 0) * 1000
        print(f"| {bpy.app.version_string} | {count} | {frames} | {degree} (w = {terms}) | {load:.2f} ({load_cpu:.2f}) | "
              f"{steps[0][0] * 1000:.0f} | {wall:.1f} ({busy:.1f}) |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
