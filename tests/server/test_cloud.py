"""Gaussians on a surface: where they are seeded, how they move, and what the pictures teach them."""

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation
from track4d.gaussians.appearance import Sitting, drawn_sittings, refine_appearance, still_psnr
from track4d.gaussians.cloud import OPACITY, RADIUS, RADIUS_RANGE, seed_cloud, triangle_quats
from track4d.gaussians.rasterise.dense import rotation_matrices
from track4d.geometry import zbuffer
from track4d.geometry.mesh import Mesh
from track4d_protocol.space import BACKGROUND, intrinsics, orbit_viewmats


@pytest.fixture(scope="module")
def ball():
    """A sphere of radius 1 with a texture of 4 x 4 fields."""
    shape = trimesh.creation.icosphere(subdivisions=3)
    direction = shape.vertices[shape.faces]
    uvs = np.stack([np.arctan2(direction[..., 1], direction[..., 0]) / (2 * np.pi), 0.5 + 0.5 * direction[..., 2]], -1)
    texture = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    return Mesh(shape.vertices, shape.faces, uvs, None, [texture])


def seeded(mesh, count=2000, seed=0, motion=None):
    return seed_cloud(mesh, count, torch.Generator().manual_seed(seed), motion)


def test_seeding_covers_the_surface_evenly_and_every_vertex(ball):
    cloud = seeded(ball)
    assert len(cloud) == 2000 and (cloud.barycentric >= 0).all()
    assert torch.allclose(cloud.barycentric.sum(1), torch.ones(2000))
    means, quats = cloud.pose(ball.faces, torch.from_numpy(ball.vertices)[None])
    nearest = KDTree(means[0].numpy())
    assert (nearest.query(ball.vertices)[0] < 1e-6).all()  # 642 vertices, less than half of 2,000
    anywhere = np.random.default_rng(1).normal(size=(500, 3))
    anywhere /= np.linalg.norm(anywhere, axis=1, keepdims=True)
    spacing = (4 * np.pi / 2000) ** 0.5
    assert (nearest.query(anywhere)[0] < 2.5 * spacing).all()
    assert torch.allclose(cloud.opacities, torch.tensor(OPACITY))
    thin = cloud.scales.argmin(1)
    assert (thin == 2).all()
    normals = rotation_matrices(quats)[0, :, :, 2]
    assert ((normals * torch.nn.functional.normalize(means[0], dim=-1)).sum(-1) > 0.99).all()


