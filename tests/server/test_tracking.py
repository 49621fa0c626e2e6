"""Exact tracks, optical flow, query points and figures; `track4d track` on pictures and videos."""

import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from track4d.commands.track import overlay, read_video, write_video
from track4d.geometry import zbuffer
from track4d.geometry.mesh import Mesh
from track4d.tracking import MovingMesh, Tracks, query_grid, sample_queries, track
from track4d.tracking.exact import attach, surface_positions
from track4d.tracking.tracks import compare
from track4d_protocol.errors import InputError
from track4d_protocol.space import intrinsics, orbit_viewmats
from typer.testing import CliRunner

SIZE = 96


def moving_ball(degrees: float) -> tuple[MovingMesh, np.ndarray]:
    """A textured ball that turns about the vertical axis by so much a frame and drifts, and its video of two views."""
    sphere = trimesh.creation.icosphere(4, 0.7)
    angles = np.radians(degrees * np.arange(6))
    turn = np.stack([[[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]] for a in angles])
    vertices = np.einsum("fij,nj->fni", turn, sphere.vertices) + np.linspace(0, 0.1, 6)[:, None, None] * [0, 1, 0.5]
    viewmats, Ks = orbit_viewmats()[:2], intrinsics(SIZE, 2)
    scene = MovingMesh(vertices.astype(np.float32), sphere.faces.astype(np.int32), viewmats, Ks)
    shading = 0.5 + 0.2 * np.sin(sphere.vertices * [17, 13, 19]).sum(1) + 0.1 * np.sin(sphere.vertices * 41).sum(1)
    mesh = Mesh(scene.vertices[0], scene.faces, textures=[np.ones((1, 1, 3), np.float32)])
    rgba = zbuffer.straight(zbuffer.render(mesh, scene.vertices, viewmats, Ks, SIZE, 2, shading.clip(0, 1)))
    return scene, (rgba.swapaxes(0, 1).clip(0, 1) * 255 + 0.5).astype(np.uint8)  # [V, F, S, S, 4]


@pytest.fixture(scope="module")
def ball():
    return moving_ball(4)


@pytest.fixture(scope="module")
def queries(ball):
    return sample_queries(ball[1][:, 0, :, :, 3] > 127, np.random.default_rng(0), per_view=40)


def test_surface_points_project_onto_their_pixels(ball):
    scene, video = ball
    points = np.random.default_rng(1).uniform(30, 66, (200, 2)).astype(np.float32)
    triangles, weights = attach(scene, 0, 2, points, SIZE)
    assert (triangles >= 0).all() and np.allclose(weights.sum(1), 1, atol=1e-5) and (weights >= 0).all()
    again, depth = zbuffer.project(surface_positions(scene, triangles, weights)[2:3], scene.viewmats[:1], scene.Ks[:1])
    assert np.abs(again[0, 0] - points).max() < 0.02
    radius = np.linalg.norm(surface_positions(scene, triangles, weights)[2] - scene.vertices[2].mean(0), axis=1)
    assert np.abs(radius - 0.7).max() < 0.01  # on the ball's surface
    assert (depth[0, 0] < np.linalg.norm(scene.viewmats[0, :3, 3])).all()  # on its near side


def test_exact_tracks_equal_geometry(queries):
    scene, video = moving_ball(25)
    tracks = track(video, queries, scene)
    for v in range(2):
        triangles, weights = attach(scene, v, 0, queries[v, :, 1:], SIZE)
        positions = surface_positions(scene, triangles, weights)
        eye = np.linalg.inv(scene.viewmats[v])[:3, 3]
        expected, _ = zbuffer.project(positions, scene.viewmats[v:v + 1], scene.Ks[v:v + 1])
        assert np.abs(tracks.points[v] - expected[:, 0]).max() < 1e-3
        centre = scene.vertices.mean(1)
        normals = positions - centre[:, None]
        facing = np.einsum("fni,fni->fn", eye - positions, normals) / 0.7 / np.linalg.norm(eye - positions, axis=2)
        clear = np.abs(facing) > 0.15  # nearer to the limb of a facetted ball, a quarter of a pixel decides
        assert np.array_equal((facing > 0)[clear], tracks.visibility[v][clear])
        assert ((facing > 0) == tracks.visibility[v]).mean() > 0.95
    assert (~tracks.visibility).mean() > 0.2 and tracks.visibility[:, 0].all() and (tracks.confidence == 1).all()


def test_points_off_the_object_stay_and_are_hidden(ball):
    scene, video = ball
    queries = np.array([[[0, 2.5, 3], [3, 94, 94]]] * 2, np.float32)
    tracks = track(video, queries, scene)
    assert not tracks.visibility.any() and not tracks.confidence.any()
    assert np.array_equal(tracks.points[:, 5], queries[..., 1:])


