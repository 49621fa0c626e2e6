"""Pictures of running jobs for the panel, held outside of Blender's data: they leave nothing behind in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bpy.utils.previews
import numpy as np

if TYPE_CHECKING:
    from bpy.utils.previews import ImagePreviewCollection

_pictures: ImagePreviewCollection | None = None


def show(job_id: str, picture: np.ndarray) -> None:
    """
    Args:
        picture: [H, W, 3] uint8 sRGB, top row first.
    """
    global _pictures
    if _pictures is None:
        _pictures = bpy.utils.previews.new()
    preview = _pictures[job_id] if job_id in _pictures else _pictures.new(job_id)
    square = as_square(picture)  # [S, S, 4]
    size = (square.shape[1], square.shape[0])
    if tuple(preview.image_size) != size:
        preview.image_size = size
    preview.image_pixels_float.foreach_set(square[::-1].astype(np.float32).ravel() / 255)


def as_square(picture: np.ndarray) -> np.ndarray:
    """The picture centred in a transparent square [S, S, 4] uint8, since Blender draws previews square."""
    height, width = picture.shape[:2]
    size = max(height, width)
    square = np.zeros((size, size, 4), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width, :3] = picture[..., :3]
    square[top : top + height, left : left + width, 3] = 255
    return square


def icon(job_id: str) -> int:
    """Icon of a job's picture for `layout.template_icon`; 0 when there is none."""
    return _pictures[job_id].icon_id if _pictures is not None and job_id in _pictures else 0


def drop(job_id: str) -> None:
    if _pictures is not None and job_id in _pictures:
        del _pictures[job_id]


def clear() -> None:
    """Release everything."""
    global _pictures
    if _pictures is not None:
        bpy.utils.previews.remove(_pictures)
        _pictures = None
