"""Colours that depend on the viewing direction and on time: spherical harmonics whose coefficients are cosine series (4D SH)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGHEST_DEGREE = 3
_C0 = math.sqrt(1 / (4 * math.pi))
_MIDDLE = 0.5  # added to the series, as in 3D Gaussian splatting: zero coefficients are mid grey
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
    rows = [torch.full_like(x, _C0)]
    if degree >= 1:
        c = math.sqrt(3 / (4 * math.pi))
        rows += [-c * y, c * z, -c * x]
    if degree >= 2:
        c = math.sqrt(15 / (4 * math.pi))
        rows += [c * x * y, -c * y * z, math.sqrt(5 / (16 * math.pi)) * (2 * z * z - x * x - y * y), -c * x * z,
                 c / 2 * (x * x - y * y)]
    if degree >= 3:
        a, b, c = (math.sqrt(k / math.pi) for k in (35 / 32, 105 / 4, 21 / 32))
        rows += [-a * y * (3 * x * x - y * y), b * x * y * z, -c * y * (4 * z * z - x * x - y * y),
                 math.sqrt(7 / (16 * math.pi)) * z * (2 * z * z - 3 * x * x - 3 * y * y), -c * x * (4 * z * z - x * x - y * y),
                 b / 2 * z * (x * x - y * y), -a * x * (x * x - 3 * y * y)]
    return torch.stack(rows, -1)


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
        return (_MIDDLE + _C0 * at_times[:, None, :, 0]).clamp(min=0).expand(*directions.shape)
    basis = sh_basis(directions, degree)  # [F, V, G, K]
    return (_MIDDLE + (basis.unsqueeze(-2) @ at_times[:, None]).squeeze(-2)).clamp(min=0)


def sh_from_colors(colors: Tensor, degree: int = 0, terms: int = 1) -> Tensor:
    """Coefficients [G, (degree + 1)^2, terms, 3] that show the static colours [G, 3] from everywhere at any time."""
    coefficients = colors.new_zeros(len(colors), (degree + 1) ** 2, terms, 3)
    coefficients[:, 0, 0] = (colors - _MIDDLE) / _C0
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
