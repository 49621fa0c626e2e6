"""How true the Gaussians of a still model are to its pictures: PSNR of the four captured views, per model.

    python benchmarks/appearance.py                   # all models; captures are kept in out/appearance/
    python benchmarks/appearance.py --only fox gull --gaussians 5000 --steps 40

The pictures are those that the product works from: rendered by Cycles from the model's own materials, 256 pixels. PSNR is over
the object's pixels (weighted by alpha): of the Gaussians as they are seeded from the texture, and after they have been refined.
The light in the pictures isn't in the texture, which is most of what the refinement has to find. `held out`: refined on views
at 0, 120 and 240 degrees and drawn ones, and measured at 60, 180 and 300, on pictures of the textured mesh without light, where
the seeded colours are right already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CAPTURES = ROOT / "out" / "appearance"


def capture(file: Path, out: Path, front: str) -> None:
    """Writes the request that the add-on would send; needs a process of its own because of bpy."""
    from track4d_addon import capture, scene_io
    from track4d_protocol.messages import Settings

    objects, _ = scene_io.load(file)
    request = capture.capture(objects, Settings(prompt="still", front=front))
    partial = out.with_suffix(".partial.npz")
    np.savez(partial, **request.arrays)
    partial.replace(out)


def captured(name: str):
    """Canonical mesh, pictures [V, H, H, 4] uint8 and cameras of one model; captured at the first use."""
    from assets import CASES
    from track4d.pipeline import canonical_mesh
    from track4d_protocol.messages import Request, Settings

    file, _, front = CASES[name]
    if not file.exists():
        return None
    kept = CAPTURES / f"{name}.npz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, "--capture", str(file), str(kept), front], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with np.load(kept) as data:
        arrays = dict(data)
    mesh, similarity = canonical_mesh(Request(Settings(prompt="still", front=front), [], arrays))
    return mesh, arrays["views"], similarity.viewmats_to_canonical(arrays["viewmats"]), np.asarray(arrays["Ks"], np.float32)


def held_out(mesh, gaussians: int, steps: int, size: int = 256) -> list[float]:
    """PSNR between the views that the refinement sees; seeded and refined."""
    import torch
    from track4d.gaussians.appearance import Sitting, drawn_sittings, refine_appearance, still_psnr
    from track4d.gaussians.cloud import seed_cloud
    from track4d.geometry.zbuffer import over, render
    from track4d_protocol.space import BACKGROUND, intrinsics, orbit_viewmats

    viewmats, Ks = orbit_viewmats(np.arange(0, 360, 60)), intrinsics(size, 6)
    rgba = render(mesh, mesh.vertices[None], viewmats, Ks, size)[0]  # [6, H, H, 4]
    seen, unseen = (Sitting(mesh.vertices, over(rgba, BACKGROUND)[k::2], rgba[k::2, ..., 3], viewmats[k::2], Ks[k::2])
                    for k in (0, 1))
    cloud = seed_cloud(mesh, gaussians, torch.Generator().manual_seed(0))
    drawn = drawn_sittings(mesh, np.ones((len(mesh.vertices), 3), np.float32), size)
    refined = refine_appearance(cloud, mesh.faces, seen, drawn, steps)
    return [still_psnr(x, mesh.faces, unseen) for x in (cloud, refined)]


def main() -> None:
    import torch
    from assets import CASES
    from track4d.gaussians.appearance import still_psnr
    from track4d.gaussians.cloud import seed_cloud
    from track4d.motion.appearance import estimate_shading
    from track4d.pipeline import still_sitting, surface_gaussians
    from track4d.presets import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--gaussians", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    print(f"{arguments.gaussians:,} Gaussians, {arguments.steps} steps\n")
    print("| model | vertices | seeded dB | refined dB | held out, seeded | held out, refined | refinement, CPU s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for name in arguments.only:
        model = captured(name)
        if model is None:
            print(f"| {name} | absent | | | | | |")
            continue
        mesh, pictures, viewmats, Ks = model
        captured_views = still_sitting(mesh, pictures, viewmats, Ks)
        cloud = seed_cloud(mesh, arguments.gaussians, torch.Generator().manual_seed(0))
        start = time.process_time()
        shading = estimate_shading(mesh, pictures, viewmats, Ks)
        quality = replace(PRESETS["default"], gaussians=arguments.gaussians, appearance_steps=arguments.steps)
        refined = surface_gaussians(mesh, captured_views, shading, quality, 0)
        seconds = time.process_time() - start
        rows.append([still_psnr(cloud, mesh.faces, captured_views), still_psnr(refined, mesh.faces, captured_views),
                     *held_out(mesh, arguments.gaussians, arguments.steps), seconds])
        print(f"| {name} | {len(mesh.vertices)} | " + " | ".join(f"{value:.1f}" for value in rows[-1]) + " |", flush=True)
    print("| mean | | " + " | ".join(f"{value:.1f}" for value in np.mean(rows, 0)) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--capture"]:
        capture(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main()
