"""4D-SDS by z0 reconstruction: what the diffusion model would rather see pulls at what is rendered (Track4DGen, Eq. 11).

Any diffusion model with Gaussian noise will do: it comes in as a function from noisy to clean latents. The multi-view
video model works on the moving frames' latents of rendered pictures (`video_prior`), the motion generator on displacements
(`motion_prior`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from track4d_protocol import space

from ..geometry import zbuffer
from ..geometry.mesh import Mesh
from ..video.diffusion import BASIS_FRAMES, log_snr
from ..video.generator import decode_video, encode_tracks
from ..video.maps import surface_operator
from ..video.sampling import ALPHA_BARS, TRAINING_STEPS, add_noise, guided
from ..video.text import read

if TYPE_CHECKING:
    from ..video.generator import MotionGenerator
    from ..video.multiview_video import MultiViewVideo

# Animate3D's published settings. Its code writes the guidance as cond + 5 (cond - free), which is 6 in the usual form.
GUIDANCE = 6.0
RESCALE = 0.25
MOTION_GUIDANCE = 1.5  # of the motion generator, which needs less of it
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


# What is rendered or moved, and the run's source of randomness, so that a run that is resumed goes on bit for bit; to the loss.
Prior = Callable[[Tensor, torch.Generator], Tensor]


def video_prior(model: MultiViewVideo, prompt: str, viewmats: Tensor, first_frames: Tensor, guidance: float = GUIDANCE,
                rescale: float = RESCALE) -> Prior:
    """4D-SDS by the multi-view video model, as a loss on rendered pictures (Track4DGen, Eq. 11).

    Args:
        model: of either size.
        prompt: a sentence.
        viewmats: [V, 4, 4] world-to-camera, canonical space.
        first_frames: [V, 4, S, S] premultiplied RGBA in 0..1 of the object at rest.

    Returns:
        a function of the moving frames [M, V, S, S, 4], premultiplied RGBA in 0..1, with a gradient. Pictures are brought
        to the model's size; each call draws another step and other noise.
    """
    def fitted(pictures: Tensor) -> Tensor:  # [N, 4, S, S]
        same = pictures.shape[-2:] == (model.size, model.size)
        return pictures if same else F.interpolate(pictures, (model.size, model.size), mode="bilinear", antialias=True)

    conditions = model.conditions(prompt, viewmats, fitted(first_frames))
    with torch.no_grad():
        first = model.encode(fitted(first_frames))  # [V, C, h, w]

    def loss(pictures: Tensor, generator: torch.Generator) -> Tensor:
        t = draw_timestep(generator)
        latents = model.encode(fitted(pictures.permute(1, 0, 4, 2, 3).flatten(0, 1))).unflatten(0, (len(first), -1))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return sds_loss(latents, lambda noisy: model.predictions(noisy, first, t, conditions), ALPHA_BARS[t], noise, guidance,
                        rescale)

    return loss


STILLS = 128  # pixels along a side of the pictures that the motion generator is shown


def motion_prior(model: MotionGenerator, mesh: Mesh, shading: np.ndarray, prompt: str,
                 guidance: float = MOTION_GUIDANCE) -> Prior:
    """4D-SDS by the motion generator, as a loss on the mesh's motion (Track4DGen, Eq. 11, in displacement space).

    The generator is shown the mesh at rest from the sides that it was trained with, whatever the video's cameras are.

    Args:
        mesh: canonical, at rest.
        shading: [N, 3] factor on its texture.
        prompt: a sentence; empty for what the model thinks of any motion.
        guidance: classifier-free guidance scale.

    Returns:
        a function of vertex positions [F, N, 3] at evenly spaced moments, the rest pose first; each call draws another noise
        level, of the same part of the schedule as `draw_timestep`, and other noise.
    """
    viewmats = space.orbit_viewmats()
    views, grid = len(viewmats), model.network.config.grid
    Ks = space.intrinsics(STILLS, views)
    stills = decode_video(mesh, mesh.vertices[None], viewmats, Ks, STILLS, shading)[:, 0]  # [V, S, S, 4]
    seen = model.observe(mesh, stills, viewmats, Ks)[0]
    seen_by = surface_operator(mesh.vertices, mesh.faces, viewmats, zbuffer.scale_intrinsics(Ks, grid / STILLS), grid)
    mask = seen[:, :, -1:]  # the network's answer means nothing where no surface is seen
    tokens = torch.tensor([read(prompt)])

    def loss(tracks: Tensor, generator: torch.Generator) -> Tensor:
        paths = tracks.permute(1, 2, 0)  # [N, 3, F]
        if len(tracks) != BASIS_FRAMES:
            paths = F.interpolate(paths, BASIS_FRAMES, mode="linear", align_corners=True)
        latents = encode_tracks(paths.permute(2, 0, 1), seen_by, views)
        level = EARLIEST + (LATEST - EARLIEST) * torch.rand(1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        signal = torch.sigmoid(log_snr(level, grid))

        def denoise(noisy: Tensor) -> tuple[Tensor, Tensor]:
            conditional, free = model.predictions(noisy, seen, level, tokens)
            return conditional * mask, free * mask

        return sds_loss(latents, denoise, signal, noise, guidance, rescale=0)

    return loss
