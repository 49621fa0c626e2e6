"""What every tracker gives and takes: tracks, query points, and the figures that compare tracks with the truth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from track4d_protocol.errors import InputError

GRID = 15  # points along each side of the paper's query grid
PER_VIEW = 8  # query points that a view gets in a training step
THRESHOLDS = (1, 2, 4, 8, 16)  # pixels of a 256-pixel picture (TAP-Vid)


class Tracks(NamedTuple):
    """Where points are in the pictures.

    Attributes:
        points: [V, F, N, 2] float32 pixels, centres at +0.5.
        visibility: [V, F, N] bool: seen, and believed to be where `points` says.
        confidence: [V, F, N] float32, 0..1.
    """

    points: np.ndarray
    visibility: np.ndarray
    confidence: np.ndarray


def query_grid(size: int, height: int, width: int, frame: int = 0, mask: np.ndarray | None = None) -> np.ndarray:
    """A regular grid of query points, a 64th of the width away from the border.

    Args:
        size: points along each side.
        mask: [H, W] bool; only points on it are kept.

    Returns:
        [N, 3] float32 frame, x, y, row by row; N is `size`^2 without a mask.
    """
    margin = width / 64
    x, y = (np.linspace(margin, side - margin, size) if size > 1 else np.array([side / 2]) for side in (width, height))
    columns, rows = np.meshgrid(x, y)
    queries = np.stack([np.full(columns.size, frame), columns.ravel(), rows.ravel()], -1).astype(np.float32)
    return queries if mask is None else queries[mask[queries[:, 2].astype(int), queries[:, 1].astype(int)]]


def sample_queries(masks: np.ndarray, rng: np.random.Generator, per_view: int = PER_VIEW, grid: int = GRID) -> np.ndarray:
    """The paper's query set: per view, some points of a regular grid on the object in the first frame (Track4DGen, section 3.2).

    Args:
        masks: [V, H, W] bool, where the object is in frame 0.
        per_view: points of each view; drawn with repetition where the object covers fewer grid points.

    Returns:
        [V, per_view, 3] float32 frame (0), x, y.

    Raises:
        InputError: a view whose mask holds no grid point.
    """
    chosen = []
    for v, mask in enumerate(masks):
        candidates = query_grid(grid, mask.shape[0], mask.shape[1], mask=mask)
        if not len(candidates):
            raise InputError("empty_mask", f"The object covers none of the {grid} x {grid} query points of view {v}.",
                             "Show the object larger in that view.")
        chosen.append(candidates[rng.choice(len(candidates), per_view, replace=len(candidates) < per_view)])
    return np.stack(chosen)


def compare(tracks: Tracks, truth: Tracks, queries: np.ndarray, size: tuple[int, int]) -> dict[str, float]:
    """TAP-Vid's figures of one clip, over the frames after each query ("first"; Doersch et al. 2022).

    Args:
        tracks, truth: of the same points; `truth.visibility` counts.
        queries: [V, N, 3].
        size: height and width of the pictures; distances are scaled to 256 x 256 pixels.

    Returns:
        occlusion_accuracy: share of right visibilities; delta_1 .. delta_16: share of visible points nearer than so many pixels
        (PCK); delta_avg: their mean; average_jaccard; epe: mean distance of visible points.
    """
    counted = np.arange(tracks.points.shape[1])[:, None] > queries[:, None, :, 0]  # [V, F, N]
    scale = np.array([255 / max(size[1] - 1, 1), 255 / max(size[0] - 1, 1)])
    distance = np.linalg.norm((tracks.points.astype(np.float64) - truth.points) * scale, axis=-1)[counted]
    seen, claimed = truth.visibility[counted], tracks.visibility[counted]
    figures, jaccards = {"occlusion_accuracy": float((seen == claimed).mean())}, []
    for threshold in THRESHOLDS:
        near = distance < threshold
        figures[f"delta_{threshold}"] = float((near & seen).sum() / max(seen.sum(), 1))
        right = (seen & near & claimed).sum()
        jaccards.append(right / max(seen.sum() + (claimed & ~(seen & near)).sum(), 1))
    figures["delta_avg"] = float(np.mean([figures[f"delta_{threshold}"] for threshold in THRESHOLDS]))
    figures["average_jaccard"] = float(np.mean(jaccards))
    figures["epe"] = float(distance[seen].mean()) if seen.any() else 0.0
    return figures
