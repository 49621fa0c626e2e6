"""The motion that was found, at any time: sampled at the fitted frames, and as the network of the paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from track4d_protocol.errors import InputError

from .hexplane import PAPER_PLANES, HexPlane, HexPlaneSize

BLOCK = 20_000  # vertices interpolated at once, which bounds memory
HEAD_WIDTH = 32  # hidden units of each head


@dataclass(frozen=True)
class MotionField:
    """Vertex positions at the fitted frames, and between them.

    Attributes:
        vertices: [F, N, 3] float32, canonical.
        confidence: [F, N] float32 in 0..1: 0 = no view saw the vertex (its neighbours carry it), 0.5 = one, 0.75 = two, ...
        loops: the motion goes on from the last frame to the first, which is one step away.
        warnings: what could not be observed, each with code, message and action.
    """

    vertices: np.ndarray
    confidence: np.ndarray
    loops: bool = False
    warnings: tuple[dict[str, str], ...] = ()

    @property
    def times(self) -> np.ndarray:
        """Times of the fitted frames in [-1, 1]; [F]. A loop's last frame lies one step before 1."""
        return frame_times(len(self.vertices), self.loops)

    def sample(self, times: np.ndarray) -> np.ndarray:
        """Positions at any times: a cubic spline through the fitted frames, exact at them.

        Args:
            times: [F'] in [-1, 1]; -1 is the first frame and 1 the last, or the first again where the motion loops.

        Returns:
            [F', N, 3] float32.

        Raises:
            InputError: a time outside of [-1, 1].
        """
        times = np.atleast_1d(np.asarray(times, np.float64))
        if not (np.abs(times) <= 1 + 1e-9).all():
            raise InputError("bad_times", f"A time of {float(times[np.abs(times).argmax()]):g} lies outside of the motion.",
                             "Give times between -1 (first frame) and 1 (last frame).")
        frames, count = self.vertices.shape[:2]
        out = np.empty((len(times), count, 3), np.float32)
        if frames == 1:
            out[:] = self.vertices
            return out
        steps = frames if self.loops else frames - 1  # from time -1 to time 1
        moments = (times.clip(-1, 1) + 1) / 2 * steps
        keys = np.arange(steps + 1) % frames
        ends = "periodic" if self.loops else "not-a-knot"
        for start in range(0, count, BLOCK):
            block = slice(start, start + BLOCK)
            path = CubicSpline(np.arange(steps + 1), self.vertices[keys, block].astype(np.float64), bc_type=ends)
            out[:, block] = path(moments)
        fitted = np.abs(moments - np.round(moments)) < 1e-9
        out[fitted] = self.vertices[np.round(moments[fitted]).astype(int) % frames]
        return out


def frame_times(frames: int, loops: bool = False) -> np.ndarray:
    """Times in [-1, 1] of the frames of a clip; [frames]. A loop's last frame lies one step before 1."""
    return np.linspace(-1, 1, frames, endpoint=not loops) if frames > 1 else np.array([-1.0])


