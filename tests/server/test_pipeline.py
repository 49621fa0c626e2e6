"""The pipeline as the worker calls it: real generator, real fit, and everything a user can get wrong."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
import trimesh
from track4d import pipeline
from track4d.geometry.mesh import Mesh
from track4d.geometry.zbuffer import render
from track4d.motion.hexplane import HexPlaneSize
from track4d.motion.reconstruct import PAPER, reconstruct_motion
from track4d.motion.refine import RefinePreset, refine_motion
from track4d.motion.sds import video_prior
from track4d.pipeline import run
from track4d.progress import silent
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.messages import Request, Settings
from track4d_protocol.space import Similarity, canonical_similarity, intrinsics, orbit_viewmats

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
    assert result.report["warnings"] == [] and result.report["still_psnr"] > 20


def test_same_seed_same_motion(capsule, result) -> None:
    again = run(request(*capsule), silent).arrays["vertices"]
    np.testing.assert_array_equal(again, result.arrays["vertices"])
    other = run(request(*capsule, seed=7), silent).arrays["vertices"]
    assert np.abs(other - again).max() > 1e-3


def test_a_loop_ends_where_it_began(capsule) -> None:
    vertices = run(request(*capsule, loop=True, frames=9), silent).arrays["vertices"]
    np.testing.assert_allclose(vertices[-1], vertices[0], atol=1e-4)
    assert np.linalg.norm(vertices - vertices[0], axis=-1).max() > 0.05


def test_a_mesh_larger_than_the_fit_works_with_moves_whole() -> None:
    """40,000 vertices: registered on a proxy, and every vertex of the user's mesh comes back."""
    ball = trimesh.creation.icosphere(subdivisions=6)
    vertices = ball.vertices * (1, 1, 2) + 4
    moving = run(request(vertices, ball.faces, frames=3), silent).arrays["vertices"]
    assert moving.shape == (3, 40962, 3)
    np.testing.assert_allclose(moving[0], vertices, atol=1e-3)
    assert np.linalg.norm(moving[2] - moving[0], axis=-1).max() > 0.1
    edges = ball.edges_unique
    lengths = np.linalg.norm(moving[:, edges[:, 0]] - moving[:, edges[:, 1]], axis=-1)
    assert np.quantile(lengths / lengths[0], 0.99) < 1.6  # nothing tears between the proxy's pieces


def test_unknown_motion_is_a_warning_that_lists_the_known_ones(capsule) -> None:
    report = run(request(*capsule, prompt="the capsule is pondering"), silent).report
    (warning,) = report["warnings"]
    assert warning["code"] == "unknown_words" and "pondering" in warning["message"] and "bounce" in warning["action"]


def test_a_prompt_longer_than_the_model_reads_is_a_warning() -> None:
    generator = pipeline.MotionGenerator.shipped("")
    (warning,) = pipeline.word_warnings(generator, "the capsule bends left " + "like a reed in a storm " * 70)
    assert warning["code"] == "long_prompt" and "143" in warning["message"] and warning["action"]
    assert pipeline.word_warnings(generator, "the capsule bends left") == []


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
    ({"model": "large"}, "bad_settings"),
    ({"front": "up"}, "bad_front"),
    ({"prompt": "the capsule bends " * 500}, "prompt_too_long"),
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


@pytest.mark.parametrize(("stills", "code"), [
    (np.zeros((4, SIZE, SIZE, 4), np.uint8), "empty_view"),
    (np.full((9, SIZE, SIZE, 4), 255, np.uint8), "too_many_views"),
    (np.full((4, SIZE, SIZE + 2, 4), 255, np.uint8), "bad_array"),  # not square
])
def test_bad_pictures_are_refused(capsule, stills, code) -> None:
    cameras = {name: np.resize(array, (len(stills), *array.shape[1:])) for name, array in
               (("viewmats", request(*capsule).arrays["viewmats"]), ("Ks", intrinsics(SIZE, 4)))}
    with pytest.raises(InputError) as caught:
        run(broken(capsule, views=stills, **cameras), silent)
    assert caught.value.code == code and caught.value.action


