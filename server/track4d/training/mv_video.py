"""MV-Video, Animate3D's data set, as its training reads it: a JSON list of clips, one video file per view.

[{"data_path": [video of view 0, view 1, ...], "text_prompt": ..., "angle": {"elv": ..., "azi_start": ...}}, ...]

The views go evenly around the object from azi_start on. The layout doesn't name distance and field of view: those of a capture
are taken. There is no geometry either, so the tracks are a tracker's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from track4d_protocol import space
from track4d_protocol.errors import InputError

from ..motion.footage import read_footage
from ..tracking import Tracks, track
from .shards import validation_rigs
from .video_data import VALIDATION_SHARE, Clip, ClipShape, evenly, query_grid, reduced, shuffled, strided

# A video [V, F, H, W, 4] uint8 and queries [V, N, 3] (frame, x, y) to tracks, as `tracking.track`.
Tracker = Callable[[np.ndarray, np.ndarray], Tracks]


@dataclass(frozen=True)
class MVVideo:
    """The clips of a list in an endless, shuffled sequence; made by `open_mv_video`.

    Attributes:
        items: (video files, prompt, elevation, azimuth of the first view) of each clip.
        tracker: gives the tracks.
    """

    items: tuple[tuple[tuple[Path, ...], str, float, float], ...]
    tracker: Tracker = track

    def __call__(self, seed: int, position: int, shape: ClipShape) -> Clip:
        paths, prompt, elevation, start = self.items[shuffled(seed, position, len(self.items))]
        rng = np.random.default_rng([seed, position, 5])
        chosen = evenly(rng, len(paths), shape.views)
        azimuths = start + 360 * chosen / len(paths)
        decoded = [read_frames(paths[v]) for v in chosen]
        frames = strided(rng, min(map(len, decoded)), shape.frames)
        if len({view.shape[1:] for view in decoded}) > 1:
            raise InputError("sizes_differ", f"The views of '{paths[0]}' have different sizes.", "Render them with one size.")
        video = np.stack([view[frames] for view in decoded])  # [V, F, H, W, 3]
        if video.shape[2] != video.shape[3]:
            raise InputError("bad_video_size", f"The pictures of '{paths[0]}' are {video.shape[3]} x {video.shape[2]} pixels.",
                             "MV-Video's are square; crop or render them so.")
        viewmats = space.orbit_viewmats(azimuths, elevation)
        footage = read_footage(video, viewmats, space.intrinsics(video.shape[2], shape.views))
        if footage.size < shape.size:
            raise InputError("clip_too_small", f"The pictures of '{paths[0]}' have {footage.size} pixels, not {shape.size}.",
                             "Ask for smaller clips.")
        rgba = np.concatenate([footage.colors, footage.masks[..., None] * np.uint8(255)], -1)
        rgba[~footage.masks] = 0
        if footage.size != shape.size:
            rgba = np.stack([[reduced(picture, shape.size) for picture in view] for view in rgba])
        return Clip(rgba, prompt, viewmats, space.intrinsics(shape.size, shape.views), *self._tracks(rgba), None,
                    {"model": paths[0].parent.name})

    def _tracks(self, rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels = query_grid(rgba.shape[2])
        queries = np.concatenate([np.zeros((len(pixels), 1)), pixels + 0.5], 1).astype(np.float32)
        found = self.tracker(rgba, np.broadcast_to(queries, (len(rgba), *queries.shape)))
        on = rgba[:, 0, pixels[:, 1], pixels[:, 0], 3] > 127  # [V, Q]
        return found.points, found.visibility, on


def open_mv_video(
    path: Path, validation: bool = False, share: float = VALIDATION_SHARE, tracker: Tracker = track
) -> MVVideo:
    """The clips of a list for training, or those for validation; models are told apart by the folders of their videos.

    Args:
        path: the JSON list; its paths are absolute, or relative to it.
        share: of the folders, which go to validation; 0 for none.
        tracker: such as `tracking.track` with CoTracker3's weights bound to it.

    Raises:
        InputError: missing_file, bad_video_list, no_clips_listed.
    """
    if not path.is_file():
        raise InputError("missing_file", f"The file '{path}' isn't there.", "Check its name and folder.")
    try:
        items = [(tuple(path.parent / name for name in item["data_path"]), str(item["text_prompt"]),
                  float(item["angle"]["elv"]), float(item["angle"]["azi_start"])) for item in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("bad_video_list", f"'{path}' is no list of multi-view videos: {error!r}.",
                         'Give [{"data_path": [...], "text_prompt": ..., "angle": {"elv": ..., "azi_start": ...}}].') from error
    held_out = validation_rigs({str(item[0][0].parent) for item in items}, share)
    chosen = tuple(item for item in items if (str(item[0][0].parent) in held_out) == validation)
    if not chosen:
        raise InputError("no_clips_listed", f"'{path}' has no clips for {'validation' if validation else 'training'}.",
                         "List more clips.")
    return MVVideo(chosen, tracker)


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video file; [F, H, W, 3] uint8.

    Raises:
        InputError: unreadable_video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError("unreadable_video", f"'{path.name}' can't be read: {error}.",
                         "Give a video file or a folder of pictures.") from error
    return np.stack(frames)
