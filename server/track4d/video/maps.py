"""What the generator sees: small pictures of the object and, for each pixel, the surface point behind it."""

from __future__ import annotations

import cv2
import numpy as np
import scipy.sparse
from numba import njit

from ..geometry import zbuffer

SAMPLES = 2  # subpixels per pixel along each axis


@njit(fastmath=True, cache=True)
def _average(faces, weights, triangles, values, samples, maps, coverage):
    views, size = maps.shape[0], maps.shape[1]
    channels = values.shape[1]
    for v in range(views):
        for y in range(size):
            for x in range(size):
                hits = 0
                for s in range(samples * samples):
                    sy, sx = y * samples + s // samples, x * samples + s % samples
                    t = faces[v, sy, sx]
                    if t < 0:
                        continue
                    hits += 1
                    w1, w2 = weights[v, sy, sx, 0], weights[v, sy, sx, 1]
                    w0 = 1 - w1 - w2
                    i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                    for c in range(channels):
                        maps[v, y, x, c] += w0 * values[i, c] + w1 * values[j, c] + w2 * values[k, c]
                if hits > 0:
                    for c in range(channels):
                        maps[v, y, x, c] /= hits
                coverage[v, y, x] = hits / (samples * samples)


def surface_maps(
    vertices: np.ndarray, faces: np.ndarray, values: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vertex values as each view's pixels see them, averaged over the covered part of a pixel.

    Args:
        vertices: [N, 3] canonical.
        faces: [T, 3].
        values: [N, C].
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of `size`.

    Returns:
        maps [V, size, size, C] float32, 0 where nothing is seen; coverage [V, size, size] in 0..1.
    """
    fragments = zbuffer.rasterise(vertices[None], faces, viewmats, zbuffer.scale_intrinsics(Ks, SAMPLES), size * SAMPLES)
    maps = np.zeros((len(viewmats), size, size, values.shape[1]), np.float32)
    coverage = np.zeros((len(viewmats), size, size), np.float32)
    _average(
        fragments.faces,
        fragments.weights,
        np.ascontiguousarray(faces, np.int32),
        np.ascontiguousarray(values, np.float32),
        SAMPLES,
        maps,
        coverage,
    )
    return maps, coverage


def surface_operator(
    vertices: np.ndarray, faces: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int
) -> scipy.sparse.csr_array:
    """`surface_maps` as a matrix: [V * size * size, N] float32, whose product with vertex values [N, C] are the maps."""
    seen = zbuffer.rasterise(vertices[None], faces, viewmats, zbuffer.scale_intrinsics(Ks, SAMPLES), size * SAMPLES)
    shape = (len(viewmats), size * SAMPLES, size * SAMPLES)
    hit = seen.faces.reshape(shape) >= 0
    v, y, x = np.nonzero(hit)
    pixels = (v * size + y // SAMPLES) * size + x // SAMPLES
    far = seen.weights.reshape(*shape, 2)[hit]
    shares = np.concatenate([1 - far.sum(1, keepdims=True), far], 1) / np.bincount(pixels)[pixels][:, None]
    corners = np.asarray(faces)[seen.faces.reshape(shape)[hit]]
    entries = (shares.ravel().astype(np.float32), (np.repeat(pixels, 3), corners.ravel()))
    return scipy.sparse.coo_array(entries, (len(viewmats) * size * size, len(vertices))).tocsr()


def condition(rgba: np.ndarray, position: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """The network's condition channels.

    Args:
        rgba: [V, H, W, 4] sRGB in 0..1, premultiplied.
        position: [V, H, W, 3] canonical rest positions.
        coverage: [V, H, W]; where it is 0 nothing is known.

    Returns:
        [V, 8, H, W] float32.
    """
    mask = (coverage > 0)[..., None].astype(np.float32)
    return np.ascontiguousarray(np.concatenate([rgba * 2 - 1, position * mask, mask], -1, dtype=np.float32).transpose(0, 3, 1, 2))


def shrink(views: np.ndarray, size: int) -> np.ndarray:
    """Straight-alpha pictures [V, H, W, 4] uint8 to premultiplied float32 [V, size, size, 4], area-averaged."""
    rgba = views.astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return np.stack([cv2.resize(view, (size, size), interpolation=cv2.INTER_AREA) for view in rgba])
