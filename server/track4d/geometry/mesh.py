"""The textured triangle mesh that everything on the server works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from track4d_protocol.errors import InputError


@dataclass(init=False)
class Mesh:
    """A textured triangle mesh.

    Attributes:
        vertices: [N, 3] float32, in canonical space unless said otherwise.
        faces: [T, 3] int32 vertex indices.
        uvs: [T, 3, 2] float32 per corner, origin at the lower left (glTF's and OBJ's v up); zeros where there are none.
        materials: [T] int32, index into `textures`.
        textures: one [h, w, 3] float32 sRGB picture in 0..1 per material, top row first; [1, 1, 3] for a plain colour.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    materials: np.ndarray
    textures: list[np.ndarray]

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray | None = None,
                 materials: np.ndarray | None = None, textures: list[np.ndarray] | None = None) -> None:
        self.vertices = np.ascontiguousarray(vertices, np.float32)
        self.faces = np.ascontiguousarray(faces, np.int32).reshape(-1, 3)
        count = len(self.faces)
        self.uvs = np.ascontiguousarray(np.zeros((count, 3, 2)) if uvs is None else uvs, np.float32)
        self.materials = np.ascontiguousarray(np.zeros(count) if materials is None else materials, np.int32)
        self.textures = textures or [np.full((1, 1, 3), 0.8, np.float32)]

    @cached_property
    def texels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All textures in one array [X, 3] float32, row by row, where each begins in it [M], and its height and width [M, 2]."""
        sizes = np.array([texture.shape[:2] for texture in self.textures], np.int64)
        texels = np.concatenate([texture.reshape(-1, 3) for texture in self.textures]).astype(np.float32, copy=False)
        return texels, np.concatenate([[0], np.cumsum(sizes.prod(1))[:-1]]).astype(np.int64), sizes

    def edges(self) -> np.ndarray:
        """Unique undirected edges; [E, 2] int64."""
        corners = self.faces.astype(np.int64)
        pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
        low, high = np.sort(pairs, 1).T
        keys = np.unique(low * len(self.vertices) + high)  # one number per edge: sorting rows takes ten times as long
        return np.stack([keys // len(self.vertices), keys % len(self.vertices)], 1)

    def vertex_normals(self, vertices: np.ndarray | None = None) -> np.ndarray:
        """Area-weighted unit normals; [N, 3] float32."""
        vertices = self.vertices if vertices is None else vertices
        a, b, c = (vertices[self.faces[:, k]] for k in range(3))
        face_normals = np.cross(b - a, c - a)
        normals = np.zeros_like(vertices)
        for k in range(3):
            np.add.at(normals, self.faces[:, k], face_normals)
        return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)

    def corner_colors(self, uvs: np.ndarray, faces: np.ndarray) -> np.ndarray:
        """Texture colours at `uvs` [M, 2] on triangles `faces` [M]; nearest texel, repeating; [M, 3] float32 sRGB."""
        colors = np.empty((len(uvs), 3), np.float32)
        for k, texture in enumerate(self.textures):
            on = np.nonzero(self.materials[faces] == k)[0]
            height, width = texture.shape[:2]
            uv = uvs[on] - np.floor(uvs[on])
            column = np.minimum((uv[:, 0] * width).astype(np.int64), width - 1)
            row = np.minimum(((1 - uv[:, 1]) * height).astype(np.int64), height - 1)
            colors[on] = texture[row, column]
        return colors


def check_mesh(vertices: np.ndarray, faces: np.ndarray) -> None:
    """Refuses what can't be animated.

    Raises:
        InputError: no triangles, indices out of range, coordinates that are not finite, or no surface area.
    """
    if len(vertices) == 0 or len(faces) == 0:
        raise InputError("empty_mesh", f"The mesh has {len(vertices)} vertices and {len(faces)} triangles.",
                         "Choose an object with a surface.")
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices).all(1)).sum())
        raise InputError("not_finite", f"{bad} vertices have coordinates that are not finite.",
                         "Delete them, or undo the modifier that made them.")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError("bad_indices", f"A triangle refers to vertex {int(faces.max())} of {len(vertices)}.",
                         "The mesh data is damaged: use Mesh > Clean Up, or export and import it again.")
    a, b, c = (np.asarray(vertices, np.float64)[faces[:, k]] for k in range(3))
    area = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1).sum()
    extent = float(np.ptp(vertices, axis=0).max())
    if extent == 0 or area < 1e-10 * extent**2:
        raise InputError("degenerate_mesh", "The mesh has no surface area.", "Choose an object with a surface.")


def weld(vertices: np.ndarray, tolerance: float = 2e-5) -> tuple[np.ndarray, np.ndarray]:
    """Joins vertices that share a place (split by UV seams or hard edges).

    Args:
        vertices: [N, 3], canonical.
        tolerance: grid size in the units of `vertices`.

    Returns:
        first: [M] index of one vertex per place; inverse: [N] the place of each vertex, so that
        `vertices[first][inverse]` is `vertices` within the tolerance.
    """
    keys = np.round(np.asarray(vertices, np.float64) / tolerance).astype(np.int64)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)
