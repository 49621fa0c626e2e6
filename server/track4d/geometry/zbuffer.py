"""Pictures of a mesh on the CPU: a z-buffer rasteriser with perspective-correct interpolation.

It gives the generator its inputs and its decoded video, the registration its renders and visibility, the training its data,
and the benchmarks their ground truth. Not differentiable; one thread per picture.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ..parallel import KERNEL_LOCK
from .mesh import Mesh

NEAR = 1e-3


class Fragments(NamedTuple):
    """What is seen through each pixel centre; pictures in the order frame, view: B = F * V.

    Attributes:
        faces: [B, H, W] int32 triangle index, -1 where there is none.
        weights: [B, H, W, 2] float32 perspective-correct weights of the triangle's corners 1 and 2 (corner 0 has the rest).
        inverse_depth: [B, H, W] float32, 0 where there is nothing.
    """

    faces: np.ndarray
    weights: np.ndarray
    inverse_depth: np.ndarray


@njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _fill(vertices, triangles, viewmats, Ks, faces, weights, inverse_depth):
    views, count = viewmats.shape[0], vertices.shape[1]
    height, width = faces.shape[1], faces.shape[2]
    for b in prange(faces.shape[0]):
        f, v = b // views, b % views
        M, K = viewmats[v], Ks[v]
        screen = np.empty((count, 3), np.float32)  # x, y in pixels and 1 / depth; 0 behind the camera
        for i in range(count):
            x, y, z = vertices[f, i, 0], vertices[f, i, 1], vertices[f, i, 2]
            depth = M[2, 0] * x + M[2, 1] * y + M[2, 2] * z + M[2, 3]
            if depth < NEAR:
                screen[i, 2] = 0
                continue
            inverse = 1 / depth
            screen[i, 0] = K[0, 0] * (M[0, 0] * x + M[0, 1] * y + M[0, 2] * z + M[0, 3]) * inverse + K[0, 2]
            screen[i, 1] = K[1, 1] * (M[1, 0] * x + M[1, 1] * y + M[1, 2] * z + M[1, 3]) * inverse + K[1, 2]
            screen[i, 2] = inverse
        for y in range(height):
            for x in range(width):
                inverse_depth[b, y, x] = 0
                faces[b, y, x] = -1
                weights[b, y, x, 0] = 0
                weights[b, y, x, 1] = 0
        for t in range(triangles.shape[0]):
            i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            zi, zj, zk = screen[i, 2], screen[j, 2], screen[k, 2]
            if zi == 0 or zj == 0 or zk == 0:
                continue
            ax, ay = screen[i, 0], screen[i, 1]
            bx, by = screen[j, 0] - ax, screen[j, 1] - ay
            cx, cy = screen[k, 0] - ax, screen[k, 1] - ay
            doubled_area = bx * cy - by * cx
            if abs(doubled_area) < 1e-9:
                continue
            scale = 1 / doubled_area
            x0 = max(0, int(math.ceil(min(ax, screen[j, 0], screen[k, 0]) - 0.5)))
            x1 = min(width - 1, int(math.floor(max(ax, screen[j, 0], screen[k, 0]) - 0.5)))
            y0 = max(0, int(math.ceil(min(ay, screen[j, 1], screen[k, 1]) - 0.5)))
            y1 = min(height - 1, int(math.floor(max(ay, screen[j, 1], screen[k, 1]) - 0.5)))
            for y in range(y0, y1 + 1):
                py = y + np.float32(0.5) - ay
                for x in range(x0, x1 + 1):
                    px = x + np.float32(0.5) - ax
                    u = (px * cy - py * cx) * scale
                    w = (py * bx - px * by) * scale
                    rest = 1 - u - w
                    if u < 0 or w < 0 or rest < 0:
                        continue
                    z = rest * zi + u * zj + w * zk  # 1 / depth is linear on the screen
                    if z > inverse_depth[b, y, x]:
                        inverse_depth[b, y, x] = z
                        faces[b, y, x] = t
                        weights[b, y, x, 0] = u * zj / z
                        weights[b, y, x, 1] = w * zk / z


def rasterise(vertices: np.ndarray, triangles: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int) -> Fragments:
    """What each pixel sees.

    Args:
        vertices: [F, N, 3].
        triangles: [T, 3] int32; both sides are drawn.
        viewmats: [V, 4, 4] world-to-camera, OpenCV axes.
        Ks: [V, 3, 3] in pixels of a picture of this size.
        size: width and height in pixels.
    """
    vertices = np.ascontiguousarray(vertices, np.float32)  # [F, N, 3]
    assert vertices.ndim == 3, vertices.shape
    pictures = len(vertices) * len(viewmats)
    fragments = Fragments(np.empty((pictures, size, size), np.int32), np.empty((pictures, size, size, 2), np.float32),
                          np.empty((pictures, size, size), np.float32))
    with KERNEL_LOCK:
        _fill(vertices, np.ascontiguousarray(triangles, np.int32), np.ascontiguousarray(viewmats, np.float32),
              np.ascontiguousarray(Ks, np.float32), *fragments)
    return fragments


@njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _shade(faces, weights, triangles, uvs, materials, texels, starts, sizes, shading, samples, out):
    size = out.shape[1]
    share = np.float32(1) / (samples * samples)
    for b in prange(faces.shape[0]):
        for y in range(size):
            for x in range(size):
                red, green, blue, alpha = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for s in range(samples * samples):
                    sy, sx = y * samples + s // samples, x * samples + s % samples
                    t = faces[b, sy, sx]
                    if t < 0:
                        continue
                    w1, w2 = weights[b, sy, sx, 0], weights[b, sy, sx, 1]
                    w0 = 1 - w1 - w2
                    u = w0 * uvs[t, 0, 0] + w1 * uvs[t, 1, 0] + w2 * uvs[t, 2, 0]
                    v = w0 * uvs[t, 0, 1] + w1 * uvs[t, 1, 1] + w2 * uvs[t, 2, 1]
                    m = materials[t]
                    height, width = sizes[m, 0], sizes[m, 1]
                    column = min(int((u - math.floor(u)) * width), width - 1)
                    row = min(int((1 - (v - math.floor(v))) * height), height - 1)
                    texel = starts[m] + row * width + column
                    i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                    red += texels[texel, 0] * (w0 * shading[i, 0] + w1 * shading[j, 0] + w2 * shading[k, 0])
                    green += texels[texel, 1] * (w0 * shading[i, 1] + w1 * shading[j, 1] + w2 * shading[k, 1])
                    blue += texels[texel, 2] * (w0 * shading[i, 2] + w1 * shading[j, 2] + w2 * shading[k, 2])
                    alpha += 1
                out[b, y, x, 0] = min(red * share, np.float32(1))
                out[b, y, x, 1] = min(green * share, np.float32(1))
                out[b, y, x, 2] = min(blue * share, np.float32(1))
                out[b, y, x, 3] = alpha * share


def scale_intrinsics(Ks: np.ndarray, factor: float) -> np.ndarray:
    """Pinhole matrices of the same cameras at `factor` times the resolution; [V, 3, 3]."""
    return np.asarray(Ks, np.float32) * np.array([factor, factor, 1], np.float32)[:, None]


def render(mesh: Mesh, vertices: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int, samples: int = 2,
           shading: np.ndarray | None = None) -> np.ndarray:
    """Textured pictures of a moving mesh.

    Args:
        mesh: gives triangles, uvs and textures.
        vertices: [F, N, 3] its positions.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of `size`.
        size: width and height in pixels.
        samples: subpixels per pixel along each axis.
        shading: [N] or [N, 3] factor per vertex on the texture's sRGB values; None for 1.

    Returns:
        [F, V, size, size, 4] float32 sRGB premultiplied by alpha.
    """
    vertices = np.ascontiguousarray(vertices, np.float32)
    shading = np.ones((len(mesh.vertices), 3), np.float32) if shading is None else np.asarray(shading, np.float32)
    shading = np.ascontiguousarray(np.broadcast_to(shading.reshape(len(shading), -1), (len(shading), 3)))
    texels = np.concatenate([t.reshape(-1, 3) for t in mesh.textures]).astype(np.float32)
    sizes = np.array([t.shape[:2] for t in mesh.textures], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes.prod(1))[:-1]]).astype(np.int64)
    views = len(viewmats)
    out = np.empty((len(vertices) * views, size, size, 4), np.float32)
    for f in range(len(vertices)):  # one frame at a time: the fragments of all frames would take gigabytes
        fragments = rasterise(vertices[f:f + 1], mesh.faces, viewmats, scale_intrinsics(Ks, samples), size * samples)
        with KERNEL_LOCK:
            _shade(fragments.faces, fragments.weights, mesh.faces, mesh.uvs, mesh.materials, texels, starts, sizes, shading,
                   samples, out[f * views:(f + 1) * views])
    return out.reshape(len(vertices), views, size, size, 4)


def straight(rgba: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA [..., 4] with the colours divided by alpha, as pictures are stored."""
    return np.concatenate([rgba[..., :3] / np.maximum(rgba[..., 3:], 1e-6), rgba[..., 3:]], -1)


