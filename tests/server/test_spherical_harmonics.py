"""4D SH: the basis against SciPy's, the cosine series against its formula, and what a rotation does."""

import math

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y
from track4d.gaussians.cloud import seed_cloud
from track4d.gaussians.light import fit_light, resample_sh
from track4d.gaussians.rasterise import rasterise
from track4d.gaussians.spherical_harmonics import (
    cosine_basis,
    rotate_sh,
    sh_basis,
    sh_colors,
    sh_from_colors,
    sh_over_time,
    view_directions,
)
from track4d.geometry.mesh import Mesh
from track4d.geometry.zbuffer import over, render
from track4d_protocol.space import intrinsics, orbit_viewmats


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


SIZE = 64
KS = intrinsics(SIZE, 4)


@pytest.fixture(scope="module")
def lit():
    """A turning textured ball under a lamp that goes around it: mesh, vertices [F, N, 3], and a function that films it."""
    shape = trimesh.creation.icosphere(subdivisions=3, radius=0.7)
    texture = np.full((1, 1, 3), 0.6, np.float32)
    mesh = Mesh(np.array(shape.vertices), np.array(shape.faces), None, None, [texture])
    turns = [Rotation.from_euler("z", 0.1 * f).as_matrix() for f in range(8)]
    vertices = np.stack([mesh.vertices @ turn.T for turn in turns]).astype(np.float32)

    def film(viewmats: np.ndarray, moving: bool = True) -> np.ndarray:
        pictures = []
        for f, posed in enumerate(vertices):
            angle = 2 * np.pi * f / 8 if moving else 0.0
            light = 0.4 + 0.6 * np.clip(posed / 0.7 @ np.array([np.cos(angle), np.sin(angle), 0.3]), 0, 1)
            pictures.append(over(render(mesh, posed[None], viewmats, KS[:len(viewmats)], SIZE, 2, light)[0], 0.5))
        return np.stack(pictures, 1).astype(np.float32)  # [V, F, S, S, 3]

    return mesh, vertices, film


def on_object(pictures: np.ndarray) -> np.ndarray:
    return np.abs(pictures - 0.5).max(-1) > 1e-3


def shown_psnr(cloud, mesh, vertices, coefficients, viewmats, wanted) -> float:
    """PSNR in dB over the pixels that aren't background."""
    means, quats = cloud.pose(mesh.faces, torch.from_numpy(vertices))
    viewmats = torch.from_numpy(viewmats)
    colors = sh_colors(coefficients, view_directions(means, viewmats), torch.arange(float(len(vertices))), len(vertices))
    Ks = torch.from_numpy(KS[:len(viewmats)])
    rgb, _ = rasterise(means, quats, cloud.scales, cloud.opacities, colors, viewmats, Ks, SIZE, 0.5)
    squared = (rgb.transpose(0, 1).numpy() - wanted) ** 2
    return float(-10 * np.log10(squared[on_object(wanted)].mean()))


def test_moving_light_is_found_and_seen_from_a_new_view(lit) -> None:
    mesh, vertices, film = lit
    cloud = seed_cloud(mesh, 1500, torch.Generator().manual_seed(0))
    given, new = orbit_viewmats(), orbit_viewmats([45.0], 30.0)
    shown = {}
    for degree, terms in ((0, 1), (1, 6)):
        pictures = film(given)
        fitted, coefficients, _ = fit_light(cloud, mesh.faces, vertices, pictures, on_object(pictures), given, KS, degree, terms,
                                            60, background=0.5)
        assert coefficients.shape == (1500, (degree + 1) ** 2, terms, 3)
        shown[terms] = shown_psnr(fitted, mesh, vertices, coefficients, new, film(new))
    assert shown[6] > shown[1] + 2, shown


def test_steady_light_loses_nothing_by_4d_sh(lit) -> None:
    mesh, vertices, film = lit
    cloud = seed_cloud(mesh, 800, torch.Generator().manual_seed(0))
    given = orbit_viewmats()
    still = vertices[:1].repeat(8, 0)
    pictures = film(given, moving=False)[:, :1].repeat(8, 1)
    static, over_time, again = (fit_light(cloud, mesh.faces, still, pictures, on_object(pictures), given, KS, 0, terms, 30,
                                          background=0.5) for terms in (1, 6, 6))
    shown = [shown_psnr(fitted, mesh, still, coefficients, given, pictures) for fitted, coefficients, _ in (static, over_time)]
    assert shown[1] > shown[0] - 0.3
    assert torch.equal(again[1], over_time[1]) and torch.equal(again[0].scales, over_time[0].scales)


def test_what_only_some_views_want_is_not_believed(lit) -> None:
    """Three views are brighter than the colours that the cloud has already; the fourth is as it should be."""
    mesh, vertices, _ = lit
    cloud = seed_cloud(mesh, 800, torch.Generator().manual_seed(0))
    given = orbit_viewmats()
    rgba = render(mesh, vertices, given, KS, SIZE, 2).swapaxes(0, 1)  # [V, F, S, S, 4]
    right, masks = over(rgba, 0.5), rgba[..., 3]
    brighter = right + 0.2 * masks[..., None] * np.array([1, 1, 1, 0], np.float32)[:, None, None, None, None]
    _, coefficients, share = fit_light(cloud, mesh.faces, vertices, brighter, masks, given, KS, 0, 4, 20, background=0.5)
    assert share == 0 and torch.equal(coefficients, sh_from_colors(cloud.colors, 0, 4))
    brighter = right + 0.2 * masks[..., None]
    _, coefficients, share = fit_light(cloud, mesh.faces, vertices, brighter, masks, given, KS, 0, 4, 20, background=0.5)
    assert share > 0.5 and coefficients[:, 0, 0].mean() > sh_from_colors(cloud.colors)[:, 0, 0].mean() + 0.1
    *_, share = fit_light(cloud, mesh.faces, vertices, brighter[:1], masks[:1], given[:1], KS[:1], 0, 4, 20, background=0.5)
    assert share > 0.5  # of a single view frames are held out


@pytest.mark.parametrize("frames", [8, 24, 60])
def test_other_numbers_of_frames_show_the_same_light(frames) -> None:
    coefficients = torch.randn(3, 4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficients *= 0.5 ** torch.arange(5.0)[:, None]
    share = torch.linspace(0, 1, 7, dtype=torch.float64)
    resampled = resample_sh(coefficients, 16, frames)
    before = torch.einsum("fw,gkwc->fgkc", cosine_basis(share * 15, 5, 16), coefficients)
    after = torch.einsum("fw,gkwc->fgkc", cosine_basis(share * (frames - 1), 5, frames), resampled)
    assert (after - before).abs().max() < 0.08 * before.abs().max()
    assert torch.equal(resample_sh(coefficients, 16, 16), coefficients)
