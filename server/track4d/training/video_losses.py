"""The losses of Stage One (Track4DGen, section 3.2, Eqs. 1-5), as functions of latents, feature maps and point tracks.

Positions on pictures and feature maps are in units of the picture: (0, 0) its upper left corner, (1, 1) its lower right
one, so that the centre of cell (i, j) of a map of w x h cells is ((j + 0.5) / w, (i + 0.5) / h) at every resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Softmax temperature of the soft-argmax; the paper gives none. A cosine lies in [-1, 1], so 1 would average the whole map.
TEMPERATURE = 0.07
# The paper (its reference 37) draws the first frame's noise scale from a logit-normal distribution whose centre is 2 t^5 - 1.
FIRST_FRAME_POWER = 5


def noise_frames(latents: Tensor, noise: Tensor, alpha_bar: Tensor, first_frame_scale: Tensor) -> Tensor:
    """The U-Net's input: frames 2..f diffused (Eq. 1), the first frame with its own small noise (Eq. 2).

    Args:
        latents: [B, V, F, C, H, W] clean.
        noise: like `latents`, standard normal.
        alpha_bar: [B] of the step, 0..1.
        first_frame_scale: [B], beta_t of Eq. 2.
    """
    alpha = alpha_bar.view(-1, 1, 1, 1, 1, 1)
    first = latents[:, :, :1] + first_frame_scale.view(-1, 1, 1, 1, 1, 1) * noise[:, :, :1]
    return torch.cat([first, alpha.sqrt() * latents[:, :, 1:] + (1 - alpha).sqrt() * noise[:, :, 1:]], 2)


def first_frame_scales(times: Tensor, largest: float, generator: torch.Generator | None = None) -> Tensor:
    """Draws beta_t of Eq. 2: large at large steps, so that motion cannot be copied away from a clean first frame.

    Args:
        times: [B] in 0..1, 1 where frames 2..f are pure noise.
        largest: bound of the scale, in standard deviations of the latents.

    Returns:
        [B], logit-normal about 2 t^5 - 1, times `largest` (Zhao et al. 2024, "TimeNoise").
    """
    centre = 2 * times**FIRST_FRAME_POWER - 1
    return largest * torch.sigmoid(centre + torch.randn(times.shape, generator=generator))


def diffusion_loss(predicted: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise on frames 2..f (Eq. 3); [B, V, F, C, H, W] both."""
    return F.mse_loss(predicted[:, :, 1:].float(), noise[:, :, 1:])


def sample_features(features: Tensor, positions: Tensor) -> Tensor:
    """Unit descriptors h(p) of points by bilinear interpolation.

    Args:
        features: [..., C, h, w].
        positions: [..., P, 2] in units of the picture; outside of it the border counts.

    Returns:
        [..., P, C] float32 of length 1.
    """
    leading = features.shape[:-3]
    maps = features.float().reshape(-1, *features.shape[-3:])
    grid = positions.float().reshape(len(maps), 1, -1, 2) * 2 - 1
    found = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)  # [N, C, 1, P]
    return F.normalize(found[:, :, 0].mT, dim=-1).reshape(*leading, positions.shape[-2], -1)


def correspondence_loss(features: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """Tracked points keep their descriptor from frame to frame (Eq. 4).

    Points count where they are visible in both frames. The sum over f - 1 pairs is divided by f as in the paper.

    Args:
        features: [B, V, F, C, h, w].
        positions: [B, V, F, P, 2] in units of the picture.
        visible: [B, V, F, P] bool.
    """
    points = sample_features(features, positions)  # [B, V, F, P, C]
    distance = 1 - (points[:, :, :-1] * points[:, :, 1:]).sum(-1)
    frames = features.shape[2]
    return masked_mean(distance, visible[:, :, :-1] & visible[:, :, 1:]) * ((frames - 1) / frames)


def similarity_maps(features: Tensor, positions: Tensor) -> Tensor:
    """Cosine similarity of every cell of every frame with each point's descriptor in the first frame.

    Args:
        features: [..., F, C, h, w].
        positions: [..., P, 2] of the points in the first frame, in units of the picture.

    Returns:
        [..., F, P, h, w] float32.
    """
    points = sample_features(features[..., 0, :, :, :], positions)  # [..., P, C]
    return torch.einsum("...pc,...fchw->...fphw", points, F.normalize(features.float(), dim=-3))


def soft_argmax(similarity: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Expected position under the softmax of [..., h, w]; [..., 2] in units of the picture."""
    height, width = similarity.shape[-2:]
    weights = (similarity.flatten(-2) / temperature).softmax(-1).unflatten(-1, (height, width))
    rows = (torch.arange(height, device=similarity.device) + 0.5) / height
    columns = (torch.arange(width, device=similarity.device) + 0.5) / width
    return torch.stack([(weights.sum(-2) * columns).sum(-1), (weights.sum(-1) * rows).sum(-1)], -1)


def position_loss(features: Tensor, positions: Tensor, visible: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Points are found again in the feature maps of later frames (Eq. 5, Huber).

    Points count where they are visible in that frame and in the first. The sum over f - 1 frames is divided by f as in the paper,
    which doesn't give the unit of the distance: it is the picture here.

    Args:
        features: [B, V, F, C, h, w].
        positions: [B, V, F, P, 2] in units of the picture.
        visible: [B, V, F, P] bool.
    """
    found = soft_argmax(similarity_maps(features, positions[:, :, 0])[:, :, 1:], temperature)  # [B, V, F - 1, P, 2]
    error = F.huber_loss(found, positions[:, :, 1:].float(), reduction="none").sum(-1)
    frames = features.shape[2]
    return masked_mean(error, visible[:, :, 1:] & visible[:, :, :1]) * ((frames - 1) / frames)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; 0 where there is nothing."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
