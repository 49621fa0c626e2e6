"""The pipeline as the worker calls it: real generator, real fit, and everything a user can get wrong."""

import numpy as np
import pytest
import trimesh
from track4d.geometry.mesh import Mesh
from track4d.geometry.zbuffer import render
from track4d.pipeline import run
from track4d.progress import silent
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.messages import Request, Settings
from track4d_protocol.space import canonical_similarity, intrinsics, orbit_viewmats

SIZE = 96


def request(vertices: np.ndarray, faces: np.ndarray, **settings) -> Request:
    """A request as capture makes it, pictures by our own rasteriser."""
    similarity = canonical_similarity(vertices)
    mesh = Mesh(similarity.apply(vertices), faces)
    viewmats, Ks = orbit_viewmats(), intrinsics(SIZE, 4)
    rgba = render(mesh, mesh.vertices[None], viewmats, Ks, SIZE, shading=0.6 + 0.4 * np.sin(5 * mesh.vertices))[0]
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    arrays = {"vertices": vertices.astype(np.float32), "faces": faces.astype(np.int32), "views": (rgba * 255).astype(np.uint8),
              "viewmats": similarity.viewmats_to_world(viewmats).astype(np.float32), "Ks": Ks}
    chosen = {"prompt": "the capsule bends left", "frames": 6, "preset": "fast"} | settings
    return Request(Settings(**chosen), ["Capsule"], arrays)


@pytest.fixture(scope="module")
def capsule() -> tuple[np.ndarray, np.ndarray]:
    shape = trimesh.creation.capsule(height=2.0, radius=0.4, count=[10, 14])
    return shape.vertices * 3 + [10, -4, 2], shape.faces  # not in canonical space


@pytest.fixture(scope="module")
def result(capsule):
    return run(request(*capsule), silent)


def test_the_mesh_comes_back_moving(capsule, result) -> None:
    vertices = result.arrays["vertices"]
    assert vertices.shape == (6, len(capsule[0]), 3) and vertices.dtype == np.float32
    assert np.abs(vertices[0] - capsule[0]).max() < 1e-3  # the first frame is the user's mesh, where the user has it
    diagonal = np.linalg.norm(np.ptp(capsule[0], axis=0))
    moved = np.linalg.norm(vertices - vertices[0], axis=-1).max() / diagonal
    assert 0.02 < moved < 1.0


def test_the_gaussians_follow_the_mesh(capsule, result) -> None:
    means = result.arrays["gaussian_means"]
    assert means.shape[0] == 6 and means.shape[1] == result.report["gaussians"]
    for frame in (0, 3):  # every Gaussian lies within the moving mesh's box
        low, high = result.arrays["vertices"][frame].min(0) - 1e-2, result.arrays["vertices"][frame].max(0) + 1e-2
        assert ((means[frame] > low) & (means[frame] < high)).all()
    assert result.arrays["gaussian_scales"].mean() > 0.02  # in the user's units, not in canonical ones
    np.testing.assert_allclose(np.linalg.norm(result.arrays["gaussian_quats"], axis=-1), 1, atol=1e-4)
    sh = result.arrays["gaussian_sh"]  # the generator's light doesn't change: static colours
    assert sh.shape == (len(result.arrays["gaussian_colors"]), 1, 1, 3)
    np.testing.assert_allclose(0.5 + 0.2820948 * sh[:, 0, 0], result.arrays["gaussian_colors"], atol=1e-5)


def test_the_film_shows_it(result) -> None:
    film = result.arrays["video"]
    assert film.shape == (4, 6, SIZE, SIZE, 3) and film.dtype == np.uint8
    assert film.std() > 10 and np.abs(film[:, 0].astype(int) - film[:, 3]).max() > 30


def test_report_names_every_stage_and_no_warning(result) -> None:
    assert set(result.report["seconds"]) == {"canonicalise", "generate", "fit", "appearance", "sample"}
    assert result.report["warnings"] == []


def test_same_seed_same_motion(capsule, result) -> None:
    again = run(request(*capsule), silent).arrays["vertices"]
    np.testing.assert_array_equal(again, result.arrays["vertices"])
    other = run(request(*capsule, seed=7), silent).arrays["vertices"]
    assert np.abs(other - again).max() > 1e-3


