"""Colours, sizes and opacities of a cloud from pictures of the object.

Few pictures leave most Gaussians to guesswork, and what fits them alone looks worse from everywhere else. The textured mesh in
its estimated light can be drawn from anywhere and in every pose that it will have, so such pictures join the captured ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from track4d_protocol.space import BACKGROUND, intrinsics, orbit_viewmats

from ..geometry import zbuffer
from ..geometry.mesh import Mesh
from .cloud import Cloud
from .rasterise import SAMPLES, picture_loss, rasterise

Array = np.ndarray | Tensor

COLOR_RATE, SCALE_RATE, OPACITY_RATE = 0.05, 0.03, 0.05
LAST_RATE = 0.1  # share of the rates in the last step
PICTURES = 4  # per step
KEEP_COLORS = 0.005  # weight of staying with the start, where the pictures don't say otherwise
DRAWN = 16  # poses that are drawn, each from `PICTURES` sides
DRAWN_ELEVATIONS = (-40.0, 0.0, 60.0)  # one after the other
TURN = 55.6  # degrees from one pose's cameras to the next one's: the golden section of a quarter turn
DRAWN_SIZE = 256  # pixels at most
CAPTURED_EVERY = 4  # steps, one is for the captured pictures
COLOR_MARGIN = 0.01  # colours this far from 0 and 1, so that their logit is finite


@dataclass(frozen=True)
class Sitting:
    """Pictures of one pose.

    Attributes:
        vertices: [N, 3] of the mesh.
        pictures: [V, H, H, 3] sRGB in 0..1, on the background; alphas: [V, H, H] in 0..1.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of these pictures.
    """

    vertices: Array
    pictures: Array
    alphas: Array
    viewmats: Array
    Ks: Array


def drawn_sittings(mesh: Mesh, shading: np.ndarray, size: int, motion: np.ndarray | None = None) -> list[Sitting]:
    """The textured mesh, lit as captured, from where it was not captured and in poses that it will have.

    Args:
        mesh: canonical; shading: [N, 3] factor on its texture, which goes with the surface.
        size: of the captured pictures; drawn ones have `DRAWN_SIZE` at most.
        motion: [F, N, 3]; the mesh's own pose alone where not given.
    """
    poses, size = mesh.vertices[None] if motion is None else motion, min(size, DRAWN_SIZE)
    Ks, sittings = intrinsics(size, PICTURES), []
    for k, frame in enumerate(np.linspace(0, len(poses) - 1, DRAWN).round().astype(int)):
        azimuths = 45 + k * TURN + np.arange(PICTURES) * 360 / PICTURES
        viewmats = orbit_viewmats(azimuths, DRAWN_ELEVATIONS[k % len(DRAWN_ELEVATIONS)])
        rgba = zbuffer.render(mesh, poses[frame][None], viewmats, Ks, size, shading=shading)[0]
        sittings.append(Sitting(poses[frame], zbuffer.over(rgba, BACKGROUND), rgba[..., 3], viewmats, Ks))
    return sittings


def refine_appearance(cloud: Cloud, faces: Array, captured: Sitting, drawn: list[Sitting], steps: int = 80, seed: int = 0,
                      background: float = BACKGROUND) -> Cloud:
    """Fits colour, scale and opacity to views of the mesh by Adam; places on the surface stay as they are.

    Args:
        faces: [T, 3].
        captured: the pictures that are given; drawn: others, which take most of the steps.
        steps: of Adam, each on a few pictures of one pose.
        seed: of the pictures' order.
        background: grey behind the pictures, sRGB.

    Returns:
        a new cloud with the same places.
    """
    device = cloud.scales.device
    first_colors = torch.logit(cloud.colors.clamp(COLOR_MARGIN, 1 - COLOR_MARGIN))  # [G, 3]
    colors = first_colors.clone().requires_grad_()
    scales = cloud.scales.log().requires_grad_()  # [G, 3]
    opacities = torch.logit(cloud.opacities.clamp(COLOR_MARGIN, 1 - COLOR_MARGIN)).requires_grad_()  # [G]
    optimiser = torch.optim.Adam([{"params": [colors], "lr": COLOR_RATE}, {"params": [scales], "lr": SCALE_RATE},
                                  {"params": [opacities], "lr": OPACITY_RATE}])
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, LAST_RATE, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    sittings = [*drawn, captured]
    motions = [torch.as_tensor(sitting.vertices, dtype=torch.float32, device=device)[None] for sitting in sittings]
    poses = [cloud.pose(faces, motion) for motion in motions]
    order: list[int] = []
    for step in range(steps):
        at = len(drawn)
        if drawn and step % CAPTURED_EVERY:
            order = order or torch.randperm(len(drawn), generator=generator).tolist()
            at = order.pop()
        sitting = sittings[at]
        chosen = torch.randperm(len(sitting.pictures), generator=generator)[:PICTURES].numpy()
        pictures, alphas, viewmats, Ks = (torch.as_tensor(x[chosen], dtype=torch.float32, device=device) for x in (
            sitting.pictures, sitting.alphas, sitting.viewmats, sitting.Ks))
        rgb, alpha = rasterise(*poses[at], scales.exp(), opacities.sigmoid(), colors.sigmoid(), viewmats, Ks,
                               pictures.shape[1], background, SAMPLES)  # [1, v, H, H, 3], [1, v, H, H]
        shown = picture_loss(rgb[0], alpha[0], pictures, alphas, squared=1.0) / alphas.mean().clamp(min=1e-3)
        optimiser.zero_grad()
        (shown + KEEP_COLORS * (colors - first_colors).square().mean()).backward()
        optimiser.step()
        slower.step()
    return Cloud(cloud.triangles, cloud.barycentric, scales.detach().exp(), opacities.detach().sigmoid(),
                 colors.detach().sigmoid())


def still_psnr(cloud: Cloud, faces: Array, sitting: Sitting, background: float = BACKGROUND) -> float:
    """How true a cloud is to pictures of one pose: PSNR in dB over the object's pixels, weighted by alpha; faces [T, 3]."""
    vertices, pictures, alphas, viewmats, Ks = (
        torch.as_tensor(x, dtype=torch.float32, device=cloud.scales.device)
        for x in (sitting.vertices, sitting.pictures, sitting.alphas, sitting.viewmats, sitting.Ks))
    means, quats = cloud.pose(faces, vertices[None])  # [1, G, 3], [1, G, 4]
    rgb, _ = rasterise(means, quats, cloud.scales, cloud.opacities, cloud.colors, viewmats, Ks, pictures.shape[1], background,
                       SAMPLES)
    error = ((rgb[0].clamp(0, 1) - pictures).square().mean(-1) * alphas).sum() / alphas.sum()
    return float(-10 * error.clamp(min=1e-10).log10())
