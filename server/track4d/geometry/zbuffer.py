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


@njit(fastmath=True, cache=True, nogil=True, error_model="numpy")
def _on_screen(vertices, M, K):
    """Where vertices [N, 3] are in a picture: x, y in pixels and 1 / depth, which is 0 behind the camera; [N, 3]."""
    screen = np.empty((vertices.shape[0], 3), np.float32)
    for i in range(vertices.shape[0]):
        x, y, z = vertices[i, 0], vertices[i, 1], vertices[i, 2]
        depth = M[2, 0] * x + M[2, 1] * y + M[2, 2] * z + M[2, 3]
        if depth < NEAR:
            screen[i, 2] = 0
            continue
        inverse = 1 / depth
        screen[i, 0] = K[0, 0] * (M[0, 0] * x + M[0, 1] * y + M[0, 2] * z + M[0, 3]) * inverse + K[0, 2]
        screen[i, 1] = K[1, 1] * (M[1, 0] * x + M[1, 1] * y + M[1, 2] * z + M[1, 3]) * inverse + K[1, 2]
        screen[i, 2] = inverse
    return screen


@njit(fastmath=True, cache=True, nogil=True, error_model="numpy")
def _within(at_zero, slope, first, last):
    """The columns first..last where at_zero + slope * column may be positive, with one to spare on each side."""
    if slope > 0:
        first = max(first, int(max(-at_zero / slope, np.float32(first))) - 1)
    elif slope < 0:
        last = min(last, int(min(max(-at_zero / slope, np.float32(-1)), np.float32(last))) + 1)
    return first, last


@njit(fastmath=True, cache=True, nogil=True, error_model="numpy")
def _fill(screen, triangles, left, top, faces, weights, inverse_depth):
    """Draws triangles into the window of a picture that begins at column `left` and row `top`; see `Fragments`."""
    height, width = faces.shape
    for y in range(height):
        for x in range(width):
            inverse_depth[y, x] = 0
            faces[y, x] = -1
            weights[y, x, 0] = 0
            weights[y, x, 1] = 0
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
        x0 = max(left, int(math.ceil(min(ax, screen[j, 0], screen[k, 0]) - 0.5)))
        x1 = min(left + width - 1, int(math.floor(max(ax, screen[j, 0], screen[k, 0]) - 0.5)))
        y0 = max(top, int(math.ceil(min(ay, screen[j, 1], screen[k, 1]) - 0.5)))
        y1 = min(top + height - 1, int(math.floor(max(ay, screen[j, 1], screen[k, 1]) - 0.5)))
        for y in range(y0, y1 + 1):
            py = y + np.float32(0.5) - ay
            first, last = x0, x1
            if x1 - x0 > 4:  # in wide triangles: the columns that a row can have, from where the three weights change sign
                mid = np.float32(0.5) - ax
                u0, w0 = (mid * cy - py * cx) * scale, (py * bx - mid * by) * scale
                du, dw = cy * scale, -by * scale
                first, last = _within(u0, du, first, last)
                first, last = _within(w0, dw, first, last)
                first, last = _within(1 - u0 - w0, -du - dw, first, last)
            for x in range(first, last + 1):
                px = x + np.float32(0.5) - ax
                u = (px * cy - py * cx) * scale
                w = (py * bx - px * by) * scale
                rest = 1 - u - w
                if u < 0 or w < 0 or rest < 0:
                    continue
                z = rest * zi + u * zj + w * zk  # 1 / depth is linear on the screen
                if z > inverse_depth[y - top, x - left]:
                    inverse_depth[y - top, x - left] = z
                    faces[y - top, x - left] = t
                    weights[y - top, x - left, 0] = u * zj / z
                    weights[y - top, x - left, 1] = w * zk / z


@njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _fill_all(vertices, triangles, viewmats, Ks, faces, weights, inverse_depth):
    views = viewmats.shape[0]
    for b in prange(faces.shape[0]):
        screen = _on_screen(vertices[b // views], viewmats[b % views], Ks[b % views])
        _fill(screen, triangles, 0, 0, faces[b], weights[b], inverse_depth[b])


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
        _fill_all(vertices, np.ascontiguousarray(triangles, np.int32), np.ascontiguousarray(viewmats, np.float32),
                  np.ascontiguousarray(Ks, np.float32), *fragments)
    return fragments


@njit(fastmath=True, cache=True, nogil=True, error_model="numpy")
def _draw(vertices, triangles, M, K, uvs, materials, texels, starts, sizes, shading, samples, out, depth):
    """Draws one picture into zeros; only the window that holds the object is looked at."""
    size = out.shape[0]
    screen = _on_screen(vertices, M, K)
    low, high = np.full(2, size * samples, np.float32), np.full(2, -1, np.float32)
    for i in range(screen.shape[0]):
        if screen[i, 2] > 0:
            for a in range(2):
                low[a], high[a] = min(low[a], screen[i, a]), max(high[a], screen[i, a])
    left, top = max(0, int(low[0]) // samples), max(0, int(low[1]) // samples)
    right, bottom = min(size, int(high[0]) // samples + 1), min(size, int(high[1]) // samples + 1)
    if right <= left or bottom <= top:
        return
    height, width = (bottom - top) * samples, (right - left) * samples
    faces, weights = np.empty((height, width), np.int32), np.empty((height, width, 2), np.float32)
    inverse_depth = np.empty((height, width), np.float32)
    _fill(screen, triangles, left * samples, top * samples, faces, weights, inverse_depth)
    share = np.float32(1) / (samples * samples)
    for y in range(top, bottom):
        for x in range(left, right):
            red, green, blue, alpha, nearest = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for s in range(samples * samples):
                sy, sx = (y - top) * samples + s // samples, (x - left) * samples + s % samples
                t = faces[sy, sx]
                if t < 0:
                    continue
                w1, w2 = weights[sy, sx, 0], weights[sy, sx, 1]
                w0 = 1 - w1 - w2
                u = w0 * uvs[t, 0, 0] + w1 * uvs[t, 1, 0] + w2 * uvs[t, 2, 0]
                v = w0 * uvs[t, 0, 1] + w1 * uvs[t, 1, 1] + w2 * uvs[t, 2, 1]
                m = materials[t]
                rows, columns = sizes[m, 0], sizes[m, 1]
                column = min(int((u - math.floor(u)) * columns), columns - 1)
                row = min(int((1 - (v - math.floor(v))) * rows), rows - 1)
                texel = starts[m] + row * columns + column
                i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                red += texels[texel, 0] * (w0 * shading[i, 0] + w1 * shading[j, 0] + w2 * shading[k, 0])
                green += texels[texel, 1] * (w0 * shading[i, 1] + w1 * shading[j, 1] + w2 * shading[k, 1])
                blue += texels[texel, 2] * (w0 * shading[i, 2] + w1 * shading[j, 2] + w2 * shading[k, 2])
                alpha += 1
                nearest = max(nearest, inverse_depth[sy, sx])
            out[y, x, 0] = min(red * share, np.float32(1))
            out[y, x, 1] = min(green * share, np.float32(1))
            out[y, x, 2] = min(blue * share, np.float32(1))
            out[y, x, 3] = alpha * share
            depth[y, x] = nearest


@njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _draw_all(vertices, triangles, viewmats, Ks, uvs, materials, texels, starts, sizes, shading, samples, out, depth):
    views = viewmats.shape[0]
    for b in prange(out.shape[0]):
        _draw(vertices[b // views], triangles, viewmats[b % views], Ks[b % views], uvs, materials, texels, starts, sizes, shading,
              samples, out[b], depth[b])


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
    return render_with_depth(mesh, vertices, viewmats, Ks, size, samples, shading)[0]


def render_with_depth(mesh: Mesh, vertices: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int, samples: int = 2,
                      shading: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of `render`, and 1 / depth of the nearest thing in each pixel, 0 where there is none; [F, V, size, size].

    A single picture is drawn by the calling thread and without the GIL, so that several threads can each draw one; of more
    pictures each is drawn by one of Numba's threads.
    """
    vertices = np.ascontiguousarray(vertices, np.float32)
    shading = np.ones((len(mesh.vertices), 3), np.float32) if shading is None else np.asarray(shading, np.float32)
    shading = np.ascontiguousarray(np.broadcast_to(shading.reshape(len(shading), -1), (len(shading), 3)))
    views = len(viewmats)
    Ks, viewmats = scale_intrinsics(Ks, samples), np.ascontiguousarray(viewmats, np.float32)
    out = np.zeros((len(vertices) * views, size, size, 4), np.float32)
    depth = np.zeros((len(vertices) * views, size, size), np.float32)
    look = mesh.uvs, mesh.materials, *mesh.texels, shading, samples
    if len(out) == 1:
        _draw(vertices[0], mesh.faces, viewmats[0], Ks[0], *look, out[0], depth[0])
    else:
        with KERNEL_LOCK:
            _draw_all(vertices, mesh.faces, viewmats, Ks, *look, out, depth)
    return out.reshape(len(vertices), views, size, size, 4), depth.reshape(len(vertices), views, size, size)


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
