"""Stage One's training: the losses are the paper's equations, the loop is repeatable."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from track4d.training import video_losses as losses
from track4d.training.video import VideoTraining, checkpoints, noise_generator, train, trained_parameters, video_losses
from track4d.training.video_data import ClipShape, Procedural, load_batches
from track4d.video.checkpoints import convert_published, load_published
from track4d.video.features import load_small
from track4d.video.multiview_video import MultiViewVideo
from track4d.video.unet import MultiViewUNet, UNetConfig
from track4d_protocol.errors import Cancelled, InputError


def moving_codes(cells=16, views=2, frames=4, points=6, channels=24, seed=0):
    """Feature maps of random unit codes that shift by whole cells from frame to frame, and the tracks of some cells."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, views, channels, cells, cells, generator=generator)
    shifts = torch.tensor([[0, 0], [1, 0], [2, 1], [1, 3]])[:frames]  # x, y in cells
    features = torch.stack([first.roll((int(y), int(x)), (-2, -1)) for x, y in shifts], 2)
    start = torch.randint(2, cells - 5, (1, views, 1, points, 2), generator=generator)
    tracks = (start + shifts.view(1, 1, frames, 1, 2) + 0.5) / cells  # [1, V, F, P, 2]
    return features, tracks, torch.ones(tracks.shape[:-1], dtype=torch.bool)


