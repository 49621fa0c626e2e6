"""The CPU rasteriser as one differentiable torch operation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...parallel import KERNEL_LOCK
from . import blending, projection
from .constants import ALPHA_CUT


def rasterise_numba(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
                    Ks: Tensor, size: int, background: Tensor) -> tuple[Tensor, Tensor]:
    """`rasterise` for float32 CPU tensors; scales are [F or 1, N, 3] and colors [F or 1, V or 1, N, 3] here."""
    return _Rasterise.apply(means, quats, scales, opacities, colors, viewmats, Ks, size, background)


class _Rasterise(torch.autograd.Function):
    """No state outlives a call, and everything that backward needs goes through `save_for_backward`, also what isn't a
    tensor by nature: so it is freed with the graph. An output kept as an attribute of ctx would be a reference cycle
    that is never freed.
    """

    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmats, Ks, size, background):
        frames, gaussians = means.shape[:2]
        views = len(viewmats)
        log_opacities = opacities.clamp(min=1e-6).log()[:, None]  # [N, 1], finite
        splats = np.empty((frames * views, gaussians), blending.SPLAT)
        counts = np.empty(frames * views, np.int32)
        image = torch.empty((frames, views, size, size, 3))  # [F, V, H, W, 3]
        coverage = torch.empty((frames, views, size, size))  # [F, V, H, W]
        with KERNEL_LOCK:
            blending.draw(_array(means), _array(quats), _array(scales), _array(log_opacities), _array(colors), _array(viewmats),
                          _array(Ks), _array(background), splats, counts, _pictures(image), _pictures(coverage))
        ctx.save_for_backward(means, quats, scales, opacities, viewmats, Ks, image, coverage,
                              torch.from_numpy(splats.view(np.float32)), torch.from_numpy(counts))
        ctx.colors_shape = colors.shape
        return image, coverage

    @staticmethod
    @once_differentiable
    def backward(ctx, d_image, d_coverage):
        means, quats, scales, opacities, viewmats, Ks, image, coverage, splats, counts = ctx.saved_tensors
        gaussians = len(opacities)
        d_screen = np.empty((len(counts), gaussians, projection.SCREEN_GRADIENTS), np.float32)
        d_means, d_quats = (torch.empty(x.shape) for x in (means, quats))  # [F, N, 3], [F, N, 4]
        d_scales, d_log_opacities, d_colors = (torch.zeros(shape) for shape in (scales.shape, opacities.shape, ctx.colors_shape))
        with KERNEL_LOCK:
            blending.draw_backward(_array(splats).view(blending.SPLAT), _array(counts), _pictures(image),
                                   _pictures(coverage), _pictures(d_image), _pictures(d_coverage), d_screen)
            projection.project_backward(_array(means), _array(quats), _array(scales), _array(viewmats), _array(Ks),
                                        np.float32(image.shape[2]), d_screen, d_means.numpy(), d_quats.numpy(),
                                        d_scales.numpy(), d_colors.numpy(), d_log_opacities.numpy())
        # no opacity below ALPHA_CUT is drawn, so the clamp only keeps 0 / 0 away
        d_opacities = d_log_opacities / opacities.clamp(min=ALPHA_CUT)  # [N]
        return d_means, d_quats, d_scales, d_opacities, d_colors, None, None, None, None


def _array(tensor: Tensor) -> np.ndarray:
    """The contiguous float32 array behind a CPU tensor; shares memory where the tensor already is one."""
    return np.ascontiguousarray(tensor.detach().numpy())


def _pictures(tensor: Tensor) -> np.ndarray:
    """The array behind [F, V, H, W, ...] as [F V, H, W, ...]."""
    return _array(tensor.flatten(0, 1))
