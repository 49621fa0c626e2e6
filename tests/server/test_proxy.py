"""The coarse surface of a fine mesh."""

import sys
from pathlib import Path

import numpy as np
from track4d.geometry.mesh import Mesh, weld
from track4d.geometry.proxy import build_proxy

sys.path.insert(0, str(Path(__file__).parent))
from films import bend, capsule  # noqa: E402


def welded(mesh: Mesh) -> Mesh:
    first, inverse = weld(mesh.vertices)
    return Mesh(mesh.vertices[first], inverse[mesh.faces])


def test_the_fine_surface_follows_the_coarse_one_smoothly():
    surface = welded(capsule(120, 100))
    proxy = build_proxy(surface.vertices, surface.faces, surface.edges(), 1500)
    assert 1200 < len(proxy.vertices) < 1900
    np.testing.assert_allclose(np.asarray(proxy.binding.sum(1)).ravel(), 1, atol=1e-9)
    shift = (bend(proxy.vertices.astype(np.float32), 2, 0.3)[1] - proxy.vertices).astype(np.float64)
    wanted = bend(surface.vertices, 2, 0.3)[1] - surface.vertices
    carried = proxy.binding @ shift
    assert np.abs(carried - wanted).max() < 0.02
    edges = surface.edges()
    edges = edges[edges[:, 0] != edges[:, 1]]
    moved = surface.vertices + carried
    ratio = (np.linalg.norm(moved[edges[:, 0]] - moved[edges[:, 1]], axis=1)
             / np.linalg.norm(surface.vertices[edges[:, 0]] - surface.vertices[edges[:, 1]], axis=1))
    assert np.quantile(np.abs(ratio - 1), 0.99) < 0.3  # no steps where one coarse vertex takes over from the next


def test_sheets_with_a_gap_stay_apart():
    x, y = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60))
    sheet = np.stack([x.ravel(), y.ravel(), np.zeros(3600)], 1)
    k = np.arange(3600).reshape(60, 60)
    a, b, c, d = k[:-1, :-1].ravel(), k[:-1, 1:].ravel(), k[1:, :-1].ravel(), k[1:, 1:].ravel()
    faces = np.concatenate([np.stack([a, b, d], 1), np.stack([a, d, c], 1)])
    mesh = Mesh(np.concatenate([sheet, sheet + [0, 0, 0.004]]), np.concatenate([faces, faces + 3600]))
    proxy = build_proxy(mesh.vertices, mesh.faces, mesh.edges(), 300)
    upper = proxy.vertices[:, 2] > 0.002
    assert len(proxy.vertices) < 500
    assert (upper[proxy.edges[:, 0]] == upper[proxy.edges[:, 1]]).all()
    assert proxy.binding[:3600][:, upper].nnz == 0


def test_anything_with_triangles_is_reduced():
    surface = welded(capsule(60, 50))
    count = len(surface.vertices)
    vertices = np.concatenate([surface.vertices, [[0, 0, 2], [0, 1, 2], [3, 3, 3]]])  # the last has no triangle
    fins = [[0, 1, count], [0, 1, count + 1], [0, 1, count]]  # three triangles on an edge, one twice
    flat = [[5, 6, 6], [7, 7, 7], [10, 11, 10]]
    mesh = Mesh(vertices, np.concatenate([surface.faces, fins, flat]))
    proxy = build_proxy(mesh.vertices, mesh.faces, mesh.edges(), 400)
    assert 100 < len(proxy.vertices) < 700
    np.testing.assert_allclose(np.asarray(proxy.binding.sum(1)).ravel(), 1, atol=1e-9)
    assert np.isfinite(proxy.binding.data).all()
    np.testing.assert_allclose((proxy.binding @ proxy.vertices)[-1], [3, 3, 3], atol=1e-6)


def test_a_small_surface_stays_as_it_is():
    surface = welded(capsule(8, 8))
    proxy = build_proxy(surface.vertices, surface.faces, surface.edges(), 10_000)
    assert len(proxy.vertices) == len(surface.vertices)
