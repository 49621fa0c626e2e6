"""A multi-view video from a folder: view_0/, view_1/, ... with a picture per frame (or view_0.mp4); cameras.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.space import AZIMUTHS, intrinsics, orbit_viewmats

from .capture.colors import to_bytes

PICTURES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm")


def read_views(folder: Path | str) -> np.ndarray:
    """All views of a multi-view video; uint8 [V, F, H, W, 3 or 4] sRGB, straight alpha if there is any.

    Raises:
        InputError: missing_file, no_views, unreadable_file, sizes_differ, video_not_supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("missing_file", f"The folder '{folder}' isn't there.", "Check its name.")
    views = [_read_view(source) for source in _sources(folder)]
    shapes = {view.shape for view in views}
    if len(shapes) != 1:
        raise InputError(
            "sizes_differ",
            f"The views in '{folder.name}' have different sizes or lengths: {sorted(shapes)}.",
            "Give each view as many frames of the same size.",
        )
    return np.stack(views)


def read_cameras(folder: Path | str, views: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, str]:
    """The cameras of a multi-view video.

    cameras.json holds {"viewmats": [[4x4], ...], "Ks": [[3x3], ...], "space": "canonical" or "world"}: world-to-camera
    matrices in OpenCV axes and intrinsics in pixels. Without it, square pictures of the orbit of a capture are assumed.

    Returns:
        viewmats [V, 4, 4] float64, Ks [V, 3, 3] float32, and the space.

    Raises:
        InputError: bad_cameras, missing_cameras.
    """
    path = Path(folder) / "cameras.json"
    if not path.is_file():
        if views != len(AZIMUTHS) or height != width:
            raise InputError(
                "missing_cameras",
                f"'{folder}' has {views} views of {width} x {height} pixels and no cameras.json.",
                f"Add it, or give {len(AZIMUTHS)} square views at {', '.join(f'{a:.0f}' for a in AZIMUTHS)} degrees.",
            )
        return orbit_viewmats().astype(np.float64), intrinsics(width, views), "canonical"
    try:
        data = json.loads(path.read_text())
        viewmats, Ks = np.array(data["viewmats"], np.float64), np.array(data["Ks"], np.float32)
        space = data.get("space", "canonical")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("bad_cameras", f"'{path}' can't be read: {error!r}.", "See docs for its form.") from error
    _check_cameras(viewmats, Ks, space, views, path)
    return viewmats, Ks, space


def _check_cameras(viewmats: np.ndarray, Ks: np.ndarray, space: Any, views: int, path: Path) -> None:
    fault = ""
    if viewmats.shape != (views, 4, 4) or Ks.shape != (views, 3, 3):
        fault = f"viewmats {list(viewmats.shape)} and Ks {list(Ks.shape)} for {views} views"
    elif not np.isfinite(viewmats).all() or not np.isfinite(Ks).all():
        fault = "numbers that are not finite"
    elif np.abs(viewmats[:, :3, :3] @ viewmats[:, :3, :3].transpose(0, 2, 1) - np.eye(3)).max() > 1e-3:
        fault = "viewmats that are not rigid"
    elif space not in ("canonical", "world"):
        fault = f"the space {space!r}"
    if fault:
        raise InputError("bad_cameras", f"'{path}' holds {fault}.", "Give one rigid 4x4 and one 3x3 matrix per view.")


def _sources(folder: Path) -> list[Path]:
    """The folder or video file of each view, in the order of their numbers."""
    found: dict[int, Path] = {}
    for entry in folder.iterdir():
        name, number = entry.stem.rsplit("_", 1) if "_" in entry.stem else ("", "")
        if name == "view" and number.isdigit() and (entry.is_dir() or entry.suffix.lower() in VIDEOS):
            found[int(number)] = entry
    if not found or sorted(found) != list(range(len(found))):
        raise InputError(
            "no_views", f"'{folder}' has the views {sorted(found)}.", "Name them view_0, view_1, ... without a gap."
        )
    return [found[number] for number in sorted(found)]


def _read_view(source: Path) -> np.ndarray:
    if source.is_file():
        return _read_video(source)
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise InputError("no_views", f"The folder '{source}' has no pictures.", "Put one .png or .jpg per frame there.")
    frames = [_read_picture(file) for file in files]
    shapes = {frame.shape for frame in frames}
    if len(shapes) != 1:
        raise InputError(
            "sizes_differ", f"The pictures in '{source}' have different sizes: {sorted(shapes)}.", "Make them alike."
        )
    return np.stack(frames)


def _read_picture(path: Path) -> np.ndarray:
    try:
        image = bpy.data.images.load(str(path))
    except RuntimeError as error:
        raise InputError("unreadable_file", f"The picture '{path}' can't be read.", "Save it again.") from error
    try:
        image.colorspace_settings.name = "sRGB"
        image.alpha_mode = "STRAIGHT"
        width, height = image.size
        if not width or not height:
            raise InputError("unreadable_file", f"The picture '{path}' can't be read.", "Save it again.")
        flat = np.empty(width * height * image.channels, np.float32)
        image.pixels.foreach_get(flat)
        channels = 4 if image.depth in (32, 64) else 3  # Blender gives four channels to every picture
        pixels = flat.reshape(height, width, image.channels)[::-1, :, :channels]
    finally:
        bpy.data.images.remove(image)
    return to_bytes(pixels)


def _read_video(path: Path) -> np.ndarray:
    try:
        import av
    except ImportError as error:
        raise InputError(
            "video_not_supported",
            f"'{path.name}' is a video, and the package 'av' isn't installed.",
            f"Give its frames as pictures in a folder {path.stem}/, or install av.",
        ) from error
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError) as error:
        raise InputError("unreadable_file", f"The video '{path}' can't be read: {error}.", "Save it again.") from error
    if not frames:
        raise InputError("unreadable_file", f"The video '{path}' has no frames.", "Save it again.")
    return np.stack(frames)
