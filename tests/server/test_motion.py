"""Stage Two: nodes, shading, the motion field and the whole fit on small films of known motions."""

import sys
from pathlib import Path

import numpy as np
import pytest
from track4d.geometry.mesh import Mesh, weld
from track4d.motion import nodes as nodes_module
from track4d.motion.appearance import estimate_shading
from track4d.motion.field import MotionField
from track4d.motion.fit import DEFAULT, FAST, Tracks3D, fit_motion
from track4d.motion.nodes import build_nodes, surface_graph
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.space import intrinsics

sys.path.insert(0, str(Path(__file__).parent))
from films import KS, SIZE, TINY, VIEWMATS, bend, capsule, error, film, noise_texture  # noqa: E402


@pytest.fixture(scope="module")
def bent() -> tuple[Mesh, np.ndarray, np.ndarray]:
    mesh = capsule()
    truth = bend(mesh.vertices)
    return mesh, truth, film(mesh, truth)


def test_known_bend_is_recovered(bent):
    mesh, truth, video = bent
    field = fit_motion(mesh, video, VIEWMATS, KS, preset=FAST)
    assert error(field.vertices, truth) < 0.2
    np.testing.assert_array_equal(field.vertices[0], mesh.vertices)
    assert field.confidence.shape == truth.shape[:2]
    assert field.confidence.min() >= 0 and 0.5 <= np.median(field.confidence) <= 1


def test_vertices_that_share_a_place_stay_together(bent):
    mesh, _, video = bent
    field = fit_motion(mesh, video[:, :2], VIEWMATS, KS, preset=TINY)
    first, inverse = weld(mesh.vertices)
    assert len(first) < len(inverse)
    np.testing.assert_allclose(field.vertices, field.vertices[:, first][:, inverse], atol=5e-5)


