"""How far drawn pictures and masks are from the wanted ones: value and gradient in one pass over the pixels."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...parallel import KERNEL_LOCK
from .kernels import kernel, parallel_kernel
from .lanes import LANES, larger, load, store, where, zeros

CHUNK = 8192  # numbers per task; few enough for their float32 sum to be exact to a few digits more than needed

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


def picture_loss(rgb: Tensor, alpha: Tensor, wanted_rgb: Tensor, wanted_alpha: Tensor, absolute: float = 1.0,
                 squared: float = 0.0, mask_absolute: float = 1.0, mask_squared: float = 0.0) -> Tensor:
    """Weighted absolute and squared differences of colour and mask (the reconstruction loss, Eq. 10 of Track4DGen).

    The mean over pixels and channels of absolute |d| + squared d^2 for d = rgb - wanted_rgb, plus that of mask_absolute |m| +
    mask_squared m^2 over the pixels for m = alpha - wanted_alpha. Eq. 10 masks both pictures: draw on black, and want black
    outside the object.

    Args:
        rgb, wanted_rgb: [..., 3] of one shape, float32; only `rgb` gets a gradient.
        alpha, wanted_alpha: [...] of one shape, float32; only `alpha` gets a gradient.

    Returns:
        a scalar.
    """
    assert rgb.shape == wanted_rgb.shape and alpha.shape == wanted_alpha.shape, (rgb.shape, wanted_rgb.shape, alpha.shape)
    if rgb.is_cuda:
        off, off_mask = rgb - wanted_rgb, alpha - wanted_alpha
        return (absolute * off.abs() + squared * off.square()).mean() + (
            mask_absolute * off_mask.abs() + mask_squared * off_mask.square()).mean()
    return _PictureLoss.apply(rgb, alpha, wanted_rgb, wanted_alpha, absolute, squared, mask_absolute, mask_squared)


class _PictureLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rgb, alpha, wanted_rgb, wanted_alpha, absolute, squared, mask_absolute, mask_squared):
        d_rgb, d_alpha = torch.empty(rgb.shape), torch.empty(alpha.shape)
        flat = [x.detach().contiguous().reshape(-1).numpy() for x in (rgb, wanted_rgb, d_rgb, alpha, wanted_alpha, d_alpha)]
        tasks = [-(-x.numel() // CHUNK) for x in (rgb, alpha)]
        totals = np.zeros((sum(tasks), LANES), np.float32)
        weights = np.array([[absolute, squared], [mask_absolute, mask_squared]], np.float32)
        weights /= np.array([[rgb.numel()], [alpha.numel()]], np.float32)
        with KERNEL_LOCK:
            _losses(*flat, weights, tasks[0], totals)
        ctx.save_for_backward(d_rgb, d_alpha)
        return torch.tensor(totals.sum(dtype=np.float64), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        d_rgb, d_alpha = ctx.saved_tensors
        if d_loss != 1:
            d_rgb, d_alpha = d_rgb * d_loss, d_alpha * d_loss
        return d_rgb, d_alpha, None, None, None, None, None, None


@kernel
def _chunk(drawn, wanted, gradient, first, weights, totals):
    """Loss of up to CHUNK numbers from `first` on, spread over the 16 `totals`, and its gradient."""
    absolute, squared = weights[0], weights[1]
    last = min(first + CHUNK, drawn.shape[0])
    whole = first + (last - first) // LANES * LANES
    total = zeros()
    for start in range(first, whole, LANES):
        off = load(drawn, start) - load(wanted, start)
        total = total + (absolute * larger(off, _ZERO - off) + squared * off * off)
        sign = where(off > _ZERO, _ONE, where(off < _ZERO, -_ONE, _ZERO))
        store(gradient, start, absolute * sign + (_TWO * squared) * off)
    store(totals, 0, total)
    for k in range(whole, last):
        off = drawn[k] - wanted[k]
        totals[0] += absolute * abs(off) + squared * off * off
        gradient[k] = absolute * np.sign(off) + (_TWO * squared) * off


@parallel_kernel
def _losses(rgb, wanted_rgb, d_rgb, alpha, wanted_alpha, d_alpha, weights, rgb_tasks, totals):
    """`_chunk` over the colours, then over the masks; all arrays flat, `weights` [2, 2], `totals` [tasks, 16]."""
    for task in prange(totals.shape[0]):
        if task < rgb_tasks:
            _chunk(rgb, wanted_rgb, d_rgb, task * CHUNK, weights[0], totals[task])
        else:
            _chunk(alpha, wanted_alpha, d_alpha, (task - rgb_tasks) * CHUNK, weights[1], totals[task])
