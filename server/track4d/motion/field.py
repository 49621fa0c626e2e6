"""The motion that was found, at any time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from track4d_protocol.errors import InputError

BLOCK = 20_000  # vertices interpolated at once, which bounds memory


@dataclass(frozen=True)
class MotionField:
    """Vertex positions at the fitted frames, and between them.

    Attributes:
        vertices: [F, N, 3] float32, canonical.
        confidence: [F, N] float32 in 0..1: 0 = no view saw the vertex (its neighbours carry it), 0.5 = one, 0.75 = two, ...
    """

    vertices: np.ndarray
    confidence: np.ndarray

    @property
    def times(self) -> np.ndarray:
        """Times of the fitted frames in [-1, 1]; [F]."""
        frames = len(self.vertices)
        return np.linspace(-1, 1, frames) if frames > 1 else np.array([-1.0])

    def sample(self, times: np.ndarray) -> np.ndarray:
        """Positions at any times: a cubic spline through the fitted frames, exact at them.

        Args:
            times: [F'] in [-1, 1]; -1 is the first frame and 1 the last.

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
        moments = (times.clip(-1, 1) + 1) / 2 * (frames - 1)
        for start in range(0, count, BLOCK):
            block = slice(start, start + BLOCK)
            out[:, block] = CubicSpline(np.arange(frames), self.vertices[:, block].astype(np.float64))(moments)
        fitted = np.abs(moments - np.round(moments)) < 1e-9
        out[fitted] = self.vertices[np.round(moments[fitted]).astype(int)]
        return out
