"""The four orbit cameras around a snapshot, and their counterparts in Blender."""

from __future__ import annotations

import math

import bpy
import numpy as np
from mathutils import Matrix
from track4d_protocol.space import canonical_similarity, intrinsics, orbit_viewmats, viewmat_to_camera_matrix


def orbit_cameras(vertices: np.ndarray, front: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cameras that see the whole object from its front, left, back and right.

    Args:
        vertices: [N, 3] in capture space.
        front: the axis the object faces, one of `space.FRONTS`.
        size: width and height of the pictures in pixels.

    Returns:
        viewmats [V, 4, 4] float64 from capture space to the cameras, Ks [V, 3, 3] float32.
    """
    viewmats = canonical_similarity(vertices, front).viewmats_to_world(orbit_viewmats())
    return viewmats, intrinsics(size, len(viewmats))


def set_camera(camera: bpy.types.Object, viewmat: np.ndarray, K: np.ndarray, size: int, radius: float) -> None:
    """Makes a Blender camera take the picture that `viewmat` and `K` describe.

    Args:
        camera: a camera object without parent.
        viewmat: [4, 4] world-to-camera, OpenCV axes.
        K: [3, 3] in pixels, the principal point in the picture's centre.
        size: width and height in pixels.
        radius: of the object's bounding sphere, for the clipping distances.
    """
    lens = camera.data
    lens.type, lens.sensor_fit = "PERSP", "HORIZONTAL"
    lens.angle = 2 * math.atan(size / 2 / float(K[0, 0]))
    lens.clip_start, lens.clip_end = 0.01 * radius, 100 * radius
    camera.matrix_world = Matrix(viewmat_to_camera_matrix(viewmat).tolist())
