"""Sampling of the multi-view video diffusion: schedule, DDIM, guidance, FreeInit, windows and loops.

Everything here works on latents [V, F, C, h, w] and on a function that predicts clean latents, not on a network, so that
one code path serves every size of model. The first frame of every clip is given and stays clean (Track4DGen, Fig. 2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TRAINING_STEPS = 1000
STEPS = 25  # Track4DGen, section 6
GUIDANCE = 7.5  # of Animate3D's published configuration
WINDOW = 16  # frames of a clip, as the published model was trained
OVERLAP = 4  # frames that a window shares with the one before it: enough to hand on speed and acceleration
MEMORY = 4.0  # frames over which what is wrong with one frame tells about its neighbours
FREEINIT_ITERATIONS = 3  # of Animate3D's published configuration; every iteration costs a whole sampling
FREEINIT_ORDER, FREEINIT_STOP = 4, 0.25  # Butterworth order, and normalised stop frequency in space and time

# Signal power per training step: betas rise linearly from 0.00085 to 0.012, as in Animate3D's published configuration.
ALPHA_BARS = torch.cumprod(1 - torch.linspace(0.00085, 0.012, TRAINING_STEPS), 0)  # [1000]

# (noisy moving frames [V, M, C, h, w], clean first frames [V, C, h, w], training step) -> clean moving frames
Denoise = Callable[[Tensor, Tensor, int], Tensor]
# (steps done, steps in all, clean moving frames as they are now believed [V, M, C, h, w]); may raise to stop the work
OnStep = Callable[[int, int, Tensor | None], None]


def timesteps(steps: int) -> list[int]:
    """Training steps that a sampler of so many steps visits, noisiest first: 961, 921, ..., 41, 1 for 25.

    Args:
        steps: 1 to 999.
    """
    return [k * (TRAINING_STEPS // steps) + 1 for k in reversed(range(steps))]


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Variance-preserving diffusion (Eq. 1 of Track4DGen) at one signal power."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=clean.dtype, device=clean.device)
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def clean_from_noise(noisy: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Clean latents by the predicted noise (the second half of Eq. 11 of Track4DGen)."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=noisy.dtype, device=noisy.device)
    return (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def guided(conditional: Tensor, free: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance; 1 is the conditional prediction. The same on noise as on clean latents."""
    return conditional if guidance == 1 else free + guidance * (conditional - free)


