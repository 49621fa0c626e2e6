"""Does the fit recover real motion? Known clips are rendered to a multi-view video and fitted back.

    python benchmarks/recover.py [CLIP ...] [--preset fast] [--degraded] [--tracks] [--seed N] [--sheet DIR] [--assets DIR]

The fit gets what a user gives: the mesh with its texture, the video and the cameras. Figures, over frames 1..15:
err   mean vertex error / mean vertex displacement (1 = nothing recovered); w10 the same for the 10 % most moving vertices
PSNR  of the textured mesh at the recovered vertices in a view that the fit did not have (azimuth 45, elevation 30)
edge  mean change of edge lengths, in brackets that of the truth
still largest mean error of the vertices that don't move in truth, in per cent of the bounding box's diagonal
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from track4d.geometry import zbuffer
from track4d.geometry.mesh import Mesh, weld
from track4d.motion.fit import DEFAULT, FAST, Tracks3D, fit_motion
from track4d_protocol.space import BACKGROUND, intrinsics, orbit_viewmats

HERE = Path(__file__).resolve().parent
SIZE = 256
PRESETS = {"default": DEFAULT, "fast": FAST}

# Asset, clip, and the prototype's err: clean video with mesh renders and with Gaussian renders, degraded video with mesh renders.
CLIPS = {
    "fox": ("fox", "Run", 0.17, 0.18, 0.25),
    "gull": ("gull", "Flap", 0.05, 0.09, 0.18),
    "cesium_man": ("cesium_man", "Anim_0", 0.02, 0.06, 0.15),
    "shark": ("shark", "Swim Horizontal", 0.02, 0.08, 0.17),
    "spider": ("spider", "Walk", 0.08, 0.13, 0.27),
    "morph": ("morph_stress_test", "TheWave", 0.38, 0.68, 0.83),
    "milk_truck": ("milk_truck", "Anim_0", 1.04, 1.13, None),
    "spider_attack": ("spider", "Attack", 0.11, 0.12, None),
}
EXTRAS = ("milk_truck", "spider_attack")  # not in the mean
LIGHTS = (((0.6, -0.5, 0.6), 0.45), ((0.5, 0.8, 0.2), 0.2), ((-0.9, 0.0, 0.5), 0.25))
AMBIENT = 0.5


@dataclass
class Truth:
    """A clip: the mesh in the pose of frame 0, the true vertices [F, N, 3], and the true shading [N]."""

    mesh: Mesh
    vertices: np.ndarray
    shading: np.ndarray


def load_truth(name: str, assets: Path) -> Truth:
    """Reads a clip, playing it in Blender's Python the first time."""
    asset, clip = CLIPS[name][:2]
    cached = HERE.parent / "out" / "recover" / f"{name}.npz"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.npz")
        subprocess.run([sys.executable, str(HERE / "clips.py"), str(assets / f"{asset}.glb"), clip, str(partial)],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.replace(cached)
    with np.load(cached) as data:
        faces = data["faces"]
        vertices = data["vertices"]
        first, welded = weld(vertices[0])
        corners = welded[faces]
        proper = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]) & (corners[:, 0] != corners[:, 2])
        mesh = Mesh(vertices[0], faces[proper], data["uvs"][proper], data["materials"][proper], list(data["textures"]))
    normals = Mesh(mesh.vertices[first], welded[mesh.faces]).vertex_normals()
    shading = np.full(len(normals), AMBIENT)
    for direction, strength in LIGHTS:
        shading += strength * np.maximum(normals @ (np.array(direction) / np.linalg.norm(direction)), 0)
    return Truth(mesh, vertices, shading[welded].astype(np.float32))