def test_same_seed_same_motion(bent):
    mesh, _, video = bent
    results = [fit_motion(mesh, video[:, :2], VIEWMATS, KS, preset=TINY, seed=s).vertices for s in (3, 3, 4)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_larger_pictures_and_plain_backgrounds(bent):
    mesh, truth, _ = bent
    video = film(mesh, truth[:2], 512)
    alpha = video[..., 3:].astype(np.float32) / 255
    on_white = (video[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    field = fit_motion(mesh, on_white, VIEWMATS, intrinsics(512, 4), preset=TINY)
    assert error(field.vertices, truth[:2]) < 0.3


def test_tracks_carry_the_fit_and_rigidity_the_hidden_part(bent):
    mesh, truth, video = bent
    rng = np.random.default_rng(0)
    unknown = mesh.vertices[:, 2] < -0.45  # no track there; the video shows nothing moving there either
    tracks = truth + rng.normal(0, 0.004, truth.shape).astype(np.float32)
    tracks[:, unknown] = 5.0
    field = fit_motion(mesh, video, VIEWMATS, KS, tracks=Tracks3D(tracks, (~unknown).astype(np.float32)), preset=TINY)
    assert error(field.vertices, truth) < 0.2
    assert np.linalg.norm(field.vertices - truth, axis=2)[:, unknown].max() < 0.1
    edges = mesh.edges()
    length = np.linalg.norm(field.vertices[:, edges[:, 0]] - field.vertices[:, edges[:, 1]], axis=2)
    real = length[0] > 1e-3
    ratio = length[1:, real] / length[0, real]
    assert np.quantile(np.maximum(ratio, 1 / ratio), 0.99) < 1.6


def test_pieces_out_of_sight_follow_their_neighbours():
    outer = capsule()
    inner = capsule(8, 8, 0.3, 0.08)
    mesh = Mesh(np.concatenate([outer.vertices, inner.vertices]),
                np.concatenate([outer.faces, inner.faces + len(outer.vertices)]),
                np.concatenate([outer.uvs, inner.uvs]), None, outer.textures)
    truth = mesh.vertices[None] + np.array([[0, 0, 0], [0.05, 0.02, 0.03], [0.1, 0.04, 0.06]], np.float32)[:, None]
    field = fit_motion(mesh, film(mesh, truth), VIEWMATS, KS, preset=TINY)
    hidden = slice(len(outer.vertices), None)
    assert field.confidence[:, hidden].max() == 0
    assert error(field.vertices[:, hidden], truth[:, hidden]) < 0.2


def test_cancel_stops_the_fit(bent):
    mesh, _, video = bent
    calls = []

    def report(stage, step, total, preview=None):
        calls.append((stage, step, total))
        if step >= 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        fit_motion(mesh, video, VIEWMATS, KS, preset=DEFAULT, report=report)
    assert calls[-1] == ("fit", 2, 15)


def test_progress_reaches_its_total(bent):
    mesh, _, video = bent
    calls = []
    fit_motion(mesh, video[:, :3], VIEWMATS, KS, preset=TINY,
               report=lambda stage, step, total, preview=None: calls.append((step, total, preview)))
    assert [step for step, _, _ in calls] == sorted(step for step, _, _ in calls)
    assert calls[-1][:2] == (4, 4)
    assert calls[-1][2].shape == (SIZE, SIZE, 3) and calls[-1][2].dtype == np.uint8


def refused(code: str, *arguments, **keywords) -> InputError:
    with pytest.raises(InputError) as caught:
        fit_motion(*arguments, preset=TINY, **keywords)
    assert caught.value.code == code
    assert caught.value.action
    return caught.value


def test_another_mesh_is_refused_with_the_number(bent):
    _, _, video = bent
    wide = capsule()
    wide.vertices[:, 1] *= 3
    assert "%" in refused("video_mismatch", wide, video, VIEWMATS, KS).message


def test_other_colours_are_refused(bent):
    mesh, _, video = bent
    black_and_white = Mesh(mesh.vertices, mesh.faces, mesh.uvs, None, [(noise_texture(seed=5) > 0.5).astype(np.float32)])
    refused("video_mismatch", black_and_white, video, VIEWMATS, KS)


def test_unusable_videos_are_refused(bent):
    mesh, _, video = bent
    empty = video.copy()
    empty[2] = 0
    assert "View 2" in refused("empty_view", mesh, empty, VIEWMATS, KS).message
    clutter = np.random.default_rng(0).integers(0, 255, video[..., :3].shape).astype(np.uint8)
    refused("no_mask", mesh, clutter, VIEWMATS, KS)
    black = np.zeros_like(video[..., :3])
    refused("empty_view", mesh, black, VIEWMATS, KS)
    refused("bad_video", mesh, video.astype(np.float32), VIEWMATS, KS)
    refused("bad_video", mesh, video[0], VIEWMATS, KS)
    refused("bad_video", mesh, video[:, :0], VIEWMATS, KS)
    refused("cut_off", mesh, video[..., :64, :], VIEWMATS, KS)
    refused("bad_video_size", mesh, video[..., :16, :16, :], VIEWMATS, KS)
    refused("bad_cameras", mesh, video, VIEWMATS[:3], KS)
    refused("bad_cameras", mesh, video, VIEWMATS * np.nan, KS)
    away = VIEWMATS.copy()
    away[:, 2, 3] = -3
    refused("video_mismatch", mesh, video, away, KS)
    refused("bad_tracks", mesh, video, VIEWMATS, KS, tracks=Tracks3D(np.zeros((2, 3, 3)), np.zeros(3)))


def test_object_that_leaves_the_picture():
    mesh = capsule()
    truth = mesh.vertices[None] + np.array([0, 0, 0.2], np.float32) * np.arange(4)[:, None, None]
    video = film(mesh, truth)
    assert video[:, 0, 0, :, 3].max() == 0 and video[:, -1, 0, :, 3].max() == 255  # inside at first, cut at last
    field = fit_motion(mesh, video, VIEWMATS, KS, preset=FAST)
    assert error(field.vertices, truth) < 0.2


def test_one_frame_is_the_mesh_itself(bent):
    mesh, _, video = bent
    field = fit_motion(mesh, video[:, :1], VIEWMATS, KS, preset=TINY)
    np.testing.assert_array_equal(field.vertices, mesh.vertices[None])


def test_a_cube_of_twelve_triangles():
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * 0.4
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
                      [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])
    uvs = np.tile(np.array([[[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]], np.float32), (6, 1, 1))
    mesh = Mesh(corners, faces, uvs, None, [noise_texture()])
    truth = mesh.vertices[None] + np.array([[0, 0, 0], [0.05, 0, 0.05]], np.float32)[:, None]
    field = fit_motion(mesh, film(mesh, truth), VIEWMATS, KS, preset=FAST)
    assert error(field.vertices, truth) < 0.2


def test_faces_without_area_and_loose_vertices(bent):
    mesh, truth, video = bent
    count = len(mesh.vertices)
    dirty = Mesh(np.concatenate([mesh.vertices, [[0, 0, 0.9], [0.2, 0.2, 0.2]]]),
                 np.concatenate([mesh.faces, [[0, 0, 1], [5, 6, 6], [count, count, count]]]),
                 np.concatenate([mesh.uvs, np.zeros((3, 3, 2))]), None, mesh.textures)
    field = fit_motion(dirty, video[:, :2], VIEWMATS, KS, preset=TINY)
    assert np.isfinite(field.vertices).all()
    assert error(field.vertices[:, :count], truth[:2]) < 0.3


def test_large_mesh_goes_through_a_proxy():
    mesh = capsule(250, 240)  # 60,000 vertices
    assert len(weld(mesh.vertices)[0]) > nodes_module.LARGEST_SURFACE
    truth = bend(mesh.vertices, 2, 0.2)
    field = fit_motion(mesh, film(mesh, truth, 64), VIEWMATS, intrinsics(64, 4), np.ones((len(mesh.vertices), 3)), preset=TINY)
    assert error(field.vertices, truth) < 0.3
    edges = mesh.edges()[::7]
    length = np.linalg.norm(field.vertices[:, edges[:, 0]] - field.vertices[:, edges[:, 1]], axis=2)
    real = length[0] > 1e-4
    ratio = length[1, real] / length[0, real]
    assert np.quantile(np.maximum(ratio, 1 / ratio), 0.99) < 1.3  # smooth: no steps between clusters


def test_nodes_reproduce_rest_and_rigid_motion():
    mesh = capsule()
    first, inverse = weld(mesh.vertices)
    surface = Mesh(mesh.vertices[first], inverse[mesh.faces])
    nodes = build_nodes(surface, 50)
    rest = np.tile(np.eye(3), (50, 1, 1))
    np.testing.assert_allclose(nodes.pose(rest, nodes.rest), surface.vertices, atol=1e-6)
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    shift = np.array([0.1, 0.2, 0.3])
    moved = nodes.pose(np.tile(turn, (50, 1, 1)), nodes.rest @ turn.T + shift)
    np.testing.assert_allclose(moved, surface.vertices @ turn.T + shift, atol=1e-6)


def test_pieces_are_bridged_at_their_closest_places():
    rng = np.random.default_rng(0)
    line = np.stack([np.linspace(0, 1, 30), np.zeros(30), np.zeros(30)], 1)
    big = np.stack([np.repeat(np.linspace(0, 1, 20), 20), np.tile(np.linspace(0, 1, 20), 20), np.full(400, 0.3)], 1)
    loose = rng.random((5, 3)) + [0, 0, 2]
    vertices = np.concatenate([line, big, loose])
    chain = np.stack([np.arange(29), np.arange(1, 30)], 1)
    grid = 30 + np.concatenate([np.stack([k := np.arange(400)[np.arange(400) % 20 < 19], k + 1], 1),
                                np.stack([np.arange(380), np.arange(20, 400)], 1)])
    graph = surface_graph(vertices, np.concatenate([chain, grid]))
    from scipy.sparse.csgraph import connected_components
    assert connected_components(graph, directed=False)[0] == 1
    across = graph[:30, 30:430].tocoo()
    assert 1 <= across.nnz <= 60
    assert across.data.max() < 0.5


def test_shading_is_found_and_extended_to_hidden_surface():
    mesh = capsule()
    normals = mesh.vertex_normals()
    light = (0.5 + 0.5 * np.maximum(normals @ np.array([0.6, 0.0, 0.8]), 0))[:, None] * np.array([1.0, 0.95, 0.85])
    still = film(mesh, mesh.vertices[None], SIZE, light.astype(np.float32))[:, 0]
    gain = estimate_shading(mesh, still, VIEWMATS, KS)
    assert gain.shape == light.shape
    assert np.abs(gain - light).mean() < 0.03
    seen_from_two = estimate_shading(mesh, still[:2], VIEWMATS[:2], KS[:2])
    assert np.isfinite(seen_from_two).all()
    assert np.abs(seen_from_two - light).mean() < 0.12


def test_field_is_exact_at_frames_and_smooth_between():
    moments = np.arange(16)
    path = np.stack([np.sin(moments / 5), np.cos(moments / 5), moments / 15], 1)[:, None].astype(np.float32)
    field = MotionField(np.repeat(path, 3, 1), np.ones((16, 3), np.float32))
    np.testing.assert_array_equal(field.sample(field.times), field.vertices)
    dense = field.sample(np.linspace(-1, 1, 151))
    fine = np.arange(151) / 10
    np.testing.assert_allclose(dense[:, 0, 0], np.sin(fine / 5), atol=1e-3)
    assert np.abs(np.diff(dense, 2, axis=0)).max() < 2 * (0.1 / 5) ** 2
    with pytest.raises(InputError):
        field.sample([1.1])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_field_with_few_frames(frames):
    vertices = np.random.default_rng(0).random((frames, 5, 3)).astype(np.float32)
    field = MotionField(vertices, np.ones((frames, 5), np.float32))
    np.testing.assert_array_equal(field.sample(field.times), vertices)
    assert np.isfinite(field.sample(np.linspace(-1, 1, 7))).all()