def test_unknown_motion_is_a_warning_that_lists_the_known_ones(capsule) -> None:
    report = run(request(*capsule, prompt="the capsule is pondering"), silent).report
    (warning,) = report["warnings"]
    assert warning["code"] == "unknown_words" and "pondering" in warning["message"] and "bounce" in warning["action"]


def broken(capsule, **arrays) -> Request:
    bad = request(*capsule)
    bad.arrays.update(arrays)
    return bad


@pytest.mark.parametrize(("settings", "code"), [
    ({"prompt": "   "}, "empty_prompt"),
    ({"preset": "best"}, "bad_settings"),
    ({"frames": 1}, "bad_settings"),
    ({"frames": 100_000}, "bad_settings"),
    ({"task": "paint"}, "bad_settings"),
    ({"front": "up"}, "bad_front"),
])
def test_bad_settings_are_refused(capsule, settings, code) -> None:
    with pytest.raises(InputError) as caught:
        run(request(*capsule, **settings), silent)
    assert caught.value.code == code and caught.value.message and caught.value.action


@pytest.mark.parametrize(("name", "value", "code"), [
    ("vertices", np.zeros((0, 3), np.float32), "empty_mesh"),
    ("faces", np.zeros((0, 3), np.int32), "empty_mesh"),
    ("vertices", np.full((160, 3), np.nan, np.float32), "not_finite"),
    ("faces", np.array([[0, 1, 100_000]], np.int32), "bad_faces"),
    ("faces", np.array([[0, 0, 0]], np.int32), "degenerate_mesh"),
])
def test_bad_meshes_are_refused(capsule, name, value, code) -> None:
    with pytest.raises(InputError) as caught:
        run(broken(capsule, **{name: value}), silent)
    assert caught.value.code == code and caught.value.action


def test_missing_pictures_are_named(capsule) -> None:
    bad = request(*capsule)
    del bad.arrays["views"]
    with pytest.raises(InputError, match="views"):
        run(bad, silent)


@pytest.mark.parametrize("stage", ["canonicalise", "generate", "fit", "appearance", "sample"])
def test_cancel_stops_every_stage(capsule, stage) -> None:
    def report(name, step, total, preview=None, motion=None):
        if name == stage:
            raise Cancelled()

    with pytest.raises(Cancelled):
        run(request(*capsule), report)


def test_a_video_of_the_users_own(capsule) -> None:
    vertices, faces = capsule
    base = request(vertices, faces, task="fit", prompt="", frames=4)
    similarity = canonical_similarity(vertices)
    mesh = Mesh(similarity.apply(vertices), faces)
    height = mesh.vertices[:, 2] - mesh.vertices[:, 2].min()
    bend = np.stack([0 * height, 0.06 * height**2, 0 * height], 1)
    truth = np.stack([mesh.vertices + f * bend for f in range(4)]).astype(np.float32)
    shading = 0.6 + 0.4 * np.sin(5 * mesh.vertices)
    rgba = render(mesh, truth, orbit_viewmats(), intrinsics(SIZE, 4), SIZE, shading=shading)  # [F, V, H, W, 4]
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    del base.arrays["views"]
    base.arrays["video"] = (rgba.transpose(1, 0, 2, 3, 4) * 255).astype(np.uint8)
    moved = similarity.apply(run(base, silent).arrays["vertices"])
    error = np.linalg.norm(moved - truth, axis=-1)[1:].mean() / np.linalg.norm(truth - truth[0], axis=-1)[1:].mean()
    assert error < 0.35


def test_the_protocol_lets_in_just_the_presets_that_exist() -> None:
    from track4d.presets import PRESETS
    from track4d_protocol import messages

    assert set(PRESETS) == set(messages.PRESETS)


def test_cameras_step_back_from_a_motion_that_would_leave_the_picture() -> None:
    from track4d.geometry.zbuffer import project
    from track4d.pipeline import stepped_back

    jump = np.zeros((2, 1, 3), np.float32)
    jump[1, 0, 2] = 1.9
    Ks = intrinsics(SIZE, 4)
    assert project(jump, orbit_viewmats(), Ks)[0].min() < 0
    uv, _ = project(jump, stepped_back(orbit_viewmats(), jump), Ks)
    assert uv.min() > 0 and uv.max() < SIZE
    np.testing.assert_array_equal(stepped_back(orbit_viewmats(), jump * 0.5), orbit_viewmats())
