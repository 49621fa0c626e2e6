"""The CPU's pictures of meshes against a renderer that asks every triangle at every pixel."""

import sys
from pathlib import Path

import numpy as np
import pytest
from track4d.geometry import zbuffer
from track4d.geometry.mesh import Mesh
from track4d_protocol.space import intrinsics

sys.path.insert(0, str(Path(__file__).parent))
from films import KS, VIEWMATS, bend, capsule  # noqa: E402

SIZE = 48


def nearest_triangles(vertices: np.ndarray, faces: np.ndarray, viewmat: np.ndarray, K: np.ndarray,
                      size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangle [S, S] (-1: none) and 1 / depth [S, S] at every pixel centre, and which pixels no edge comes near [S, S]."""
    local = vertices.astype(np.float64) @ viewmat[:3, :3].T + viewmat[:3, 3]
    screen = local[:, :2] / local[:, 2:] * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]]
    y, x = np.mgrid[0:size, 0:size] + 0.5
    found, nearest, clear = np.full((size, size), -1), np.zeros((size, size)), np.ones((size, size), bool)
    for t, (i, j, k) in enumerate(faces):
        if (local[[i, j, k], 2] < zbuffer.NEAR).any():
            continue
        a, b, c = screen[i], screen[j] - screen[i], screen[k] - screen[i]
        area = b[0] * c[1] - b[1] * c[0]
        u = ((x - a[0]) * c[1] - (y - a[1]) * c[0]) / area
        w = ((y - a[1]) * b[0] - (x - a[0]) * b[1]) / area
        inverse = (1 - u - w) / local[i, 2] + u / local[j, 2] + w / local[k, 2]
        inside = (np.minimum(np.minimum(u, w), 1 - u - w) > 0) & (inverse > nearest)
        clear &= np.abs(np.stack([u, w, 1 - u - w])).min(0) > 1e-4
        found[inside], nearest[inside] = t, inverse[inside]
    return found, nearest, clear


@pytest.fixture(scope="module")
def soup() -> Mesh:
    """Triangles of all sizes and shapes, some behind the cameras, many across the pictures' edges."""
    generator = np.random.default_rng(3)
    centres, sizes = generator.normal(0, 1.0, (80, 1, 3)), generator.choice([0.05, 0.5, 3.0], (80, 1, 1))
    corners = centres + sizes * generator.normal(0, 1, (80, 3, 3))
    return Mesh(corners.reshape(-1, 3), np.arange(240).reshape(-1, 3), generator.random((80, 3, 2)), None,
                [generator.random((8, 8, 3))])


def test_every_pixel_sees_the_nearest_triangle(soup: Mesh) -> None:
    Ks = intrinsics(SIZE, 4)
    fragments = zbuffer.rasterise(soup.vertices[None], soup.faces, VIEWMATS, Ks, SIZE)
    for v in range(4):
        found, nearest, clear = nearest_triangles(soup.vertices, soup.faces, VIEWMATS[v], Ks[v], SIZE)
        assert clear.mean() > 0.9 and (found >= 0).mean() > 0.5
        np.testing.assert_array_equal(fragments.faces[v][clear], found[clear])
        np.testing.assert_allclose(fragments.inverse_depth[v][clear], nearest[clear], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 2])
def test_pictures_hold_all_that_the_fragments_show(soup: Mesh, samples: int) -> None:
    """The window that is drawn leaves nothing out; depth is the nearest of a pixel's samples."""
    Ks = intrinsics(SIZE, 4)
    rgba, depth = zbuffer.render_with_depth(soup, soup.vertices[None], VIEWMATS, Ks, SIZE, samples)
    fine = zbuffer.rasterise(soup.vertices[None], soup.faces, VIEWMATS, zbuffer.scale_intrinsics(Ks, samples), SIZE * samples)
    blocks = fine.inverse_depth.reshape(4, SIZE, samples, SIZE, samples)
    np.testing.assert_array_equal(depth[0], blocks.max((2, 4)))
    np.testing.assert_array_equal(rgba[0, ..., 3], (blocks > 0).mean((2, 4)))


def test_one_picture_is_like_the_same_among_many() -> None:
    mesh = capsule()
    vertices = bend(mesh.vertices)
    together, depths = zbuffer.render_with_depth(mesh, vertices, VIEWMATS, KS, 128)
    assert (together[..., 3] > 0).any((2, 3)).all()
    for f in range(len(vertices)):
        alone, depth = zbuffer.render_with_depth(mesh, vertices[f:f + 1], VIEWMATS[2:3], KS[2:3], 128)
        np.testing.assert_array_equal(alone[0, 0], together[f, 2])
        np.testing.assert_array_equal(depth[0, 0], depths[f, 2])


def test_a_mesh_out_of_sight_gives_empty_pictures() -> None:
    mesh = capsule()
    away = mesh.vertices[None] + np.float32([0, 0, 50])
    rgba, depth = zbuffer.render_with_depth(mesh, away, VIEWMATS, KS, 64)
    assert not rgba.any() and not depth.any()
