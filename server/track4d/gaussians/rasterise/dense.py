"""The rasteriser's definition in plain torch: every Gaussian at every pixel, any dtype, differentiable by autograd.

Slow (pixels x Gaussians numbers per picture) and meant to be: it is the twin that the fast backends are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import ALPHA_CUT, ALPHA_MAX, CLAMP_MARGIN, EPS2D, NEAR, TRANSMITTANCE_STOP


def rasterise_dense(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
                    Ks: Tensor, size: int, background: Tensor) -> tuple[Tensor, Tensor]:
    """`rasterise` in the dtype of `means`, for tests."""
    frames, gaussians = means.shape[:2]
    scales = scales.expand(frames, gaussians, 3)  # [F, N, 3]
    opacities = limit_opacities(opacities)  # [N]
    colors = colors if colors.ndim == 4 else colors.expand(frames, gaussians, 3)[:, None]  # [F, V or 1, N, 3]
    colors = colors.expand(frames, len(viewmats), gaussians, 3)  # [F, V, N, 3]
    pictures = [[_picture(means[f], quats[f], scales[f], opacities, colors[f, v], viewmat, K, size, background)
                 for v, (viewmat, K) in enumerate(zip(viewmats, Ks))] for f in range(frames)]
    image = torch.stack([torch.stack([rgb for rgb, _ in views]) for views in pictures])  # [F, V, H, W, 3]
    alpha = torch.stack([torch.stack([a for _, a in views]) for views in pictures])  # [F, V, H, W]
    return image, alpha


def limit_opacities(opacities: Tensor) -> Tensor:
    """Opacities with those above ALPHA_MAX set to it; the gradient passes as if they weren't, so that they can come back."""
    return opacities - (opacities.detach() - ALPHA_MAX).clamp(min=0)


def rotation_matrices(quats: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] wxyz of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).reshape(*quats.shape[:-1], 3, 3)


def _project(means, quats, scales, viewmat, K, size):
    """Pixels [N, 2], conics [N, 3] and depths [N] of one view; see `projection`."""
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    z = z.clamp(min=NEAR)
    margin_x, margin_y = CLAMP_MARGIN * 0.5 * size / fx, CLAMP_MARGIN * 0.5 * size / fy
    u = (x / z).clamp(-cx / fx - margin_x, (size - cx) / fx + margin_x)
    v = (y / z).clamp(-cy / fy - margin_y, (size - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * u / z, zero, fy / z, -fy * v / z], -1).reshape(-1, 2, 3)
    factor = jacobian @ rotation @ (rotation_matrices(quats) * scales[:, None, :])  # [N, 2, 3]
    covariance = factor @ factor.transpose(1, 2) + EPS2D * torch.eye(2, dtype=means.dtype)  # [N, 2, 2]
    inverse = torch.linalg.inv(covariance)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)  # [N, 3]
    return torch.stack([fx * x / z + cx, fy * y / z + cy], -1), conics, z


def _picture(means, quats, scales, opacities, colors, viewmat, K, size, background):
    centres, conics, depths = _project(means, quats, scales, viewmat, K, size)
    order = torch.argsort(depths.detach(), stable=True)
    order = order[depths[order] > NEAR]
    centres, conics, colors, opacities = centres[order], conics[order], colors[order], opacities[order]
    across = torch.arange(size, dtype=means.dtype) + 0.5
    pixels = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1).reshape(-1, 1, 2)  # [H W, 1, 2]
    dx, dy = (pixels - centres).unbind(-1)  # [H W, N]
    exponent = -0.5 * (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) - conics[:, 1] * dx * dy
    alpha = opacities * torch.exp(exponent)  # [H W, N]
    alpha = torch.where(alpha >= ALPHA_CUT, alpha, 0)
    stopped = torch.cumprod(1 - alpha.detach(), 1) <= TRANSMITTANCE_STOP  # once true, true for all that lies behind
    alpha = torch.where(stopped, 0, alpha)
    after = torch.cumprod(1 - alpha, 1)
    light = torch.cat([torch.ones_like(pixels[:, 0, :1]), after], 1)  # [H W, N + 1]
    rgb = (alpha * light[:, :-1]) @ colors + light[:, -1:] * background
    return rgb.reshape(size, size, 3), (1 - light[:, -1]).reshape(size, size)
