"""Evaluation sets (Track4DGen, section 9) and how well results of them stand up: figures that need no other model.

The paper's own scores compare features of CLIP, DINO and other large networks; none of them is computed here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from track4d_protocol import space
from track4d_protocol.errors import InputError
from track4d_protocol.splat_files import read_ply, read_t4d
from track4d_protocol.splats import Splats

from .geometry.mesh import Mesh
from .geometry.moving_glb import MovingMesh, read_moving_glb

MANIFEST, MESH, GAUSSIANS = "asset.json", "mesh.glb", "gaussians.ply"
VIEWS = 8  # cameras of the pictures, half a step beside those from which an object is captured
SAME = 1e-3  # edges shorter than this share of the object's diagonal say nothing about stretch
NEIGHBOURS = 6  # of a Gaussian, which stand for the edges of a mesh
_NEEDED = {"name": str, "prompt": str, "front": str, "samples": int, "vertices": int, "gaussians": int, "sha256": dict}


@dataclass(frozen=True)
class Asset:
    """One asset of a set, as `track4d bake-lighting` writes it."""

    folder: Path
    manifest: dict[str, Any]
    mesh: MovingMesh
    splats: Splats

    @property
    def similarity(self) -> space.Similarity:
        """From the file's world into canonical space."""
        return space.canonical_similarity(self.mesh.vertices[0], self.manifest["front"])


@dataclass(frozen=True)
class Stills:
    """How alike two objects look from `VIEWS` sides.

    Attributes:
        psnr: dB, over the pixels that the first one covers by more than half, both before the same grey; None without colours.
        iou: of the two silhouettes (coverage above one half), over all views together.
    """

    psnr: float | None
    iou: float


@dataclass(frozen=True)
class Motion:
    """What a motion is like; lengths are shares of the diagonal of the first frame's bounding box.

    Attributes:
        frames: of the result.
        size: mean distance of a point from its place in the first frame, over all points and later frames.
        roughness: mean length of the second differences in time over that of the first ones: 0 of a steady motion, about
            1 / 2 of a cosine of twelve frames, 2 of a flicker. None below three frames, or where nothing moves.
        stretch: 99th percentile, over edges and frames, of how many times longer or shorter an edge is than in the first frame.
    """

    frames: int
    size: float
    roughness: float | None
    stretch: float


def asset_folders(folder: Path) -> list[Path]:
    """The assets of a set, by name.

    Raises:
        InputError: missing_folder, no_assets.
    """
    if not folder.is_dir():
        raise InputError("missing_folder", f"The folder '{folder}' isn't there.", "Check its name.")
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise InputError("no_assets", f"'{folder}' holds no assets: no folder in it has an {MANIFEST}.",
                         "Make a set with `track4d bake-lighting`.")
    return found


def read_asset(folder: Path) -> Asset:
    """Reads an asset, and checks that it is whole: its manifest, both files and their hashes, and the numbers.

    Raises:
        InputError: bad_asset, and what the readers of the files refuse.
    """
    def bad(reason: str) -> InputError:
        return InputError("bad_asset", f"'{folder.name}' is no whole asset: {reason}.",
                          "Bake it again with `track4d bake-lighting`.")

    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise bad(f"{MANIFEST} can't be read ({error})") from error
    if not isinstance(manifest, dict):
        raise bad(f"{MANIFEST} is no object")
    for name, kind in _NEEDED.items():
        if not isinstance(manifest.get(name), kind):
            raise bad(f"{MANIFEST} has no {name}")
    if manifest["front"] not in space.FRONTS:
        raise bad(f"the front '{manifest['front']}' is none of {', '.join(space.FRONTS)}")
    for name in (MESH, GAUSSIANS):
        try:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise bad(f"{name} can't be read ({error.strerror})") from error
        if digest != manifest["sha256"].get(name):
            raise bad(f"{name} is not the file that was written: its hash differs")
    asset = Asset(folder, manifest, read_moving_glb(folder / MESH), read_ply(folder / GAUSSIANS))
    if len(asset.splats.opacities) != manifest["gaussians"]:
        raise bad(f"{GAUSSIANS} has {len(asset.splats.opacities)} Gaussians, {MANIFEST} says {manifest['gaussians']}")
    points = asset.mesh.vertices.shape[1]
    if asset.mesh.colors is None:
        raise bad(f"{MESH} has no vertex colours")
    if points < manifest["vertices"]:  # glTF splits vertices, so there may be more
        raise bad(f"{MESH} has {points} vertices, {MANIFEST} says {manifest['vertices']}")
    return asset


def find_result(folder: Path, name: str) -> MovingMesh | Splats | None:
    """The result of an asset: NAME.glb, NAME.t4d, or the sequence NAME_0001.ply, ...; None where there is none.

    Raises:
        InputError: what the readers refuse, or frames of a sequence that don't belong together (`uneven_sequence`).
    """
    if (folder / f"{name}.glb").exists():
        return read_moving_glb(folder / f"{name}.glb")
    if (folder / f"{name}.t4d").exists():
        return read_t4d(folder / f"{name}.t4d")
    frames = [read_ply(path) for path in sorted(folder.glob(f"{name}_[0-9][0-9][0-9][0-9].ply"))]
    if not frames:
        return None
    if len({frame.sh.shape for frame in frames}) > 1:
        raise InputError("uneven_sequence", f"The files {name}_*.ply have different numbers of Gaussians.", "Export them again.")
    first = frames[0]
    return Splats(np.concatenate([frame.means for frame in frames]), np.concatenate([frame.quats for frame in frames]),
                  first.scales, first.opacities, first.sh)


