"""What moving Gaussians look like in a multi-view video: 4D SH, sizes and opacities, fitted while the motion stays as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from track4d_protocol.space import BACKGROUND

from ..progress import Report, silent
from .cloud import Cloud
from .rasterise import picture_loss, rasterise
from .spherical_harmonics import cosine_basis, sh_colors, sh_from_colors, view_directions

Array = np.ndarray | Tensor

RATE, SCALE_RATE, OPACITY_RATE = 0.03, 0.01, 0.03  # Adam's; the first for colours that all directions and times share
SLOWER = 4.0  # the rates of single directions and times are this much smaller
# Weights of staying with the start, where the pictures don't say otherwise: colours, their change in time, by direction, sizes.
KEEP, KEEP_STEADY, KEEP_MATT, KEEP_SCALES = 0.01, 0.1, 1.0, 0.02
OPACITY_MARGIN = 0.01  # opacities this far from 0 and 1, so that their logit is finite
FRAMES_PER_STEP = 2


def fit_light(cloud: Cloud, faces: Array, vertices: Array, pictures: Array, masks: Array, viewmats: Array, Ks: Array,
              degree: int, terms: int, steps: int, seed: int = 0, background: float = BACKGROUND,
              report: Report = silent) -> tuple[Cloud, Tensor]:
    """Fits 4D SH (Eq. 8 of Track4DGen), sizes and opacities to a video by Adam on the pictures, from the cloud as it is.

    Args:
        faces: [T, 3]; vertices: [F, N, 3] the mesh's motion.
        pictures: [V, F, H, H, 3] sRGB in 0..1, on the background; masks: [V, F, H, H] in 0..1 or bool, where the object is.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of these pictures.
        degree: 0 to 3; terms: cosines per coefficient. With 0 and 1 the colours are static.
        steps: of Adam, each on two frames in all views.
        seed: of the order of the frames.
        background: grey behind the pictures, sRGB.
        report: called at every step with "appearance"; may raise `Cancelled`.

    Returns:
        the cloud with its new sizes and opacities, and the coefficients [G, (degree + 1)^2, terms, 3].
    """
    device = cloud.scales.device
    vertices, pictures, masks, viewmats, Ks = (torch.as_tensor(x, dtype=torch.float32, device=device)
                                               for x in (vertices, pictures, masks, viewmats, Ks))
    frames, size = pictures.shape[1], pictures.shape[2]
    generator = torch.Generator().manual_seed(seed)
    start = sh_from_colors(cloud.colors, degree, terms)  # [G, K, W, 3]
    shared = torch.zeros_like(start[:, :1, :1]).requires_grad_()  # [G, 1, 1, 3] of all directions and times
    single = torch.zeros_like(start).requires_grad_()
    first_scales = cloud.scales.log()  # [G, 3]
    scales = first_scales.clone().requires_grad_()
    opacities = torch.logit(cloud.opacities.clamp(OPACITY_MARGIN, 1 - OPACITY_MARGIN)).requires_grad_()  # [G]
    optimiser = torch.optim.Adam([{"params": [shared], "lr": RATE}, {"params": [single], "lr": RATE / SLOWER},
                                  {"params": [scales], "lr": SCALE_RATE}, {"params": [opacities], "lr": OPACITY_RATE}])
    object_share = masks.mean().clamp(min=1e-3)
    order: list[int] = []

    def coefficients() -> Tensor:
        return start + single + functional.pad(shared, (0, 0, 0, terms - 1, 0, start.shape[1] - 1))

    for step in range(steps):
        report("appearance", step, steps)
        if len(order) < min(FRAMES_PER_STEP, frames):
            order += torch.randperm(frames, generator=generator).tolist()
        chosen, order = order[:FRAMES_PER_STEP], order[FRAMES_PER_STEP:]
        means, quats = cloud.pose(faces, vertices[chosen])  # [f, G, 3], [f, G, 4]
        moments = torch.tensor(chosen, dtype=torch.float32, device=device)
        colors = sh_colors(coefficients(), view_directions(means, viewmats), moments, frames)  # [f, V, G, 3]
        rgb, alpha = rasterise(means, quats, scales.exp(), opacities.sigmoid(), colors, viewmats, Ks, size, background)
        wanted, mask = pictures[:, chosen].transpose(0, 1), masks[:, chosen].transpose(0, 1)  # [f, V, H, H, 3], [f, V, H, H]
        lost = (mask.amax((-2, -1)) == 0)[..., None, None]  # [f, V, 1, 1] pictures without the object say nothing
        wanted, mask = torch.where(lost[..., None], rgb.detach(), wanted), torch.where(lost, alpha.detach(), mask)
        shown = picture_loss(rgb, alpha, wanted.contiguous(), mask.contiguous(), squared=1.0, mask_absolute=0.5)
        unsteady, glossy = (part.square().sum((1, 2)).mean() for part in (single[:, :1], single[:, 1:]))
        kept = KEEP * shared.square().mean() + KEEP_STEADY * unsteady + KEEP_MATT * glossy
        kept = kept + KEEP_SCALES * (scales - first_scales).square().mean()
        optimiser.zero_grad()
        (shown / object_share + kept).backward()
        optimiser.step()
    fitted = replace(cloud, scales=scales.detach().exp(), opacities=opacities.detach().sigmoid())
    return fitted, coefficients().detach()


def resample_sh(coefficients: Tensor, frames: int, new_frames: int) -> Tensor:
    """Cosine series [G, K, W, 3] over `frames` frames as the closest ones over `new_frames` frames of the same span of time."""
    terms = coefficients.shape[2]
    if frames == new_frames or terms == 1:
        return coefficients
    count = max(new_frames, 4 * terms)
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    before = cosine_basis(share * (frames - 1), terms, frames)  # [count, W]
    after = cosine_basis(share * (new_frames - 1), terms, new_frames)
    matrix = torch.linalg.lstsq(after, before).solution  # [W, W]
    return torch.einsum("ij,gkjc->gkic", matrix.to(coefficients), coefficients)
