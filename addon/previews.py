"""Pictures of running jobs for the panel, held outside of Blender's data: they leave nothing behind in a file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import bpy.utils.previews

if TYPE_CHECKING:
    import numpy as np
    from bpy.utils.previews import ImagePreviewCollection

FRAMES_PER_SECOND = 8
_pictures: ImagePreviewCollection | None = None
_films: dict[str, np.ndarray] = {}  # [T, S, S, 4] uint8, of jobs whose picture moves
_shown: dict[str, int] = {}  # frame of the film that the picture shows


def show(job_id: str, picture: np.ndarray) -> None:
    """Shows a picture, or a film from now on; a job that has a film shows no more single pictures.

    Args:
        picture: [H, W, 3] uint8 sRGB, top row first, or a film [T, H, W, 3].
    """
    if picture.ndim == 4 and len(picture):
        _films[job_id] = as_square(picture)
        _shown[job_id] = -1
        play()
    elif job_id not in _films:
        _draw(job_id, as_square(picture))


def play() -> bool:
    """Lets the films go on; True when a picture has changed."""
    changed = False
    for job_id, film in _films.items():
        frame = int(time.monotonic() * FRAMES_PER_SECOND) % len(film)
        if frame != _shown[job_id]:
            _draw(job_id, film[frame])
            _shown[job_id], changed = frame, True
    return changed


def _draw(job_id: str, square: np.ndarray) -> None:
    global _pictures
    if _pictures is None:
        _pictures = bpy.utils.previews.new()
    preview = _pictures[job_id] if job_id in _pictures else _pictures.new(job_id)
    size = (square.shape[1], square.shape[0])
    if tuple(preview.image_size) != size:
        preview.image_size = size
    preview.image_pixels_float.foreach_set(square[::-1].astype("float32").ravel() / 255)


def as_square(picture: np.ndarray) -> np.ndarray:
    """Pictures [..., H, W, 3] centred in a transparent square [..., S, S, 4] uint8, since Blender draws previews square."""
    import numpy as np  # late: Blender 4.2 doesn't have it loaded, and registering shall be quick

    height, width = picture.shape[-3:-1]
    size = max(height, width)
    square = np.zeros((*picture.shape[:-3], size, size, 4), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[..., top : top + height, left : left + width, :3] = picture[..., :3]
    square[..., top : top + height, left : left + width, 3] = 255
    return square


def icon(job_id: str) -> int:
    """Icon of a job's picture for `layout.template_icon`; 0 when there is none."""
    return _pictures[job_id].icon_id if _pictures is not None and job_id in _pictures else 0


def drop(job_id: str) -> None:
    _films.pop(job_id, None)
    _shown.pop(job_id, None)
    if _pictures is not None and job_id in _pictures:
        del _pictures[job_id]


def clear() -> None:
    """Release everything."""
    global _pictures
    _films.clear()
    _shown.clear()
    if _pictures is not None:
        bpy.utils.previews.remove(_pictures)
        _pictures = None
