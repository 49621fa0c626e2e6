"""The motion generator with its shipped weights: what it answers, for whom, and how well."""

import numpy as np
import pytest
import torch
from track4d.geometry.mesh import Mesh
from track4d.training.judge import capture, make_trial, run_trial
from track4d.training.objects import make_object
from track4d.video.diffusion import add_noise
from track4d.video.generator import MotionGenerator, decode_video, encode_tracks, lift
from track4d.video.maps import surface_maps, surface_operator
from track4d.video.text import VERB_NAMES, tokenise
from track4d_protocol import space
from track4d_protocol.errors import Cancelled, InputError

VIEWMATS = space.orbit_viewmats()
KS = space.intrinsics(128, 4)


@pytest.fixture(scope="module")
def generator() -> MotionGenerator:
    return MotionGenerator.load()


@pytest.fixture(scope="module")
def dog() -> tuple[Mesh, np.ndarray]:
    return capture(make_object(np.random.default_rng(5), "quadruped"))


def generate(generator, subject, prompt="the dog is running", **options):
    mesh, views = subject
    return generator.generate(mesh, views, VIEWMATS, KS, prompt, **({"steps": 4} | options))


def test_a_sentence_goes_to_the_weights_that_have_learnt_it():
    natural, designed = MotionGenerator.shipped("the dog is running"), MotionGenerator.shipped("the dog is spinning")
    assert natural is MotionGenerator.shipped("a cat walks slowly") and designed is MotionGenerator.shipped("")
    assert designed is MotionGenerator.shipped("the dog is running plainly")  # the designed motion of a verb with real clips
    ours, others = natural.network.state_dict(), designed.network.state_dict()
    assert not torch.equal(ours["text.embedding.weight"], others["text.embedding.weight"])


