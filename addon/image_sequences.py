"""A multi-view video from a folder: view_0/, view_1/, ... with a picture per frame (or view_0.mp4); cameras.json."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.space import AZIMUTHS, intrinsics, orbit_viewmats

from .capture.colors import to_bytes
from .capture.pictures import quiet_handlers
from .slices import finished

PICTURES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
Reading = Generator[tuple[int, int] | None, None, np.ndarray]  # yields pictures done and pictures in all, where it knows them


def read_views(folder: Path | str) -> np.ndarray:
    """All views of a multi-view video; uint8 [V, F, H, W, 3 or 4] sRGB, straight alpha if there is any.

    Raises:
        InputError: missing_file, no_views, unreadable_file, sizes_differ.
    """
    return finished(views_steps(folder))


def views_steps(folder: Path | str) -> Reading:
    """`read_views` in slices of one picture; during a pause nothing of it is in `bpy.data`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("missing_file", f"The folder '{folder}' isn't there.", "Check its name.")
    films = yield from films_steps(_sources(folder))
    return (yield from pictures_steps(films))


def films_steps(sources: Sequence[Path]) -> Generator[None, None, list[list[Frame]]]:
    """The `film` of each view, a view at a time; all have as many frames.

    Raises:
        InputError: missing_file, no_views, unreadable_file, sizes_differ.
    """
    films: list[list[Frame]] = []
    for source in sources:
        films.append(film(source))
        yield
    if len({len(frames) for frames in films}) != 1:
        lengths = ", ".join(f"'{source.name}' {len(frames)}" for source, frames in zip(sources, films))
        raise InputError("sizes_differ", f"The views differ in how many frames they have: {lengths}.",
                         "Give each view as many frames.")  # fmt: skip
    return films


def pictures_steps(films: Sequence[Sequence[Frame]], size: int | None = None) -> Reading:
    """The pictures of films of one length, a picture at a time; uint8 [V, F, H, W, 3 or 4].

    Args:
        films: of each view.
        size: larger square pictures are reduced to it.

    Raises:
        InputError: unreadable_file, sizes_differ.
    """
    frames = [frame for film in films for frame in film]
    video: np.ndarray | None = None
    for number, frame in enumerate(frames):
        picture = read_frame(frame, size)
        if video is None:
            video = np.empty((len(frames), *picture.shape), np.uint8)
        if picture.shape != video.shape[1:]:
            raise InputError("sizes_differ", f"The picture '{frame.path}' is {_size(picture)}; '{frames[0].path}' is "
                             f"{_size(video[0])}.", "Give each view pictures of the same size.")  # fmt: skip
        video[number] = picture
        yield number + 1, len(frames)
    assert video is not None, "a film has frames"
    return video.reshape(len(films), -1, *video.shape[1:])


def _size(picture: np.ndarray) -> str:
    height, width, channels = picture.shape
    return f"{width} x {height} pixels {'with' if channels == 4 else 'without'} transparency"


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
        raise InputError("bad_cameras", f"'{path}' can't be read: {error!r}.", "See docs/multiview_video.md for its form."
                         ) from error  # fmt: skip
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
        raise InputError("no_views", f"'{folder}' has the views {sorted(found)}.", "Name them view_0, view_1, ... without a gap.")
    return [found[number] for number in sorted(found)]


def is_multi_view(path: Path) -> bool:
    """Whether a path is a folder as `read_views` takes it."""
    return path.is_dir() and any(entry.stem.startswith("view_") for entry in path.iterdir())


def film(path: Path) -> list[Frame]:
    """The frames of one view, in their order: of a video, of a folder of pictures, or of the sequence of one picture.

    Raises:
        InputError: missing_file, no_views, unreadable_file.
    """
    if not path.exists():
        raise InputError("missing_file", f"'{path}' isn't there.", "Check its name.")
    if path.suffix.lower() in VIDEOS:
        with _movie(path) as (_, length):
            return [Frame(path, number) for number in range(length)]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    else:
        stem = path.stem.rstrip("0123456789")
        files = [file for file in path.parent.iterdir() if file.suffix == path.suffix and file.stem.startswith(stem)]
        files = sorted((file for file in files if file.stem[len(stem) :].isdigit()), key=lambda file: int(file.stem[len(stem) :]))
    if not files:
        raise InputError("no_views", f"'{path}' holds no pictures.", "Choose a video, or one .png or .jpg per frame.")
    return [Frame(file) for file in files]


@dataclass(frozen=True)
class Frame:
    """A picture: a file, or the frame of this number of a video."""

    path: Path
    number: int | None = None


def read_frame(frame: Frame, size: int | None = None) -> np.ndarray:
    """One picture as uint8 [H, W, 3 or 4] sRGB, straight alpha if there is any.

    Args:
        frame: of a `film`.
        size: a larger square picture is reduced to it.

    Raises:
        InputError: unreadable_file.
    """
    if frame.number is None:
        return _read_picture(frame.path, size)
    with _movie(frame.path) as (scene, _), TemporaryDirectory() as folder:
        render = scene.render
        if size and render.resolution_x == render.resolution_y > size:
            render.resolution_x = render.resolution_y = size
        scene.frame_start = scene.frame_end = frame.number + 1
        render.filepath = str(Path(folder) / "frame_")
        had_result = "Render Result" in bpy.data.images
        try:
            with quiet_handlers():
                bpy.ops.render.render(animation=True, scene=scene.name)
        finally:
            if not had_result and "Render Result" in bpy.data.images:
                bpy.data.images.remove(bpy.data.images["Render Result"])
        return _read_picture(next(Path(folder).iterdir()), None)


@contextmanager
def _movie(path: Path) -> Iterator[tuple[bpy.types.Scene, int]]:
    """A temporary scene that shows a video in its own size from frame 1 on, and the number of its frames."""
    scene = bpy.data.scenes.new(".Track4D")
    try:
        editor = scene.sequence_editor_create()
        strips = editor.strips if hasattr(editor, "strips") else editor.sequences  # 4.4 has both
        try:
            strip = strips.new_movie("view", str(path), 1, 1)
            width, height = strip.elements[0].orig_width, strip.elements[0].orig_height
        except RuntimeError:
            width = height = 0
        if not width or not height:
            raise InputError("unreadable_file", f"The video '{path}' can't be read.", "Save it again.")
        render = scene.render
        render.resolution_x, render.resolution_y, render.resolution_percentage = width, height, 100
        render.image_settings.file_format, render.image_settings.color_mode = "PNG", "RGB"
        scene.view_settings.view_transform = "Standard"
        yield scene, int(strip.duration if hasattr(strip, "duration") else strip.frame_final_duration)
    finally:
        bpy.data.scenes.remove(scene)


def _read_picture(path: Path, size: int | None) -> np.ndarray:
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
        if size and width == height > size:
            image.scale(size, size)
            width = height = size
        flat = np.empty(width * height * image.channels, np.float32)
        image.pixels.foreach_get(flat)
        channels = 4 if image.depth in (32, 64) else 3  # Blender gives four channels to every picture
        pixels = flat.reshape(height, width, image.channels)[::-1, :, :channels]
    finally:
        bpy.data.images.remove(image)
    return to_bytes(pixels)