def look(asset: Asset, thing: MovingMesh | Splats, size: int = 512) -> Stills:
    """How alike the asset's mesh, in its baked light, and the first frame of something else look.

    Args:
        size: of the pictures, in pixels.
    """
    viewmats = asset.similarity.viewmats_to_world(space.orbit_viewmats((np.arange(VIEWS) + 0.5) * 360 / VIEWS))
    Ks = space.intrinsics(size, VIEWS)
    one = _mesh_pictures(asset.mesh, viewmats, Ks, size)
    draw = _splat_pictures if isinstance(thing, Splats) else _mesh_pictures
    other = draw(thing, viewmats, Ks, size)  # type: ignore[arg-type]
    on, there = one[..., 3] > 0.5, other[..., 3] > 0.5
    error = np.square(one[on, :3] - other[on, :3], dtype=np.float64).mean()
    colored = isinstance(thing, Splats) or thing.colors is not None
    return Stills(float(-10 * np.log10(max(error, 1e-10))) if colored else None,
                  float((on & there).sum() / max(1, (on | there).sum())))


def _mesh_pictures(thing: MovingMesh, viewmats: np.ndarray, Ks: np.ndarray, size: int) -> np.ndarray:
    """[V, size, size, 4]: sRGB on the grey, and coverage."""
    from .geometry import zbuffer

    linear = np.ones_like(thing.vertices[0]) if thing.colors is None else thing.colors.clip(0, 1)
    colors = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    mesh = Mesh(thing.vertices[0], thing.faces, textures=[np.ones((1, 1, 3), np.float32)])
    rgba = zbuffer.render(mesh, thing.vertices[:1], viewmats, Ks, size, shading=colors)[0]
    return np.concatenate([zbuffer.over(rgba, space.BACKGROUND), rgba[..., 3:]], -1)


def _splat_pictures(splats: Splats, viewmats: np.ndarray, Ks: np.ndarray, size: int) -> np.ndarray:
    """[V, size, size, 4]: sRGB on the grey, and opacity."""
    import torch

    from .gaussians.rasterise import SAMPLES, rasterise

    eyes = -np.einsum("vji,vj->vi", viewmats[:, :3, :3], viewmats[:, :3, 3])
    colors = np.stack([splats.colors(0, viewer=eye) for eye in eyes])[None]  # [1, V, N, 3]
    arrays = (splats.means[:1], splats.quats[:1], splats.scales, splats.opacities, colors, viewmats, Ks)
    means, quats, scales, opacities, seen, cameras, lenses = (
        torch.as_tensor(np.ascontiguousarray(array, np.float32)) for array in arrays)
    with torch.no_grad():
        rgb, alpha = rasterise(means, quats, scales, opacities, seen, cameras, lenses, size, space.BACKGROUND, SAMPLES)
    return torch.cat([rgb[0], alpha[0, ..., None]], -1).numpy()


def measure(thing: MovingMesh | Splats) -> Motion:
    """The figures of a result's motion; those of Gaussians are of their centres, and of nearest neighbours instead of edges.

    Raises:
        InputError: still_result, when it has one frame.
    """
    points = (thing.means if isinstance(thing, Splats) else thing.vertices).astype(np.float64)  # [F, N, 3]
    if len(points) < 2:
        raise InputError("still_result", "It has one frame: nothing moves.", "Give an animated .glb, a .t4d or a sequence.")
    diagonal = float(np.linalg.norm(np.ptp(points[0], axis=0))) or 1.0
    speeds = np.linalg.norm(np.diff(points, axis=0), axis=-1).mean()
    turns = np.linalg.norm(np.diff(points, 2, axis=0), axis=-1)
    a, b = _pairs(thing).T
    lengths = np.linalg.norm(points[:, a] - points[:, b], axis=-1)  # [F, E]
    ratio = lengths[1:, lengths[0] > SAME * diagonal] / lengths[0, lengths[0] > SAME * diagonal]
    stretch = np.maximum(ratio, 1 / np.maximum(ratio, 1e-9))
    return Motion(
        frames=len(points),
        size=float(np.linalg.norm(points[1:] - points[:1], axis=-1).mean() / diagonal),
        roughness=float(turns.mean() / speeds) if len(points) > 2 and speeds > 1e-6 * diagonal else None,
        stretch=float(np.percentile(stretch, 99)) if stretch.size else 1.0,
    )


def _pairs(thing: MovingMesh | Splats) -> np.ndarray:
    """Neighbours [E, 2] whose distance should stay about the same."""
    if isinstance(thing, MovingMesh):
        return Mesh(thing.vertices[0], thing.faces).edges()
    from scipy.spatial import cKDTree

    means = thing.means[0]
    nearest = cKDTree(means).query(means, min(NEIGHBOURS + 1, len(means)))[1].reshape(len(means), -1)[:, 1:]
    return np.stack([np.repeat(np.arange(len(means)), nearest.shape[1]), nearest.ravel()], 1)
