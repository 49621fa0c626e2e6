"""Stage One's training: the losses are the paper's equations, the loop is repeatable."""

import pytest
import torch
import torch.nn.functional as F
from track4d.training import video_losses as losses


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
