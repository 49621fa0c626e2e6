"""The generator's motion latent and its diffusion: temporal basis, noise schedule, sampler.

A latent is the 3D displacement of what every pixel of the static views sees, as coefficients over time in the channels:
no frame axis, continuous in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

COEFFICIENTS = 12  # of 15: the truncation costs less than a hundredth of the motion (benchmarks/generator.py prints it)
LATENT_CHANNELS = 3 * COEFFICIENTS
LATENT_SCALE = 5.0  # displacement to latent; about unit variance for a strong motion
BASIS_FRAMES = 16  # the clip length the basis is orthonormal for, frame 0 included
BASE_GRID = 32  # pixels along a side for which the noise schedule is made
_SHIFT = -2.0  # log-SNR shift of the cosine schedule: smooth fields keep their signal under more noise


def temporal_basis(times: Tensor, count: int = COEFFICIENTS) -> Tensor:
    """DST-VII functions: orthonormal on the 15 moving frames, 0 at time 0.

    Video codecs use them for residuals that vanish at one end, as a displacement from the rest pose does.

    Args:
        times: [F], 0 at the rest pose, 1 at the last frame.

    Returns:
        [F, count].
    """
    moving = BASIS_FRAMES - 1
    order = torch.arange(count, dtype=torch.float32) + 0.5
    return math.sqrt(4 / (2 * moving + 1)) * torch.sin(math.pi * 2 * moving / (2 * moving + 1) * times.float()[:, None] * order)


def frame_times(frames: int) -> Tensor:
    """Times of the frames of a clip, 0 to 1; [frames]."""
    return torch.arange(frames) / max(frames - 1, 1)


def log_snr(noise_level: Tensor, grid: int) -> Tensor:
    """Shifted cosine schedule; noise level 0 (clean) to 1 (noise).

    On a finer grid noise averages out over more pixels, so there is more of it (Hoogeboom et al. 2023, simple diffusion).
    """
    clipped = noise_level.clamp(1e-3, 1 - 1e-3)
    return -2 * torch.log(torch.tan(math.pi * clipped / 2)) + _SHIFT + 2 * math.log(BASE_GRID / grid)


def add_noise(latent: Tensor, noise: Tensor, noise_level: Tensor) -> Tensor:
    """Variance-preserving diffusion of [B, ..., R, R] at noise levels [B]."""
    return mix(latent, noise, log_snr(noise_level, latent.shape[-1]).reshape(-1, *[1] * (latent.ndim - 1)))


def mix(latent: Tensor, noise: Tensor, snr: Tensor) -> Tensor:
    """The same at log-SNRs that broadcast against the latent."""
    return (torch.sigmoid(-snr).sqrt() * noise).addcmul_(torch.sigmoid(snr).sqrt(), latent)


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    on_step: Callable[[int], None] | None = None,
    narrow: Callable[[Tensor, float], Tensor | slice] = lambda clean, level: slice(None),
) -> Tensor:
    """Deterministic DDIM from pure noise (Song et al. 2021).

    Args:
        denoise: (noisy latent [B, ...], noise level [B]) to the predicted clean latent.
        noise: [B, ..., R, R] standard normal.
        steps: evaluations of the network.
        on_step: called with the number of steps done before each step; may raise.
        narrow: (predicted clean latents, noise level) to the indices of those to go on with, after each evaluation.
    """
    latent, clean = noise, noise
    levels = torch.linspace(1, 0, steps + 1)
    for k in range(steps):
        if on_step is not None:
            on_step(k)
        clean = denoise(latent, levels[k].expand(len(latent)))
        kept = narrow(clean, float(levels[k]))
        latent, clean = latent[kept], clean[kept]
        now, then = log_snr(levels[k], noise.shape[-1]), log_snr(levels[k + 1], noise.shape[-1])
        residual = (latent - torch.sigmoid(now).sqrt() * clean) / torch.sigmoid(-now).sqrt()
        latent = torch.sigmoid(then).sqrt() * clean + torch.sigmoid(-then).sqrt() * residual
    return clean
