"""The rasteriser on NVIDIA GPUs, by gsplat."""

from __future__ import annotations

import torch
from torch import Tensor
from track4d_protocol.errors import ServerError

from .constants import EPS2D, NEAR


def rasterise_gsplat(means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor,
                     Ks: Tensor, size: int, background: Tensor) -> tuple[Tensor, Tensor]:
    """`rasterise` for CUDA tensors, all frames and views in one call; gsplat is imported here and nowhere else.

    Scales are [F or 1, N, 3] and colors [F or 1, V or 1, N, 3] here, and no opacity exceeds `constants.ALPHA_MAX`.

    Raises:
        ServerError: gsplat isn't installed, or it has no compiled kernels for this machine.
    """
    if not torch.cuda.is_available():
        raise ServerError("no_cuda", "The tensors ask for CUDA, but torch finds no GPU.",
                          "Use CPU tensors, or install a torch with CUDA.")
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise ServerError("gsplat_missing", f"The GPU rasteriser gsplat can't be imported ({error}).",
                          "Run `python -m pip install gsplat` with the server's Python; it compiles on first use and needs nvcc "
                          "and a C++ compiler."
                          ) from error

    frames, gaussians = means.shape[:2]
    views = len(viewmats)
    rgb, alpha, _ = rasterization(
        means, quats, scales.expand(frames, gaussians, 3), opacities.expand(frames, gaussians),
        colors.expand(frames, views, gaussians, 3), viewmats.expand(frames, views, 4, 4), Ks.expand(frames, views, 3, 3),
        size, size, near_plane=NEAR, eps2d=EPS2D, packed=False, backgrounds=background.expand(frames, views, 3),
        rasterize_mode="classic",
    )  # [F, V, H, W, 3], [F, V, H, W, 1]
    return rgb, alpha[..., 0]
