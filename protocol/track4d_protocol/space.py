"""Canonical space and the orbit cameras around it.

Canonical space: the centre of the bounding box at the origin, bounding sphere radius 1, +Z up, front on +X. Cameras are
`viewmats` [V, 4, 4] world-to-camera in OpenCV axes (x right, y down, z forward) and `Ks` [V, 3, 3] in pixels, pixel centres
at +0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import InputError

AZIMUTHS = (0.0, 90.0, 180.0, 270.0)  # degrees; azimuth 0 looks at the front
ELEVATION = 15.0  # degrees
FIELD_OF_VIEW = 40.0  # degrees, the whole angle
DISTANCE = 3.0  # in bounding sphere radii
BACKGROUND = 0.498  # grey, sRGB

# Rotation about Z, in degrees, that turns an object's front onto +X.
FRONTS = {"+X": 0.0, "-Y": 90.0, "-X": 180.0, "+Y": -90.0}


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ (x - centre), from the user's world into canonical space.

    Attributes:
        rotation: [3, 3] float64, proper rotation.
        centre: [3] float64, in world units.
        scale: 1 / bounding sphere radius.
    """

    rotation: np.ndarray
    centre: np.ndarray
    scale: float

    def apply(self, points: np.ndarray) -> np.ndarray:
        """World points [..., 3] to canonical float32 [..., 3]."""
        return ((np.asarray(points, np.float64) - self.centre) @ self.rotation.T * self.scale).astype(np.float32)

    def invert(self, points: np.ndarray) -> np.ndarray:
        """Canonical points [..., 3] to world float32 [..., 3]."""
        return (np.asarray(points, np.float64) / self.scale @ self.rotation + self.centre).astype(np.float32)

    def viewmats_to_world(self, viewmats: np.ndarray) -> np.ndarray:
        """Canonical world-to-camera matrices [V, 4, 4] to those that give the same pictures of the user's world."""
        world = np.tile(np.eye(4), (len(viewmats), 1, 1))
        world[:, :3, :3] = viewmats[:, :3, :3] @ self.rotation
        world[:, :3, 3] = viewmats[:, :3, 3] / self.scale - world[:, :3, :3] @ self.centre
        return world

    def viewmats_to_canonical(self, viewmats: np.ndarray) -> np.ndarray:
        """The inverse of `viewmats_to_world`; float32 [V, 4, 4]."""
        canonical = np.tile(np.eye(4), (len(viewmats), 1, 1))
        canonical[:, :3, :3] = viewmats[:, :3, :3] @ self.rotation.T
        canonical[:, :3, 3] = (viewmats[:, :3, 3] + viewmats[:, :3, :3] @ self.centre) * self.scale
        return canonical.astype(np.float32)


def canonical_similarity(vertices: np.ndarray, front: str = "-Y") -> Similarity:
    """The transform that takes world vertices [N, 3] into canonical space.

    Args:
        vertices: [N, 3], world units.
        front: the world axis the object faces, one of `FRONTS`.

    Raises:
        InputError: no vertices, a coordinate that is not finite, all vertices in one place, or an unknown front axis.
    """
    vertices = np.asarray(vertices, np.float64)
    if front not in FRONTS:
        raise InputError("bad_front", f"The front axis '{front}' is not known.", f"Use one of {', '.join(FRONTS)}.")
    if len(vertices) == 0:
        raise InputError("empty_mesh", "The mesh has no vertices.", "Choose an object with a surface.")
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices).all(1)).sum())
        raise InputError("not_finite", f"{bad} vertices have coordinates that are not finite.",
                         "Delete them, or undo the modifier that made them.")
    centre = (vertices.min(0) + vertices.max(0)) / 2
    radius = float(np.linalg.norm(vertices - centre, axis=1).max())
    if radius < 1e-9:
        raise InputError("degenerate_mesh", "All vertices of the mesh lie in one point.", "Choose an object with a surface.")
    angle = math.radians(FRONTS[front])
    c, s = math.cos(angle), math.sin(angle)
    return Similarity(np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]), centre, 1.0 / radius)


def orbit_viewmats(azimuths=AZIMUTHS, elevation: float = ELEVATION, distance: float = DISTANCE) -> np.ndarray:
    """World-to-camera matrices of cameras on an orbit, looking at the origin; float32 [V, 4, 4].

    Args:
        azimuths: degrees; 0 stands on +X, 90 on +Y.
        elevation: degrees above the horizon, one number or one per view.
        distance: from the origin, one number or one per view.
    """
    azimuths = np.atleast_1d(np.asarray(azimuths, np.float64))
    elevations = np.broadcast_to(np.asarray(elevation, np.float64), azimuths.shape)
    distances = np.broadcast_to(np.asarray(distance, np.float64), azimuths.shape)
    viewmats = np.tile(np.eye(4), (len(azimuths), 1, 1))
    for v, (azimuth, tilt, far) in enumerate(zip(np.radians(azimuths), np.radians(elevations), distances)):
        outward = np.array([math.cos(tilt) * math.cos(azimuth), math.cos(tilt) * math.sin(azimuth), math.sin(tilt)])
        right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
        down = -np.cross(outward, right)
        viewmats[v, :3, :3] = np.stack([right, down, -outward])
        viewmats[v, 2, 3] = far
    return viewmats.astype(np.float32)


def intrinsics(size: int, views: int = 1, field_of_view: float = FIELD_OF_VIEW) -> np.ndarray:
    """Pinhole matrices of square pictures; float32 [V, 3, 3], in pixels.

    Args:
        size: width and height in pixels.
        field_of_view: the whole angle in degrees.
    """
    focal = 0.5 * size / math.tan(math.radians(field_of_view) / 2)
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32)
    return np.tile(K, (views, 1, 1))


_OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def viewmat_to_camera_matrix(viewmat: np.ndarray) -> np.ndarray:
    """World-to-camera in OpenCV axes [..., 4, 4] to Blender's camera `matrix_world` (OpenGL axes)."""
    return np.linalg.inv(np.asarray(viewmat, np.float64)) @ _OPENCV_TO_OPENGL
