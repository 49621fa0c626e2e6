"""Where points go in the pictures: `track` and the trackers behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.space import BACKGROUND

from .exact import MovingMesh, exact_tracks
from .flow import flow_tracks, to_grey
from .tracks import Tracks, query_grid, sample_queries

if TYPE_CHECKING:
    from .cotracker import CoTracker3

__all__ = ["MovingMesh", "Tracks", "query_grid", "sample_queries", "track"]

SEEN = 0.6  # visibility times confidence above which CoTracker's paper counts a point as seen


def track(video: np.ndarray, queries: np.ndarray, tracker: MovingMesh | CoTracker3 | None = None, *,
          backward: bool = True) -> Tracks:
    """Follows points through a multi-view video.

    Args:
        video: [V, F, H, W, 3 or 4] uint8 sRGB, straight alpha.
        queries: [V, N, 3] frame, x and y in pixels (centres at +0.5); `query_grid` and `sample_queries` make them.
        tracker: the geometry behind the video for exact tracks; CoTracker3 (`predictor.load_cotracker`) for joint tracking with
            the user's weights, all views in one batch; None for DIS optical flow with a forward-backward check, which needs
            texture.
        backward: CoTracker3 tracks to frames before a query in a second pass. The others always go both ways.

    Returns:
        Tracks of N points per view; at its query a point is exact and seen.

    Raises:
        InputError: a video or queries of the wrong shape or type, or a query outside of the video's frames.
    """
    video, queries = np.asarray(video), np.asarray(queries, np.float32)
    if video.ndim != 5 or video.shape[-1] not in (3, 4) or video.dtype != np.uint8 or 0 in video.shape:
        raise InputError("bad_video", f"The video is {video.dtype} {list(video.shape)}.",
                         "Give uint8 pictures [views, frames, height, width, 3 or 4].")
    views, frames, height, width, channels = video.shape
    if queries.ndim != 3 or queries.shape[0] != views or queries.shape[1] == 0 or queries.shape[2] != 3:
        raise InputError("bad_queries", f"The query points are {list(queries.shape)} for {views} views.",
                         "Give frame, x and y of at least one point: [views, points, 3].")
    frame = queries[..., 0]
    if not np.isfinite(queries).all() or (frame % 1).any() or frame.min() < 0 or frame.max() >= frames:
        raise InputError("bad_query_frame", f"A query point has no place in the {frames} frames of the video, or isn't finite.",
                         f"Give whole frame numbers from 0 to {frames - 1}, and finite positions.")
    if isinstance(tracker, MovingMesh):
        if len(tracker.vertices) != frames or len(tracker.viewmats) != views:
            raise InputError("bad_geometry", f"The video has {views} views of {frames} frames, its geometry "
                             f"{len(tracker.viewmats)} cameras and {len(tracker.vertices)} frames.",
                             "Give the geometry that the video was made of.")
        return exact_tracks(tracker, queries, max(height, width))
    colors, masks = video[..., :3], None
    if channels == 4:
        masks = video[..., 3] > 127
        alpha = video[..., 3:].astype(np.float32) / 255
        colors = (colors * alpha + (1 - alpha) * (BACKGROUND * 255) + 0.5).astype(np.uint8)
    if tracker is None:
        grey = np.stack([np.stack([to_grey(picture) for picture in view]) for view in colors])
        return flow_tracks(grey, masks, queries)
    return _cotracks(tracker, colors, queries, backward and bool(frame.any()))


def _cotracks(model: CoTracker3, colors: np.ndarray, queries: np.ndarray, backward: bool) -> Tracks:
    import torch

    from .predictor import predict

    device = model.time_emb.device
    pictures = torch.from_numpy(np.ascontiguousarray(colors)).to(device).permute(0, 1, 4, 2, 3)  # [V, F, 3, H, W]
    centred = torch.from_numpy(queries - np.array([0, 0.5, 0.5], np.float32)).to(device)
    points, vis, conf = (part.cpu().numpy() for part in predict(model, pictures, centred, backward=backward))
    return Tracks(points + np.float32(0.5), vis * conf > SEEN, conf)
