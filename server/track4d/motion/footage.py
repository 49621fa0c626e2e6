"""The user's multi-view video, checked and brought to the size the registration works at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.space import BACKGROUND

from ..tracking.flow import to_grey

WORKING_SIZE = 256  # pixels; larger pictures are reduced to it
SMALLEST_SIZE = 32
MOST_VIEWS, MOST_FRAMES = 8, 64
PLAIN = 12  # how far a colour (0..255) may be from the background's and still belong to it


@dataclass(frozen=True)
class Footage:
    """A multi-view video ready to be registered.

    Attributes:
        colors: [V, F, S, S, 3] uint8 sRGB on plain grey.
        grey: [V, F, S, S] uint8.
        masks: [V, F, S, S] bool, where the object is; nowhere in a picture that is missing.
        viewmats: [V, 4, 4] float64 world-to-camera.
        Ks: [V, 3, 3] float64 in pixels of these pictures.
    """

    colors: np.ndarray
    grey: np.ndarray
    masks: np.ndarray
    viewmats: np.ndarray
    Ks: np.ndarray

    @property
    def size(self) -> int:
        return self.colors.shape[2]

    @property
    def views(self) -> int:
        return len(self.colors)

    @property
    def frames(self) -> int:
        return self.colors.shape[1]

    @property
    def unit(self) -> float:
        """Pixels of these pictures per pixel of a 256-pixel picture; every tolerance is written in the latter."""
        return self.size / 256

    @cached_property
    def lost(self) -> np.ndarray:
        """Which pictures show nothing of the object; [V, F] bool."""
        return ~self.masks.any((2, 3))

    def difference(self, first: int, second: int) -> float:
        """How much two frames differ where both have pictures: colour (0..1) plus half the silhouette, per object pixel of the
        second; every other row and column is looked at.
        """
        there = ~self.lost[:, first] & ~self.lost[:, second]
        if not there.any():
            return float("inf")
        one, other = (self.colors[there, frame, ::2, ::2].astype(np.int16) for frame in (first, second))
        masks = [self.masks[there, frame, ::2, ::2] for frame in (first, second)]
        colors = np.abs(one - other).sum(dtype=np.int64) / (3 * 255)
        return float(colors + 0.5 * (masks[0] ^ masks[1]).sum()) / max(int(masks[1].sum()), 1)

    def straight_views(self) -> np.ndarray:
        """Frame 0 as straight-alpha pictures; [V, S, S, 4] uint8."""
        return np.concatenate([self.colors[:, 0], self.masks[:, 0, :, :, None].astype(np.uint8) * 255], -1)


def read_footage(video: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, masks: np.ndarray | None = None) -> Footage:
    """Checks a video and its cameras and separates the object from the background.

    A picture of one colour throughout, such as a black one, counts as missing. Pictures that are not square get background on the
    right or below.

    Args:
        video: [V, F, H, W, 3 or 4] uint8 sRGB, straight alpha. Without alpha and masks the background must be plain.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of the video.
        masks: [V, F, H, W] bool, where the object is; used instead of alpha.

    Raises:
        InputError: wrong shape or type, too many views or frames, pictures that are too small, or not square and the object
            leaves them, cameras or masks that don't fit the video, or a background that can't be told from the object.
    """
    video, viewmats, Ks = np.asarray(video), np.asarray(viewmats, np.float64), np.asarray(Ks, np.float64)
    if video.ndim != 5 or video.shape[-1] not in (3, 4) or video.dtype != np.uint8 or 0 in video.shape:
        raise InputError("bad_video", f"The video is {video.dtype} {list(video.shape)}.",
                         "Give uint8 pictures [views, frames, height, width, 3 or 4].")
    views, frames, height, width, channels = video.shape
    if views > MOST_VIEWS or frames > MOST_FRAMES:
        raise InputError("video_too_long", f"The video has {views} views and {frames} frames.",
                         f"Give at most {MOST_VIEWS} views and {MOST_FRAMES} frames: leave views out, or every second frame.")
    if min(height, width) < SMALLEST_SIZE:
        raise InputError("bad_video_size", f"The video's pictures are {width} x {height} pixels.",
                         f"Give pictures of at least {SMALLEST_SIZE} pixels a side; {WORKING_SIZE} is best.")
    if viewmats.shape != (views, 4, 4) or Ks.shape != (views, 3, 3):
        raise InputError("bad_cameras",
                         f"The video has {views} views, the cameras are {list(viewmats.shape)} and {list(Ks.shape)}.",
                         "Give one 4x4 world-to-camera and one 3x3 pinhole matrix per view.")
    if not (np.isfinite(viewmats).all() and np.isfinite(Ks).all()):
        raise InputError("bad_cameras", "A camera matrix has numbers that are not finite.", "Check the cameras of the video.")

    if masks is not None and np.shape(masks) != (views, frames, height, width):
        raise InputError("bad_masks", f"The masks are {list(np.shape(masks))}, the video has {views} views, {frames} frames and "
                         f"{width} x {height} pixels.", "Give one mask per picture, of the picture's size.")

    size = min(max(height, width), WORKING_SIZE)
    rows, columns = (max(1, round(side * size / max(height, width))) for side in (height, width))
    colors = np.full((views, frames, size, size, 3), round(BACKGROUND * 255), np.uint8)
    inside = np.zeros((views, frames, size, size), bool)
    transparent = channels == 4 and bool((video[..., 3] < 255).any())
    missing = np.array([[np.ptp(picture, axis=(0, 1)).max() <= 2 for picture in view] for view in video])  # [V, F]
    for v in range(views):
        plain = masks is None and not transparent and not missing[v].all()
        background = _plain_background(video[v, ~missing[v], :, :, :3], v) if plain else None
        for f in range(frames):
            picture = video[v, f]
            color: np.ndarray
            alpha: np.ndarray
            if missing[v, f]:
                color, alpha = np.full((height, width, 3), BACKGROUND * 255), np.zeros((height, width))
            elif masks is not None or transparent:
                alpha = masks[v, f].astype(np.float32) if masks is not None else picture[..., 3].astype(np.float32) / 255
                color = picture[..., :3] * alpha[..., None] + (1 - alpha[..., None]) * BACKGROUND * 255
            else:
                color = picture[..., :3].astype(np.float32)
                alpha = (np.abs(color - background).max(-1) > PLAIN).astype(np.float32)
            if (height, width) != (rows, columns):
                color, alpha = (cv2.resize(p, (columns, rows), interpolation=cv2.INTER_AREA) for p in (color, alpha))
            colors[v, f, :rows, :columns] = (color + 0.5).clip(0, 255)
            inside[v, f, :rows, :columns] = alpha > 0.5
    cut = inside[:, :, rows - 1].any(-1) if rows < size else inside[:, :, :, columns - 1].any(-1) & (columns < size)  # [V, F]
    if cut.any():
        view, frame = np.argwhere(cut)[0]
        raise InputError("cut_off", f"The object leaves the picture of {width} x {height} pixels in view {view}, frame {frame}.",
                         "Show all of it, or crop the video to squares: what lies beyond a square's edge is not asked for.")
    grey = np.stack([np.stack([to_grey(picture) for picture in view]) for view in colors])
    return Footage(colors, grey, inside, viewmats, Ks * np.array([[columns / width], [rows / height], [1]]))


def _plain_background(view: np.ndarray, index: int) -> np.ndarray:
    """The colour [3] of a plain background, from the picture's border in all frames of a view [F, H, W, 3].

    Raises:
        InputError: most of the border has other colours.
    """
    border = np.concatenate([view[:, :2].reshape(-1, 3), view[:, -2:].reshape(-1, 3),
                             view[:, :, :2].reshape(-1, 3), view[:, :, -2:].reshape(-1, 3)]).astype(np.float32)
    color = np.median(border, axis=0)
    plain = float((np.abs(border - color).max(-1) <= PLAIN).mean())
    if plain < 0.6:
        raise InputError("no_mask", f"View {index} of the video has no transparency and no plain background "
                         f"(only {plain:.0%} of its border has one colour).",
                         "Give pictures with an alpha channel or masks beside them, or film before a plain background.")
    return color
