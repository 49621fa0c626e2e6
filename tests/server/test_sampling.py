"""The sampler against diffusers' own parts, and on a process whose perfect denoiser is known in closed form."""

import numpy as np
import pytest
import torch
from track4d.video.sampling import (
    ALPHA_BARS,
    OVERLAP,
    WINDOW,
    add_noise,
    blend_frequencies,
    clean_from_noise,
    evaluations,
    guided,
    sample_video,
    sample_window,
    seam_window,
    timesteps,
    windows,
)


@pytest.fixture(scope="module")
def published_scheduler():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(25)
    return scheduler


def test_schedule_is_that_of_the_published_configuration(published_scheduler) -> None:
    assert timesteps(25) == published_scheduler.timesteps.tolist()
    torch.testing.assert_close(ALPHA_BARS, published_scheduler.alphas_cumprod)
    assert timesteps(25)[:2] == [961, 921] and timesteps(25)[-2:] == [41, 1]
    assert float(ALPHA_BARS[999]) == pytest.approx(0.00158, abs=1e-5)


def test_a_clip_is_sampled_as_diffusers_would(published_scheduler) -> None:
    """Same made-up noise predictions, same result; guidance on noise is guidance on clean latents."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 5, 4, 6, 6, generator=generator)
    answers = {t: torch.randn(2, 2, 5, 4, 6, 6, generator=generator) for t in timesteps(25)}

    expected = noise
    for t in published_scheduler.timesteps.tolist():
        text, free = answers[t]
        expected = published_scheduler.step(free + 7.5 * (text - free), t, expected).prev_sample

    def denoise(latents: torch.Tensor, first: torch.Tensor, t: int) -> torch.Tensor:
        text, free = (clean_from_noise(latents, answer, ALPHA_BARS[t]) for answer in answers[t])
        return guided(text, free, 7.5)

    sampled = sample_window(denoise, torch.zeros(2, 4, 6, 6), noise, 25)
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


def test_frequencies_are_blended_as_diffusers_freeinit_does() -> None:
    from diffusers.pipelines.free_init_utils import FreeInitMixin

    low, high = torch.randn(2, 2, 8, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    mixin = FreeInitMixin()
    mask = mixin._get_free_init_freq_filter((1, 4, 8, 6, 10), "cpu", "butterworth", 4, 0.25, 0.25)
    expected = mixin._apply_freq_filter(low.transpose(1, 2), high.transpose(1, 2), mask).transpose(1, 2)
    torch.testing.assert_close(blend_frequencies(low, high), expected)


def test_windows_cover_every_frame_and_share_some() -> None:
    for frames in (2, 15, 16, 17, 28, 29, 65):
        places = windows(frames)
        assert sorted({f for window in places for f in window}) == list(range(frames))
        assert all(len(window) == min(frames, WINDOW) for window in places)
        assert all(len(set(a) & set(b)) >= OVERLAP for a, b in zip(places, places[1:]))
    for frames in range(4, 40):
        seam = seam_window(frames)
        assert len(seam) == min(frames, WINDOW) and 0 in seam[2:] and frames - 1 in seam


class Process:
    """A smooth stationary Gaussian process over frames: the latents of a video, with the perfect denoiser.

    Every latent moves on its own, with correlation exp(-(distance / 4 frames)^2 / 2); a clip knows its first frame only.
    """

    deviation = 2.0

    def covariance(self, count: int) -> torch.Tensor:
        distance = torch.arange(count, dtype=torch.float64)[:, None] - torch.arange(count, dtype=torch.float64)
        return self.deviation**2 * torch.exp(-0.5 * (distance / 4) ** 2) + 1e-4 * torch.eye(count, dtype=torch.float64)

    def denoise(self, latents: torch.Tensor, first: torch.Tensor, t: int) -> torch.Tensor:
        alpha = ALPHA_BARS[t].double()
        covariance = self.covariance(latents.shape[1] + 1)
        gain = covariance[1:, :1] / covariance[0, 0]  # [M, 1]
        inner = covariance[1:, 1:] - gain @ covariance[:1, 1:]
        prior = first.double().flatten()[None] * gain  # [M, P]
        noisy = latents.double().transpose(0, 1).flatten(1)  # [M, P]
        system = alpha * inner + (1 - alpha) * torch.eye(len(inner), dtype=torch.float64)
        clean = prior + alpha.sqrt() * inner @ torch.linalg.solve(system, noisy - alpha.sqrt() * prior)
        return clean.unflatten(1, first.shape).transpose(0, 1).float()

    def first(self) -> torch.Tensor:
        return self.deviation * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def sample(self, frames: int, **settings) -> torch.Tensor:
        return sample_video(self.denoise, self.first(), frames, generator=torch.Generator().manual_seed(2), **settings)


def step_sizes(video: torch.Tensor, order: int = 1) -> np.ndarray:
    """Root mean square of the difference (velocity, acceleration) at each frame of a video taken as it is."""
    return torch.diff(video, n=order, dim=1).square().mean((0, 2, 3, 4)).sqrt().numpy()


def test_a_clip_has_the_statistics_of_its_process() -> None:
    process = Process()
    video = process.sample(16, steps=50)
    assert torch.equal(video[:, 0], process.first())
    late = video[:, 8:]
    assert float(late.mean()) == pytest.approx(0, abs=0.15)
    assert float(late.std()) == pytest.approx(process.deviation, rel=0.1)
    expected = np.sqrt(2 * (1 - np.exp(-0.5 / 16))) * process.deviation
    np.testing.assert_allclose(step_sizes(video)[2:], expected, rtol=0.15)


def test_long_videos_have_no_seams() -> None:
    """Velocity and acceleration at the windows' borders are like those inside of a window."""
    video = Process().sample(65)
    assert video.shape[1] == 65 and torch.isfinite(video).all()
    for order, bound in ((1, 1.25), (2, 2.3)):
        sizes = step_sizes(video, order)
        assert sizes.max() < bound * np.median(sizes), order
    distant = torch.corrcoef(torch.stack([video[:, 20].flatten(), video[:, 50].flatten()]))[0, 1]
    assert abs(float(distant)) < 0.15  # not a copy either


