"""Pictures of Gaussians: one differentiable function, drawn by Numba on the CPU and by gsplat on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from importlib.util import find_spec

import torch
from torch import Tensor

from .dense import limit_opacities
from .gsplat_backend import rasterise_gsplat
from .loss import picture_loss
from .numba_backend import rasterise_numba

__all__ = ["SAMPLES", "best_device", "picture_loss", "rasterise", "rasterise_depth"]

# Subpixels along each axis where clouds are fitted and judged. Splats are drawn with a blur of half a pixel; a cloud that is
# fitted through it has splats too small for every viewer that looks closer, and Blender has no such blur at all.
SAMPLES = 2


def best_device() -> str:
    """Where clouds can be drawn fastest: "cuda" where torch finds a GPU and gsplat is installed, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and find_spec("gsplat") else "cpu"


def rasterise(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
              Ks: Tensor, size: int, background: Tensor | Sequence[float] | float, samples: int = 1) -> tuple[Tensor, Tensor]:
    """Draws moving Gaussians in all views (3D Gaussian splatting, Kerbl et al. 2023).

    All tensors lie on one device, which chooses the backend; floating types other than float32 are converted.
    Gradients flow to `means`, `quats`, `scales`, `opacities` and `colors`.

    Args:
        means: [F, N, 3] centres.
        quats: [F, N, 4] orientations wxyz, of any length but zero.
        scales: [N, 3] or [F, N, 3] standard deviations along the Gaussian's own axes.
        opacities: [N] in 0..1; those above 0.99 are drawn as 0.99, with the gradient of a picture that isn't limited.
        colors: [N, 3], [F, N, 3] or [F, V, N, 3] sRGB.
        viewmats: [V, 4, 4] world-to-camera, OpenCV axes.
        Ks: [V, 3, 3] in pixels of a picture of this size.
        size: width and height in pixels.
        background: [3] sRGB, or one grey.
        samples: subpixels of a pixel along each axis: drawn so much larger, blur and all, and averaged.

    Returns:
        rgb [F, V, size, size, 3] on the background, and alpha [F, V, size, size], both float32.

    Raises:
        ServerError: CUDA tensors without a GPU or without gsplat.
    """
    if samples > 1:
        fine = Ks * Ks.new_tensor([samples, samples, 1])[:, None]
        pictures = rasterise(means, quats, scales, opacities, colors, viewmats, fine, samples * size, background)
        return _averaged(pictures[0], samples), _averaged(pictures[1], samples)
    frames, gaussians, views = *means.shape[:2], len(viewmats)
    assert means.shape == (frames, gaussians, 3) and quats.shape == (frames, gaussians, 4), (means.shape, quats.shape)
    assert opacities.shape == (gaussians,), opacities.shape
    background = torch.as_tensor(background, dtype=torch.float32, device=means.device).expand(3)  # [3]
    scales = scales if scales.ndim == 3 else scales[None]  # [F or 1, N, 3]
    colors = colors if colors.ndim == 4 else colors[None, None] if colors.ndim == 2 else colors[:, None]  # [F or 1, V or 1, N, 3]
    assert scales.shape in {(1, gaussians, 3), (frames, gaussians, 3)}, scales.shape
    assert colors.shape in {(1, 1, gaussians, 3), (frames, 1, gaussians, 3), (frames, views, gaussians, 3)}, colors.shape
    draw = rasterise_gsplat if means.is_cuda else rasterise_numba
    return draw(means.float(), quats.float(), scales.float(), limit_opacities(opacities.float()), colors.float(),
                viewmats.float(), Ks.float(), size, background)


def _averaged(pictures: Tensor, samples: int) -> Tensor:
    """[F, V, samples * H, samples * W, ...] averaged to [F, V, H, W, ...]; slices are five times as fast as pooling here."""
    rows = reduce(torch.add, (pictures[:, :, k::samples] for k in range(samples)))
    return reduce(torch.add, (rows[:, :, :, k::samples] for k in range(samples))) / samples**2


def rasterise_depth(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
                    size: int) -> tuple[Tensor, Tensor]:
    """Expected depth: the mean of the Gaussians' depths at each pixel, weighted like their colours; arguments as in `rasterise`.

    It is drawn as a colour, so gradients flow to everything that `rasterise` differentiates.

    Returns:
        depth [F, V, size, size], distance from the camera's plane, 0 where nothing is drawn; and alpha [F, V, size, size].
    """
    depths = torch.einsum("vi,fni->fvn", viewmats[:, 2, :3], means) + viewmats[:, 2, 3, None]  # [F, V, N]
    rgb, alpha = rasterise(means, quats, scales, opacities, depths[..., None].expand(-1, -1, -1, 3), viewmats, Ks, size, 0.0)
    return rgb[..., 0] / torch.where(alpha > 0, alpha, 1), alpha