def test_a_later_query_is_tracked_both_ways(ball):
    scene, video = ball
    early = np.array([[[0, 48, 48], [0, 40, 52]]] * 2, np.float32)
    first = track(video, early, scene)
    later = np.concatenate([np.full((2, 2, 1), 3), first.points[:, 3]], -1).astype(np.float32)
    assert np.abs(track(video, later, scene).points - first.points).max() < 0.05
    flow = track(video, later)
    assert np.array_equal(flow.points[:, 3], later[..., 1:])
    assert np.linalg.norm(flow.points - first.points, axis=-1).mean() < 1


def test_flow_follows_texture_and_knows_what_it_loses(ball, queries):
    scene, video = ball
    truth, flow = track(video, queries, scene), track(video, queries)
    figures = compare(flow, truth, queries, (SIZE, SIZE))
    still = compare(truth._replace(points=np.repeat(truth.points[:, :1], 6, 1)), truth, queries, (SIZE, SIZE))
    assert figures["epe"] < 0.25 * still["epe"] and figures["delta_4"] > 0.9
    miss = np.linalg.norm(flow.points - truth.points, axis=-1)
    assert miss[flow.visibility].mean() < miss[~flow.visibility].mean()
    assert flow.confidence[flow.visibility].mean() > flow.confidence[~flow.visibility].mean()


def test_figures_of_tracks_by_hand():
    queries = np.array([[[0, 10, 10], [1, 20, 20]]], np.float32)
    truth = Tracks(np.zeros((1, 3, 2, 2), np.float32), np.ones((1, 3, 2), bool), np.ones((1, 3, 2), np.float32))
    truth.visibility[0, 2, 0] = False  # counted are: point 0 in frames 1 and 2, point 1 in frame 2
    points = np.zeros((1, 3, 2, 2), np.float32)
    points[0, 1, 0] = [0, 3]  # within 4 pixels
    points[0, 2, 1] = [0, 40]
    figures = compare(Tracks(points, np.ones((1, 3, 2), bool), truth.confidence), truth, queries, (256, 256))
    assert figures["occlusion_accuracy"] == pytest.approx(2 / 3)
    assert [figures[f"delta_{k}"] for k in (1, 2, 4, 8, 16)] == [0, 0, 0.5, 0.5, 0.5]
    assert figures["delta_avg"] == pytest.approx(0.3)
    assert figures["average_jaccard"] == pytest.approx(3 / 5 * 1 / 4)  # one right, two wrong claims, two seen
    assert figures["epe"] == pytest.approx(21.5)
    perfect = compare(truth, truth, queries, (256, 256))
    assert perfect["average_jaccard"] == perfect["delta_avg"] == perfect["occlusion_accuracy"] == 1


def test_the_papers_query_set(ball):
    masks = ball[1][:, 0, :, :, 3] > 127
    chosen = sample_queries(masks, np.random.default_rng(3))
    assert chosen.shape == (2, 8, 3) and (chosen[..., 0] == 0).all()
    grid = {tuple(point) for point in query_grid(15, SIZE, SIZE).tolist()}
    assert len(grid) == 225 and all(tuple(point) in grid for point in chosen.reshape(-1, 3).tolist())
    for mask, points in zip(masks, chosen):
        assert mask[points[:, 2].astype(int), points[:, 1].astype(int)].all() and len(np.unique(points, axis=0)) == 8
    assert np.array_equal(chosen, sample_queries(masks, np.random.default_rng(3)))
    few = np.zeros_like(masks)
    few[:, 40:56, 40:56] = True
    assert sample_queries(few, np.random.default_rng(3)).shape == (2, 8, 3)
    with pytest.raises(InputError, match="empty_mask"):
        sample_queries(np.zeros_like(masks), np.random.default_rng(3))


@pytest.mark.parametrize(("video", "queries", "code"), [
    (np.zeros((1, 2, 8, 8, 3), np.float32), [[[0, 1, 1]]], "bad_video"),
    (np.zeros((2, 8, 8, 3), np.uint8), [[[0, 1, 1]]], "bad_video"),
    (np.zeros((1, 2, 8, 8, 3), np.uint8), [[0, 1, 1]], "bad_queries"),
    (np.zeros((1, 2, 8, 8, 3), np.uint8), [[[0, 1, 1]]] * 2, "bad_queries"),
    (np.zeros((1, 2, 8, 8, 3), np.uint8), [[[2, 1, 1]]], "bad_query_frame"),
    (np.zeros((1, 2, 8, 8, 3), np.uint8), [[[0.5, 1, 1]]], "bad_query_frame"),
    (np.zeros((1, 2, 8, 8, 3), np.uint8), [[[0, np.nan, 1]]], "bad_query_frame"),
])
def test_bad_input_is_refused(video, queries, code):
    with pytest.raises(InputError) as error:
        track(video, queries)
    assert error.value.code == code


