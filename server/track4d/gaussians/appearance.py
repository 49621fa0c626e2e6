"""Colours, sizes and opacities of a cloud from the pictures of the still object.

Few pictures leave most Gaussians to guesswork, and what fits them alone looks worse from everywhere else. The textured mesh in
its estimated light can be drawn from anywhere, so such pictures join the captured ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from track4d_protocol.space import BACKGROUND, intrinsics, orbit_viewmats

from ..geometry import zbuffer
from ..geometry.mesh import Mesh
from .cloud import Cloud
from .rasterise import picture_loss, rasterise

Array = np.ndarray | Tensor

COLOR_RATE, SCALE_RATE, OPACITY_RATE = 0.05, 0.03, 0.05
LAST_RATE = 0.1  # share of the rates in the last step
PICTURES = 4  # per step
KEEP_COLORS = 0.005  # weight of staying with the start, where the pictures don't say otherwise
DRAWN_AZIMUTHS, DRAWN_ELEVATIONS = np.arange(45.0, 360, 90), (-40.0, 0.0, 60.0)  # between the captured views, below and above
COLOR_MARGIN = 0.01  # colours this far from 0 and 1, so that their logit is finite


def drawn_views(mesh: Mesh, shading: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The textured mesh, lit as captured, from where it was not captured.

    Args:
        mesh: canonical; shading: [N, 3] factor on its texture.
        size: of the pictures.

    Returns:
        pictures [V, size, size, 3] sRGB on the background, alphas [V, size, size], viewmats [V, 4, 4], Ks [V, 3, 3].
    """
    viewmats = np.concatenate([orbit_viewmats(DRAWN_AZIMUTHS, elevation) for elevation in DRAWN_ELEVATIONS])
    Ks = intrinsics(size, len(viewmats))
    rgba = zbuffer.render(mesh, mesh.vertices[None], viewmats, Ks, size, 4, shading)[0]
    return zbuffer.over(rgba, BACKGROUND), rgba[..., 3], viewmats, Ks


def refine_appearance(cloud: Cloud, faces: Array, vertices: Array, pictures: Array, alphas: Array, viewmats: Array,
                      Ks: Array, steps: int = 80, seed: int = 0, background: float = BACKGROUND) -> Cloud:
    """Fits colour, scale and opacity to views of the still mesh by Adam; places stay as they are.

    Args:
        faces: [T, 3]; vertices: [N, 3] of the captured pose.
        pictures: [V, H, H, 3] sRGB in 0..1, on the background; alphas: [V, H, H] in 0..1.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of these pictures.
        steps: of Adam, each on a few of the pictures.
        seed: of the pictures' order.
        background: grey behind the pictures, sRGB.

    Returns:
        a new cloud with the same places.
    """
    device = cloud.scales.device
    vertices, pictures, alphas, viewmats, Ks = (torch.as_tensor(x, dtype=torch.float32, device=device)
                                                for x in (vertices, pictures, alphas, viewmats, Ks))
    means, quats = cloud.pose(faces, vertices[None])  # [1, G, 3], [1, G, 4]
    first_colors = torch.logit(cloud.colors.clamp(COLOR_MARGIN, 1 - COLOR_MARGIN))  # [G, 3]
    colors = first_colors.clone().requires_grad_()
    scales = cloud.scales.log().requires_grad_()  # [G, 3]
    opacities = torch.logit(cloud.opacities.clamp(COLOR_MARGIN, 1 - COLOR_MARGIN)).requires_grad_()  # [G]
    optimiser = torch.optim.Adam([{"params": [colors], "lr": COLOR_RATE}, {"params": [scales], "lr": SCALE_RATE},
                                  {"params": [opacities], "lr": OPACITY_RATE}])
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, LAST_RATE, max(steps, 1))
    object_share = alphas.mean().clamp(min=1e-3)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < min(PICTURES, len(pictures)):
            order += torch.randperm(len(pictures), generator=generator).tolist()
        chosen, order = order[:PICTURES], order[PICTURES:]
        rgb, alpha = rasterise(means, quats, scales.exp(), opacities.sigmoid(), colors.sigmoid(), viewmats[chosen], Ks[chosen],
                               pictures.shape[1], background)  # [1, v, H, H, 3], [1, v, H, H]
        shown = picture_loss(rgb[0], alpha[0], pictures[chosen], alphas[chosen], squared=1.0)
        optimiser.zero_grad()
        (shown / object_share + KEEP_COLORS * (colors - first_colors).square().mean()).backward()
        optimiser.step()
        slower.step()
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
