"""Pictures of Gaussians: one differentiable function, drawn by Numba on the CPU and by gsplat on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gsplat_backend import rasterise_gsplat
from .numba_backend import rasterise_numba

__all__ = ["rasterise"]


def rasterise(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
              Ks: Tensor, size: int, background: Tensor | Sequence[float] | float) -> tuple[Tensor, Tensor]:
    """Draws moving Gaussians in all views (3D Gaussian splatting, Kerbl et al. 2023).

    All tensors lie on one device, which chooses the backend; floating types other than float32 are converted.
    Gradients flow to `means`, `quats`, `scales`, `opacities` and `colors`.

    Args:
        means: [F, N, 3] centres.
        quats: [F, N, 4] orientations wxyz, of any length but zero.
        scales: [N, 3] or [F, N, 3] standard deviations along the Gaussian's own axes.
        opacities: [N] in 0..1.
        colors: [N, 3] or [F, N, 3] sRGB.
        viewmats: [V, 4, 4] world-to-camera, OpenCV axes.
        Ks: [V, 3, 3] in pixels of a picture of this size.
        size: width and height in pixels.
        background: [3] sRGB, or one grey.

    Returns:
        rgb [F, V, size, size, 3] on the background, and alpha [F, V, size, size], both float32.

    Raises:
        ServerError: CUDA tensors without a GPU or without gsplat.
    """
    frames, gaussians = means.shape[:2]
    assert means.shape == (frames, gaussians, 3) and quats.shape == (frames, gaussians, 4), (means.shape, quats.shape)
    assert opacities.shape == (gaussians,), opacities.shape
    background = torch.as_tensor(background, dtype=torch.float32, device=means.device).expand(3)  # [3]
    scales, colors = (x if x.ndim == 3 else x[None] for x in (scales, colors))  # [F or 1, N, 3]
    assert scales.shape in {(1, gaussians, 3), (frames, gaussians, 3)}, scales.shape
    assert colors.shape in {(1, gaussians, 3), (frames, gaussians, 3)}, colors.shape
    draw = rasterise_gsplat if means.is_cuda else rasterise_numba
    return draw(means.float(), quats.float(), scales.float(), opacities.float(), colors.float(), viewmats.float(),
                Ks.float(), size, background)