def test_real_clip_is_tracked_by_flow(shared):
    pytest.importorskip("bpy", reason="real clips are played in Blender's Python")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import recover

    truth = recover.load_truth("gull", shared / "assets")
    truth.vertices = truth.vertices[:5]
    video, viewmats, Ks = recover.film(truth, degraded=False)
    queries = sample_queries(video[:, 0, :, :, 3] > 127, np.random.default_rng(0))
    exact = track(video, queries, MovingMesh(truth.vertices, truth.mesh.faces, viewmats, Ks))
    figures = compare(track(video, queries), exact, queries, video.shape[2:4])
    assert exact.visibility[:, 0].all() and exact.visibility.mean() > 0.6
    assert figures["delta_avg"] > 0.6


def run(*arguments: object):
    from track4d.cli import app

    return CliRunner().invoke(app, ["track", *map(str, arguments)])


def test_command_tracks_folders_and_videos(ball, tmp_path):
    folder = tmp_path / "ball"
    folder.mkdir()
    for f, picture in enumerate(ball[1][0]):
        Image.fromarray(picture).save(folder / f"{f:03}.png")
    write_video(tmp_path / "clip.mp4", np.repeat(ball[1][0, :, :95, :93, :3], 2, 1), 24)  # odd width
    result = run(folder, tmp_path / "clip.mp4", "-o", tmp_path / "out", "--grid", 7)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out" / "ball.npz") as found:
        expected = track(ball[1][:1], found["queries"][None])
        assert 0 < len(found["queries"]) < 49  # only points on the object
        assert np.array_equal(found["points"], expected.points[0])
        assert np.array_equal(found["visibility"], expected.visibility[0])
    drawn, rate = read_video(tmp_path / "out" / "ball.mp4")
    assert drawn.shape == (6, 480, 480, 4) and rate == 16
    assert np.ptp(drawn[0, ..., :3].astype(int), axis=-1).max() > 150  # coloured points on a grey ball
    with np.load(tmp_path / "out" / "clip.npz") as found:
        assert found["points"].shape == (6, 49, 2) and found["size"].tolist() == [190, 94]
    assert read_video(tmp_path / "out" / "clip.mp4")[1] == 24
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ball.mp4", "ball.npz", "clip.mp4", "clip.npz"]


def test_command_with_a_mask_and_a_later_frame(ball, tmp_path):
    write_video(tmp_path / "clip.mp4", ball[1][0, ..., :3], 16)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    result = run(tmp_path / "clip.mp4", "-o", tmp_path, "--grid", 4, "--frame", 2, "--mask", tmp_path / "mask.png")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "clip.npz") as found:
        assert len(found["queries"]) == 8 and (found["queries"][:, 0] == 2).all()
        assert np.array_equal(found["points"][2], found["queries"][:, 1:])


@pytest.mark.parametrize(("arguments", "code"), [
    (["absent.mp4"], "no_video"), (["text.mp4"], "unreadable_video"), (["empty"], "unreadable_video"),
    (["sizes"], "uneven_pictures"), (["good", "--frame", 9], "bad_query_frame"),
    (["good", "--mask", "text.mp4"], "unreadable_mask"), (["good", "--mask", "small.png"], "mask_size"),
    (["good", "good"], "same_names"),
    (["good", "--weights", "absent.pth"], "checkpoint_missing"),
])
def test_command_refuses_with_a_reason(tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video")
    for name, sizes in (("empty", []), ("sizes", [32, 40]), ("good", [32, 32])):
        Path(name).mkdir()
        for f, size in enumerate(sizes):
            Image.new("RGB", (size, size), "grey").save(f"{name}/{f}.png")
    Image.new("L", (8, 8), 255).save("small.png")
    result = run(*arguments, "-o", "out")
    assert isinstance(result.exception, InputError) and result.exception.code == code


def test_hidden_points_are_drawn_as_rings():
    video = np.full((1, 600, 600, 4), 255, np.uint8)
    tracks = Tracks(np.array([[[[100.5, 100.5], [300.5, 300.5]]]], np.float32), np.array([[[True, False]]]), np.ones((1, 1, 2)))
    drawn = overlay(video, tracks)[0].astype(int)
    assert np.ptp(drawn[100, 100]) > 100 and np.ptp(drawn[300, 300]) < 60 and np.ptp(drawn[300, 303]) > 60
