"""A bending tube, filmed: what the tests of the fit have in common."""

import numpy as np
from track4d.geometry import zbuffer
from track4d.geometry.mesh import Mesh
from track4d.motion.fit import FitPreset
from track4d_protocol.space import intrinsics, orbit_viewmats

SIZE = 128
VIEWMATS, KS = orbit_viewmats(), intrinsics(SIZE, 4)
TINY = FitPreset(nodes=40, points=600, rounds=(10, 1), track_rounds=(1,))


def noise_texture(side: int = 64, seed: int = 0) -> np.ndarray:
    grid = np.random.default_rng(seed).random((side // 4, side // 4, 3), np.float32)
    return np.repeat(np.repeat(grid, 4, 0), 4, 1) * 0.8 + 0.1


def capsule(rings: int = 24, around: int = 20, half_length: float = 0.7, radius: float = 0.25) -> Mesh:
    """A textured tube along Z with rounded ends, its seam split as exporters do."""
    u, v = np.meshgrid(np.linspace(0, 1, around + 1), np.linspace(0, 1, rings + 1))  # [rings + 1, around + 1]
    angle = np.pi * (v - 0.5)
    z = half_length * np.clip(3 * (v - 0.5), -1, 1) * 0.64 + radius * np.sin(angle)
    width = radius * np.cos(angle) ** 0.5
    vertices = np.stack([width * np.cos(2 * np.pi * u), width * np.sin(2 * np.pi * u), z], -1).reshape(-1, 3)
    row, column = np.meshgrid(np.arange(rings), np.arange(around), indexing="ij")
    a = (row * (around + 1) + column).ravel()
    b, c, d = a + 1, a + around + 1, a + around + 2
    faces = np.concatenate([np.stack([a, b, d], 1), np.stack([a, d, c], 1)])
    uv = np.stack([2 * u.ravel(), v.ravel()], 1).astype(np.float32)
    return Mesh(vertices, faces, uv[faces], None, [noise_texture()])


def bend(vertices: np.ndarray, frames: int = 4, amount: float = 0.5) -> np.ndarray:
    """The tube's upper part leans over, more from frame to frame; [F, N, 3]."""
    out = []
    for f in range(frames):
        angle = amount * f / (frames - 1) * np.clip(vertices[:, 2] + 0.3, 0, None)
        x, z = vertices[:, 0], vertices[:, 2] + 0.3
        out.append(np.stack([x * np.cos(angle) + z * np.sin(angle), vertices[:, 1],
                             z * np.cos(angle) - x * np.sin(angle) - 0.3], 1))
    return np.stack(out).astype(np.float32)


def film(mesh: Mesh, vertices: np.ndarray, size: int = SIZE, shading: np.ndarray | None = None) -> np.ndarray:
    """Straight-alpha pictures [V, F, S, S, 4] uint8."""
    rgba = zbuffer.render(mesh, vertices, VIEWMATS, intrinsics(size, 4), size, 3, shading).swapaxes(0, 1)
    rgba = np.concatenate([rgba[..., :3] / np.maximum(rgba[..., 3:], 1e-6), rgba[..., 3:]], -1)
    return (rgba.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def error(result: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(result - truth, axis=2)[1:].mean() / np.linalg.norm(truth - truth[:1], axis=2)[1:].mean())
