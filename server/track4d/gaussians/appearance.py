"""Colours, sizes and opacities of a cloud from the pictures of the still object."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from track4d_protocol.space import BACKGROUND

from .cloud import Cloud
from .rasterise import picture_loss, rasterise

Array = np.ndarray | Tensor

COLOR_RATE, SCALE_RATE, OPACITY_RATE = 0.03, 0.01, 0.03
COARSE_SHARE = 0.6  # of the steps run at half the resolution
SQUARED_WEIGHT = 0.2  # squared next to absolute colour difference
KEEP_SCALES, KEEP_COLORS = 0.02, 0.05  # weights of staying with the start, where the pictures don't say otherwise
COLOR_MARGIN = 0.01  # colours this far from 0 and 1, so that their logit is finite


def refine_appearance(cloud: Cloud, faces: Array, vertices: Array, pictures: Array, alphas: Array, viewmats: Array,
                      Ks: Array, steps: int = 80, background: float = BACKGROUND) -> Cloud:
    """Fits colour, scale and opacity to the views of the still mesh by Adam; places stay as they are.

    Args:
        faces: [T, 3]; vertices: [N, 3] of the captured pose.
        pictures: [V, H, H, 3] sRGB in 0..1, on the background; alphas: [V, H, H] in 0..1.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of these pictures.
        steps: of Adam.
        background: grey behind the pictures, sRGB.

    Returns:
        a new cloud with the same places.
    """
    device = cloud.scales.device
    vertices, pictures, alphas, viewmats, Ks = (torch.as_tensor(x, dtype=torch.float32, device=device)
                                                for x in (vertices, pictures, alphas, viewmats, Ks))
    means, quats = cloud.pose(faces, vertices[None])  # [1, G, 3], [1, G, 4]
    first_colors = torch.logit(cloud.colors.clamp(COLOR_MARGIN, 1 - COLOR_MARGIN))  # [G, 3]
    first_scales = cloud.scales.log()  # [G, 3]
    colors = first_colors.clone().requires_grad_()
    scales = first_scales.clone().requires_grad_()
    opacities = torch.logit(cloud.opacities.clamp(COLOR_MARGIN, 1 - COLOR_MARGIN)).requires_grad_()  # [G]
    optimiser = torch.optim.Adam([{"params": [colors], "lr": COLOR_RATE}, {"params": [scales], "lr": SCALE_RATE},
                                  {"params": [opacities], "lr": OPACITY_RATE}])
    fine, coarse = (pictures, alphas, Ks), _halve(pictures, alphas, Ks)
    object_share = alphas.mean().clamp(min=1e-3)
    for step in range(steps):
        wanted, wanted_alpha, step_Ks = coarse if step < COARSE_SHARE * steps else fine
        rgb, alpha = rasterise(means, quats, scales.exp(), opacities.sigmoid(), colors.sigmoid(), viewmats, step_Ks,
                               wanted.shape[1], background)  # [1, V, H, H, 3], [1, V, H, H]
        shown = picture_loss(rgb[0], alpha[0], wanted, wanted_alpha, squared=SQUARED_WEIGHT)
        bigger, recoloured = (scales - first_scales).square().mean(), (colors - first_colors).square().mean()
        optimiser.zero_grad()
        (shown / object_share + KEEP_SCALES * bigger + KEEP_COLORS * recoloured).backward()
        optimiser.step()
    return Cloud(cloud.triangles, cloud.barycentric, scales.detach().exp(), opacities.detach().sigmoid(),
                 colors.detach().sigmoid())


def still_psnr(cloud: Cloud, faces: Array, vertices: Array, pictures: Array, alphas: Array, viewmats: Array, Ks: Array,
               background: float = BACKGROUND) -> float:
    """How true a cloud is to the views of the still mesh: PSNR in dB over the object's pixels, weighted by `alphas`.

    Arguments as in `refine_appearance`.
    """
    vertices, pictures, alphas, viewmats, Ks = (torch.as_tensor(x, dtype=torch.float32, device=cloud.scales.device)
                                                for x in (vertices, pictures, alphas, viewmats, Ks))
    means, quats = cloud.pose(faces, vertices[None])  # [1, G, 3], [1, G, 4]
    rgb, _ = rasterise(means, quats, cloud.scales, cloud.opacities, cloud.colors, viewmats, Ks, pictures.shape[1], background)
    error = ((rgb[0].clamp(0, 1) - pictures).square().mean(-1) * alphas).sum() / alphas.sum()
    return float(-10 * error.clamp(min=1e-10).log10())


def _halve(pictures: Tensor, alphas: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, alphas and intrinsics at half the resolution; unchanged where the size is odd."""
    if pictures.shape[1] % 2:
        return pictures, alphas, Ks
    rgba = torch.cat([pictures, alphas[..., None]], -1)  # [V, H, H, 4]
    small = rgba.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))  # [V, H/2, H/2, 4]
    return small[..., :3], small[..., 3], Ks * Ks.new_tensor([0.5, 0.5, 1])[:, None]
