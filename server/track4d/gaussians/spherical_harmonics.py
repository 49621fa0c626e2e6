"""Colours that depend on the viewing direction and on time: spherical harmonics whose coefficients are cosine series (4D SH)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from track4d_protocol.splats import C0, GREY, HIGHEST_DEGREE, sh_rows

_DIRECTIONS = 64  # that determine a rotation of the coefficients; 16 would do


def sh_basis(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics, in the order and with the signs of 3D Gaussian splatting (Kerbl et al. 2023).

    Args:
        directions: [..., 3] of unit length, from the camera to the Gaussian.
        degree: 0 to 3, the band limit l_max.

    Returns:
        [..., (degree + 1)^2], ordered by l, then m = -l..l.
    """
    assert 0 <= degree <= HIGHEST_DEGREE, degree
    x, y, z = directions.unbind(-1)
    return torch.stack(sh_rows(x, y, z, degree), -1)


def cosine_basis(moments: Tensor, terms: int, frames: int) -> Tensor:
    """The temporal functions cos(i pi t / N_t) of Eq. 8 of Track4DGen.

    Args:
        moments: [F] times in frames, 0 to frames - 1, whole or not.
        terms: w, how many cosines.
        frames: N_t, the frames of the clip.

    Returns:
        [F, terms]; the first is 1 at all times.
    """
    return torch.cos(math.pi / frames * moments[:, None] * torch.arange(terms, dtype=moments.dtype, device=moments.device))


def view_directions(means: Tensor, viewmats: Tensor) -> Tensor:
    """Unit vectors from the cameras to the Gaussians.

    Args:
        means: [F, G, 3]; viewmats: [V, 4, 4] world-to-camera.

    Returns:
        [F, V, G, 3], without a gradient to the means: light is not a cue for where a Gaussian is.
    """
    cameras = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]  # [V, 3]
    return torch.nn.functional.normalize(means.detach()[:, None] - cameras[:, None], dim=-1)


def sh_colors(coefficients: Tensor, directions: Tensor, moments: Tensor, frames: int) -> Tensor:
    """Colours of the Gaussians in each frame and view (Eq. 8 of Track4DGen).

    Args:
        coefficients: [G, K, W, 3]: K = (degree + 1)^2 harmonics, each a series of W cosines; sRGB.
        directions: [F, V, G, 3] of unit length, from the camera to the Gaussian.
        moments: [F] times in frames.
        frames: N_t, the frames of the clip.

    Returns:
        [F, V, G, 3] sRGB, not below 0; differentiable in the coefficients.
    """
    degree = math.isqrt(coefficients.shape[1]) - 1
    at_times = torch.einsum("fw,gkwc->fgkc", cosine_basis(moments, coefficients.shape[2], frames), coefficients)  # [F, G, K, 3]
    if degree == 0:
        return (GREY + C0 * at_times[:, None, :, 0]).clamp(min=0).expand(*directions.shape)
    basis = sh_basis(directions, degree)  # [F, V, G, K]
    return (GREY + (basis.unsqueeze(-2) @ at_times[:, None]).squeeze(-2)).clamp(min=0)


def sh_from_colors(colors: Tensor, degree: int = 0, terms: int = 1) -> Tensor:
    """Coefficients [G, (degree + 1)^2, terms, 3] that show the static colours [G, 3] from everywhere at any time."""
    coefficients = colors.new_zeros(len(colors), (degree + 1) ** 2, terms, 3)
    coefficients[:, 0, 0] = (colors - GREY) / C0
    return coefficients


def sh_over_time(static: Tensor, terms: int) -> Tensor:
    """Static SH [G, K, 3] as cosine series [G, K, terms, 3] that look the same at all times."""
    coefficients = static.new_zeros(*static.shape[:2], terms, 3)
    coefficients[:, :, 0] = static
    return coefficients


def rotate_sh(coefficients: Tensor, rotation: Tensor) -> Tensor:
    """The same appearance after the world was turned: a direction d now shows what was seen along R^T d.

    Args:
        coefficients: [G, K, W, 3].
        rotation: [3, 3] R, proper.

    Returns:
        [G, K, W, 3].
    """
    degree = math.isqrt(coefficients.shape[1]) - 1
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(_DIRECTIONS, 3, generator=generator, dtype=torch.float64), dim=-1)
    turned = sh_basis(directions @ rotation.double().cpu(), degree)  # rows d^T R = (R^T d)^T
    matrix = torch.linalg.lstsq(sh_basis(directions, degree), turned).solution  # [K, K]
    return torch.einsum("kj,gjwc->gkwc", matrix.to(coefficients), coefficients)
