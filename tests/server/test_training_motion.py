"""The generator's training: its data are exact, its runs repeatable."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from track4d.training import data, motion
from track4d.training.actions import draw_action
from track4d.training.clips import draw_clip, load_clips
from track4d.training.motion import TrainingSettings, diffusion_loss, train
from track4d.training.objects import PLANS, make_object
from track4d.training.verbs import Action, animate, mirrored
from track4d.video.diffusion import BASIS_FRAMES, frame_times, log_snr, temporal_basis
from track4d.video.generator import MotionGenerator
from track4d.video.motion_unet import MotionUNet, UNetConfig, patches, pixels, turned
from track4d.video.parts import BOUND, affine_fits, cells
from track4d.video.text import VERB_NAMES, VERBS, tokenise
from track4d_protocol.errors import Cancelled, InputError

TIMES = frame_times(BASIS_FRAMES).numpy()
TINY = UNetConfig(channels=(32, 32, 32), embedding=32, text_width=32, parts=7, gist=16)


@pytest.mark.parametrize("plan", PLANS)
def test_objects_are_canonical(plan):
    thing = make_object(np.random.default_rng(3), plan)
    assert np.linalg.norm(thing.vertices, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert np.abs(thing.vertices.min(0) + thing.vertices.max(0)).max() < 1e-5
    assert thing.faces.min() == 0 and thing.faces.max() == len(thing.vertices) - 1
    assert 0 <= thing.colors.min() and thing.colors.max() <= 1
    for limb in thing.limbs:
        assert len(limb.members) == len(limb.along) > 0 and 0 <= limb.along.min() <= limb.along.max() <= 1


@pytest.mark.parametrize("plan", PLANS)
def test_every_verb_moves_every_object_from_rest(plan):
    thing = make_object(np.random.default_rng(4), plan)
    for verb in range(len(VERBS)):
        trajectory = animate(thing, Action(verb), TIMES)
        assert trajectory.shape == (16, len(thing.vertices), 3) and np.isfinite(trajectory).all()
        assert np.allclose(trajectory[0], thing.vertices, atol=1e-5), VERB_NAMES[verb]
        assert 0.02 < np.abs(trajectory - trajectory[0]).max() < 3, VERB_NAMES[verb]


def test_directions():
    """Left is +Y: bending left takes the top there; a raised hand goes up; a nod takes the head down."""
    thing = make_object(np.random.default_rng(1), "biped")
    top = thing.vertices[:, 2].argmax()

    def middle(name):
        return animate(thing, Action(VERB_NAMES.index(name)), np.array([0.0, 8 / 15]))

    assert middle("bend left")[1, top, 1] > thing.vertices[top, 1] + 0.2
    assert middle("bend right")[1, top, 1] < thing.vertices[top, 1] - 0.2
    (hand,) = [arm.members[arm.along.argmax()] for arm in thing.of("arm") if arm.side > 0]
    assert middle("wave")[1, hand, 2] > thing.vertices[hand, 2]
    nod = animate(thing, Action(VERB_NAMES.index("nod")), np.array([0.0, 4 / 15]))
    assert nod[1, top, 0] > thing.vertices[top, 0] + 0.02
    spin = animate(thing, Action(VERB_NAMES.index("spin")), np.array([0.0, 4 / 15]))
    assert np.cross(thing.vertices[hand], spin[1, hand])[2] > 0


def test_sides_are_mirror_images():
    thing = make_object(np.random.default_rng(1), "biped")
    for name in ("turn", "punch", "wave"):
        left, right = (animate(thing, Action(VERB_NAMES.index(name), side=side), TIMES) for side in (1, -1))
        flipped = mirrored(thing)
        assert np.allclose(animate(flipped, Action(VERB_NAMES.index(name)), TIMES) * [1, -1, 1], right, atol=1e-5)
        assert np.abs(left - right).max() > 0.2
    front = thing.vertices[:, 0].argmax()
    turned = animate(thing, Action(VERB_NAMES.index("turn"), side=-1), TIMES)[-1]
    assert turned[front, 1] < thing.vertices[front, 1] - 0.05  # right is -Y


def test_what_is_counted_happens_so_often():
    thing = make_object(np.random.default_rng(1), "biped")
    rng, counts = np.random.default_rng(0), set()
    jump = VERB_NAMES.index("jump")
    while len(counts) < 2:
        action, _, words = draw_action(rng, jump)
        if words not in ("once", "twice"):
            continue
        counts.add(words)
        height = animate(thing, action, np.linspace(0, 1, 64))[:, :, 2].mean(1)
        peaks = (height[1:-1] > height[:-2]) & (height[1:-1] >= height[2:]) & (height[1:-1] > height[0] + 0.15)
        assert peaks.sum() == {"once": 1, "twice": 2}[words]


def test_a_finer_network_answers_as_the_coarse_one():
    """Every pixel like the coarse one it lies in, for coarse inputs and whatever the noise level."""
    torch.manual_seed(0)
    coarse = MotionUNet(TINY).eval()
    for parameter in coarse.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    fine = coarse.refined().eval()
    assert (fine.config.grid, fine.config.patch) == (64, 4)
    batch = data.make_batch(0, 5, 4)
    batch.condition[:] = batch.condition.round()  # masks and pictures that survive doubling as they are
    tokens, level = batch.tokens, torch.tensor([0.1, 0.4, 0.7, 0.95])

    def signal(grid):
        return torch.sigmoid(log_snr(level, grid)).sqrt()[:, None, None, None, None] * batch.latent

    def doubled(picture):
        return picture.repeat_interleave(2, -1).repeat_interleave(2, -2)

    # The noise that is left after averaging is the coarse noise, scaled as the network expects it.
    noise = torch.randn(batch.latent.shape, generator=torch.Generator().manual_seed(1))
    shares = [torch.sigmoid(-log_snr(level, grid)).sqrt()[:, None, None, None, None] for grid in (32, 64)]
    with torch.no_grad():
        answer = coarse(signal(32) + shares[0] * noise, batch.condition, level, tokens)
        finer = fine(doubled(signal(64) + shares[1] / 2 * noise), doubled(batch.condition), level, tokens)
    assert torch.allclose(doubled(answer), finer, atol=1e-4) and answer.abs().max() > 1e-3


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_patches_are_convolved_as_if_they_were_channels(side, kernel):
    layer = torch.nn.Conv2d(5 * side * side, 7, kernel, padding=kernel // 2)
    picture = torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patches(picture, layer, side), layer(F.pixel_unshuffle(picture, side)))
    back = torch.nn.Conv2d(7, 5 * side * side, 1)
    tokens = torch.randn(2, 7, 4, 4)
    torch.testing.assert_close(pixels(tokens, back, side), F.pixel_shuffle(back(tokens), side))


def test_a_token_turns_all_its_pixels():
    generator = torch.Generator().manual_seed(0)
    matrices, places = torch.randn(2, 5 * 3, 4, 6, generator=generator), torch.randn(2, 3, 8, 12, generator=generator)
    everywhere = matrices.view(2, 5, 3, 4, 6).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(turned(matrices, places), (everywhere * places[:, None]).sum(2))


def test_rigid_parts_are_read_from_noise_that_hides_every_pixel():
    """Two halves that turn about different axes: two fits, exact where there is no noise and near where there is much."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 4000, 3, generator=generator) - 0.5
    functions = torch.cat([places, torch.ones(2, 4000, 1)], 2)
    left = (places[..., :1] < 0).float()
    shares = torch.cat([left, 1 - left], 2)
    truth = torch.zeros(2, 2, 4, 36)
    truth[..., :6] = 3 * torch.randn(2, 2, 4, 6, generator=generator)
    latent = torch.einsum("bpk,bpf,bkfc->bpc", shares, functions, truth)

    def fitted(level):
        snr = log_snr(torch.full((2,), level), 64)
        signal = torch.sigmoid(snr)[:, None, None]
        noisy = signal.sqrt() * latent + (1 - signal).sqrt() * torch.randn(latent.shape, generator=generator)
        fits, facts = affine_fits(noisy, functions, shares, snr)
        assert facts.std() < 2
        again = torch.einsum("bpk,bpf,bkfc->bpc", shares, functions, fits)
        return float((again - latent).square().sum() / latent.square().sum())

    assert fitted(0.0) < 0.01
    assert fitted(0.75) < 0.2  # where a pixel's signal is a twentieth of its noise
    assert abs(fitted(1.0) - 1) < 0.01  # nothing is seen in pure noise


