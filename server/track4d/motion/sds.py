"""4D-SDS by z0 reconstruction: what the diffusion model would rather see pulls at what is rendered (Track4DGen, Eq. 11).

Any diffusion model with Gaussian noise will do: it comes in as a function from noisy to clean latents. The multi-view
video model works on the moving frames' latents of rendered pictures, the motion generator on displacements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..video.sampling import ALPHA_BARS, TRAINING_STEPS, add_noise, guided

if TYPE_CHECKING:
    from ..video.multiview_video import MultiViewVideo

# Animate3D's published settings. Its code writes the guidance as cond + 5 (cond - free), which is 6 in the usual form.
GUIDANCE = 6.0
RESCALE = 0.25
EARLIEST, LATEST = 0.02, 0.2  # range of the noise, in parts of the schedule


def draw_timestep(generator: torch.Generator) -> int:
    """A training step of the range that 4D-SDS uses: 20 to 200, uniform."""
    low, high = round(EARLIEST * TRAINING_STEPS), round(LATEST * TRAINING_STEPS)
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def reconstruct(latents: Tensor, denoise: Callable[[Tensor], tuple[Tensor, Tensor]], alpha_bar: Tensor | float, noise: Tensor,
                guidance: float = GUIDANCE, rescale: float = RESCALE) -> Tensor:
    """What the model believes the latents to be, after some noise has been put on them: z0_hat of Eq. 11.

    Args:
        latents: [V, M, ...] clean.
        denoise: noisy latents to clean ones, with the prompt and without it.
        alpha_bar: signal power of the noise level, 0..1.
        noise: like `latents`, standard normal.
        guidance: classifier-free guidance scale; 1 is without.
        rescale: how far the deviation of the guided prediction is brought back to that of the conditional one
            (Lin et al. 2024, section 3.4); 0 is not at all.

    Returns:
        like `latents`, without gradient.
    """
    with torch.no_grad():
        conditional, free = denoise(add_noise(latents.detach(), noise, alpha_bar))
        clean = guided(conditional, free, guidance)
        return clean * (rescale * conditional.std() / clean.std() + 1 - rescale)


def sds_loss(latents: Tensor, denoise: Callable[[Tensor], tuple[Tensor, Tensor]], alpha_bar: Tensor | float, noise: Tensor,
             guidance: float = GUIDANCE, rescale: float = RESCALE) -> Tensor:
    """Half the squared distance of the latents to their reconstruction, per picture (Track4DGen, Eq. 11).

    The gradient reaches the latents alone, (z - z0_hat) / (V M), not through the model.

    Args:
        as `reconstruct`; latents [V, M, ...] are those of the moving frames, the first one isn't counted.

    Returns:
        [] scalar.
    """
    wanted = reconstruct(latents, denoise, alpha_bar, noise, guidance, rescale)
    return 0.5 * (latents - wanted).square().sum() / (latents.shape[0] * latents.shape[1])


def video_prior(model: MultiViewVideo, prompt: str, viewmats: Tensor, first_frames: Tensor, seed: int = 0,
                guidance: float = GUIDANCE, rescale: float = RESCALE) -> Callable[[Tensor], Tensor]:
    """4D-SDS by the multi-view video model, as a loss on rendered pictures (Track4DGen, Eq. 11).

    Args:
        model: of either size.
        prompt: a sentence.
        viewmats: [V, 4, 4] world-to-camera, canonical space.
        first_frames: [V, 4, S, S] premultiplied RGBA in 0..1 of the object at rest.
        seed: of steps and noise.

    Returns:
        a function from the moving frames [M, V, S, S, 4], premultiplied RGBA in 0..1, to the loss. Pictures are brought to
        the model's size; each call draws another step and other noise.
    """
    def fitted(pictures: Tensor) -> Tensor:  # [N, 4, S, S]
        same = pictures.shape[-2:] == (model.size, model.size)
        return pictures if same else F.interpolate(pictures, (model.size, model.size), mode="bilinear", antialias=True)

    generator = torch.Generator().manual_seed(seed)
    conditions = model.conditions(prompt, viewmats, fitted(first_frames))
    with torch.no_grad():
        first = model.encode(fitted(first_frames))  # [V, C, h, w]

    def loss(pictures: Tensor) -> Tensor:
        t = draw_timestep(generator)
        latents = model.encode(fitted(pictures.permute(1, 0, 4, 2, 3).flatten(0, 1))).unflatten(0, (len(first), -1))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return sds_loss(latents, lambda noisy: model.predictions(noisy, first, t, conditions), ALPHA_BARS[t], noise, guidance,
                        rescale)

    return loss