@dataclass
class Offsets:
    """What a field does to Gaussians: [F, N, ...] each.

    Attributes:
        means: [F, N, 3] added to the positions.
        quats: [F, N, 4] added to the orientations wxyz of unit length, which are then brought to unit length again.
        log_scales: [F, N, 3] added to the logarithms of the scales.
        turn: [F, 4] unit quaternion wxyz and shift: [F, 3] of the whole object; None without a global head.
    """

    means: Tensor
    quats: Tensor
    log_scales: Tensor
    turn: Tensor | None = None
    shift: Tensor | None = None

    def apply(self, means: Tensor, quats: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves Gaussians: first the whole object turns and shifts, then the offsets are added (Eq. 9 of Track4DGen).

        Args:
            means: [N, 3]; quats: [N, 4] wxyz of any length; scales: [N, 3], linear.

        Returns:
            means [F, N, 3], quats [F, N, 4] of unit length, scales [F, N, 3].
        """
        quats = nn.functional.normalize(quats, dim=-1)
        if self.turn is not None and self.shift is not None:
            turn = self.turn[:, None]  # [F, 1, 4]
            means = turned(turn, means) + self.shift[:, None]  # [F, N, 3]
            quats = quaternion_product(turn, quats)  # [F, N, 4]
        return (means + self.means, nn.functional.normalize(quats + self.quats, dim=-1), scales * self.log_scales.exp())


class HybridField(nn.Module):
    """The motion field of the paper: hex-plane features, joined by diffusion features, to offsets by three small heads.

    Continuous in time. Heads have one hidden layer and no biases; their last layers start at zero, so the field starts still
    (Eq. 6 and 7 of Track4DGen; the global head is Animate3D's).

    Args:
        planes: resolution and width of the hex-planes.
        diffusion_width: features per Gaussian and frame from the video model, 0 for none; see `hybrid_features`.
        global_head: whether the whole object may turn and shift too.
        periodic: whether the motion loops.
        generator: source of the start.
    """

    def __init__(self, planes: HexPlaneSize = PAPER_PLANES, diffusion_width: int = 0, global_head: bool = False,
                 periodic: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.planes = HexPlane(planes, periodic, generator)
        inputs = planes.features + diffusion_width
        self.means, self.quats, self.log_scales = (_head(inputs, outputs, generator) for outputs in (3, 4, 3))
        self.turn, self.shift = (_head(inputs, 3, generator) if global_head else None for _ in range(2))

    def features(self, points: Tensor, times: Tensor, diffusion: Tensor | None = None) -> Tensor:
        """Hybrid features (Eq. 6): points [N, 3], times [F], diffusion [F, N, D]; [F, N, planes.features + D]."""
        features = self.planes(points, times)
        return features if diffusion is None else torch.cat([features, diffusion], -1)

    def forward(self, points: Tensor, times: Tensor, diffusion: Tensor | None = None) -> Offsets:
        """Offsets of all Gaussians at all times (Eq. 7).

        Args:
            points: [N, 3] centres in the still object, canonical.
            times: [F] in [-1, 1].
            diffusion: [F, N, D] diffusion features, where the field has a width for them.
        """
        features = self.features(points, times, diffusion)  # [F, N, C]
        turn = shift = None
        if self.turn is not None and self.shift is not None:
            whole = features.mean(1)  # [F, C]
            turn = euler_quaternion(2 * torch.pi * self.turn(whole).sigmoid() - torch.pi)  # [F, 4]
            shift = 2 * self.shift(whole).sigmoid() - 1  # [F, 3]
        return Offsets(self.means(features), self.quats(features), self.log_scales(features), turn, shift)

    def move(self, points: Tensor, times: Tensor, diffusion: Tensor | None = None) -> Tensor:
        """Where the field takes places; [F, N, 3]."""
        features = self.features(points, times, diffusion)
        if self.turn is None or self.shift is None:
            return points + self.means(features)
        offsets = self(points, times, diffusion)
        assert offsets.turn is not None and offsets.shift is not None
        return turned(offsets.turn[:, None], points) + offsets.shift[:, None] + offsets.means


def _head(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Sequential:
    first, last = nn.Linear(inputs, HEAD_WIDTH, bias=False), nn.Linear(HEAD_WIDTH, outputs, bias=False)
    with torch.no_grad():
        first.weight.uniform_(-1, 1, generator=generator).mul_(inputs**-0.5)
        last.weight.zero_()
    return nn.Sequential(first, nn.ReLU(), last)


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """The rotation b and then a; quaternions [..., 4] wxyz."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], -1)


def turned(quats: Tensor, points: Tensor) -> Tensor:
    """Points [..., 3] turned by unit quaternions [..., 4] wxyz."""
    w, axis = quats[..., :1], quats[..., 1:]
    axis, points = torch.broadcast_tensors(axis, points)
    across = 2 * torch.linalg.cross(axis, points)
    return points + w * across + torch.linalg.cross(axis, across)


def euler_quaternion(angles: Tensor) -> Tensor:
    """Unit quaternions [..., 4] wxyz of Rz Ry Rx for angles [..., 3] about x, y and z in radians."""
    zero = torch.zeros_like(angles[..., 0])
    half_sine, half_cosine = (angles / 2).sin().unbind(-1), (angles / 2).cos().unbind(-1)
    x, y, z = (torch.stack([half_cosine[k], *(half_sine[k] if axis == k else zero for axis in range(3))], -1) for k in range(3))
    return quaternion_product(z, quaternion_product(y, x))