def test_same_seed_same_motion(generator, dog):
    first, again, other = (generate(generator, dog, seed=seed).tracks for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_the_network_doubts_a_motion_under_another_sentence(generator, dog):
    """What `generate` chooses its answer by: true motions are likelier under their own sentence than under another."""
    grid, names = generator.network.config.grid, ("running", "nodding", "bouncing", "spinning")
    batch = torch.tensor([tokenise(f"the dog is {name}") for name in names])
    seen = generator.observe(*dog, VIEWMATS, KS)[0]
    noise = torch.randn(len(names), 1, 4, generator.network.config.latent, grid, grid, generator=torch.Generator().manual_seed(3))
    latents = torch.stack([generator.sample(seen, batch[k : k + 1], noise[k], 4, 1.0) for k in range(len(names))])
    observed = generator.network.observe(seen).repeated(len(names))
    doubts = torch.stack([generator.doubt(latents, observed, batch.roll(turn, 0)) for turn in range(len(names))])
    assert (doubts[0] < doubts[1:]).float().mean() > 0.9


def test_only_the_likeliest_of_four_is_finished(generator, dog, monkeypatch):
    doubts, sizes = [], []
    doubt, hook = generator.doubt, generator.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr(generator, "doubt", lambda *given: doubts.append(doubt(*given)) or doubts[-1])
    chosen = generate(generator, dog, guidance=1.0)
    hook.remove()
    assert sizes == [4, 4, 4, 4, 1]  # levels 1, .75 and .5, the choice, and .25
    assert doubts[0].shape == (4,) and doubts[0].std() > 0
    monkeypatch.setattr(generator, "doubt", lambda *given: -doubt(*given))
    assert np.abs(generate(generator, dog, guidance=1.0).tracks - chosen.tracks).max() > 1e-4


def test_real_motions_take_more_guidance(generator, dog):
    natural, plain = "the dog is running", "the dog is running plainly"
    assert np.array_equal(generate(generator, dog, natural).tracks, generate(generator, dog, natural, guidance=3.0).tracks)
    assert np.array_equal(generate(generator, dog, plain).tracks, generate(generator, dog, plain, guidance=1.5).tracks)
    assert not np.array_equal(generate(generator, dog, natural).tracks, generate(generator, dog, natural, guidance=1.5).tracks)


def test_guidance_keeps_to_its_interval(generator, dog, monkeypatch):
    levels, predictions = [], generator.predictions
    monkeypatch.setattr(generator, "predictions", lambda *given: levels.append(float(given[2][0])) or predictions(*given))
    generate(generator, dog, steps=5, guidance=2.0)
    assert levels == pytest.approx([0.8, 0.6, 0.4])
    levels.clear()
    generate(generator, dog, steps=5, guidance=1.0)
    assert not levels


@pytest.mark.parametrize("frames", [2, 8, 16, 33])
def test_any_number_of_frames(generator, dog, frames):
    motion = generate(generator, dog, frames=frames)
    count, grid = len(dog[0].vertices), generator.network.config.grid
    assert motion.tracks.shape == (frames, count, 3) and motion.tracks.dtype == np.float32
    assert motion.displacement.shape == (4, frames, grid, grid, 3) and motion.mask.shape == (4, grid, grid)
    assert motion.confidence.shape == (count,) and 0 <= motion.confidence.min() <= motion.confidence.max() <= 1
    assert np.array_equal(motion.tracks[0], dog[0].vertices)
    assert np.isfinite(motion.tracks).all() and np.abs(motion.tracks[1:] - motion.tracks[0]).max() > 0.01
    assert not motion.displacement[:, 0].any() and not motion.displacement[~np.repeat(motion.mask[:, None], frames, 1)].any()


def test_more_frames_show_the_same_motion(generator, dog):
    coarse, fine = (generate(generator, dog, frames=frames).tracks for frames in (16, 31))
    assert np.allclose(coarse, fine[::2], atol=1e-5)


def test_one_triangle_without_texture(generator):
    mesh = Mesh(np.array([[0.0, -0.8, -0.5], [0, 0.8, -0.5], [0, 0, 0.8]]), np.array([[0, 1, 2]]))
    views = np.zeros((4, 64, 64, 4), np.uint8)  # pictures that show nothing are no reason to fail
    motion = generator.generate(mesh, views, VIEWMATS, space.intrinsics(64, 4), "it spins", steps=2)
    assert motion.tracks.shape == (16, 3, 3) and np.isfinite(motion.tracks).all()


def test_a_mesh_that_no_pixel_sees_stays_still(generator):
    mesh = Mesh(np.array([[0.0, 0, 1e-4], [0, 1e-4, 0], [0, 0, -1e-4]]), np.array([[0, 1, 2]]))
    motion = generator.generate(mesh, np.zeros((4, 32, 32, 4), np.uint8), VIEWMATS, space.intrinsics(32, 4), "it jumps", steps=2)
    if not motion.mask.any():
        assert not motion.confidence.any() and np.array_equal(motion.tracks, np.repeat(mesh.vertices[None], 16, 0))


def test_split_vertices_move_together(generator, dog):
    mesh, views = dog
    soup = Mesh(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(mesh.faces.size).reshape(-1, 3))
    tracks = generate(generator, (soup, views)).tracks
    joined = np.full_like(tracks[:, : len(mesh.vertices)], np.nan)
    joined[:, mesh.faces.reshape(-1)] = tracks
    assert np.abs(joined[:, mesh.faces.reshape(-1)] - tracks).max() == 0


def test_cancelled_at_every_step(generator, dog):
    for stop in range(4):
        seen = []

        def report(stage, step, total, preview=None, stop=stop, seen=seen):
            seen.append((stage, step, total))
            if step == stop:
                raise Cancelled

        with pytest.raises(Cancelled):
            generate(generator, dog, report=report)
        assert seen == [("generate", k, 4) for k in range(stop + 1)]


def test_reports_every_step_and_the_end(generator, dog):
    seen = []
    generate(generator, dog, report=lambda stage, step, total, preview=None: seen.append(step))
    assert seen == [0, 1, 2, 3, 4]


def test_adverbs_scale_the_motion(generator, dog):
    def size(prompt):
        tracks = generate(generator, dog, prompt, steps=8).tracks
        return np.linalg.norm(tracks - tracks[0], axis=-1).mean()

    assert size("the dog bounces strongly") > 1.3 * size("the dog bounces slightly")


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A body's vertices, and the places and coverage of the pixels that see it."""
    thing = make_object(np.random.default_rng(11), "quadruped")
    return thing.vertices, *surface_maps(thing.vertices, thing.faces, thing.vertices, VIEWMATS, space.intrinsics(64, 4), 64)


def test_what_moves_as_one_piece_is_lifted_as_it_is(drawn):
    vertices, maps, coverage = drawn
    turn = np.array([[-2, 0.3, 0], [-0.3, -2, 0], [0, 0.5, 0.1]], np.float32)
    fields = (maps @ turn.T + 0.2).transpose(0, 3, 1, 2)[:, None]
    lifted, confidence = lift(vertices, fields, maps, coverage)
    assert np.abs(lifted[:, 0] - vertices @ turn.T - 0.2).max() < 0.02
    assert 0.8 < (confidence > 0).mean() <= 1


def test_what_bends_is_lifted_nearly_as_it_is(drawn):
    vertices, maps, coverage = drawn

    def bent(places):
        return np.sin(1.5 * places) + np.cos(places[..., ::-1])

    lifted, confidence = lift(vertices, bent(maps).transpose(0, 3, 1, 2)[:, None], maps, coverage)
    error = np.linalg.norm(lifted[:, 0] - bent(vertices), axis=-1)
    assert error[confidence > 0.5].mean() < 0.012 and error.mean() < 0.02


def test_a_few_pixels_are_enough_for_a_vertex(drawn):
    vertices, maps, coverage = drawn
    few = np.zeros_like(coverage)
    few[0][np.unravel_index(np.argsort(coverage[0], None)[-3:], coverage[0].shape)] = 1
    far = np.concatenate([vertices, [[50.0, 0, 0]]]).astype(np.float32)
    lifted, confidence = lift(far, maps.transpose(0, 3, 1, 2)[:, None], maps, few)
    assert np.isfinite(lifted).all() and confidence[-1] == 0


def test_the_surface_operator_draws_the_same_maps(dog):
    mesh, _ = dog
    Ks = space.intrinsics(32, 4)
    values = np.random.default_rng(0).normal(size=(len(mesh.vertices), 5)).astype(np.float32)
    maps, coverage = surface_maps(mesh.vertices, mesh.faces, values, VIEWMATS, Ks, 32)
    drawn = surface_operator(mesh.vertices, mesh.faces, VIEWMATS, Ks, 32) @ values
    assert np.allclose(drawn.reshape(maps.shape), maps, atol=1e-4) and (coverage > 0).any()


def test_denoising_a_true_motion_in_displacement_space(generator):
    """What 4D-SDS asks: a little noise on a true motion is taken off again, and the gradient reaches the vertices."""
    trial = make_trial(3, VERB_NAMES.index("bend left"))
    grid = generator.network.config.grid
    seen, _, _ = generator.observe(trial.mesh, trial.views, VIEWMATS, KS)
    rows = surface_operator(trial.mesh.vertices, trial.mesh.faces, VIEWMATS, space.intrinsics(grid, 4), grid)
    tracks = torch.from_numpy(trial.truth).requires_grad_()
    latent = encode_tracks(tracks, rows, 4)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    mask = seen[:, :, 7:]

    def error(prompt, level=0.6):
        clean = generator.denoise(add_noise(latent, noise, torch.tensor([level])), level, prompt, seen)
        return ((clean - latent).square() * mask).sum()

    with torch.no_grad():
        assert error(trial.prompt) < 0.5 * (latent.square() * mask).sum()
        assert error(trial.prompt) < error("the thing is jumping")
    error(trial.prompt).backward()
    assert tracks.grad is not None and torch.isfinite(tracks.grad).all() and tracks.grad.abs().max() > 0


def test_decoded_video_starts_with_the_capture(generator, dog):
    mesh, views = dog
    thing = make_object(np.random.default_rng(5), "quadruped")
    motion = generate(generator, dog, frames=4)
    video = decode_video(mesh, motion.tracks, VIEWMATS, KS, 128, thing.colors)
    assert video.shape == (4, 4, 128, 128, 4) and video.dtype == np.uint8
    shown, flat = (rgba[..., :3] * (rgba[..., 3:] / 255.0) for rgba in (video[:, 0], views))
    assert np.abs(shown - flat).mean() < 1
    assert (video[:, 1:] != video[:, :1]).any()


SURE = ("jump", "dance", "bounce", "squash and stretch", "spin", "shake", "sway", "twist", "bend left", "bend right", "pulse")


def test_shipped_weights_do_what_they_are_told(generator):
    """Verbs of the whole body; the model card says how well the others do."""
    trials = [make_trial(1, VERB_NAMES.index(name)) for name in SURE]
    scores = [run_trial(generator, trial, samples=1, steps=10)[0][0] for trial in trials]
    assert np.mean([score.verb == trial.action.verb for score, trial in zip(scores, trials)]) >= 0.9
    assert np.mean([score.error for score in scores]) < 0.08


def test_running_moves_the_feet_more_than_the_hips():
    ratios, generator = [], MotionGenerator.shipped("the fox is running")
    for seed in range(4):
        thing = make_object(np.random.default_rng([77, seed]), "quadruped")
        tracks = generate(generator, capture(thing), "the fox is running", steps=8).tracks
        travel = np.ptp(tracks[..., 0], axis=0)
        feet, hips = (
            np.concatenate([leg.members[part(leg.along)] for leg in thing.of("leg")])
            for part in (lambda along: along > 0.9, lambda along: along < 0.05)
        )
        ratios.append(travel[feet].mean() / travel[hips].mean())
    assert np.mean(ratios) > 1.5


@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_damaged_weights_are_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        MotionGenerator.load(path)
    assert caught.value.code in ("weights_missing", "bad_weights") and caught.value.action
