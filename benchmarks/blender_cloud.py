"""How fast does Blender take and play a Gaussian cloud? Needs bpy and numpy alone, so any version of bpy can run it.

    python benchmarks/blender_cloud.py [--count 100000] [--frames 16]

And does Blender draw it as the rasteriser does? That needs the server's packages. One frame of an archive, by Cycles, by the
rasteriser, and four times their difference, side by side:

    track4d animate examples/fox_cub.glb --prompt "the fox is running" -o fox.t4d
    python benchmarks/blender_cloud.py --archive fox.t4d --picture docs/images/blender_cloud.png
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
    parser.add_argument("--archive", type=Path, help="a .t4d to draw")
    parser.add_argument("--picture", type=Path, help="where the comparison is written")
    parser.add_argument("--frame", type=int, default=10)
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.archive:
        return compare(arguments.archive, arguments.picture, arguments.frame, arguments.size)
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


def compare(archive: Path, picture: Path, frame: int, size: int) -> None:
    """Draws frame `frame` of an archive from its left side in both ways and tells how far they are apart."""
    import torch
    from PIL import Image
    from track4d.gaussians.rasterise import SAMPLES, rasterise
    from track4d_addon.apply.gaussian_cloud import gaussian_cloud
    from track4d_addon.capture.cameras import set_camera
    from track4d_addon.capture.colors import linear_to_srgb
    from track4d_protocol.space import BACKGROUND, canonical_similarity, intrinsics, orbit_viewmats
    from track4d_protocol.splat_files import read_t4d

    splats = read_t4d(archive)
    canonical, K = canonical_similarity(splats.means[0]), intrinsics(size)[0]
    viewmat = canonical.viewmats_to_world(orbit_viewmats([60.0]))[0]
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(scene.camera)
    set_camera(scene.camera, viewmat, K, size, 1 / canonical.scale)
    gaussian_cloud(splats, "cloud", frame_start=1)
    render = scene.render
    render.engine, scene.cycles.samples, scene.cycles.use_denoising = "CYCLES", 64, False
    render.resolution_x = render.resolution_y = size
    render.film_transparent = True
    render.image_settings.file_format, render.image_settings.color_depth = "OPEN_EXR", "32"
    render.filepath = str(picture.with_suffix(".exr"))
    scene.frame_set(frame + 1)
    bpy.ops.render.render(write_still=True)
    image = bpy.data.images.load(render.filepath)
    pixels = np.empty(size * size * 4, np.float32)
    image.pixels.foreach_get(pixels)
    Path(render.filepath).unlink()
    drawn = pixels.reshape(size, size, 4)[::-1]  # linear, premultiplied
    alpha = drawn[..., 3:].clip(0, 1)
    blender = linear_to_srgb(drawn[..., :3] / np.maximum(alpha, 1e-4)) * alpha + BACKGROUND * (1 - alpha)

    eye = -np.linalg.inv(viewmat[:3, :3]) @ viewmat[:3, 3]
    arrays = (splats.means[frame : frame + 1], splats.quats[frame : frame + 1], splats.scales, splats.opacities,
              splats.colors(frame, viewer=eye), viewmat[None], K[None])  # fmt: skip
    tensors = (torch.from_numpy(np.ascontiguousarray(array, np.float32)) for array in arrays)
    rgb, coverage = rasterise(*tensors, size, torch.full((3,), BACKGROUND), SAMPLES)
    ours, there = rgb[0, 0].clamp(0, 1).numpy(), coverage[0, 0].numpy() > 0.05
    difference = blender - ours
    inside, whole = (-10 * np.log10((part**2).mean()) for part in (difference[there], difference))
    print(f"{archive.name}, frame {frame}, {splats.means.shape[1]} Gaussians, {size} px, 64 samples: PSNR over the object "
          f"{inside:.1f} dB, over the picture {whole:.1f} dB, mean error {np.abs(difference[there]).mean():.4f}")  # fmt: skip
    row = np.concatenate([blender, ours, (4 * np.abs(difference)).clip(0, 1)], 1)
    Image.fromarray((row * 255 + 0.5).astype(np.uint8)).quantize(200).save(picture, optimize=True)


if __name__ == "__main__":
    main()