@pytest.mark.parametrize("frames", [16, 40])
def test_a_loop_closes_as_smoothly_as_it_runs(frames: int) -> None:
    process = Process()
    video = process.sample(frames, loop=True)
    assert torch.equal(video[:, 0], process.first())
    twice = torch.cat([video, video], 1)
    for order, bound in ((1, 1.25), (2, 2.4)):
        sizes = step_sizes(twice, order)
        assert sizes.max() < bound * np.median(sizes), order
    open_ended = process.sample(frames)
    gap = (open_ended[:, -1] - open_ended[:, 0]).square().mean().sqrt()
    assert float(gap) > 4 * step_sizes(twice)[frames - 1]
    assert torch.equal(open_ended[:, :frames - 8], video[:, :frames - 8])  # the loop alters the end alone


def test_every_evaluation_is_counted_and_told() -> None:
    calls, told = [], []

    def denoise(latents: torch.Tensor, first: torch.Tensor, t: int) -> torch.Tensor:
        calls.append(t)
        return latents * 0.5

    first = torch.zeros(2, 4, 4, 4)
    sample_video(denoise, first, 40, steps=3, freeinit=2, loop=True,
                 on_step=lambda step, total, clean: told.append((step, total, clean is None or tuple(clean.shape))))
    assert len(calls) == evaluations(40, 3, 2, True) == 3 * 2 * 4
    assert told[0] == (0, 24, True) and [step for step, _, _ in told] == list(range(25))
    assert told[-1] == (24, 24, (2, 15, 4, 4, 4))
    assert evaluations(16) == 25 and evaluations(16, freeinit=3) == 75


def test_same_seed_same_video_and_another_one_otherwise() -> None:
    process = Process()
    first = process.first()
    videos = [sample_video(process.denoise, first, 16, 5, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert torch.equal(videos[0], videos[1]) and not torch.allclose(videos[0], videos[2])


def test_freeinit_keeps_the_slow_part_and_draws_the_rest_anew() -> None:
    process = Process()
    plain, again = process.sample(16), process.sample(16, freeinit=2)
    slow = [torch.nn.functional.avg_pool3d(video[:, 1:].transpose(1, 2), (15, 8, 8)).flatten() for video in (plain, again)]
    assert float(torch.corrcoef(torch.stack(slow))[0, 1]) > 0.8
    assert not torch.allclose(plain, again, atol=0.1)
    torch.testing.assert_close(plain[:, 0], again[:, 0])


def test_a_step_can_stop_the_work() -> None:
    from track4d_protocol.errors import Cancelled

    def stop(step: int, total: int, clean: torch.Tensor | None) -> None:
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        sample_video(lambda latents, first, t: latents, torch.zeros(1, 4, 4, 4), 16, on_step=stop)


def test_noise_and_its_removal_are_inverse() -> None:
    clean, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for alpha in (ALPHA_BARS[1], ALPHA_BARS[500], 0.3):
        torch.testing.assert_close(clean_from_noise(add_noise(clean, noise, alpha), noise, alpha), clean, rtol=1e-4, atol=1e-5)
