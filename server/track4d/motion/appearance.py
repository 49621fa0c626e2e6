"""What light does to the texture: a gain per vertex, found on the still pictures of frame 0."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import cg

from ..geometry import zbuffer
from ..geometry.mesh import Mesh, weld

SMOOTHNESS = 0.05  # weight of a mesh edge, in pixels of a white texture
PRIOR = 3e-3  # weight of the gain that the normals explain, at each vertex
RIDGE = 1e-3  # keeps light from directions that no picture shows small
OUTLIER = 0.05  # colour difference that halves a pixel's say
PASSES = 4
LARGEST_GAIN = 4.0


def estimate_shading(mesh: Mesh, views: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray) -> np.ndarray:
    """The factor on the texture with which the mesh looks as it does in the pictures.

    Robust least squares over the pixels that lie fully on the object; the surface's edges carry the gain smoothly to where no
    picture shows the surface.

    Args:
        mesh: canonical, in the pose of the pictures.
        views: [V, H, W, 4] uint8 sRGB, straight alpha.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of the pictures.

    Returns:
        [N, 3] float32, for `geometry.zbuffer.render`.
    """
    size = views.shape[1]
    fragments = zbuffer.rasterise(mesh.vertices[None], mesh.faces, viewmats, Ks, size)
    textured = zbuffer.render(mesh, mesh.vertices[None], viewmats, Ks, size, 2)[0]  # [V, S, S, 4]
    inside = (fragments.faces >= 0) & (textured[..., 3] > 0.99) & (views[..., 3] > 250) & (views[..., :3].max(-1) < 250)
    count = len(mesh.vertices)
    if not inside.any():
        return np.ones((count, 3), np.float32)
    texture, picture = textured[inside][:, :3].astype(np.float64), views[inside][:, :3].astype(np.float64) / 255  # [P, 3]
    weights = fragments.weights[inside].astype(np.float64)
    weights = np.concatenate([1 - weights.sum(1, keepdims=True), weights], 1)
    rows = np.repeat(np.arange(len(weights)), 3)
    blend = sp.csr_matrix((weights.ravel(), (rows, mesh.faces[fragments.faces[inside]].ravel())), shape=(len(weights), count))

    normals = _normal_polynomials(mesh)  # [N, 9]
    smooth = SMOOTHNESS * _laplacian(mesh) + PRIOR * sp.identity(count)
    gain = np.full((count, 3), (picture.sum() / max(texture.sum(), 1e-6)).clip(1 / LARGEST_GAIN, LARGEST_GAIN))
    for _ in range(PASSES):
        for channel in range(3):
            design = sp.diags(texture[:, channel]) @ blend
            residual = picture[:, channel] - design @ gain[:, channel]
            trust = sp.diags((OUTLIER**2 / (OUTLIER**2 + residual**2)) ** 2 + 1e-3)
            seen = design.T @ trust @ design
            right = design.T @ (trust @ picture[:, channel])
            gain[:, channel] = _explain(seen, right, normals, smooth, gain[:, channel])
    return gain.clip(0, LARGEST_GAIN).astype(np.float32)


def _explain(seen: sp.spmatrix, right: np.ndarray, normals: np.ndarray, smooth: sp.spmatrix, start: np.ndarray) -> np.ndarray:
    """The gain [N]: light that depends on the normal, plus a smooth rest.

    Args:
        seen, right: normal equations of the pixels, [N, N] and [N].
        normals: [N, 9] polynomials of the normal.
        smooth: [N, N] penalty on the rest.
        start: [N] a gain to start from.
    """
    projected = normals.T @ (seen @ normals)
    ridge = RIDGE * np.trace(projected) / 9 * np.diag([0.0] + [1.0] * 8)
    light = normals @ np.linalg.solve(projected + ridge + 1e-9 * np.eye(9), normals.T @ right)
    matrix = (seen + smooth).tocsr()
    rest, _ = cg(matrix, right - seen @ light, x0=start - light, rtol=1e-4, maxiter=200, M=sp.diags(1 / matrix.diagonal()))
    return light + rest


def _normal_polynomials(mesh: Mesh) -> np.ndarray:
    """1, the normal, and its products: under distant light the brightness of a matt surface is a quadratic of its normal
    (Ramamoorthi and Hanrahan 2001); [N, 9]."""
    first, inverse = weld(mesh.vertices)
    x, y, z = Mesh(mesh.vertices[first], inverse[mesh.faces]).vertex_normals()[inverse].T.astype(np.float64)
    return np.stack([np.ones_like(x), x, y, z, x * y, y * z, z * x, x * x - y * y, 3 * z * z - 1], 1)


def _laplacian(mesh: Mesh) -> sp.csr_matrix:
    """Graph Laplacian of the edges and of the vertices that share a place; [N, N]."""
    first, inverse = weld(mesh.vertices)
    twins = np.stack([np.arange(len(inverse)), first[inverse]], 1)
    pairs = np.concatenate([mesh.edges(), twins[twins[:, 0] != twins[:, 1]]])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    count = len(mesh.vertices)
    adjacency = sp.csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    adjacency = adjacency + adjacency.T
    return (sp.diags(np.asarray(adjacency.sum(1)).ravel()) - adjacency).tocsr()
