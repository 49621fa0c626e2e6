"""What the video model's features say about each point of the surface: the second half of Eq. 6 of Track4DGen.

Points are projected into the feature planes of all views, hidden projections are discarded, the rest is averaged. What remains
is centred per frame, so that it tells points apart and not frames, and reduced to a few numbers that the field's heads can use.
"""

from __future__ import annotations

import numpy as np
import torch
import trimesh
from torch import Tensor
from torch.nn import functional
from track4d_protocol.errors import InputError
from trimesh.ray import ray_pyembree

from ..geometry import zbuffer
from .losses import project

WIDTH = 16  # features that are kept, as many as a hex-plane has
HIDDEN = 0.02  # a point this far behind the surface is hidden, canonical units


def visible_by_rays(vertices: np.ndarray, faces: np.ndarray, points: np.ndarray, viewmats: np.ndarray,
                    tolerance: float = HIDDEN) -> np.ndarray:
    """Which points no surface hides, by a ray from each camera to each point (Embree's bounding volume hierarchy).

    Args:
        vertices: [F, N, 3]; faces: [T, 3].
        points: [F, P, 3].
        viewmats: [V, 4, 4]; pictures without borders.
        tolerance: how far behind the surface a point may lie, in world units.

    Returns:
        [F, V, P] bool.
    """
    viewmats = np.asarray(viewmats, np.float64)
    cameras = -np.einsum("vji,vj->vi", viewmats[:, :3, :3], viewmats[:, :3, 3])  # [V, 3]
    out = np.empty((len(points), len(cameras), points.shape[1]), bool)
    for f, posed in enumerate(vertices):
        caster = ray_pyembree.RayMeshIntersector(trimesh.Trimesh(posed, faces, process=False))
        towards = points[f][None] - cameras[:, None]  # [V, P, 3]
        distance = np.linalg.norm(towards, axis=-1)  # [V, P]
        rays = (towards / distance[..., None]).reshape(-1, 3)
        starts = np.repeat(cameras, points.shape[1], 0)
        triangle = caster.intersects_first(starts, rays)  # [V P], -1 for none
        corner = posed[faces[np.maximum(triangle, 0)]].astype(np.float64)  # [V P, 3, 3]
        normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        slope = (rays * normal).sum(1)
        hit = ((corner[:, 0] - starts) * normal).sum(1) / np.where(slope == 0, 1e-12, slope)
        out[f] = ((triangle < 0) | (hit > distance.ravel() - tolerance)).reshape(len(cameras), -1)
    return out


def visible_by_depth(vertices: np.ndarray, faces: np.ndarray, points: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int,
                     tolerance: float = HIDDEN) -> np.ndarray:
    """The same from depth pictures of `size` pixels; points outside of the picture are not visible."""
    inverse_depth = zbuffer.rasterise(vertices, faces, viewmats, Ks, size).inverse_depth
    return zbuffer.visible(points, inverse_depth, viewmats, Ks, tolerance)


def reduced_planes(planes: Tensor, width: int = WIDTH) -> Tensor:
    """Feature planes [V, F, C, h, w] in their directions of largest variance within frames; [V, F, width, h, w].

    Every frame is centred first. Directions are scaled by the largest one's deviation, so that they keep their proportions.
    """
    views, frames, channels = planes.shape[:3]
    planes = planes.float()
    centred = planes - planes.mean((0, 3, 4), keepdim=True)  # [V, F, C, h, w]
    rows = centred.permute(0, 1, 3, 4, 2).reshape(-1, channels)  # [V F h w, C]
    variance, directions = torch.linalg.eigh((rows.T @ rows / len(rows)).double())  # ascending
    kept = min(width, channels)
    basis = directions[:, -kept:].flip(1) / variance[-1].clamp(min=1e-12).sqrt()  # [C, kept]
    sign = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # an eigenvector's sign is arbitrary: make it definite
    reduced = (rows @ (basis * sign).float()).reshape(views, frames, *planes.shape[3:], kept).permute(0, 1, 4, 2, 3)
    return functional.pad(reduced, (0, 0, 0, 0, 0, width - kept))


def hybrid_features(planes: Tensor, points: Tensor, visible: Tensor, viewmats: Tensor, Ks: Tensor, size: int,
                    moments: Tensor | None = None) -> Tensor:
    """Diffusion features of surface points: bilinear in space and in time, the mean of the views that see the point.

    Args:
        planes: [V, F, C, h, w], as they are or from `reduced_planes`; they cover the whole pictures.
        points: [T, P, 3] where the points are at the moments.
        visible: [T, V, P] bool.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of a picture of `size`.
        moments: [T] in frames, 0..F-1, whole or not; the frames where not given.

    Returns:
        [T, P, C], with mean 0 over the points that are seen in a moment; 0 where no view sees the point.

    Raises:
        InputError: planes that don't fit the cameras or the frames.
    """
    views, frames = planes.shape[:2]
    if moments is None:
        moments = torch.arange(len(points), dtype=torch.float32, device=points.device)
    if planes.ndim != 5 or len(viewmats) != views or float(moments.max()) > frames - 1:
        raise InputError("bad_features", f"The features are {list(planes.shape)} for {len(viewmats)} cameras and "
                         f"{len(points)} moments.", "Give features [views, frames, channels, height, width] of this video.")
    uv = project(points, viewmats, Ks)[0]  # [T, V, P, 2]
    places = (uv / size * 2 - 1)[:, :, None]  # [T, V, 1, P, 2]
    before = moments.floor().long().clamp(0, frames - 1)
    after = (before + 1).clamp(max=frames - 1)
    out = points.new_zeros(len(points), points.shape[1], planes.shape[2])
    for t in range(len(points)):  # one moment at a time: full-width features of all frames would take gigabytes
        share = moments[t] - before[t]
        at = torch.lerp(planes[:, before[t]].float(), planes[:, after[t]].float(), share)  # [V, C, h, w]
        found = functional.grid_sample(at, places[t], padding_mode="border", align_corners=False)[:, :, 0]  # [V, C, P]
        seen = (visible[t] & (places[t, :, 0].abs() <= 1).all(-1)).to(found)  # [V, P]
        some = seen.sum(0) > 0  # [P]
        mean = (found * seen[:, None]).sum(0) / seen.sum(0).clamp(min=1)  # [C, P]
        if some.any():
            mean = (mean - mean[:, some].mean(1, keepdim=True)) * some
        out[t] = mean.T
    return out
