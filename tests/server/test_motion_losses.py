"""Losses of the motion: ARAP against the published numbers, the rest by what they must be zero for and must not change with."""

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation
from track4d.geometry import zbuffer
from track4d.motion.losses import (
    arap_energy,
    edges_within,
    isometry_loss,
    mask_loss,
    place_loss,
    project,
    reconstruction_loss,
    rigidity_loss,
    ring_neighbours,
    smoothness_loss,
    track_loss,
)
from track4d_protocol.space import intrinsics, orbit_viewmats


@pytest.fixture(scope="module")
def published(shared) -> dict[str, torch.Tensor]:
    return load_file(shared / "fixtures" / "animate3d_stage2" / "arap.safetensors")


@pytest.mark.parametrize("case", ["knn_small", "knn_k6_radius", "knn_sampled", "with_static_frame"])
def test_arap_matches_the_published_numbers(published, case) -> None:
    part = {name.split(".", 1)[1]: tensor for name, tensor in published.items() if name.startswith(case + ".")}
    nodes = part["nodes"].clone().requires_grad_()
    neighbours = torch.full((nodes.shape[1], int(part["nn"].max()) + 1), -1)
    neighbours[part["ii"], part["nn"]] = part["jj"]
    energy = arap_energy(nodes[0], nodes[1:], neighbours, part["sample_idx"])
    torch.testing.assert_close(energy, part["error"], rtol=1e-5, atol=0)
    energy.backward()
    torch.testing.assert_close(nodes.grad, part["grad"], rtol=1e-4, atol=1e-4)


def sphere(subdivisions: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = trimesh.creation.icosphere(subdivisions=subdivisions)
    return (torch.from_numpy(np.array(shape.vertices)).float(),
            ring_neighbours(torch.from_numpy(np.array(shape.edges_unique)), len(shape.vertices), 6))


def twisted(points: torch.Tensor) -> torch.Tensor:
    angle = 0.5 * points[:, 2]
    return torch.stack([points[:, 0] * angle.cos() - points[:, 1] * angle.sin(),
                        points[:, 0] * angle.sin() + points[:, 1] * angle.cos(), 1.2 * points[:, 2]], 1)[None]


def test_rigidity_changes_neither_with_turns_nor_with_size_nor_with_the_number_of_vertices() -> None:
    rest, neighbours = sphere(3)
    everyone = torch.arange(len(rest))
    turn = torch.from_numpy(Rotation.from_euler("xyz", [1.0, -0.5, 2.5]).as_matrix()).float()
    assert rigidity_loss(rest, (rest @ turn.T + 3)[None], neighbours, everyone) < 1e-9
    posed = twisted(rest)
    loss = rigidity_loss(rest, posed, neighbours, everyone)
    assert loss > 1e-3
    torch.testing.assert_close(rigidity_loss(rest, posed @ turn.T + 3, neighbours, everyone), loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(rigidity_loss(5 * rest, 5 * posed, neighbours, everyone), loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(rigidity_loss(rest, posed.repeat(4, 1, 1), neighbours, everyone.repeat(2)), loss)
    finer, finer_neighbours = sphere(4)  # four times the vertices; only bending becomes smaller
    fine = rigidity_loss(finer, twisted(finer), finer_neighbours, torch.arange(len(finer)))
    assert 0.85 < fine / loss < 1.15


def test_rigidity_pulls_a_displaced_vertex_back() -> None:
    rest, neighbours = sphere(2)
    posed = rest[None].clone()
    posed[0, 5] *= 1.3
    posed.requires_grad_()
    rigidity_loss(rest, posed, neighbours, torch.arange(len(rest))).backward()
    assert (posed.grad[0, 5] * rest[5]).sum() > 0


def test_isometry_of_a_pinned_region() -> None:
    rest, _ = sphere(2)
    edges = torch.from_numpy(np.array(trimesh.creation.icosphere(subdivisions=2).edges_unique))
    pinned = rest[:, 2] > 0
    inside = edges_within(edges, pinned)
    assert 0 < len(inside) < len(edges)
    below = rest.clone()
    below[~pinned] *= 2
    assert isometry_loss(rest, below[None], inside) < 1e-12 < isometry_loss(rest, below[None], edges)
    torch.testing.assert_close(isometry_loss(rest, 1.1 * rest[None], inside), torch.tensor(0.01), rtol=1e-3, atol=0)
    assert isometry_loss(rest, below[None], inside[:0]) == 0


def test_masked_reconstruction_sees_only_the_object() -> None:
    wanted, mask = torch.rand(2, 8, 8, 3), torch.zeros(2, 8, 8)
    mask[:, 2:6, 2:6] = 1
    assert reconstruction_loss(wanted * mask[..., None], wanted, mask) == 0
    other_background = torch.where(mask[..., None] > 0, wanted, torch.rand(2, 8, 8, 3))
    assert reconstruction_loss(wanted * mask[..., None], other_background, mask) == 0
    assert reconstruction_loss(wanted, wanted, mask) > 0  # drawn beside the object
    assert mask_loss(mask, mask) == 0 < mask_loss(mask * 0.5, mask)


def test_projection_is_the_renderers() -> None:
    points = torch.rand(3, 7, 3) - 0.5
    viewmats, Ks = orbit_viewmats(), intrinsics(64, 4)
    uv, depth = project(points, torch.from_numpy(viewmats), torch.from_numpy(Ks))
    expected = zbuffer.project(points.numpy(), viewmats, Ks)
    np.testing.assert_allclose(uv.numpy(), expected[0], atol=1e-4)
    np.testing.assert_allclose(depth.numpy(), expected[1], atol=1e-5)


def test_tracks_in_pictures_and_in_space() -> None:
    points = (torch.rand(3, 7, 3) - 0.5).requires_grad_()
    viewmats, Ks = torch.from_numpy(orbit_viewmats()), torch.from_numpy(intrinsics(64, 4))
    tracks = project(points, viewmats, Ks)[0].detach().transpose(0, 1).clone()  # [V, F, N, 2]
    weights = torch.ones(tracks.shape[:3])
    assert track_loss(points, tracks, weights, viewmats, Ks) < 1e-6
    tracks[1, 2, 3] = torch.nan  # not tracked
    weights[1, 2, 3] = 0
    tracks[0, 1, 2] += torch.tensor([6.0, 0.0])
    loss = track_loss(points, tracks, weights, viewmats, Ks)
    loss.backward()
    torch.testing.assert_close(loss, (2 * (6.0 - 1.0)) / weights.sum(), rtol=1e-4, atol=1e-5)
    moved = points.grad.norm(dim=-1) > 1e-4
    assert moved.sum() == 1 and moved[1, 2]
    places = points.detach().clone()
    assert place_loss(points, places, torch.ones(3, 7)) < 1e-6
    assert place_loss(points, places + 0.5, torch.zeros(3, 7)) == 0


def test_smoothness_is_zero_for_steady_motion() -> None:
    steady = torch.arange(6.0)[:, None, None] * torch.tensor([[1.0, 2, 3]])
    assert smoothness_loss(steady) == 0 < smoothness_loss(steady, loops=True)
    assert smoothness_loss(steady.square()) == pytest.approx(4 + 64 + 324)
    assert smoothness_loss(steady[:2]) == 0


def test_neighbours_come_from_the_edges() -> None:
    edges = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [1, 2]])
    got = ring_neighbours(edges, 6, 2)
    assert got.tolist() == [[1, 3], [0, 2], [0, 1], [0, -1], [0, -1], [-1, -1]]
