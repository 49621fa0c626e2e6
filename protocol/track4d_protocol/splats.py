"""4D Gaussians as plain arrays: what the server fits, Blender shows and files hold.

Colours follow 3D Gaussian splatting: 0.5 plus real spherical harmonics of the viewing direction, sRGB; in 4D SH every
coefficient is a cosine series in time (Track4DGen, Eq. 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

HIGHEST_DEGREE = 3
C0 = math.sqrt(1 / (4 * math.pi))  # the harmonic of degree 0
GREY = 0.5  # zero coefficients are mid grey


@dataclass(frozen=True)
class Splats:
    """F frames of G Gaussians that keep their size and opacity.

    Attributes:
        means: [F, G, 3] float32, Blender's units and axes (+Z up).
        quats: [F, G, 4] float32 wxyz, of unit length.
        scales: [G, 3] float32, standard deviations along the own axes.
        opacities: [G] float32 in 0..1.
        sh: [G, K, W, 3] float32: K = (degree + 1)^2 harmonics, each a series of W cosines over the F frames.
        fps: frames per second.
    """

    means: np.ndarray
    quats: np.ndarray
    scales: np.ndarray
    opacities: np.ndarray
    sh: np.ndarray
    fps: float = 24.0

    @property
    def frames(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        return math.isqrt(self.sh.shape[1]) - 1

    def sh_at(self, frame: float) -> np.ndarray:
        """Static coefficients [G, K, 3] of one moment, in frames."""
        return np.tensordot(self.sh, cosine_basis(np.array([frame]), self.sh.shape[2], self.frames)[0], (2, 0)).astype(np.float32)

    def colors(self, frame: int, viewer: np.ndarray | None = None, direction: np.ndarray | None = None) -> np.ndarray:
        """Colours [G, 3] sRGB, not below 0, as seen from a place `viewer` [3], or everywhere along `direction` [3]."""
        if self.degree == 0:
            basis = np.array(sh_rows(0.0, 0.0, 1.0, 0))
        else:
            looking = self.means[frame] - viewer if viewer is not None else np.asarray(direction, np.float64)
            x, y, z = np.moveaxis(looking / np.linalg.norm(looking, axis=-1, keepdims=True), -1, 0)
            basis = np.stack(np.broadcast_arrays(*sh_rows(x, y, z, self.degree)), -1)  # [G, K] or [K]
        return np.maximum(GREY + (self.sh_at(frame) * basis[..., None]).sum(1), 0).astype(np.float32)

    def turned(self, rotation: np.ndarray) -> Splats:
        """The same Gaussians in a world turned by the proper rotation [3, 3]: places, orientations and harmonics."""
        rotation = np.asarray(rotation, np.float64)
        return replace(
            self,
            means=(self.means @ rotation.T).astype(np.float32),
            quats=multiply_quats(quat_from_matrix(rotation), self.quats).astype(np.float32),
            sh=np.einsum("kj,gjwc->gkwc", sh_rotation(rotation, self.degree), self.sh).astype(np.float32),
        )


def sh_rows(x: Any, y: Any, z: Any, degree: int) -> list:
    """Real spherical harmonics of unit directions, with the signs of 3D Gaussian splatting (Kerbl et al. 2023).

    Args:
        x, y, z: components, numbers or arrays of any library.
        degree: 0 to 3, the band limit.

    Returns:
        (degree + 1)^2 values ordered by l, then m = -l..l.
    """
    rows = [0 * x + C0]
    if degree >= 1:
        c = math.sqrt(3 / (4 * math.pi))
        rows += [-c * y, c * z, -c * x]
    if degree >= 2:
        c = math.sqrt(15 / (4 * math.pi))
        rows += [
            c * x * y,
            -c * y * z,
            math.sqrt(5 / (16 * math.pi)) * (2 * z * z - x * x - y * y),
            -c * x * z,
            c / 2 * (x * x - y * y),
        ]
    if degree >= 3:
        a, b, c = (math.sqrt(k / math.pi) for k in (35 / 32, 105 / 4, 21 / 32))
        rows += [
            -a * y * (3 * x * x - y * y),
            b * x * y * z,
            -c * y * (4 * z * z - x * x - y * y),
            math.sqrt(7 / (16 * math.pi)) * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -c * x * (4 * z * z - x * x - y * y),
            b / 2 * z * (x * x - y * y),
            -a * x * (x * x - 3 * y * y),
        ]
    return rows


def cosine_basis(moments: np.ndarray, terms: int, frames: int) -> np.ndarray:
    """cos(i pi t / N_t) of Eq. 8 at times [T] in frames, 0 to N_t - 1; [T, terms]."""
    return np.cos(math.pi / frames * np.asarray(moments, np.float64)[:, None] * np.arange(terms))


def sh_rotation(rotation: np.ndarray, degree: int) -> np.ndarray:
    """The matrix [K, K] that turns coefficients with the world: direction d then shows what was seen along R^T d."""
    directions = np.random.default_rng(0).normal(size=(64, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def basis(at: np.ndarray) -> np.ndarray:
        return np.stack(sh_rows(at[:, 0], at[:, 1], at[:, 2], degree), -1)

    return np.linalg.lstsq(basis(directions), basis(directions @ rotation), rcond=None)[0]


def quat_from_matrix(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion wxyz [4] of a proper rotation [3, 3]: the eigenvector of Bar-Itzhack's symmetric matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    symmetric = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, d + b, g + c],
            [c - g, d + b, e - a - i, h + f],
            [d - b, g + c, h + f, i - a - e],
        ]
    )
    return np.linalg.eigh(symmetric)[1][:, -1]


def multiply_quats(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Hamilton product of wxyz quaternions [..., 4]: the rotation `second`, then `first`."""
    w, x, y, z = np.moveaxis(np.asarray(first), -1, 0)
    p, q, r, s = np.moveaxis(np.asarray(second), -1, 0)
    product = (
        w * p - x * q - y * r - z * s,
        w * q + x * p + y * s - z * r,
        w * r - x * s + y * p + z * q,
        w * s + x * r - y * q + z * p,
    )
    return np.stack(product, -1)
