"""The CPU rasteriser as one differentiable torch operation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...parallel import KERNEL_LOCK
from . import blending, projection


def rasterise_numba(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor,
                    size: int, background: Tensor) -> tuple[Tensor, Tensor]:
    """`rasterise` for float32 CPU tensors; scales and colors are [F or 1, N, 3] here."""
    return _Rasterise.apply(means, quats, scales, opacities, colors, viewmats, Ks, size, background)


class _Rasterise(torch.autograd.Function):
    """Everything that backward needs goes through `save_for_backward`, also what isn't a tensor by nature: it is then freed with the
    graph, and an output kept as an attribute of ctx would be a reference cycle that Python never frees. No state outlives a call."""

    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmats, Ks, size, background):
        frames, gaussians = means.shape[:2]
        views = len(viewmats)
        pictures = frames * views
        arrays = [_array(tensor) for tensor in (means, quats, scales, opacities, colors, viewmats, Ks, background)]
        means_, quats_, scales_, opacities_, colors_, viewmats_, Ks_, background_ = arrays

        screen = np.empty((pictures, gaussians, 2), np.float32)
        conics = np.empty((pictures, gaussians, 3), np.float32)
        depths = np.empty((pictures, gaussians), np.float32)
        splats = np.empty((pictures, gaussians), blending.SPLAT)
        counts = np.empty(pictures, np.int32)
        tiles = (-(-size // blending.TILE)) ** 2
        tile_starts = np.empty((pictures, tiles + 1), np.int32)
        image = torch.empty((frames, views, size, size, 3))  # [F, V, H, W, 3]
        coverage = torch.empty((frames, views, size, size))  # [F, V, H, W]
        with KERNEL_LOCK:
            projection.project(means_, quats_, scales_, viewmats_, Ks_, np.float32(size), screen, conics, depths)
            blending.prepare(screen, conics, depths, opacities_, colors_, np.int32(size), splats, counts, tile_starts)
            entry_starts = np.concatenate([[0], np.cumsum(tile_starts[:, -1], dtype=np.int64)])  # [B + 1]
            entries = np.empty(entry_starts[-1], np.int32)
            blending.blend(splats, counts, tile_starts, entry_starts, entries, background_, np.int32(size),
                           image.numpy().reshape(pictures, size, size, 3), coverage.numpy().reshape(pictures, size, size))
        lists = (splats.view(np.float32), counts, tile_starts, entry_starts, entries)
        ctx.save_for_backward(means, quats, scales, viewmats, Ks, image, coverage, *map(torch.from_numpy, lists))
        ctx.shared_colors = len(colors) == 1
        return image, coverage

    @staticmethod
    @once_differentiable
    def backward(ctx, d_image, d_coverage):
        means, quats, scales, viewmats, Ks, image, coverage, splats, *lists = map(_array, ctx.saved_tensors)
        frames, views, size = image.shape[:3]
        pictures, gaussians = frames * views, means.shape[1]
        flat = (pictures, size, size)
        d_screen = np.empty((pictures, gaussians, projection.SCREEN_GRADIENTS), np.float32)
        d_means = torch.empty((frames, gaussians, 3))  # [F, N, 3]
        d_quats = torch.empty((frames, gaussians, 4))  # [F, N, 4]
        d_scales, d_colors = torch.empty_like(d_means), torch.empty_like(d_means)  # [F, N, 3]
        d_opacities = torch.empty((frames, gaussians, 1))  # [F, N, 1]
        with KERNEL_LOCK:
            blending.blend_backward(splats.view(blending.SPLAT), *lists, np.int32(size), image.reshape(*flat, 3),
                                    coverage.reshape(flat), _array(d_image).reshape(*flat, 3), _array(d_coverage).reshape(flat),
                                    d_screen)
            projection.project_backward(means, quats, scales, viewmats, Ks, np.float32(size), d_screen, d_means.numpy(),
                                        d_quats.numpy(), d_scales.numpy(), d_colors.numpy(), d_opacities.numpy())
        if len(scales) == 1:
            d_scales = d_scales.sum(0, keepdim=True)  # [1, N, 3]
        if ctx.shared_colors:
            d_colors = d_colors.sum(0, keepdim=True)  # [1, N, 3]
        return d_means, d_quats, d_scales, d_opacities.sum(0)[:, 0], d_colors, None, None, None, None


def _array(tensor: Tensor) -> np.ndarray:
    """The contiguous float32 array behind a CPU tensor; shares memory where the tensor already is one."""
    return np.ascontiguousarray(tensor.detach().numpy())
