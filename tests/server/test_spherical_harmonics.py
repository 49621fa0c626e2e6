"""4D SH: the basis against SciPy's, the cosine series against its formula, and what a rotation does."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y
from track4d.gaussians.spherical_harmonics import (
    cosine_basis,
    rotate_sh,
    sh_basis,
    sh_colors,
    sh_from_colors,
    sh_over_time,
    view_directions,
)
from track4d_protocol.space import orbit_viewmats


def directions(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_basis_is_the_real_spherical_harmonics(degree) -> None:
    d = directions(50).numpy()
    polar, azimuth = np.arccos(d[:, 2]), np.arctan2(d[:, 1], d[:, 0])
    expected = []
    for l in range(degree + 1):
        for m in range(-l, l + 1):
            value = sph_harm_y(l, abs(m), polar, azimuth)  # with the Condon-Shortley phase, as 3D Gaussian splatting
            real = value.real if m >= 0 else value.imag
            expected.append(real * (math.sqrt(2) if m else 1))
    np.testing.assert_allclose(sh_basis(torch.from_numpy(d), degree).numpy(), np.stack(expected, -1), atol=1e-12)


def test_colors_follow_the_published_series() -> None:
    generator = torch.Generator().manual_seed(1)
    coefficients = 0.2 * torch.randn(5, 9, 4, 3, generator=generator, dtype=torch.float64)
    towards = directions(3 * 2 * 5).reshape(3, 2, 5, 3)
    moments = torch.tensor([0.0, 2.5, 15.0], dtype=torch.float64)
    got = sh_colors(coefficients, towards, moments, 16)
    basis = sh_basis(towards, 2)
    for f, v, g, c in [(0, 0, 0, 0), (1, 1, 4, 2), (2, 0, 3, 1)]:
        k = [sum(coefficients[g, j, i, c] * math.cos(i * math.pi / 16 * float(moments[f])) for i in range(4)) for j in range(9)]
        expected = max(0.0, 0.5 + sum(float(k[j] * basis[f, v, g, j]) for j in range(9)))
        assert float(got[f, v, g, c]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("degree", "terms"), [(0, 1), (0, 5), (1, 3), (3, 16)])
def test_start_is_the_static_colour_everywhere_and_always(degree, terms) -> None:
    colors = torch.rand(7, 3, generator=torch.Generator().manual_seed(2))
    coefficients = sh_from_colors(colors, degree, terms)
    assert coefficients.shape == (7, (degree + 1) ** 2, terms, 3)
    shown = sh_colors(coefficients, directions(4 * 2 * 7).float().reshape(4, 2, 7, 3), torch.arange(4.0), 4)
    torch.testing.assert_close(shown, colors.expand(4, 2, 7, 3))
    torch.testing.assert_close(sh_over_time(coefficients[:, :, 0], terms), coefficients)


def test_first_cosine_is_constant_and_all_are_independent() -> None:
    basis = cosine_basis(torch.arange(16.0), 16, 16)
    torch.testing.assert_close(basis[:, 0], torch.ones(16))
    assert torch.linalg.matrix_rank(basis) == 16


def test_turned_appearance_is_seen_from_turned_cameras() -> None:
    coefficients = torch.randn(6, 16, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.1
    turn = torch.from_numpy(Rotation.from_euler("xyz", [0.4, -1.0, 2.0]).as_matrix())
    towards = directions(12).reshape(1, 2, 6, 3)
    moments = torch.tensor([1.0], dtype=torch.float64)
    before = sh_colors(coefficients, towards, moments, 4)
    after = sh_colors(rotate_sh(coefficients, turn), towards @ turn.T, moments, 4)
    torch.testing.assert_close(after, before, atol=1e-9, rtol=0)


def test_directions_point_from_the_camera_and_carry_no_gradient() -> None:
    means = torch.zeros(1, 1, 3, requires_grad=True)
    viewmats = torch.from_numpy(orbit_viewmats([0.0, 90.0], 0.0))
    towards = view_directions(means, viewmats)
    torch.testing.assert_close(towards[0, :, 0], torch.tensor([[-1.0, 0, 0], [0, -1.0, 0]]), atol=1e-6, rtol=0)
    assert not towards.requires_grad
