"""How long work tells its caller where it is, and how the caller stops it."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Report(Protocol):
    """Called once per step of every stage; may raise `Cancelled` to stop the work, so it is called often and outside of locks."""

    def __call__(self, stage: str, step: int, total: int, preview: np.ndarray | None = None) -> None:
        """
        Args:
            stage: "canonicalise", "generate", "fit", "sample", ...
            step: steps done, 0..total.
            preview: [H, W, 3] uint8 sRGB picture, or a film [T, H, W, 3] of it, sometimes.
        """


class JobReport(Report, Protocol):
    """A `Report` that also takes a motion to be shown before the work is done."""

    def __call__(self, stage: str, step: int, total: int, preview: np.ndarray | None = None,
                 motion: np.ndarray | None = None) -> None:
        """
        Args:
            motion: [F, N, 3] float32, where the request's vertices go in its space as far as that is known, sometimes.
        """


def silent(stage: str, step: int, total: int, preview: np.ndarray | None = None, motion: np.ndarray | None = None) -> None:
    """A `Report` that nobody reads."""