def test_frames_are_noised_as_in_equations_1_and_2():
    latents, noise = torch.randn(2, 3, 4, 5, 6, 7), torch.randn(2, 3, 4, 5, 6, 7)
    kept = latents.clone()
    noisy = losses.noise_frames(latents, noise, torch.tensor([0.64, 0.0]), torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(noisy[0, :, 1:], 0.8 * latents[0, :, 1:] + 0.6 * noise[0, :, 1:])
    torch.testing.assert_close(noisy[1, :, 1:], noise[1, :, 1:])
    torch.testing.assert_close(noisy[0, :, 0], latents[0, :, 0] + 0.5 * noise[0, :, 0])
    torch.testing.assert_close(noisy[1, :, 0], latents[1, :, 0] + 0.1 * noise[1, :, 0])
    assert torch.equal(latents, kept)


def test_the_first_frame_gets_more_noise_at_larger_steps():
    generator = torch.Generator().manual_seed(0)
    means = [losses.first_frame_scales(torch.full((4000,), time), 0.5, generator).mean().item() for time in (0.0, 0.7, 0.9, 1.0)]
    assert means == sorted(means) and means[-1] > 2 * means[0]
    scales = losses.first_frame_scales(torch.rand(4000), 0.5, generator)
    assert 0 < scales.min() and scales.max() < 0.5


def test_the_diffusion_loss_leaves_the_first_frame_out():
    noise, predicted = torch.randn(1, 2, 3, 4, 5, 5), torch.randn(1, 2, 3, 4, 5, 5)
    loss = losses.diffusion_loss(predicted, noise)
    torch.testing.assert_close(loss, ((predicted - noise)[:, :, 1:] ** 2).mean())
    predicted[:, :, 0] = 100
    assert losses.diffusion_loss(predicted, noise) == loss


def test_cell_centres_are_sampled_exactly():
    features, tracks, _ = moving_codes()
    cell = (tracks * 16 - 0.5).round().long()
    sampled = losses.sample_features(features, tracks)
    for view in range(2):
        for frame in range(4):
            for point in range(6):
                x, y = cell[0, view, frame, point]
                expected = F.normalize(features[0, view, frame, :, y, x], dim=0)
                torch.testing.assert_close(sampled[0, view, frame, point], expected)


def test_correspondence_loss_is_equation_4():
    features, tracks, visible = moving_codes()
    tracks = tracks + 0.02 * torch.randn(tracks.shape)  # between the cells
    views, frames, points = tracks.shape[1:4]
    descriptors = losses.sample_features(features, tracks)[0]
    total = 0.0
    for i in range(views):
        for j in range(frames - 1):
            total += (1 - F.cosine_similarity(descriptors[i, j], descriptors[i, j + 1], dim=-1)).mean()
    torch.testing.assert_close(losses.correspondence_loss(features, tracks, visible), total / (views * frames))
    assert points == 6


def test_features_that_move_with_their_points_cost_nothing():
    features, tracks, visible = moving_codes()
    assert losses.correspondence_loss(features, tracks, visible) < 1e-5
    assert losses.position_loss(features, tracks, visible, temperature=0.01) < 1e-6
    wrong = tracks.roll(1, dims=3)
    wrong[:, :, 0] = tracks[:, :, 0]
    assert losses.correspondence_loss(features, wrong, visible) > 0.2  # one of the three pairs, over 4
    assert losses.position_loss(features, wrong, visible, temperature=0.01) > 0.01


def test_position_loss_is_equation_5():
    features, tracks, visible = moving_codes()
    temperature = 0.07
    views, frames = tracks.shape[1:3]
    total = 0.0
    for i in range(views):
        for j in range(1, frames):
            for start, truth in zip(tracks[0, i, 0], tracks[0, i, j]):
                x, y = ((start * 16 - 0.5).round().long()).tolist()
                similarity = F.cosine_similarity(features[0, i, j], features[0, i, 0, :, y, x].view(-1, 1, 1), dim=0)
                weights = (similarity / temperature).flatten().softmax(0).view(16, 16)
                centres = (torch.arange(16) + 0.5) / 16
                found = torch.stack([(weights.sum(0) * centres).sum(), (weights.sum(1) * centres).sum()])
                total += 0.5 * ((found - truth) ** 2).sum() / tracks.shape[3]  # Huber within its square part
    torch.testing.assert_close(losses.position_loss(features, tracks, visible, temperature), total / (views * frames))


def test_hidden_points_do_not_count():
    features, tracks, visible = moving_codes()
    visible[:, :, 2, 3] = False
    astray = tracks.clone()
    astray[:, :, 2, 3] = 0.9
    for loss in (losses.correspondence_loss, losses.position_loss):
        assert loss(features, astray, visible) == loss(features, tracks, visible)
        assert loss(features, tracks, torch.zeros_like(visible)) == 0
    seen = torch.ones_like(visible)
    assert losses.position_loss(features, astray, seen) > losses.position_loss(features, tracks, visible)


def test_constant_features_satisfy_one_loss_and_not_the_other():
    """Why the position loss is needed: the correspondence loss alone has the trivial answer."""
    _, tracks, visible = moving_codes()
    constant = torch.ones(1, 2, 4, 24, 16, 16)
    assert losses.correspondence_loss(constant, tracks, visible) < 1e-6
    assert losses.position_loss(constant, tracks, visible) > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_soft_argmax_finds_the_peak(size):
    similarity = torch.full((2, *size), -1.0)
    similarity[0, 1, 4] = similarity[1, 5, 2] = 1.0
    found = losses.soft_argmax(similarity, 0.05)
    expected = torch.tensor([[4.5 / size[1], 1.5 / size[0]], [2.5 / size[1], 5.5 / size[0]]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_losses_take_half_precision_features_and_give_gradients():
    features, tracks, visible = moving_codes()
    leaf = features.bfloat16().requires_grad_()
    wrong = tracks.roll(1, dims=3)
    loss = losses.correspondence_loss(leaf, wrong, visible) + losses.position_loss(leaf, wrong, visible)
    assert loss.dtype == torch.float32
    loss.backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0


TINY = UNetConfig(channels=(16, 16), attention=(False, True), spatial_motion=(False, True), layers=1, heads=2, motion_heads=2,
                  groups=4, patch=4, text_dim=16, vocabulary=128, text_tokens=16, image_dim=0)
SHORT = VideoTraining.small(steps=4, batch=1, shapes=((2, 3), (1, 4)), size=32, warm_up=2, sheet_every=4)


def tiny(seed=0):
    torch.manual_seed(seed)
    return MultiViewVideo(MultiViewUNet(TINY))


def run(out, settings=SHORT, model=None, **options):
    return load_file(train(out, model or tiny(), Procedural(), settings, workers=0, **options))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of four steps in one go, with its sheets and logs."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, validation=Procedural(validation=True))


def test_a_resumed_training_ends_with_the_same_bits(whole, tmp_path):
    def interrupt(stage, step, total, preview=None):
        if step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path, report=interrupt)
    assert [step for step, _ in checkpoints(tmp_path)] == [3]
    parts = run(tmp_path, model=tiny(seed=9), resume=True)  # what it begins with doesn't matter any more
    assert same(parts, whole[1])
    assert [step for step, _ in checkpoints(tmp_path)] == [4]


def test_without_tensorboard_training_goes_on_and_draws_its_sheets(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])  # as accelerate finds them at its import
    assert same(run(tmp_path, validation=Procedural(validation=True)), whole[1])
    assert (tmp_path / "sheets" / "000004.png").exists() and not list((tmp_path / "logs").rglob("events*"))


def test_another_seed_gives_other_weights(whole, tmp_path):
    assert not same(run(tmp_path, replace(SHORT, seed=1)), whole[1])


def test_logs_and_sheets_are_written_while_training(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((whole[0] / "logs").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss/diffusion")] == [1, 2, 3, 4]
    assert all(event.value > 0 for name in ("correspondence", "position") for event in events.Scalars(f"loss/{name}"))
    assert "validation/error" in events.Tags()["scalars"] and events.Tags()["images"] == ["sample"]
    sheet = cv2.imread(str(whole[0] / "sheets" / "000004.png"))
    assert sheet.shape == (4 * 64, 8 * 64, 3) and np.ptp(sheet) > 50  # truth and sample of two views, eight frames


def test_the_weights_are_the_running_average_and_load_again(whole, tmp_path):
    model = load_small(whole[0] / "features.safetensors")
    assert model.unet.config == TINY
    with safe_open(whole[0] / "features.safetensors", "pt") as file:
        assert json.loads(file.metadata()["trained"])["step"] == 4
    (state,) = [load_file(path / "model.safetensors") for _, path in checkpoints(whole[0])]
    assert not same({name: tensor.half() for name, tensor in state.items()}, whole[1])
    further = run(tmp_path, replace(SHORT, steps=1, learning_rate=0.0), model)
    assert same(further, whole[1])  # a step of length 0 keeps what was loaded


def test_a_file_that_holds_no_network_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError) as caught:
        load_small(tmp_path / "weights.safetensors")
    assert caught.value.code == "bad_network_file"


def test_accumulated_batches_make_the_step_of_a_larger_batch(tmp_path):
    """Two batches of one clip have the gradient of their mean; seen by the first step's direction, which Adam takes by sign."""
    model, generator = tiny(), torch.Generator().manual_seed(0)
    batches = list(load_batches(Procedural(), ClipShape(1, 3, 32), 1, 0, 0, 2, workers=0))
    settings = replace(SHORT, steps=1, accumulation=2, shapes=((1, 3),), warm_up=1, average=0.0)
    before = {name: value.detach().clone() for name, value in model.unet.named_parameters()}
    for part, batch in enumerate(batches):
        generator = noise_generator(0, part, 0)
        (video_losses(model, model.unet, batch, settings, generator).total(settings) / 2).backward()
    gradients = {name: value.grad.clone() for name, value in model.unet.named_parameters() if value.grad is not None}
    model.unet.zero_grad(set_to_none=True)
    train(tmp_path, model, Procedural(), settings, workers=0)
    agreed = []
    for name, value in gradients.items():
        clear = value.abs() > 1e-5
        moved = dict(model.unet.named_parameters())[name] - before[name]
        agreed.append((moved.sign() == -value.sign())[clear].float().mean() if clear.any() else torch.tensor(1.0))
    assert torch.stack(agreed).mean() > 0.99


def test_checkpointing_and_bf16_change_memory_and_precision_only():
    batch = next(iter(load_batches(Procedural(), ClipShape(2, 3, 32), 2, 0, 0, 1, workers=0)))
    model = tiny()
    values = []
    for checkpointing, bf16 in ((False, False), (True, False), (False, True)):
        model.unet.gradient_checkpointing = checkpointing
        model.unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = video_losses(model, model.unet, batch, SHORT, noise_generator(0, 0, 0)).total(SHORT)
        loss.backward()
        values.append((loss.item(), torch.cat([p.grad.flatten() for p in model.unet.parameters() if p.grad is not None])))
    assert values[0][0] == values[1][0]
    torch.testing.assert_close(values[0][1], values[1][1])
    assert values[2][0] == pytest.approx(values[0][0], rel=0.05)
    assert F.cosine_similarity(values[0][1], values[2][1], dim=0) > 0.95


def test_the_published_size_trains_adapter_and_motion_modules_only():
    with torch.device("meta"):
        unet = MultiViewUNet(UNetConfig.published())
    chosen = trained_parameters(unet)
    assert sum(value.numel() for value in chosen.values()) == 642_699_562 and len(chosen) == 846  # Animate3D's train.py
    assert all("motion_modules" in name or "_i2v" in name for name in chosen)
    assert len(trained_parameters(tiny().unet)) == len(list(tiny().unet.parameters()))


def test_frozen_parts_stay_as_they_are(published, tmp_path):
    """The published size's way, on a narrow network: text and pictures through encoders, the rest of the 2D network frozen."""
    model = load_published(convert_published(published, tmp_path / "converted"))
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    settings = VideoTraining(steps=1, shapes=((2, 3),), size=32, learning_rate=1e-3, warm_up=1, precision="no")
    weights = load_file(train(tmp_path / "out", model, Procedural(), settings, workers=0))
    moved = {name for name, value in model.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= set(trained_parameters(model.unet))
    assert weights.keys() == set(trained_parameters(model.unet))


def test_training_brings_the_losses_down(tmp_path):
    """The same few clips again and again: the features learn to follow their points."""
    settings = VideoTraining.small(batch=2, shapes=((1, 4),), size=32, first_frame=0.1, step_power=6.0)
    model = tiny()
    batch = next(iter(load_batches(Procedural(), ClipShape(1, 4, 32), 2, 0, 0, 1, workers=0)))
    optimizer = torch.optim.AdamW(model.unet.parameters(), 3e-3)
    history = []
    for step in range(40):
        losses_now = video_losses(model, model.unet, batch, settings, noise_generator(0, step, 0))
        optimizer.zero_grad()
        losses_now.total(settings).backward()
        optimizer.step()
        history.append((losses_now.position.item(), losses_now.correspondence.item()))
    first, last = np.mean(history[:5], 0), np.mean(history[-5:], 0)
    assert last[0] < 0.6 * first[0]


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    """Both draw other clips, and step together. Slow: two more processes import torch."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "track4d"]
    command = [*launch, "train", "video", "--out", str(tmp_path), "--steps", "2", "--batch", "1", "--workers", "0"]
    subprocess.run(command, check=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    model = load_small(tmp_path / "features.safetensors")
    assert all(torch.isfinite(value).all() for value in model.unet.parameters())
    assert len(list(checkpoints(tmp_path)[0][1].glob("random_states_*.pkl"))) == 2


def test_clips_that_cannot_be_trained_on_are_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        run(tmp_path, replace(SHORT, shapes=((4, 1),)))
    assert caught.value.code == "bad_training"
