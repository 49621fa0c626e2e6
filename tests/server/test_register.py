"""The registration where the video or the mesh is not what one hopes for, and what it must not move."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from track4d.geometry.mesh import Mesh, weld
from track4d.motion.appearance import estimate_shading
from track4d.motion.fit import Tracks3D, _recall, check_memory, fit_motion
from track4d.motion.footage import read_footage
from track4d.motion.nodes import build_nodes
from track4d.motion.register import Pose, Registration, Targets
from track4d_protocol.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from films import KS, TINY, VIEWMATS, bend, capsule, error, film, noise_texture  # noqa: E402


@pytest.fixture(scope="module")
def bent() -> tuple[Mesh, np.ndarray, np.ndarray]:
    mesh = capsule()
    truth = bend(mesh.vertices, 5, 0.6)
    return mesh, truth, film(mesh, truth)


def codes(field) -> list[str]:
    return [warning["code"] for warning in field.warnings]


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]),
                np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts)]),
                np.concatenate([mesh.uvs for mesh in meshes]), None, meshes[0].textures)


def test_a_frame_that_is_missing_is_bridged(bent):
    mesh, truth, video = bent
    broken = video.copy()
    broken[:, 2] = 0
    field = fit_motion(mesh, broken, VIEWMATS, KS, preset=TINY)
    assert codes(field) == ["lost_pictures"] and "4 of" in field.warnings[0]["message"]
    np.testing.assert_allclose(field.vertices[2], (field.vertices[1] + field.vertices[3]) / 2, atol=1e-6)
    assert field.confidence[2].max() == 0
    assert error(field.vertices, truth) < 0.3


def test_a_view_that_goes_black_is_left_out(bent):
    mesh, truth, video = bent
    broken = video[:, :3].copy()
    broken[1, 1:] = (0, 0, 0, 255)
    field = fit_motion(mesh, broken, VIEWMATS, KS, preset=TINY)
    assert codes(field) == ["lost_pictures"]
    assert error(field.vertices, truth[:3]) < 0.35


def test_one_view_says_what_it_could_not_see(bent):
    mesh, truth, video = bent
    field = fit_motion(mesh, video[1:2, :3], VIEWMATS[1:2], KS[1:2], preset=TINY)
    assert codes(field) == ["one_view"] and "%" in field.warnings[0]["message"]
    moved = np.abs(field.vertices - field.vertices[:1]).max()
    assert 0.02 < moved < 2 * np.abs(truth[:3] - truth[:1]).max()


def test_nothing_moves_without_evidence():
    mesh = capsule()
    rng = np.random.default_rng(0)
    video = film(mesh, np.repeat(mesh.vertices[None], 3, 0))
    noisy = video.copy()
    noisy[..., :3] = (video[..., :3] + rng.normal(0, 6, video[..., :3].shape)).clip(0, 255)
    noisy[:, 0] = video[:, 0]
    field = fit_motion(mesh, noisy, VIEWMATS, KS, preset=TINY)
    np.testing.assert_allclose(field.vertices, np.repeat(mesh.vertices[None], 3, 0), atol=1e-6)
    assert field.warnings == ()


def test_only_the_piece_that_moves_is_moved():
    body, part = capsule(), capsule(12, 12, 0.4, 0.12)
    part.vertices[:, 0] += 0.6
    mesh = joined(body, part)
    truth = np.repeat(mesh.vertices[None], 3, 0).copy()
    truth[1:, len(body.vertices):, 2] += np.array([0.08, 0.16], np.float32)[:, None]
    field = fit_motion(mesh, film(mesh, truth), VIEWMATS, KS, preset=TINY)
    still = slice(0, len(body.vertices))
    np.testing.assert_allclose(field.vertices[:, still], truth[:, still], atol=1e-6)
    assert error(field.vertices[:, len(body.vertices):], truth[:, len(body.vertices):]) < 0.3


def test_pieces_with_nodes_share_none():
    big, small = capsule(), capsule(12, 12, 0.4, 0.12)
    small.vertices[:, 0] += 0.6
    mesh = joined(big, small)
    first, inverse = weld(mesh.vertices)
    nodes = build_nodes(Mesh(mesh.vertices[first], inverse[mesh.faces]), 60)
    on_small = first >= len(big.vertices)
    used = [set(nodes.skinning[on_small == side].nonzero()[1] // 4) for side in (False, True)]
    assert used[0] and used[1] and not used[0] & used[1]
    assert len(set(nodes.piece)) == 2


def test_pieces_that_touch_swing_together():
    """A flower sways: petals that have nodes of their own are glued to it and to each other, and keep up with it."""

    def turned(vertices: np.ndarray, angle: float) -> np.ndarray:
        return vertices @ Rotation.from_rotvec([angle, 0, 0]).as_matrix().astype(np.float32)

    stalk, petals = capsule(), []
    for angle in np.linspace(0, 2 * np.pi, 8, endpoint=False):
        petal = capsule(10, 10, 0.3, 0.1)
        petal.vertices = turned(petal.vertices + np.array([0, 0, 0.38], np.float32), angle) + np.array([0.2, 0, 0.45], np.float32)
        petals.append(petal)
    mesh = joined(stalk, *petals)
    mesh.vertices *= np.float32(0.7)
    foot = np.array([0, 0, -0.7], np.float32)
    truth = np.stack([turned(mesh.vertices - foot, angle) + foot for angle in (0, 0.25, 0.5, 0.25, -0.2, -0.5)])
    tracks = Tracks3D(truth, np.ones(len(mesh.vertices), np.float32))
    field = fit_motion(mesh, film(mesh, truth), VIEWMATS, KS, tracks=tracks, preset=replace(TINY, nodes=200))
    assert np.linalg.norm(field.vertices - truth, axis=2).max() < 0.03


def test_a_bar_that_grows_is_followed():
    mesh = capsule()
    growth = np.array([1, 1.25, 1.5, 1.75], np.float32)[:, None]
    truth = np.repeat(mesh.vertices[None], 4, 0).copy()
    truth[..., 2] = (truth[..., 2] + 0.7) * growth - 0.7
    field = fit_motion(mesh, film(mesh, truth), VIEWMATS, KS, preset=TINY)
    assert error(field.vertices, truth) < 0.25


def test_steps_that_explode_are_rejected(bent):
    mesh, _, video = bent
    first, welded = weld(mesh.vertices)
    nodes = build_nodes(Mesh(mesh.vertices[first], welded[mesh.faces]), 40)
    footage = read_footage(video, VIEWMATS, KS)
    shading = estimate_shading(mesh, footage.straight_views(), VIEWMATS, KS)
    registration = Registration(mesh, welded, nodes, footage, shading, 400, 20.0, 2, 0)
    look = registration.look(Pose.at_rest(nodes))
    absurd = Targets(look.uv + 1e4, np.full(look.uv.shape[:2], 1e6, np.float32), 1e9)
    pose = registration.solve(Pose.at_rest(nodes), [absurd], 1.0)
    assert registration.rejected >= 1
    assert np.isfinite(pose.positions).all() and np.abs(pose.positions).max() < 5
    broken = Targets(look.uv, np.full(look.uv.shape[:2], np.nan, np.float32), 4.0)
    broken.weights[:] = np.inf
    pose = registration.solve(Pose.at_rest(nodes), [broken], 1.0)
    np.testing.assert_array_equal(pose.positions, nodes.rest)


def test_shared_edges_doubled_vertices_and_no_texture(bent):
    mesh, truth, video = bent
    count = len(mesh.vertices)
    fins = [[100, 101, count], [100, 101, count + 1], [100, 101, count + 2]]  # an edge of five triangles
    twins = mesh.vertices[[100, 100, 101]] + np.array([[0.01, 0, 0], [0, 0.01, 0], [0, 0.01, 0]], np.float32)
    messy = Mesh(np.concatenate([mesh.vertices, twins]), np.concatenate([mesh.faces, mesh.faces[:40], fins]),
                 np.concatenate([mesh.uvs, mesh.uvs[:40], np.zeros((3, 3, 2))]), None, mesh.textures)
    field = fit_motion(messy, video[:, :2], VIEWMATS, KS, preset=TINY)
    assert error(field.vertices[:, :count], truth[:2]) < 0.35

    plain = Mesh(mesh.vertices, mesh.faces, mesh.uvs)  # texture coordinates without a texture: grey
    field = fit_motion(plain, film(plain, truth[:2]), VIEWMATS, KS, preset=TINY)
    assert np.isfinite(field.vertices).all()
    assert np.linalg.norm(field.vertices - truth[:2], axis=2).max() < 0.15


def test_twelve_triangles_in_pieces():
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32) * 0.4
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    pieces = [Mesh(corners + shift, faces, np.random.default_rng(0).random((4, 3, 2)), None, [noise_texture()])
              for shift in ([-0.6, 0, 0], [0.3, 0, 0], [0, 0.4, 0.4])]
    mesh = joined(*pieces)
    assert len(mesh.faces) == 12
    truth = mesh.vertices[None] + np.array([[0, 0, 0], [0.05, 0, 0.05]], np.float32)[:, None]
    field = fit_motion(mesh, film(mesh, truth), VIEWMATS, KS, preset=TINY)
    assert error(field.vertices, truth) < 0.3


def test_memory_is_counted_before_the_fit():
    check_memory((4, 16, 256, 256, 4), 5000, 10_000, 200)
    with pytest.raises(InputError) as caught:
        check_memory((8, 64, 256, 256, 4), 10**9, 2 * 10**9, 200)
    assert caught.value.code == "too_little_memory"
    assert "GB" in caught.value.message


def test_a_noisy_video_is_steadied_and_a_clean_one_left_alone(bent):
    """A body that goes straight on, seen at places that are pixels off, in every picture otherwise."""
    mesh, truth, video = bent
    footage = read_footage(video, VIEWMATS, KS)
    first, welded = weld(mesh.vertices)
    nodes = build_nodes(Mesh(mesh.vertices[first], welded[mesh.faces]), 30)
    registration = Registration(mesh, welded, nodes, footage, np.ones(len(mesh.vertices), np.float32), 200, 20.0, 2, 0)
    rest = Pose.at_rest(nodes)
    right = [Pose(rest.rotations, rest.positions + [0.02 * frame, 0, 0]) for frame in range(len(truth))]
    generator = np.random.default_rng(0)
    poses = [rest]
    for frame in range(1, len(right)):
        look = registration.look(right[frame])
        off = generator.normal(0, 2, (len(VIEWMATS), 1, 2)) * footage.unit
        registration.targets[frame] = [Targets(look.uv + off.astype(np.float32), look.visible.astype(np.float32), 4.0)]
        registration.misses[frame] = 2.0
        poses.append(registration.solve(rest, registration.targets[frame], 1.0))

    def missed(poses: list[Pose]) -> float:
        return float(np.mean([np.abs(registration.points(a) - registration.points(b)).mean() for a, b in zip(poses, right)]))

    steady = registration.steadied(poses)
    assert steady[0] is rest and missed(steady) < 0.7 * missed(poses)
    registration.misses = dict.fromkeys(registration.misses, 0.2)
    assert registration.steadied(poses) is poses


def test_what_was_lost_is_found_when_the_motion_comes_back(bent):
    mesh, truth, _ = bent
    truth = truth[[0, 1, 1, 0]]
    footage = read_footage(film(mesh, truth), VIEWMATS, KS)
    assert footage.difference(0, 3) == 0 < footage.difference(0, 1)
    first, welded = weld(mesh.vertices)
    nodes = build_nodes(Mesh(mesh.vertices[first], welded[mesh.faces]), 30)
    registration = Registration(mesh, welded, nodes, footage, np.ones(len(mesh.vertices), np.float32), 300, 20.0, 2, 0)
    rest = Pose.at_rest(nodes)
    right = registration.refine(registration.refine(rest, 1, 3.0), 1, 1.0)
    lost = Pose(rest.rotations, rest.positions + 0.3 * np.clip(rest.positions[:, 2:], 0, None) * [0, 1, 0])
    poses, views = [rest, right, lost, lost], np.zeros((4, len(mesh.vertices)), np.int64)
    costs = [registration.cost(registration.look(pose), frame) for frame, pose in enumerate(poses)]
    before = list(costs)
    with ThreadPoolExecutor(1) as pool:
        assert _recall(registration, poses, costs, views, (10, 3, 1, 1), pool)
        assert not _recall(registration, poses, costs, views, (10, 3, 1, 1), pool)
    assert poses[0] is rest and costs[1] <= before[1] and (views[2:] > 0).any()
    assert costs[2] < 0.5 * before[2] and costs[3] < 0.5 * before[3]
    for frame in (2, 3):
        assert np.linalg.norm(registration.vertices(poses[frame]) - truth[frame], axis=1).mean() < 0.02