@njit(fastmath=True, cache=True, nogil=True, error_model="numpy")
def _over(rgba, background, out):
    for p in range(rgba.shape[0]):
        behind = (1 - rgba[p, 3]) * background
        for c in range(3):
            out[p, c] = rgba[p, c] + behind


def over(rgba: np.ndarray, background: float) -> np.ndarray:
    """Premultiplied RGBA [..., 4] on a plain grey; [..., 3] float32."""
    out = np.empty((*rgba.shape[:-1], 3), np.float32)
    _over(np.ascontiguousarray(rgba, np.float32).reshape(-1, 4), np.float32(background), out.reshape(-1, 3))
    return out


def interpolate(fragments: Fragments, triangles: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Vertex values [N, C] at every pixel; [B, H, W, C], zeros where nothing is seen."""
    corners = values[triangles[np.maximum(fragments.faces, 0)]]  # [B, H, W, 3, C]
    w = fragments.weights
    weights = np.stack([1 - w.sum(-1), w[..., 0], w[..., 1]], -1) * (fragments.faces >= 0)[..., None]
    return (corners * weights[..., None].astype(np.float32)).sum(-2)


def project(points: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [F, N, 3] to pixel positions [F, V, N, 2] and depths [F, V, N], float32."""
    viewmats, Ks = np.asarray(viewmats, np.float32), np.asarray(Ks, np.float32)
    local = np.einsum("vij,fnj->fvni", viewmats[:, :3, :3], np.asarray(points, np.float32)) + viewmats[:, None, :3, 3]
    depth = np.maximum(local[..., 2], np.float32(NEAR))
    uv = np.stack([Ks[:, None, 0, 0] * local[..., 0] / depth + Ks[:, None, 0, 2],
                   Ks[:, None, 1, 1] * local[..., 1] / depth + Ks[:, None, 1, 2]], -1)
    return uv, local[..., 2]


def visible(points: np.ndarray, inverse_depth: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray,
            tolerance: float = 0.02) -> np.ndarray:
    """Which points no surface hides.

    Args:
        points: [F, N, 3].
        inverse_depth: [F * V, H, W] of the surface, from `rasterise` with these cameras.
        tolerance: how far behind the surface a point may lie, in world units.

    Returns:
        [F, V, N] bool.
    """
    uv, depth = project(points, viewmats, Ks)
    frames, views, _ = depth.shape
    height, width = inverse_depth.shape[1:]
    pixel = np.floor(uv).astype(np.int64)
    inside = (pixel >= 0).all(-1) & (pixel[..., 0] < width) & (pixel[..., 1] < height) & (depth > NEAR)
    column, row = pixel[..., 0].clip(0, width - 1), pixel[..., 1].clip(0, height - 1)
    surface = inverse_depth.reshape(frames, views, height, width)[
        np.arange(frames)[:, None, None], np.arange(views)[None, :, None], row, column]
    return inside & (surface > 0) & (1 / np.maximum(surface, 1e-6) > depth - tolerance)