def straight(rgba: np.ndarray) -> np.ndarray:
    """Premultiplied float pictures to straight-alpha uint8."""
    color = rgba[..., :3] / np.maximum(rgba[..., 3:], 1e-6)
    return (np.concatenate([color, rgba[..., 3:]], -1).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def film(truth: Truth, degraded: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The video [V, F, S, S, 4] uint8 and its cameras."""
    viewmats, Ks = orbit_viewmats(), intrinsics(SIZE, 4)
    if degraded:
        return straight(degrade(truth, viewmats, Ks)), viewmats, Ks
    rgba = zbuffer.render(truth.mesh, truth.vertices, viewmats, Ks, SIZE, 4, truth.shading)
    return straight(rgba).swapaxes(0, 1), viewmats, Ks


def degrade(truth: Truth, viewmats: np.ndarray, Ks: np.ndarray) -> np.ndarray:
    """What a video model might get wrong in frames 1..15: unsteady shapes, blur, brightness, noise, JPEG, views out of step.

    Returns:
        [V, F, S, S, 4] float32 premultiplied.
    """
    frames, late = len(truth.vertices), (0.0, 0.25, -0.25, 0.15)
    generator = np.random.default_rng(1)
    out = np.empty((4, frames, SIZE, SIZE, 4), np.float32)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

    def smooth(grid: np.ndarray) -> np.ndarray:
        return cv2.resize(grid.astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)

    for v in range(4):
        moments = np.clip(np.arange(frames) + late[v] * (np.arange(frames) > 0), 0, frames - 1)
        whole = np.minimum(moments.astype(int), frames - 2)
        part = (moments - whole)[:, None, None]
        posed = (1 - part) * truth.vertices[whole] + part * truth.vertices[whole + 1]
        out[v] = zbuffer.render(truth.mesh, posed, viewmats[v:v + 1], Ks[v:v + 1], SIZE, 4, truth.shading)[:, 0]
        drift = generator.normal(0, 1, (frames, 2, 5, 5))
        for f in range(1, frames):
            warp = 0.6 * drift[f] + 0.8 * drift[f - 1]
            shift = [smooth(warp[k]) * 1.5 for k in (0, 1)]
            picture = cv2.remap(out[v, f], columns + shift[0], rows + shift[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
            picture = cv2.GaussianBlur(picture, (0, 0), 0.8)
            alpha, brightness = picture[..., 3:], 1 + 0.06 * smooth(generator.normal(0, 1, (3, 3)))[..., None]
            color = picture[..., :3] * brightness + (1 - alpha) * BACKGROUND
            color = (color + generator.normal(0, 0.012, color.shape)).clip(0, 1)
            packed = cv2.imencode(".jpg", (color * 255).astype(np.uint8)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
            color = cv2.imdecode(packed, 1)[..., ::-1] / 255.0
            out[v, f] = np.concatenate([color - (1 - alpha) * BACKGROUND, alpha], -1)
    return out


def measure(truth: Truth, vertices: np.ndarray) -> dict[str, float]:
    """The figures of the table."""
    error = np.linalg.norm(vertices - truth.vertices, axis=2)[1:]
    moved = np.linalg.norm(truth.vertices - truth.vertices[:1], axis=2)[1:]
    most = moved.mean(0) >= np.quantile(moved.mean(0), 0.9)
    viewmats, Ks = orbit_viewmats([45.0], 30.0), intrinsics(SIZE, 1)
    pictures = [zbuffer.over(zbuffer.render(truth.mesh, posed, viewmats, Ks, SIZE, 4, truth.shading), BACKGROUND)[1:, 0]
                for posed in (vertices, truth.vertices)]
    squared = ((pictures[0] - pictures[1]) ** 2).mean((1, 2, 3))
    first, welded = weld(truth.mesh.vertices)
    edges = Mesh(truth.mesh.vertices[first], welded[truth.mesh.faces]).edges()

    def stretch(posed: np.ndarray) -> float:
        lengths = np.linalg.norm(posed[:, first][:, edges[:, 0]] - posed[:, first][:, edges[:, 1]], axis=2)
        proper = lengths[0] > 1e-3
        return float(np.abs(lengths[1:, proper] / lengths[0, proper] - 1).mean())

    at_rest = moved.max(0) < 1e-4
    still = error[:, at_rest].mean(1).max() / np.linalg.norm(np.ptp(truth.vertices[0], axis=0)) if at_rest.any() else np.nan
    return {"err": float(error.mean() / moved.mean()), "w10": float(error[:, most].mean() / moved[:, most].mean()),
            "psnr": float((-10 * np.log10(np.maximum(squared, 1e-10))).mean()),
            "edge": stretch(vertices), "true_edge": stretch(truth.vertices), "still": 100 * float(still)}


def paper_motion(name: str) -> Path:
    """Where `refine.py --paper` leaves the motion that the paper's recipe found in a clip."""
    return HERE.parent / "out" / "recover" / f"{name}_paper.npz"


def contact_sheet(truth: Truth, motions: list[np.ndarray], path: Path) -> None:
    """Truth and motions [F, N, 3], each in two rows: front and held-out view, five moments."""
    tile, moments = 128, [0, 3, 6, 9, 12]
    viewmats = np.concatenate([orbit_viewmats([90.0]), orbit_viewmats([45.0], 30.0)])
    rows = []
    for posed in (truth.vertices, *motions):
        rgba = zbuffer.render(truth.mesh, posed[moments], viewmats, intrinsics(tile, 2), tile, 4, truth.shading)
        rows += [np.concatenate(list(zbuffer.over(rgba[:, v], BACKGROUND)), 1) for v in range(2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = (np.concatenate(rows).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    cv2.imwrite(str(path), picture[..., ::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", help=f"of {', '.join(CLIPS)}; default: all")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--degraded", action="store_true", help="fit the damaged video")
    parser.add_argument("--tracks", action="store_true", help="give the fit exact tracks too")
    parser.add_argument("--seed", type=int, default=0, help="of the matched surface points")
    parser.add_argument("--sheet", type=Path, help="folder for pictures of truth, result, and what `refine.py --paper` found")
    parser.add_argument("--assets", type=Path, default=HERE.parents[1] / "shared" / "assets", help="folder of the .glb files")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.clips if name not in CLIPS]
    if unknown:
        parser.error(f"unknown clip {', '.join(unknown)}")
    if arguments.preset != "default":
        print("The prototype's figures are for the default preset.")
    print(f"{'clip':14s} {'err':>6s} {'w10':>6s} {'PSNR':>6s} {'edge (true)':>13s} {'still %':>7s} {'cpu s':>6s} "
          f"{'wall s':>6s}   prototype err, ratio: mesh, Gaussians")
    errors = []
    for name in arguments.clips or CLIPS:
        truth = load_truth(name, arguments.assets)
        video, viewmats, Ks = film(truth, arguments.degraded)
        cpu, wall = time.process_time(), time.perf_counter()
        tracks = Tracks3D(truth.vertices, np.ones(len(truth.mesh.vertices)), exact=True) if arguments.tracks else None
        field = fit_motion(truth.mesh, video, viewmats, Ks, tracks=tracks, preset=PRESETS[arguments.preset], seed=arguments.seed)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        m = measure(truth, field.vertices)
        published = CLIPS[name][4:] if arguments.degraded else CLIPS[name][2:4]
        beside = ", ".join(f"{p:.2f} x{m['err'] / p:.2f}" for p in published if p)
        edges = f"{m['edge']:.3f} ({m['true_edge']:.3f})"
        print(f"{name:14s} {m['err']:6.3f} {m['w10']:6.3f} {m['psnr']:6.2f} {edges:>13s} {m['still']:7.3f} {cpu:6.1f} "
              f"{wall:6.1f}   {beside}", flush=True)
        errors += [m["err"]] if name not in EXTRAS else []
        if arguments.sheet:
            published = [np.load(paper_motion(name))["vertices"]] if paper_motion(name).exists() else []
            contact_sheet(truth, [field.vertices, *published], arguments.sheet / f"{name}.png")
    if errors:
        print(f"{'mean':14s} {np.mean(errors):6.3f}")


if __name__ == "__main__":
    main()
