"""How small is the compact archive of Gaussians, and what does it cost? On a real result, with the product's rasteriser.

    python benchmarks/archive.py [--mesh examples/fox_cub.glb --prompt "the fox is running"] [--size 256]

The job runs once, its Gaussians are written as a PLY sequence, as .splats.glb and as .t4d, and both what was fitted and what the
archive gives back are drawn from four views at every frame.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from track4d.gaussians.rasterise import rasterise
from track4d.pipeline import run
from track4d_addon import capture, scene_io
from track4d_addon.apply.gaussian_cloud import splats_of_result
from track4d_addon.export import write_splats
from track4d_protocol.messages import Settings
from track4d_protocol.space import BACKGROUND, canonical_similarity, intrinsics, orbit_viewmats
from track4d_protocol.splat_files import read_t4d
from track4d_protocol.splats import Splats

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=Path, default=ROOT / "examples" / "fox_cub.glb")
    parser.add_argument("--prompt", default="the fox is running")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    objects, _ = scene_io.load(arguments.mesh)
    request = capture.capture(objects, Settings(prompt=arguments.prompt, preset=arguments.preset))
    splats = splats_of_result(run(request, lambda *_, **__: None))
    viewmats = canonical_similarity(request.arrays["vertices"]).viewmats_to_world(orbit_viewmats())
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for suffix in (".ply", ".splats.glb", ".t4d"):
            part = Path(folder) / suffix[1:]
            part.mkdir()
            write_splats(splats, part / f"fox{suffix}")
            sizes[suffix] = sum(file.stat().st_size for file in part.iterdir())
        back = read_t4d(Path(folder) / "t4d" / "fox.t4d")
    truth, kept = (pictures(one, viewmats, arguments.size) for one in (splats, back))
    stills = torch.from_numpy(request.arrays["views"].astype(np.float32) / 255)  # [V, H, W, 4]
    stills = stills[..., :3] * stills[..., 3:] + (1 - stills[..., 3:]) * BACKGROUND
    fitted, archived = (psnr(drawn[0], stills) for drawn in (truth, kept))
    means, sh = splats.means, splats.sh
    print(
        f"{arguments.mesh.name}, {arguments.prompt!r}, {means.shape[1]} Gaussians, {len(means)} frames, SH {list(sh.shape[1:])}"
    )
    print("| file | bytes | share of the PLY sequence |\n|---|---:|---:|")
    for suffix, size in sizes.items():
        print(f"| {suffix} | {size} | 1/{sizes['.ply'] / size:.1f} |")
    print(f"PSNR of the drawn archive to the drawn Gaussians, all views and frames: {psnr(kept, truth):.2f} dB")
    print(f"PSNR to the captured pictures at frame 0: {fitted:.2f} dB, from the archive {archived:.2f} dB")


def pictures(splats: Splats, viewmats: np.ndarray, size: int) -> torch.Tensor:
    """Every frame from every view, [F, V, H, W, 3]."""
    drawn = []
    for frame in range(splats.frames):
        views = []
        for viewmat in viewmats:
            eye = -np.linalg.inv(viewmat[:3, :3]) @ viewmat[:3, 3]
            arrays = (
                splats.means[frame : frame + 1],
                splats.quats[frame : frame + 1],
                splats.scales,
                splats.opacities,
                splats.colors(frame, viewer=eye),
                viewmat[None].astype(np.float32),
                intrinsics(size),
            )
            tensors = (torch.from_numpy(np.ascontiguousarray(array, np.float32)) for array in arrays)
            views.append(rasterise(*tensors, size, torch.full((3,), BACKGROUND))[0][0, 0])
        drawn.append(torch.stack(views))
    return torch.stack(drawn).clamp(0, 1)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * torch.log10(((one - other) ** 2).mean()))


if __name__ == "__main__":
    main()