def sample_window(denoise: Denoise, first: Tensor, noise: Tensor, steps: int, known: Tensor | None = None,
                  given: Tensor | None = None, on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """One clip by deterministic DDIM (Song et al. 2021, eta 0).

    Frames that are already known take part at the noise level of each step. The network sees them through that noise and
    predicts them a little wrong; what it is wrong by is added to their neighbours too, fading with the distance
    (`correction`), or the video would jump where the known frames end.

    Args:
        denoise: predicts clean moving frames.
        first: [V, C, h, w] clean first frame.
        noise: [V, M, C, h, w] standard normal, for the moving frames.
        steps: evaluations of `denoise`.
        known: [V, M, C, h, w] clean frames, used where `given` [M] is true.
        on_step: called with the steps done and the clean frames as they are now believed, after each step.

    Returns:
        [V, M, C, h, w], the known frames unchanged.
    """
    if known is None or given is None:
        known, given = noise, torch.zeros(noise.shape[1], dtype=torch.bool)
    spread = correction(given).to(noise)  # [M, known]
    times = timesteps(steps)
    latents = noise.clone()
    for k, t in enumerate(times):
        now, then = ALPHA_BARS[t], ALPHA_BARS[times[k + 1]] if k + 1 < steps else 1.0
        latents[:, given] = add_noise(known[:, given], noise[:, given], now)
        clean = denoise(latents, first, t)
        clean = clean + torch.einsum("mk,vkchw->vmchw", spread, known[:, given] - clean[:, given])
        residual = (latents - now.sqrt() * clean) / (1 - now).sqrt()
        latents = add_noise(clean, residual, then)
        if on_step is not None:
            on_step(k + 1, clean)
    latents[:, given] = known[:, given]
    return latents


def correction(given: Tensor) -> Tensor:
    """How much of each known frame's error is added to each frame: regression on a process that forgets exponentially.

    Args:
        given: [M] bool, which frames are known.

    Returns:
        [M, known] float64: one for a known frame itself, at most one in a row, 0.78 for its neighbour, 0.37 four frames away.
    """
    places = torch.arange(len(given), dtype=torch.float64)
    known = places[given]
    similar = torch.exp(-(places[:, None] - known).abs() / MEMORY)  # [M, known]
    return similar @ torch.linalg.inv(similar[given])


def sample_video(denoise: Denoise, first: Tensor, frames: int, steps: int = STEPS, freeinit: int = 1, loop: bool = False,
                 generator: torch.Generator | None = None, window: int = WINDOW, on_step: OnStep | None = None) -> Tensor:
    """A video of any length from its first frame, by windows that overlap.

    A window begins with a frame of the one before it as its clean first frame, and `OVERLAP` - 1 more of them are known
    to it. A loop costs one window more, laid across the seam: it makes the last frames anew between those before them
    and the first frames.

    Args:
        denoise: predicts clean moving frames; called for clips of at most `window` frames.
        first: [V, C, h, w] clean latents of the first frame.
        frames: in all, the first one included, at least 2; 4 for a loop.
        steps: evaluations of `denoise` per window and FreeInit iteration; `evaluations` says how many in all.
        freeinit: samplings of each window, each from the low frequencies of the one before (Wu et al. 2024); 1 is without.
        loop: whether the first frame follows on the last one.
        generator: of the noise, on the CPU, so that every device draws the same.
        on_step: gets the progress.

    Returns:
        [V, frames, C, h, w]; frame 0 is `first`.
    """
    total, done = evaluations(frames, steps, freeinit, loop, window), 0
    video = first[:, None].repeat(1, frames, *[1] * (first.ndim - 1))  # [V, F, C, h, w]
    ready = torch.zeros(frames, dtype=torch.bool)
    ready[0] = True

    def fill(places: list[int]) -> None:
        nonlocal done
        moving = places[1:]

        def tell(step: int, clean: Tensor) -> None:
            if on_step is not None:
                on_step(done + step, total, clean)

        shape = (len(first), len(moving), *first.shape[1:])
        start = noise = torch.randn(shape, generator=generator).to(first)
        for iteration in range(freeinit):
            sampled = sample_window(denoise, video[:, places[0]], start, steps, video[:, moving], ready[moving], tell)
            done += steps
            if iteration + 1 < freeinit:
                fresh = torch.randn(shape, generator=generator).to(first)
                start = blend_frequencies(add_noise(sampled, noise, ALPHA_BARS[-1]), fresh)
        video[:, moving] = sampled
        ready[moving] = True

    if on_step is not None:
        on_step(0, total, None)
    for places in windows(frames, window):
        fill(places)
    if loop:
        seam = seam_window(frames, window)
        ready[frames - len(seam) // 2:] = False
        fill(seam)
    return video


def windows(frames: int, window: int = WINDOW) -> list[list[int]]:
    """The frames of each window, in order; the last ones overlap more, so that every window is full."""
    last = max(frames - window, 0)
    starts = [*range(0, last, window - OVERLAP), last]
    return [list(range(start, min(start + window, frames))) for start in starts]


def seam_window(frames: int, window: int = WINDOW) -> list[int]:
    """The frames of the window across a loop's seam: known ones, as many again to be made anew, and the first ones."""
    length = min(window, frames)
    start = frames - length // 2 - max(length // 4, 1)
    return [(start + k) % frames for k in range(length)]


def evaluations(frames: int, steps: int = STEPS, freeinit: int = 1, loop: bool = False, window: int = WINDOW) -> int:
    """Calls of `denoise` for a video: 25 for a plain clip, 75 with Animate3D's three FreeInit iterations."""
    return steps * freeinit * (len(windows(frames, window)) + loop)


def blend_frequencies(low: Tensor, high: Tensor) -> Tensor:
    """Low frequencies of one video and high ones of another, by a Butterworth filter (FreeInit, Wu et al. 2024, Eq. 6).

    Args:
        low, high: [V, M, C, h, w].
    """
    axes = (1, 3, 4)
    radius = sum((torch.fft.fftfreq(low.shape[axis], 0.5) ** 2).view([-1 if k == axis else 1 for k in range(5)]) for axis in axes)
    keep = (1 / (1 + (radius / FREEINIT_STOP**2) ** FREEINIT_ORDER)).to(low.device)  # [1, M, 1, h, w]
    return torch.fft.ifftn(torch.fft.fftn(low, dim=axes) * keep + torch.fft.fftn(high, dim=axes) * (1 - keep), dim=axes).real