def test_facts_of_far_turns_stay_within_bounds():
    places = torch.rand(1, 4000, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    functions, shares = torch.cat([places, torch.ones(1, 4000, 1)], 2), torch.ones(1, 4000, 1)
    snr = log_snr(torch.tensor([0.05]), 64)
    small, far = (affine_fits(size * places.repeat(1, 1, 12), functions, shares, snr) for size in (0.5, 200.0))
    assert 1 < float(small[1].norm()) < BOUND
    assert float(far[1].norm()) == pytest.approx(BOUND, rel=1e-4)
    assert torch.allclose(far[0] / 400, small[0], atol=0.02)  # the fits themselves are as large as the motion


def test_a_sample_thrown_far_off_counts_by_the_root_of_its_error():
    batch = data.make_batch(0, 0, 4)

    def loss(size):
        def predict(noisy, *_):
            return torch.full_like(noisy, size)

        return [float(each) for each in diffusion_loss(predict, batch, torch.Generator().manual_seed(0), torch.float32)]

    (near, error), (far, large) = loss(100.0), loss(1000.0)
    assert large / error == pytest.approx(100, rel=0.05)
    assert far / near == pytest.approx(10, rel=0.05)
    assert loss(0.01)[0] < 0.1 * near


def test_cells_keep_the_noise_as_it_is():
    maps = torch.randn(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = cells(maps, 2)
    assert rows.shape == (2, 3 * 16, 5) and abs(float(rows.var()) - 1) < 0.1
    torch.testing.assert_close(rows[1, 16 + 5], maps[1, 1, :, 2:4, 2:4].sum((1, 2)) / 2)  # second view, second row and column


@pytest.mark.parametrize("prompt", ["it spins", "it runs"])
def test_every_part_of_both_shipped_networks_works(prompt):
    """None is saturated: a gradient comes through everything, and half precision hardly changes it."""
    network = MotionGenerator.load(MotionGenerator.shipped_weights(prompt)).network.train()
    batch = data.make_batch(7, 0, 8, grid=network.config.grid)

    def gradients(precision):
        loss, _ = diffusion_loss(network, batch, torch.Generator().manual_seed(0), precision)
        network.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.ndim > 1}

    exact, usual = gradients(torch.float32), gradients(torch.bfloat16)
    wrong = {name: float((usual[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    assert max(wrong.values()) < 0.5, wrong


def test_training_can_be_refined(tmp_path):
    trained = train(tmp_path / "coarse", TrainingSettings(steps=1, batch=4), config=TINY)
    finer = train(tmp_path / "fine", TrainingSettings(steps=1, batch=4), start=trained, grid=64)
    assert MotionGenerator.load(finer).network.config.grid == 64


def test_running_legs_swing_about_their_hips():
    thing = make_object(np.random.default_rng(8), "quadruped")
    trajectory = animate(thing, Action(VERB_NAMES.index("walk")), TIMES)
    travel = np.ptp(trajectory[:, :, 0], axis=0)
    for leg in thing.of("leg"):
        foot, hip = leg.members[leg.along > 0.9], leg.members[leg.along < 0.05]
        assert travel[foot].mean() > 3 * travel[hip].mean()


def test_time_basis_is_orthonormal_and_starts_at_rest():
    basis = temporal_basis(frame_times(BASIS_FRAMES)).numpy()
    assert np.abs(basis[0]).max() == 0
    assert np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)


def test_the_latent_holds_the_motion():
    """Pixels that see a vertex move as it does."""
    thing = make_object(np.random.default_rng(2), "biped")
    truth = animate(thing, Action(VERB_NAMES.index("twist")), TIMES)
    coefficients = data.motion_coefficients(truth).reshape(len(thing.vertices), -1, 3)
    restored = truth[:1] + np.einsum("fk,nkc->fnc", temporal_basis(frame_times(BASIS_FRAMES)).numpy(), coefficients)
    assert np.linalg.norm(restored - truth, axis=-1).mean() < 0.02 * np.linalg.norm(truth - truth[:1], axis=-1).mean()


def test_batches_depend_on_seed_and_step_alone():
    one, same, other = data.make_batch(0, 5, 8), data.make_batch(0, 5, 8), data.make_batch(0, 6, 8)
    assert torch.equal(one.latent, same.latent) and torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.condition, other.condition)
    assert one.latent.shape == (8, 4, 36, 32, 32) and one.condition.shape == (8, 4, 8, 32, 32)
    assert not (one.latent * (1 - one.mask)).any()


def test_resumed_training_is_bit_identical(tmp_path):
    settings = TrainingSettings(steps=6, batch=4, seed=3)

    def interrupt(stage, step, total, preview=None):
        if step == 3:
            raise Cancelled

    whole = train(tmp_path / "whole", settings, config=TINY)
    with pytest.raises(Cancelled):
        train(tmp_path / "parts", settings, config=TINY, report=interrupt)
    parts = train(tmp_path / "parts", settings, resume=True, config=TINY)
    first, second = load_file(whole), load_file(parts)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    generator = MotionGenerator.load(whole)
    assert generator.network.config == TINY


def test_a_new_run_can_begin_with_trained_weights(tmp_path):
    short = TrainingSettings(steps=1, batch=4, seed=5)
    trained = train(tmp_path / "first", TrainingSettings(steps=3, batch=4), config=TINY)
    further = train(tmp_path / "further", short, start=trained)
    afresh = train(tmp_path / "afresh", short, config=TINY)
    assert MotionGenerator.load(further).network.config == TINY  # the weights bring their size along

    def distance(weights):
        start, end = load_file(trained), load_file(weights)
        return sum(float((start[name].float() - end[name].float()).abs().sum()) for name in start)

    assert 0 < distance(further) < 0.1 * distance(afresh)


def test_other_seed_other_weights(tmp_path):
    one, two = (
        load_file(train(tmp_path / str(seed), TrainingSettings(steps=1, batch=4, seed=seed), config=TINY)) for seed in (0, 1)
    )
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_clips_are_drawn_from_rest(tmp_path):
    rng = np.random.default_rng(0)
    thing = make_object(rng, "quadruped")
    walk = animate(thing, Action(VERB_NAMES.index("walk"), speed=16 / 15), np.arange(24) / 24)
    np.savez(
        tmp_path / "dog.npz",
        faces=thing.faces,
        rest=thing.vertices,
        clips=walk[None].astype(np.float16),
        verbs=np.array(["walk"]),
        loops=np.array([True]),
        noun=np.array("dog"),
    )
    (real,) = load_clips(tmp_path)
    assert [VERB_NAMES[clip.verb] for clip in real.clips] == ["walk"]
    assert min(real.clips[0].start, 1 - real.clips[0].start) < 0.1  # the left front foot starts forwards at once
    for _ in range(5):
        trajectory, colors, prompt = draw_clip(rng, real, TIMES)
        assert trajectory.shape == (16, len(thing.vertices), 3) and colors.shape == thing.colors.shape and prompt
        assert np.linalg.norm(trajectory[0], axis=1).max() == pytest.approx(1, abs=1e-4)
        assert np.abs(trajectory[1:] - trajectory[0]).max() > 0.02
    batch = data.make_batch(0, 1, 16, [real])
    assert batch.latent.shape[0] == 16 and torch.isfinite(batch.latent).all()


def test_real_motions_can_be_learnt_nearly_alone(tmp_path):
    """As the shipped weights for natural motions are: real meshes do what their clips show, and little else is drawn."""
    thing = make_object(np.random.default_rng(0), "quadruped")
    walk = animate(thing, Action(VERB_NAMES.index("walk")), np.arange(24) / 24)
    named = {"faces": thing.faces, "rest": thing.vertices, "loops": np.array([True]), "noun": np.array("dog")}
    np.savez(tmp_path / "dog.npz", clips=walk[None].astype(np.float16), verbs=np.array(["walk"]), **named)
    real = load_clips(tmp_path)
    word = tokenise("naturally")[0]

    def natural(**options):
        tokens = torch.cat([data.make_batch(0, step, 8, real, **options).tokens for step in range(12)])
        return float((tokens == word).any(1).float().mean())

    assert natural(natural=True) > 0.75 and natural() < 0.5
    settings, config = TrainingSettings(steps=1, batch=4, natural=True), replace(TINY, gist=16, parts=3)
    weights = train(tmp_path / "out", settings, clips=tmp_path, config=config)
    network = MotionGenerator.load(weights).network
    assert network.config.parts == 3
    other = data.make_batch(0, 0, 8).condition  # of two objects
    with torch.no_grad():
        one, two = (network.observe(condition).gist for condition in (other, other.flip(0)))
    assert one.shape == (8, 16) and torch.allclose(one, two.flip(0), atol=1e-5) and (one[0] - one[-1]).abs().max() > 1e-3


def test_clips_happen_to_the_left_unless_the_sentence_says_right(tmp_path):
    rng = np.random.default_rng(0)
    thing = make_object(rng, "biped")
    punch = animate(thing, Action(VERB_NAMES.index("punch"), side=-1), np.arange(24) / 24)  # with the right hand
    named = {"faces": thing.faces, "rest": thing.vertices, "loops": np.array([False]), "noun": np.array("man")}
    np.savez(tmp_path / "man.npz", clips=punch[None].astype(np.float16), verbs=np.array(["punch"]), **named)
    (real,) = load_clips(tmp_path)
    assert real.clips[0].side == -1
    said = set()
    for _ in range(60):
        trajectory, _, prompt = draw_clip(rng, real, TIMES)
        if "naturally" not in prompt:  # a motion of the whole body
            continue
        effort = ((trajectory - trajectory.mean(0)) ** 2).sum((0, 2))
        left, right = effort[trajectory[0, :, 1] > 0].sum(), effort[trajectory[0, :, 1] < 0].sum()
        assert (left > right) != ("right" in prompt.split())
        said |= {"right", "left"} & set(prompt.split())
    assert said == {"right", "left"}


def test_processes_share_a_training(tmp_path):
    """Each takes its part of every batch, all end with the same weights, and one writes them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from track4d.training import motion\n"
        "from track4d.video.motion_unet import MotionUNet, UNetConfig\n"
        "made = []\n"
        "motion.MotionUNet = lambda config: made.append(MotionUNet(config)) or made[-1]\n"
        "tiny = UNetConfig(channels=(32, 32, 32), embedding=32, text_width=32)\n"
        "motion.train(Path(sys.argv[1]), motion.TrainingSettings(steps=3, batch=8), config=tiny)\n"
        "torch.save(made[0].state_dict(), f'{sys.argv[1]}/{os.environ[\"RANK\"]}.pt')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, script, str(tmp_path / "two")], check=True, capture_output=True, timeout=240)
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 1
    alone = load_file(train(tmp_path / "one", TrainingSettings(steps=3, batch=8), config=TINY))
    shared = load_file(tmp_path / "two" / "motion.safetensors")
    assert any(not torch.equal(alone[name], shared[name]) for name in alone)  # the second process had data of its own


def test_drawing_data_leaves_torch_its_threads(tmp_path, monkeypatch):
    """Numba gives OpenMP all cores when it starts its own threads."""
    wanted, seen = torch.get_num_threads(), []

    def greedy(*given):
        torch.set_num_threads(wanted + 1)
        return data.make_batch(*given)

    monkeypatch.setattr(motion, "make_batch", greedy)
    monkeypatch.setattr(motion, "diffusion_loss", lambda *given: seen.append(torch.get_num_threads()) or diffusion_loss(*given))
    train(tmp_path, TrainingSettings(steps=2, batch=4), config=TINY)
    assert seen == [wanted, wanted]


def test_a_batch_must_be_shared_in_fours(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="12") as caught:
        train(tmp_path, TrainingSettings(steps=1, batch=12), config=TINY)
    assert caught.value.code == "bad_batch"


def test_log_is_one_json_object_a_line(tmp_path):
    train(tmp_path, TrainingSettings(steps=2, batch=4), config=TINY)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] and lines[0]["loss"] > 0