def test_ellipses_reach_to_their_neighbours():
    """On a ribbon they are long along it and narrow across, and nowhere beyond the limits."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 0.004, 0], [0, 0.004, 0]])
    cloud = seeded(Mesh(corners, [[0, 1, 2], [2, 3, 0]]), 100)
    spacing = (0.004 / 100) ** 0.5
    along, across = cloud.scales[cloud.triangles == 0, :2].T
    assert along.median() > 1.3 * across.median()
    even = RADIUS * spacing
    assert (cloud.scales[:, :2] >= 0.999 * RADIUS_RANGE[0] * even).all()
    assert (cloud.scales[:, :2] <= 1.001 * RADIUS_RANGE[1] * even).all()


def test_where_the_surface_will_grow_there_are_more_gaussians_and_they_reach_further(ball):
    """A ball whose upper half is drawn up to three times its height."""
    grown = ball.vertices * np.where(ball.vertices[:, 2:] > 0, [1, 1, 3], [1, 1, 1])
    motion = np.stack([ball.vertices, grown, ball.vertices]).astype(np.float32)
    anywhere = trimesh.sample.sample_surface(trimesh.Trimesh(grown, ball.faces), 2000, seed=0)[0]
    anywhere = anywhere[anywhere[:, 2] > 0]
    uppers, gaps = [], []
    for cloud in (seeded(ball), seeded(ball, motion=motion)):
        assert len(cloud) == 2000
        means = cloud.pose(ball.faces, torch.from_numpy(motion[:2]))[0]  # [2, G, 3]
        uppers.append(means[0, :, 2] > 0)
        gaps.append(np.quantile(KDTree(means[1].numpy()).query(anywhere)[0], 0.95))
    assert uppers[1].sum() > 1.2 * uppers[0].sum() and gaps[1] < 0.9 * gaps[0]
    assert cloud.scales[uppers[1], :2].mean() > 1.1 * cloud.scales[~uppers[1], :2].mean()


def test_an_even_cover_has_round_discs(ball):
    scales = seeded(ball).scales[:, :2] / (4 * np.pi / 2000) ** 0.5
    assert 0.9 * RADIUS < scales.mean() < 1.1 * RADIUS
    assert abs(float((scales[:, 0] / scales[:, 1]).log().mean())) < 0.1


def test_one_gaussian_has_no_neighbours(ball):
    assert torch.isfinite(seeded(ball, 1).scales).all()


def test_colours_come_from_the_texture(ball):
    cloud = seeded(ball)
    texels = torch.from_numpy(ball.textures[0].reshape(-1, 3))  # [16, 3]
    assert torch.equal(torch.unique(cloud.colors, dim=0), torch.unique(texels, dim=0))


def test_the_same_seed_gives_the_same_cloud(ball):
    first, same, other = seeded(ball), seeded(ball), seeded(ball, seed=1)
    assert torch.equal(first.barycentric, same.barycentric) and torch.equal(first.triangles, same.triangles)
    assert not torch.equal(first.barycentric, other.barycentric)


def test_fewer_gaussians_than_vertices_and_triangles_without_area(ball):
    faces = np.concatenate([ball.faces, [[0, 0, 1], [2, 2, 2]]])
    vertices = np.concatenate([ball.vertices, [[5, 5, 5]]])  # in no triangle
    cloud = seeded(Mesh(vertices, faces), 100)
    assert len(cloud) == 100 and (cloud.triangles < len(ball.faces)).all()
    means, quats = cloud.pose(faces, torch.from_numpy(vertices).float()[None])
    assert torch.isfinite(means).all() and torch.isfinite(quats).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_a_cloud_turns_with_its_mesh(seed):
    """Also about the normal: the discs are carried along, not only tilted."""
    shape = trimesh.creation.box()
    turn = Rotation.random(random_state=seed % 2**31).as_matrix().astype(np.float32)
    rest = torch.from_numpy(np.array(shape.vertices, np.float32))
    cloud = seed_cloud(Mesh(shape.vertices, shape.faces), 60, torch.Generator().manual_seed(seed))
    means, quats = cloud.pose(shape.faces, torch.stack([rest, rest @ torch.from_numpy(turn).T]))
    matrices = rotation_matrices(quats)
    assert torch.allclose(means[1], means[0] @ torch.from_numpy(turn).T, atol=1e-5)
    assert torch.allclose(matrices[1], torch.from_numpy(turn) @ matrices[0], atol=1e-4)


def test_orientation_of_a_triangle():
    corners = torch.tensor([[[0.0, 0, 0], [0, 2, 0], [-3, 0.5, 0]], [[1, 1, 1], [1, 1, 1], [2, 0, 0]]])
    first, flat = rotation_matrices(triangle_quats(corners))
    assert torch.allclose(first, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6)
    assert torch.allclose(flat, torch.eye(3))


def test_gradients_reach_the_vertices(ball):
    cloud = seeded(ball, 300)
    vertices = torch.from_numpy(ball.vertices)[None].double().requires_grad_()
    weights = torch.randn(1, 300, 3, generator=torch.Generator().manual_seed(2)).double()
    means, quats = cloud.pose(ball.faces, vertices)
    assert not quats.requires_grad
    (means * weights).sum().backward()
    expected = torch.zeros_like(vertices[0])
    corner_indices = torch.from_numpy(ball.faces).long()[cloud.triangles]
    expected.index_put_((corner_indices,), cloud.barycentric[..., None] * weights[0][:, None], accumulate=True)
    assert torch.allclose(vertices.grad[0], expected)


def test_appearance_comes_closer_to_the_pictures(ball):
    viewmats, Ks = orbit_viewmats(), intrinsics(64, 4)
    rgba = zbuffer.render(ball, ball.vertices[None], viewmats, Ks, 64, shading=np.full(len(ball.vertices), 0.7))[0]
    views = Sitting(ball.vertices, zbuffer.over(rgba, BACKGROUND), rgba[..., 3], viewmats, Ks)
    cloud = seeded(ball)
    refined = refine_appearance(cloud, ball.faces, views, [], steps=30)

    before, after = (still_psnr(x, ball.faces, views) for x in (cloud, refined))
    assert after > before + 3
    assert torch.equal(refined.triangles, cloud.triangles) and torch.equal(refined.barycentric, cloud.barycentric)
    assert ((refined.colors >= 0) & (refined.colors <= 1)).all() and (refined.scales > 0).all()
    assert not refined.colors.requires_grad


def test_drawn_pictures_show_the_poses_that_will_be(ball):
    """A cloud that also learnt from them closes the gaps of a grown ball."""
    motion = np.stack([ball.vertices * scale for scale in ((1, 1, 1), (1, 1, 2), (1, 1, 1))]).astype(np.float32) * 0.45
    still = Mesh(motion[0], ball.faces, ball.uvs, None, ball.textures)
    light = np.ones((len(still.vertices), 3), np.float32)
    viewmats, Ks = orbit_viewmats([20.0], 20.0), intrinsics(64, 1)
    views = []
    for posed in motion[:2]:
        rgba = zbuffer.render(still, posed[None], viewmats, Ks, 64, 4)[0]
        views.append(Sitting(posed, zbuffer.over(rgba, BACKGROUND), rgba[..., 3], viewmats, Ks))
    shown = {}
    for name, known in (("still", None), ("moving", motion)):
        drawn = drawn_sittings(still, light, 64, known)
        assert {len(one.pictures) for one in drawn} == {4} and all(0.05 < one.alphas.mean() < 0.6 for one in drawn)
        cloud = refine_appearance(seeded(still, 600, motion=known), still.faces, views[0], drawn, steps=40)
        shown[name] = still_psnr(cloud, still.faces, views[1])
    assert shown["moving"] > shown["still"] + 1
