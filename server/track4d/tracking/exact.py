"""Exact tracks of a moving mesh: query points are attached to its surface and carried along, hidden ones found by a z-buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..geometry.zbuffer import Fragments, project, rasterise, scale_intrinsics
from .tracks import Tracks

SAMPLES = 2  # subpixels of the z-buffer along each axis
TOLERANCE = 0.01  # how far behind the surface a visible point may lie, in canonical units (bounding sphere of radius 1)
STEEPEST = 0.05  # change of depth within a subpixel beyond which a triangle is seen edge-on, likewise


@dataclass(frozen=True)
class MovingMesh:
    """The geometry behind a multi-view video.

    Attributes:
        vertices: [F, M, 3] canonical positions in each frame.
        faces: [T, 3] int32.
        viewmats: [V, 4, 4] world-to-camera, OpenCV axes.
        Ks: [V, 3, 3] in pixels of the video.
    """

    vertices: np.ndarray
    faces: np.ndarray
    viewmats: np.ndarray
    Ks: np.ndarray


def attach(scene: MovingMesh, view: int, frame: int, points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the surface that are seen at pixels.

    Args:
        points: [N, 2] pixels, centres at +0.5.
        size: width and height of the pictures; the larger one where they differ.

    Returns:
        [N] int32 triangles, -1 off the object, and [N, 3] float32 barycentric weights.
    """
    viewmat, K = scene.viewmats[view].astype(np.float64), scene.Ks[view].astype(np.float64)
    vertices = scene.vertices[frame]
    faces = rasterise(vertices[None], scene.faces, viewmat[None], scale_intrinsics(K[None], SAMPLES), size * SAMPLES).faces[0]
    # The triangle under a point is that of a subpixel near it: of the nine around, the first whose plane is hit inside it.
    around = np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    pixel = np.floor(points * SAMPLES).astype(int)[:, None] + around  # [N, 9, 2]
    pixel = pixel.clip(0, size * SAMPLES - 1)
    candidates = faces[pixel[..., 1], pixel[..., 0]]  # [N, 9]
    local = vertices @ viewmat[:3, :3].T + viewmat[:3, 3]
    corners = (local @ K.T)[scene.faces[candidates]]  # [N, 9, 3, 3] pixels times depth
    rays = np.concatenate([points, np.ones((len(points), 1))], 1)[:, None]  # [N, 1, 3]
    a, b, c = (corners[:, :, k] for k in range(3))
    weights = np.stack([(np.cross(b, c) * rays).sum(-1), (np.cross(c, a) * rays).sum(-1), (np.cross(a, b) * rays).sum(-1)], -1)
    total = weights.sum(-1, keepdims=True)  # the determinant of the corners: zero where the triangle is seen edge-on
    weights = np.divide(weights, total, out=np.full_like(weights, 1 / 3), where=np.abs(total) > 1e-12)
    depth = (weights * corners[..., 2]).sum(-1)
    outside = np.maximum(-weights.min(-1), 0)  # 0 inside
    outside = np.where((candidates >= 0) & (depth > 0), outside, np.inf)
    inside = outside < 1e-6
    best = np.where(inside.any(1), np.where(inside, depth, np.inf).argmin(1), outside.argmin(1))
    rows = np.arange(len(points))
    clamped = weights[rows, best].clip(0, 1)
    centre = np.floor(points * SAMPLES).astype(int).clip(0, size * SAMPLES - 1)
    found = inside.any(1) | (faces[centre[:, 1], centre[:, 0]] >= 0)
    return (np.where(found, candidates[rows, best], -1).astype(np.int32),
            (clamped / clamped.sum(1, keepdims=True)).astype(np.float32))


def surface_positions(scene: MovingMesh, triangles: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """3D tracks [F, N, 3] of places on the surface, from `attach`."""
    return np.einsum("fnkc,nk->fnc", scene.vertices[:, scene.faces[triangles]], weights)


def exact_tracks(scene: MovingMesh, queries: np.ndarray, size: int) -> Tracks:
    """Tracks of the surface under the queries; points off the object stay where they are, hidden and with confidence 0.

    Args:
        queries: [V, N, 3] float32 frame, x, y.
        size: width and height of the pictures; the larger one where they differ.
    """
    views, count, _ = queries.shape
    frames = len(scene.vertices)
    points = np.broadcast_to(queries[:, None, :, 1:], (views, frames, count, 2)).astype(np.float32)
    visibility = np.zeros((views, frames, count), bool)
    confidence = np.zeros((views, frames, count), np.float32)
    for v in range(views):
        camera, K = scene.viewmats[v:v + 1], scene.Ks[v:v + 1]
        triangles, weights = np.empty(count, np.int32), np.empty((count, 3), np.float32)
        for frame in np.unique(queries[v, :, 0]).astype(int):
            asked = queries[v, :, 0] == frame
            triangles[asked], weights[asked] = attach(scene, v, frame, queries[v, asked, 1:], size)
        on = np.nonzero(triangles >= 0)[0]
        positions = surface_positions(scene, triangles[on], weights[on])  # [F, n, 3]
        fine = scale_intrinsics(K, SAMPLES)
        for f in range(frames):
            fragments = rasterise(scene.vertices[f:f + 1], scene.faces, camera, fine, size * SAMPLES)
            corners = scene.vertices[f][scene.faces[triangles[on]]]
            visibility[v, f, on] = _unhidden(corners, positions[f], triangles[on], fragments, camera[0], fine[0])
        points[v][:, on] = project(positions, camera, K)[0][:, 0]
        confidence[v][:, on] = 1
        frame = queries[v, on, 0].astype(int)
        visibility[v, frame, on] = True
    return Tracks(points, visibility, confidence)


def _unhidden(corners: np.ndarray, positions: np.ndarray, triangles: np.ndarray, fragments: Fragments, viewmat: np.ndarray,
              K: np.ndarray) -> np.ndarray:
    """Which points of the surface nothing hides.

    The z-buffer knows the depth at pixel centres only, so it is compared with where the plane of the point's own triangle meets
    the ray through the centre: steep surfaces don't hide themselves, and their back doesn't show through.

    Args:
        corners: [N, 3, 3] of the triangles that carry the points; positions: [N, 3]; triangles: [N] their indices.

    Returns:
        [N] bool.
    """
    height, width = fragments.faces.shape[1:]
    uv, depth = (part[0, 0] for part in project(positions[None], viewmat[None], K[None]))  # [N, 2], [N]
    pixel = np.floor(uv.clip(-1, width + 1)).astype(int)
    inside = (pixel >= 0).all(1) & (pixel < (width, height)).all(1) & (depth > 0)
    column, row = pixel.clip(0, (width - 1, height - 1)).T
    local = corners @ viewmat[:3, :3].T + viewmat[:3, 3]  # [N, 3, 3]
    normals = np.cross(local[:, 1] - local[:, 0], local[:, 2] - local[:, 0])
    rays = np.stack([(pixel[:, 0] + 0.5 - K[0, 2]) / K[0, 0], (pixel[:, 1] + 0.5 - K[1, 2]) / K[1, 1], np.ones(len(pixel))], -1)
    along = (normals * rays).sum(1)
    plane = np.divide((normals * local[:, 0]).sum(1), along, out=depth.astype(np.float64), where=np.abs(along) > 1e-12)
    plane = np.where(np.abs(plane - depth) < STEEPEST, plane, depth)
    surface = fragments.inverse_depth[0, row, column]
    nothing_before = (surface > 0) & (1 / np.maximum(surface, 1e-6) > plane - TOLERANCE)
    return inside & (nothing_before | (fragments.faces[0, row, column] == triangles))
