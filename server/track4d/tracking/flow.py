"""Optical flow between two pictures, checked forward and backward.

DIS (Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search") as OpenCV has it, on enlarged pictures: small objects
have more texture for its 8-pixel patches there.
"""

from __future__ import annotations

import cv2
import numpy as np

from .tracks import Tracks

SMALLEST = 64  # pixels; DIS needs a pyramid of a few levels, so smaller pictures are padded


def to_grey(picture: np.ndarray) -> np.ndarray:
    """sRGB uint8 [H, W, 3] to uint8 [H, W]."""
    return cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)


def bilinear(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of `picture` [H, W] or [H, W, C] float32 at `points` [N, 2] in pixels (centres at +0.5); [N] or [N, C]."""
    x, y = (points[:, k:k + 1].astype(np.float32) - np.float32(0.5) for k in (0, 1))
    return cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]


def dense_flow(first: np.ndarray, second: np.ndarray, upsampling: int = 2) -> np.ndarray:
    """Where each pixel of `first` goes in `second`.

    Args:
        first, second: [H, W] uint8.
        upsampling: the pictures are enlarged by this factor before matching.

    Returns:
        [H, W, 2] float32 displacement in pixels.
    """
    height, width = first.shape
    if upsampling > 1:
        first, second = (cv2.resize(p, None, fx=upsampling, fy=upsampling, interpolation=cv2.INTER_CUBIC)
                         for p in (first, second))
    first, second = np.ascontiguousarray(first), np.ascontiguousarray(second)
    below, right = (max(SMALLEST - side, 0) for side in first.shape)
    if below or right:
        first, second = (cv2.copyMakeBorder(p, 0, below, 0, right, cv2.BORDER_REPLICATE) for p in (first, second))
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)  # type: ignore[call-overload]
    flow = flow[:height * upsampling, :width * upsampling]
    if upsampling > 1:
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / upsampling
    return flow


def match_points(first: np.ndarray, second: np.ndarray, points: np.ndarray, tolerance: float | None,
                 upsampling: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Follows points from one picture to another.

    Args:
        first, second: [H, W] uint8.
        points: [N, 2] pixel positions in `first`.
        tolerance: pixels that a point may miss its start by, after going there and back; 5 % of the way is added. None: the
            way back is not asked, in half the time.

    Returns:
        [N, 2] positions in `second`, and [N] bool: came back within the tolerance, or was not asked to.
    """
    there = bilinear(dense_flow(first, second, upsampling), points)  # [N, 2]
    matched = points + there
    if tolerance is None:
        return matched, np.ones(len(points), bool)
    back = bilinear(dense_flow(second, first, upsampling), matched)  # [N, 2]
    miss = np.linalg.norm(there + back, axis=1)
    return matched, miss < tolerance + 0.05 * np.linalg.norm(there, axis=1)


def flow_tracks(grey: np.ndarray, masks: np.ndarray | None, queries: np.ndarray, tolerance: float = 2.0,
                upsampling: int = 2) -> Tracks:
    """Follows points from frame to frame by optical flow, later and earlier than their queries.

    A point counts as seen until it leaves the picture or the object, or a step there and back misses its start by more than the
    tolerance; it has to be, because nothing finds it again later.

    Args:
        grey: [V, F, H, W] uint8; masks: [V, F, H, W] bool, where the object is, or None.
        queries: [V, N, 3] frame, x, y.
        tolerance: pixels, plus 5 % of the step.
    """
    views, frames, height, width = grey.shape
    points = np.repeat(queries[:, None, :, 1:].astype(np.float32), frames, 1)  # [V, F, N, 2]
    visibility = np.ones(points.shape[:3], bool)
    missed = np.zeros(points.shape[:3], np.float32)  # pixels, summed along the way
    for v in range(views):
        first = queries[v, :, 0]
        for direction in (1, -1):
            for f in range(frames - 1) if direction > 0 else range(frames - 1, 0, -1):
                going = (first - f) * direction <= 0
                if not going.any():
                    continue
                there = dense_flow(grey[v, f], grey[v, f + direction], upsampling)
                back = dense_flow(grey[v, f + direction], grey[v, f], upsampling)
                start = points[v, f, going]
                step = bilinear(there, start)
                end = start + step
                miss = np.linalg.norm(step + bilinear(back, end), axis=1)
                inside = ((end >= 0) & (end < (width, height))).all(1)
                if masks is not None:
                    inside &= bilinear(masks[v, f + direction].astype(np.float32), end) > 0.5
                points[v, f + direction, going] = end
                visibility[v, f + direction, going] = (visibility[v, f, going] & inside
                                                       & (miss < tolerance + 0.05 * np.linalg.norm(step, axis=1)))
                missed[v, f + direction, going] = missed[v, f, going] + miss
    return Tracks(points, visibility, 1 / (1 + missed))