def test_one_picture_is_enough_and_the_report_says_what_it_did_not_show(capsule) -> None:
    one = request(*capsule)
    one.arrays |= {name: one.arrays[name][:1] for name in ("views", "viewmats", "Ks")}
    result = run(one, silent)
    assert result.arrays["video"].shape[0] == 1 and np.isfinite(result.arrays["vertices"]).all()
    (warning,) = result.report["warnings"]
    assert warning["code"] == "one_view" and "%" in warning["message"]


@pytest.mark.parametrize(("views", "frames", "size", "code"), [
    (9, 2, (32, 32), "video_too_long"), (1, 65, (32, 32), "video_too_long"), (4, 2, (31, 40), "bad_video_size"),
])
def test_bad_videos_are_refused(capsule, views, frames, size, code) -> None:
    bad = request(*capsule, task="fit", prompt="")
    cameras = {"viewmats": np.resize(bad.arrays["viewmats"], (views, 4, 4)), "Ks": intrinsics(32, views)}
    del bad.arrays["views"]
    bad.arrays |= cameras | {"video": np.zeros((views, frames, *size, 4), np.uint8)}
    with pytest.raises(InputError) as caught:
        run(bad, silent)
    assert caught.value.code == code and caught.value.action


@pytest.mark.parametrize("task", ["animate", "fit"])
def test_memory_is_planned_before_the_work_begins(capsule, task, monkeypatch) -> None:
    """64 frames of 8 views, and a result of as many, were measured to take 1.7 GB more than the request."""
    job = request(*capsule, task=task, prompt="it bends", frames=64)
    name, shape, needed = {"fit": ("video", (8, 64, 256, 256, 4), 1.7e9), "animate": ("views", (4, 512, 512, 4), 0.9e9)}[task]
    job.arrays[name] = np.broadcast_to(np.uint8(0), shape)
    for free, fits in ((0.8 * needed, False), (1.3 * needed, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if fits:
            pipeline.check_memory(job, pipeline.PRESETS["default"])
            continue
        with pytest.raises(InputError) as caught:
            pipeline.check_memory(job, pipeline.PRESETS["default"])
        assert caught.value.code == "too_little_memory" and "GB" in caught.value.message and "fewer" in caught.value.action


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


@pytest.mark.parametrize("stage", ["canonicalise", "appearance", "fit", "refine", "sample"])
def test_cancel_stops_every_stage_of_a_fit(capsule, monkeypatch, stage) -> None:
    quick = RefinePreset(rounds=1, steps=3, points=300, compared=100, rigid_samples=16)
    monkeypatch.setitem(pipeline.PRESETS, "fast", replace(pipeline.PRESETS["fast"], refine=quick))
    steps = []

    def report(name, step, total, preview=None, motion=None):
        steps.append((name, step))
        if name == stage and (step > 0 or stage not in ("fit", "refine")):  # in the middle, where there is one
            raise Cancelled()

    with pytest.raises(Cancelled):
        run(bent(capsule, 3)[0], report)
    assert steps[-1][0] == stage


def bent(capsule, frames: int, size: int = SIZE, **settings) -> tuple[Request, np.ndarray, Similarity]:
    """A request with a video of the capsule that bends, its vertices in canonical space [F, N, 3], and the way there."""
    vertices, faces = capsule
    base = request(vertices, faces, task="fit", prompt="", frames=frames, **settings)
    similarity = canonical_similarity(vertices)
    mesh = Mesh(similarity.apply(vertices), faces)
    height = mesh.vertices[:, 2] - mesh.vertices[:, 2].min()
    bend = np.stack([0 * height, 0.06 * height**2, 0 * height], 1)
    truth = np.stack([mesh.vertices + f * bend for f in range(frames)]).astype(np.float32)
    base.arrays["Ks"] = intrinsics(size, 4)
    rgba = render(mesh, truth, orbit_viewmats(), base.arrays["Ks"], size, shading=0.6 + 0.4 * np.sin(5 * mesh.vertices))
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    del base.arrays["views"]
    base.arrays["video"] = (rgba.transpose(1, 0, 2, 3, 4) * 255).astype(np.uint8)
    return base, truth, similarity


def error(found: np.ndarray, truth: np.ndarray) -> float:
    return np.linalg.norm(found - truth, axis=-1)[1:].mean() / np.linalg.norm(truth - truth[0], axis=-1)[1:].mean()


def test_a_video_of_the_users_own(capsule) -> None:
    base, truth, similarity = bent(capsule, 4)
    result = run(base, silent)
    assert error(similarity.apply(result.arrays["vertices"]), truth) < 0.35
    assert result.report["still_psnr"] > 20


def test_a_video_larger_than_the_fit_works_with(capsule) -> None:
    """The fit reduces it; the stills' Gaussians and the film must be seen by cameras of that size too."""
    base, truth, similarity = bent(capsule, 2, 320)
    result = run(base, silent)
    assert error(similarity.apply(result.arrays["vertices"]), truth) < 0.35
    shown = np.abs(result.arrays["video"][:, 1].astype(int) - 128).max(-1) > 20  # [V, 256, 256]
    given = np.stack([cv2.resize(view, (256, 256)) for view in base.arrays["video"][:, 1, ..., 3]]) > 127
    assert (shown & given).sum() > 0.8 * (shown | given).sum()
    assert result.report["still_psnr"] > 20


def test_refinement_gets_features_and_pins(capsule, monkeypatch) -> None:
    """The shipped network's features join the field, pinned regions keep their shape in it, and what is pinned stays put."""
    quick = RefinePreset(rounds=1, steps=3, points=300, compared=100, rigid_samples=16)
    monkeypatch.setitem(pipeline.PRESETS, "fast", replace(pipeline.PRESETS["fast"], refine=quick))
    given = {}

    def spy(*arguments, **options):
        given.update(options, features=arguments[5])
        given["refined"] = refine_motion(*arguments, **options)
        return given["refined"]

    monkeypatch.setattr(pipeline, "refine_motion", spy)
    base, _, _ = bent(capsule, 3)
    pin = (capsule[0][:, 2] < np.median(capsule[0][:, 2])).astype(np.float32)
    base.arrays["pin"] = pin
    vertices = run(base, silent).arrays["vertices"]
    assert given["features"].shape == (4, 3, 32, 16, 16) and given["refined"].steps == 3
    np.testing.assert_array_equal(given["pinned"], pin > 0.5)
    still = np.abs(vertices - vertices[:1]).max((0, 2))
    assert still[pin == 1].max() < 1e-4 < still[pin == 0].max()


def test_no_features_where_nothing_refines(capsule, monkeypatch) -> None:
    """And a video of one frame, which `fast` doesn't refine either, is a motion that stands still."""
    monkeypatch.setattr("track4d.video.features.video_features", lambda *_, **__: pytest.fail("features were computed"))
    base, _, _ = bent(capsule, 2)
    base.arrays["video"] = base.arrays["video"][:, :1]
    vertices = run(base, silent).arrays["vertices"]
    assert len(vertices) == 2 and np.abs(vertices - vertices[:1]).max() < 1e-5


def test_the_paper_preset_runs_whole_and_goes_on_from_a_checkpoint(capsule, monkeypatch, tmp_path) -> None:
    quick = replace(PAPER, reconstruction=4, distillation=4, frames_every=2, planes=HexPlaneSize(((8, 8, 8, 4),), 8))
    small = replace(pipeline.PRESETS["paper"], paper=quick, gaussians=400, appearance_steps=2)
    monkeypatch.setitem(pipeline.PRESETS, "paper", small)
    given = {}

    def spy(*arguments, motion_prior, **options):
        given.update(features=arguments[4], priors=0)

        def counted(tracks, generator):
            given["priors"] += 1
            return motion_prior(tracks, generator)

        return reconstruct_motion(*arguments, motion_prior=counted, **options, every=3)

    monkeypatch.setattr(pipeline, "reconstruct_motion", spy)
    base, _, _ = bent(capsule, 3)
    base.settings = replace(base.settings, preset="paper")
    whole = run(base, silent).arrays["vertices"]
    assert given["features"].shape[:2] == (4, 3) and given["priors"] == 4

    def stop(stage, step, total, preview=None, motion=None):
        if stage == "fit" and (step, total) == (7, 8):
            raise Cancelled()

    file = tmp_path / "job.checkpoint"
    with pytest.raises(Cancelled):
        run(base, stop, file)
    assert file.exists()
    again = run(base, silent, file).arrays["vertices"]
    assert given["priors"] == 2  # steps 6 and 7 alone
    np.testing.assert_array_equal(again, whole)


@pytest.fixture
def downloaded(published, tmp_path, monkeypatch) -> None:
    """The published weights, small and random, lie where `track4d generate --weights` leaves them."""
    from track4d.video.checkpoints import convert_published

    monkeypatch.setenv("TRACK4D_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("track4d.video.multiview_video.SIZE", 64)
    convert_published(published, tmp_path / "models" / "published")


@pytest.fixture
def paints_the_bend(capsule, downloaded, monkeypatch) -> SimpleNamespace:
    """Random weights paint noise, so the capsule that bends is painted over the model's video."""
    monkeypatch.setattr(pipeline, "FITTED_FRAMES", 6)
    given, truth, similarity = bent(capsule, 6, 64)
    generate, loops = pipeline.MultiViewVideo.generate, []

    def repainted(self, *arguments, **options):
        loops.append(options["loop"])
        video = generate(self, *arguments, **options, steps=4)
        rgba = given.arrays["video"].astype(np.float32)
        alpha = rgba[..., 3:] / 255
        video[..., :3] = rgba[..., :3] * alpha + 127 * (1 - alpha)
        return video

    monkeypatch.setattr(pipeline.MultiViewVideo, "generate", repainted)
    return SimpleNamespace(truth=truth, similarity=similarity, loops=loops)


def test_the_published_model_paints_a_video_that_is_fitted(capsule, paints_the_bend) -> None:
    stages = []
    asked = request(*capsule, model="published", frames=6, prompt="it bends " * 40)
    result = run(asked, lambda stage, *_, **__: stages.append(stage))
    assert stages.count("generate") > 4 and paints_the_bend.loops == [False]
    assert error(paints_the_bend.similarity.apply(result.arrays["vertices"]), paints_the_bend.truth) < 0.35
    assert result.report["model"].startswith("MV-VDM") and {"generate", "fit", "refine"} <= set(result.report["seconds"])
    assert [w["code"] for w in result.report["warnings"]] == ["long_prompt", "model_licences"]
    assert "apache-2.0" in result.report["warnings"][1]["message"]


def test_the_paper_preset_distils_the_model_that_painted(capsule, paints_the_bend, monkeypatch) -> None:
    quick = replace(PAPER, reconstruction=1, distillation=2, planes=HexPlaneSize(((8, 8, 8, 4),), 8))
    small = replace(pipeline.PRESETS["paper"], paper=quick, gaussians=400, appearance_steps=2)
    monkeypatch.setitem(pipeline.PRESETS, "paper", small)
    monkeypatch.setattr(pipeline, "motion_prior", lambda *_: pytest.fail("the motion generator has painted nothing"))
    losses = []

    def spy(*arguments):
        prior = video_prior(*arguments)
        return lambda pictures, generator: losses.append(prior(pictures, generator)) or losses[-1]

    monkeypatch.setattr(pipeline, "video_prior", spy)
    result = run(request(*capsule, model="published", preset="paper", loop=True), silent)
    assert paints_the_bend.loops == [True]
    assert len(losses) == 2 and all(loss.requires_grad and float(loss.detach()) > 0 for loss in losses)
    assert np.isfinite(result.arrays["vertices"]).all()


def test_a_painting_of_noise_is_refused(capsule, downloaded, monkeypatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 16, 64, 64, 4)).astype(np.uint8)
    noise[..., 3] = 255
    monkeypatch.setattr(pipeline.MultiViewVideo, "generate", lambda *_, **__: noise)
    with pytest.raises(InputError) as caught:
        run(request(*capsule, model="published"), silent)
    assert caught.value.code == "nothing_painted" and "seed" in caught.value.action


def test_published_weights_that_are_absent_are_named_with_the_way_to_get_them(capsule, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACK4D_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(InputError) as caught:
        run(request(*capsule, model="published"), silent)
    assert caught.value.code == "checkpoint_missing" and "hf download yanqinJiang/animate3d" in caught.value.action


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
