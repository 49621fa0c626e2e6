"""What the motion field adds to the registration, and 4D SH to the colours. Clips and cameras are those of recover.py.

    python benchmarks/refine.py [CLIP ...] [--degraded] [--preset fine]   # registration against refinement, per clip
    python benchmarks/refine.py [CLIP ...] --ablate [--features exact]    # w/o diffusion features, w/o 4D SH; three seeds
    python benchmarks/refine.py fox --lamp                                # a lamp goes around the moving object
    python benchmarks/refine.py fox --visibility                          # rays against depth pictures
    python benchmarks/refine.py [CLIP ...] --paper [--batch N] [--gpu]    # the paper's own recipe, N frames per step
    python benchmarks/refine.py fox --budget                              # 20,000 Gaussians, 4 x 16 pictures of 256 pixels

err   mean vertex error / mean vertex displacement, edge: mean change of edge lengths, as in recover.py
PSNR  of the 4D Gaussians in a view that no step has seen (azimuth 45, elevation 30), over the object's pixels
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from recover import CLIPS, EXTRAS, HERE, SIZE, Truth, film, load_truth, measure, paper_motion, straight
from track4d.gaussians.cloud import Cloud
from track4d.gaussians.light import fit_light
from track4d.gaussians.rasterise import SAMPLES, best_device, rasterise
from track4d.gaussians.spherical_harmonics import sh_colors, sh_from_colors, view_directions
from track4d.geometry import zbuffer
from track4d.motion.appearance import estimate_shading
from track4d.motion.field import MotionField
from track4d.motion.fit import fit_motion
from track4d.motion.footage import Footage, read_footage
from track4d.motion.hybrid_features import visible_by_depth, visible_by_rays
from track4d.motion.reconstruct import PAPER, reconstruct_motion
from track4d.motion.refine import object_pictures, refine_motion
from track4d.pipeline import still_sitting, surface_gaussians
from track4d.presets import PRESETS, Preset
from track4d.video.features import video_features
from track4d_protocol.space import BACKGROUND, intrinsics, orbit_viewmats

NEW_VIEW = orbit_viewmats([45.0], 30.0)
SEEDS = (0, 1, 2)


def surface_cloud(truth: Truth, video: np.ndarray, shading: np.ndarray, quality: Preset, motion: np.ndarray | None,
                  seed: int = 0) -> Cloud:
    """The Gaussians as the pipeline makes them from frame 0 and for a motion [F, N, 3]."""
    captured = still_sitting(truth.mesh, video[:, 0], orbit_viewmats(), intrinsics(SIZE, 4))
    return surface_gaussians(truth.mesh, captured, shading, quality, seed, motion)


def new_view_psnr(truth: Truth, cloud: Cloud, vertices: np.ndarray, sh: torch.Tensor,
                  shadings: np.ndarray | None = None, samples: int = SAMPLES) -> float:
    """PSNR in dB of frames 1.. in the new view over the object; shadings [F, N] of the truth where its light moves.

    The truth has 4 samples along each axis of a pixel, the Gaussians `samples`."""
    Ks, frames = intrinsics(SIZE, 1), len(vertices)
    camera = torch.from_numpy(NEW_VIEW), torch.from_numpy(Ks)
    squared, area = 0.0, 0.0
    for f in range(1, frames):
        shading = truth.shading if shadings is None else shadings[f]
        rgba = zbuffer.render(truth.mesh, truth.vertices[f:f + 1], NEW_VIEW, Ks, SIZE, 4, shading)[0, 0]
        means, quats = cloud.pose(truth.mesh.faces, torch.from_numpy(vertices[f:f + 1]))
        colors = sh_colors(sh, view_directions(means, camera[0]), torch.tensor([float(f)]), frames)
        rgb, _ = rasterise(means, quats, cloud.scales, cloud.opacities, colors, *camera, SIZE, BACKGROUND, samples)
        off = (rgb[0, 0].clamp(0, 1).numpy() - zbuffer.over(rgba, BACKGROUND)) ** 2  # [S, S, 3]
        squared += float((off.mean(-1) * rgba[..., 3]).sum())
        area += float(rgba[..., 3].sum())
    return -10 * np.log10(squared / area)


def lit(truth: Truth, cloud: Cloud, field: MotionField, footage: Footage, quality: Preset, terms: int | None = None,
        seed: int = 0) -> tuple[Cloud, torch.Tensor, float]:
    """The cloud, 4D SH of the preset, or static colours fitted in the same way where `terms` is 1, and the share of that fit."""
    degree, terms = (0, 1) if terms == 1 else (quality.sh_degree, quality.sh_terms)
    return fit_light(cloud, truth.mesh.faces, field.vertices, object_pictures(footage), footage.masks, footage.viewmats,
                     footage.Ks, degree, terms, quality.color_steps, seed)


def registered(truth: Truth, video: np.ndarray, quality: Preset) -> tuple[MotionField, Footage, np.ndarray]:
    """The registered motion, the video as it is registered, and the shading found in it."""
    footage = read_footage(video, orbit_viewmats(), intrinsics(SIZE, 4))
    shading = estimate_shading(truth.mesh, footage.straight_views(), footage.viewmats, footage.Ks)
    return fit_motion(truth.mesh, video, orbit_viewmats(), intrinsics(SIZE, 4), shading, preset=quality.fit), footage, shading


def compare(names: list[str], assets: Path, quality: Preset, degraded: bool) -> None:
    """Registration and refinement, clip by clip."""
    print(f"{'clip':14s} {'err':>6s} {'refined':>8s} {'gain':>6s} {'share':>6s} {'held out':>9s} {'after':>7s} {'edge':>6s} "
          f"{'after':>6s} {'truth':>6s} {'true motion':>11s} {'still SH':>8s} {'4D SH':>6s} {'share':>5s} {'cpu s: fit':>10s} "
          f"{'refine':>6s} {'cloud':>6s} {'colours':>7s}")
    sums = []
    for name in names:
        truth = load_truth(name, assets)
        video = film(truth, degraded)[0]
        clock = [time.process_time()]
        field, footage, shading = registered(truth, video, quality)
        clock.append(time.process_time())
        refined = refine_motion(truth.mesh, field, footage, shading, quality.refine)
        clock.append(time.process_time())
        still = surface_cloud(truth, video, shading, quality, refined.field.vertices)
        clock.append(time.process_time())
        cloud, sh, share = lit(truth, still, refined.field, footage, quality)
        clock.append(time.process_time())
        exact = surface_cloud(truth, video, shading, quality, truth.vertices)
        before, after = measure(truth, field.vertices), measure(truth, refined.field.vertices)
        shown = [new_view_psnr(truth, exact, truth.vertices, sh_from_colors(exact.colors)),
                 new_view_psnr(truth, still, refined.field.vertices, sh_from_colors(still.colors)),
                 new_view_psnr(truth, cloud, refined.field.vertices, sh)]
        fit, refine, covering, colors = np.diff(clock)
        sums.append([before["err"], after["err"], *shown])
        print(f"{name:14s} {before['err']:6.3f} {after['err']:8.3f} {1 - after['err'] / before['err']:6.1%} {refined.share:6.2f} "
              f"{refined.before:9.4f} {refined.after:7.4f} {before['edge']:6.3f} {after['edge']:6.3f} {after['true_edge']:6.3f} "
              f"{shown[0]:11.2f} {shown[1]:8.2f} {shown[2]:6.2f} {share:5.2f} {fit:10.1f} {refine:6.1f} {covering:6.1f} "
              f"{colors:7.1f}", flush=True)
    registered_err, refined_err, *shown = np.mean(sums, 0)
    print(f"mean: err {registered_err:.4f} -> {refined_err:.4f}; new view, dB: true motion {shown[0]:.2f}, "
          f"still SH {shown[1]:.2f}, 4D SH {shown[2]:.2f}")


def exact_features(truth: Truth) -> torch.Tensor:
    """Features [V, F, C, 16, 16] that know the place on the surface that they show: no video model can have better ones."""
    cells, places = 16, truth.mesh.vertices
    waves = np.concatenate([trig(k * np.pi * places) for k in (1, 2, 4) for trig in (np.sin, np.cos)], 1).astype(np.float32)
    fragments = zbuffer.rasterise(truth.vertices, truth.mesh.faces, orbit_viewmats(), intrinsics(4 * cells, 4), 4 * cells)
    maps = zbuffer.interpolate(fragments, truth.mesh.faces, waves).reshape(len(truth.vertices), 4, cells, 4, cells, 4, -1)
    return torch.from_numpy(maps.mean((3, 5)).transpose(1, 0, 4, 2, 3).copy())


def ablate(names: list[str], assets: Path, quality: Preset, kind: str) -> None:
    """Full, without diffusion features, without 4D SH: mean and standard deviation over seeds."""
    print(f"{'clip':14s} {'variant':>24s} {'err':>16s} {'PSNR':>14s}")
    for name in names:
        truth = load_truth(name, assets)
        video = film(truth, False)[0]
        field, footage, shading = registered(truth, video, quality)
        if kind == "exact":
            features = exact_features(truth)
        else:
            features = torch.from_numpy(video_features(video, "", orbit_viewmats()))
        rows: dict[str, list[tuple[float, float]]] = {"full": [], "w/o diffusion features": [], "w/o 4D SH": []}
        for seed in SEEDS:
            for given, variants in ((features, ("full", "w/o 4D SH")), (None, ("w/o diffusion features",))):
                motion = refine_motion(truth.mesh, field, footage, shading, quality.refine, given, seed=seed).field
                err = measure(truth, motion.vertices)["err"]
                still = surface_cloud(truth, video, shading, quality, motion.vertices, seed)
                for variant in variants:
                    cloud, sh, _ = lit(truth, still, motion, footage, quality, 1 if variant == "w/o 4D SH" else None, seed)
                    rows[variant].append((err, new_view_psnr(truth, cloud, motion.vertices, sh)))
        for variant, values in rows.items():
            (err, psnr), (err_spread, psnr_spread) = np.mean(values, 0), np.std(values, 0)
            print(f"{name:14s} {variant:>24s} {err:8.4f} +- {err_spread:.4f} {psnr:7.2f} +- {psnr_spread:.2f}", flush=True)


def lamp(names: list[str], assets: Path, quality: Preset) -> None:
    """4D SH against static SH where a lamp goes once around; the motion is the true one, so that only light is compared."""
    print(f"{'clip':14s} {'static SH':>10s} {'4D SH':>7s} {'gain dB':>8s}")
    for name in names:
        truth = load_truth(name, assets)
        normals = np.stack([truth.mesh.vertex_normals(posed) for posed in truth.vertices])  # [F, N, 3]
        angles = 2 * np.pi * np.arange(len(normals)) / len(normals)
        towards = np.stack([np.cos(angles), np.sin(angles), np.full_like(angles, 0.4)], 1) / np.hypot(1, 0.4)
        shadings = (0.35 + 0.65 * np.maximum(np.einsum("fnx,fx->fn", normals, towards), 0)).astype(np.float32)
        cameras = orbit_viewmats(), intrinsics(SIZE, 4), SIZE
        rgba = np.stack([zbuffer.render(truth.mesh, truth.vertices[f:f + 1], *cameras, 4, shading)[0]
                         for f, shading in enumerate(shadings)], 1)  # [V, F, S, S, 4]
        video = straight(rgba)
        footage = read_footage(video, *cameras[:2])
        still = surface_cloud(truth, video, estimate_shading(truth.mesh, video[:, 0], *cameras[:2]), quality, truth.vertices)
        right = MotionField(truth.vertices, np.ones(truth.vertices.shape[:2], np.float32))
        shown = []
        for terms in (1, quality.sh_terms):
            cloud, sh, share = lit(truth, still, right, footage, quality, terms)
            shown.append(new_view_psnr(truth, cloud, truth.vertices, sh, shadings))
        print(f"{name:14s} {shown[0]:10.2f} {shown[1]:7.2f} {shown[1] - shown[0]:8.2f} (share {share:.2f})", flush=True)


def visibility(names: list[str], assets: Path) -> None:
    """Rays and depth pictures on all vertices of all frames: agreement and time in one run."""
    print(f"{'clip':14s} {'points':>8s} {'agree':>7s} {'rays cpu s':>11s} {'depth cpu s':>12s}")
    for name in names:
        truth = load_truth(name, assets)
        vertices, faces = truth.vertices, truth.mesh.faces
        visible_by_depth(vertices[:1], faces, vertices[:1], orbit_viewmats(), intrinsics(SIZE, 4), SIZE)  # loads the kernels
        clock = [time.process_time()]
        rays = visible_by_rays(vertices, faces, vertices, orbit_viewmats())
        clock.append(time.process_time())
        depth = visible_by_depth(vertices, faces, vertices, orbit_viewmats(), intrinsics(SIZE, 4), SIZE)
        clock.append(time.process_time())
        seconds = np.diff(clock)
        print(f"{name:14s} {rays.size:8d} {(rays == depth).mean():7.1%} {seconds[0]:11.2f} {seconds[1]:12.2f}", flush=True)


def paper(names: list[str], assets: Path, batch: int | None, device: str) -> None:
    """The paper's own recipe; without a video model's 4D-SDS."""
    print(f"{'clip':14s} {'err':>6s} {'w10':>6s} {'edge':>6s} {'PSNR':>6s} {'cpu s':>7s} {'wall s':>7s} {'drawing':>8s}")
    for name in names:
        truth, quality = load_truth(name, assets), PRESETS["paper"]
        video = film(truth, False)[0]
        footage = read_footage(video, orbit_viewmats(), intrinsics(SIZE, 4))
        shading = estimate_shading(truth.mesh, footage.straight_views(), footage.viewmats, footage.Ks)
        cloud = surface_cloud(truth, video, shading, quality, None)
        features = torch.from_numpy(video_features(video, "", orbit_viewmats()))
        preset = replace(PAPER, batch=batch)
        drawing_time(truth, cloud.to(device), 1)  # the first time compiles
        start, wall = time.process_time(), time.perf_counter()
        found = reconstruct_motion(truth.mesh, cloud.to(device), footage, preset, features)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
        most = min(footage.frames - 1, batch or footage.frames)
        drawn = sum(min(step // preset.frames_every + 1, most) for step in range(found.steps))  # frames
        drawing = drawing_time(truth, cloud.to(device), footage.frames - 1) * drawn / (footage.frames - 1)
        m, psnr = measure(truth, found.field.vertices), new_view_psnr(truth, cloud, found.field.vertices, found.coefficients)
        print(f"{name:14s} {m['err']:6.3f} {m['w10']:6.3f} {m['edge']:6.3f} {psnr:6.2f} {seconds:7.1f} {wall:7.1f} "
              f"{drawing / wall:8.0%}", flush=True)
        np.savez(paper_motion(name), vertices=found.field.vertices)


def drawing_time(truth: Truth, cloud: Cloud, frames: int) -> float:
    """Seconds that the rasteriser takes, forward and backward, for some frames in four views; the median of three."""
    vertices = torch.as_tensor(truth.vertices[1:1 + frames], device=cloud.scales.device)
    means, quats = cloud.pose(truth.mesh.faces, vertices)
    means.requires_grad_()
    viewmats, Ks = (torch.as_tensor(x, dtype=torch.float32, device=means.device) for x in (orbit_viewmats(), intrinsics(SIZE, 4)))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        rgb, _ = rasterise(means, quats, cloud.scales, cloud.opacities, cloud.colors, viewmats, Ks, SIZE, 0.0)
        rgb.square().mean().backward()
        float(means.grad.sum())  # waits for the GPU
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def budget(names: list[str], assets: Path, quality: Preset) -> None:
    """Seconds and memory of all steps of Stage Two with 20,000 Gaussians."""
    quality = replace(quality, gaussians=20_000)
    print(f"{'clip':14s} {'step':>12s} {'wall s':>7s} {'cpu s':>7s}")
    for name in names:
        truth = load_truth(name, assets)
        video, wall, cpu = film(truth, False)[0], time.perf_counter(), time.process_time()
        whole = wall, cpu

        def lap(step: str) -> None:
            nonlocal wall, cpu
            print(f"{name:14s} {step:>12s} {time.perf_counter() - wall:7.1f} {time.process_time() - cpu:7.1f}", flush=True)  # noqa: B023
            wall, cpu = time.perf_counter(), time.process_time()

        field, footage, shading = registered(truth, video, quality)
        lap("registration")
        field = refine_motion(truth.mesh, field, footage, shading, quality.refine).field
        lap("refinement")
        still = surface_cloud(truth, video, shading, quality, field.vertices)
        lap("appearance")
        cloud, sh, _ = lit(truth, still, field, footage, quality)
        lap("4D SH")
        wall, cpu = whole
        lap("all")
        print(f"{name:14s} peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, "
              f"stills alone {new_view_psnr(truth, still, field.vertices, sh_from_colors(still.colors)):.2f} dB, "
              f"4D SH {new_view_psnr(truth, cloud, field.vertices, sh):.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", help=f"of {', '.join(CLIPS)}; default: all but {', '.join(EXTRAS)}")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--degraded", action="store_true", help="the damaged video of recover.py")
    parser.add_argument("--features", choices=("shipped", "exact"), default="shipped", help="for --ablate")
    parser.add_argument("--batch", type=int, help="for --paper: frames per step; default all")
    parser.add_argument("--assets", type=Path, default=HERE.parents[1] / "shared" / "assets", help="folder of the .glb files")
    for mode in ("ablate", "lamp", "visibility", "paper", "budget", "gpu"):
        parser.add_argument(f"--{mode}", action="store_true")
    arguments = parser.parse_args()
    names = arguments.clips or [name for name in CLIPS if name not in EXTRAS]
    quality = PRESETS[arguments.preset]
    if arguments.ablate:
        ablate(names, arguments.assets, quality, arguments.features)
    elif arguments.lamp:
        lamp(names, arguments.assets, quality)
    elif arguments.visibility:
        visibility(names, arguments.assets)
    elif arguments.paper:
        if arguments.gpu and best_device() == "cpu":
            parser.error("--gpu needs an NVIDIA GPU and gsplat")
        paper(names, arguments.assets, arguments.batch, "cuda" if arguments.gpu else "cpu")
    elif arguments.budget:
        budget(names, arguments.assets, quality)
    else:
        compare(names, arguments.assets, quality, arguments.degraded)


if __name__ == "__main__":
    main()
