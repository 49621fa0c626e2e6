"""A multi-view video from a folder: view_0/, view_1/, ... with a picture per frame (or view_0.mp4); mask_0/; cameras.json."""

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

from .capture import quiet_handlers, to_bytes
from .slices import finished

PICTURES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
Reading = Generator[tuple[int, int] | None, None, np.ndarray]  # yields pictures done and pictures in all, where it knows them


def read_views(folder: Path | str, size: int | None = None, most: int | None = None) -> np.ndarray:
    """All views of a multi-view video; uint8 [V, F, H, W, 3 or 4] sRGB, straight alpha if there is any.

    Masks beside the views (mask_0/, mask_1/, ..., white where the object is) become its alpha.

    Args:
        size: the longer side of larger pictures is reduced to it.
        most: of a longer video, so many frames at even distances are taken.

    Raises:
        InputError: missing_file, no_views, bad_masks, unreadable_file, sizes_differ.
    """
    return finished(views_steps(folder, size, most))


def views_steps(folder: Path | str, size: int | None = None, most: int | None = None) -> Reading:
    """`read_views` in slices of one picture; during a pause nothing of it is in `bpy.data`."""
    folder = Path(folder)
    sources, masks = _sources(folder, "view"), _sources(folder, "mask")
    if masks and len(masks) != len(sources):
        raise InputError("bad_masks", f"'{folder}' has {len(sources)} views and {len(masks)} masks.", "Give one mask per view.")
    films = yield from films_steps([*sources, *masks])
    films = [spread(frames, most) for frames in films]
    video = yield from pictures_steps(films[: len(sources)], size)
    if not masks:
        return video
    inside = yield from pictures_steps(films[len(sources) :], size)
    if inside.shape[:4] != video.shape[:4]:
        raise InputError("bad_masks", f"The masks in '{folder}' are {_size(inside[0, 0])}, the views {_size(video[0, 0])}.",
                         "Give masks of the pictures' size.")  # fmt: skip
    white = inside[..., :3].max(-1, keepdims=True)
    white = white if inside.shape[-1] == 3 else np.minimum(white, inside[..., 3:])
    return np.concatenate([video[..., :3], white], -1)


def spread(film: Sequence[Frame], most: int | None) -> list[Frame]:
    """At most so many frames of a film, at even distances, the first and the last among them."""
    count = min(len(film), most or len(film))
    return [film[index] for index in np.linspace(0, len(film) - 1, count).round().astype(int)]


def picture_size(folder: Path | str) -> tuple[int, int]:
    """Width and height that the views of a multi-view video have in their files.

    Raises:
        InputError: what `read_views` raises.
    """
    sizes = {_file_size(film(source)[0]) for source in _sources(Path(folder), "view")}
    if len(sizes) != 1:
        raise InputError(
            "sizes_differ",
            f"The views in '{folder}' have {' and '.join(f'{w} x {h}' for w, h in sorted(sizes))} pixels.",
            "Give each view pictures of the same size.",
        )
    return sizes.pop()


def count_views(folder: Path | str) -> int:
    """How many views a multi-view video has."""
    return len(_sources(Path(folder), "view"))


def _file_size(frame: Frame) -> tuple[int, int]:
    if frame.number is None:
        with _image(frame.path) as image:
            return image.size[0], image.size[1]
    with _movie(frame.path) as (scene, _, _):
        return scene.render.resolution_x, scene.render.resolution_y


def duration(folder: Path | str) -> float | None:
    """Seconds from the first frame of a multi-view video to its last, by its films or by "fps" in cameras.json; None if unknown.

    Raises:
        InputError: bad_cameras, and what `read_views` raises.
    """
    source = _sources(Path(folder), "view")[0]
    if source.suffix.lower() in VIDEOS:
        with _movie(source) as (_, length, rate):
            return (length - 1) / rate if rate > 0 else None
    path = Path(folder) / "cameras.json"
    fps = _read_json(path).get("fps") if path.is_file() else None
    if fps is None:
        return None
    if not isinstance(fps, (int, float)) or not fps > 0:
        raise InputError("bad_cameras", f"'{path}' holds fps {fps!r}.", "Give the frames per second as a number.")
    return (len(film(source)) - 1) / fps


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
        size: the longer side of larger pictures is reduced to it.

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
    data = _read_json(path)
    try:
        viewmats, Ks = np.array(data["viewmats"], np.float64), np.array(data["Ks"], np.float32)
        space = data.get("space", "canonical")
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_cameras(path, error) from error
    _check_cameras(viewmats, Ks, space, views, path)
    return viewmats, Ks, space


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("it is no object")
        return data
    except (OSError, ValueError) as error:
        raise _bad_cameras(path, error) from error


def _bad_cameras(path: Path, error: Exception) -> InputError:
    return InputError("bad_cameras", f"'{path}' can't be read: {error!r}.", "See docs/multiview_video.md for its form.")


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


def _sources(folder: Path, kind: str) -> list[Path]:
    """The folder or video file of each view or mask, in the order of their numbers; there may be no masks."""
    if not folder.is_dir():
        raise InputError("missing_file", f"The folder '{folder}' isn't there.", "Check its name.")
    found: dict[int, Path] = {}
    for entry in folder.iterdir():
        name, number = entry.stem.rsplit("_", 1) if "_" in entry.stem else ("", "")
        if name == kind and number.isdigit() and (entry.is_dir() or entry.suffix.lower() in VIDEOS):
            found[int(number)] = entry
    if (kind == "view" and not found) or sorted(found) != list(range(len(found))):
        raise InputError(
            "no_views", f"'{folder}' has the {kind}s {sorted(found)}.", f"Name them {kind}_0, {kind}_1, ... without a gap."
        )
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
        with _movie(path) as (_, length, _):
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
        size: the longer side of a larger picture is reduced to it.

    Raises:
        InputError: unreadable_file.
    """
    if frame.number is None:
        return _read_picture(frame.path, size)
    with _movie(frame.path) as (scene, _, _), TemporaryDirectory() as folder:
        render = scene.render
        render.resolution_x, render.resolution_y = _reduced_size(render.resolution_x, render.resolution_y, size)
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
def _movie(path: Path) -> Iterator[tuple[bpy.types.Scene, int, float]]:
    """A temporary scene that shows a video in its own size from frame 1 on, how many frames it has, and how many a second."""
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
        yield scene, int(strip.duration if hasattr(strip, "duration") else strip.frame_final_duration), float(strip.fps)
    finally:
        bpy.data.scenes.remove(scene)


def _read_picture(path: Path, size: int | None) -> np.ndarray:
    with _image(path) as image:
        width, height = image.size
        flat = np.empty(width * height * image.channels, np.float32)
        image.pixels.foreach_get(flat)
        channels = 4 if image.depth in (32, 64) else 3  # Blender gives four channels to every picture
        pixels = flat.reshape(height, width, image.channels)[::-1, :, :channels]
    return to_bytes(_reduced(pixels, *_reduced_size(width, height, size)))


@contextmanager
def _image(path: Path) -> Iterator[bpy.types.Image]:
    """A picture in sRGB with straight alpha, while it is looked at."""
    try:
        image = bpy.data.images.load(str(path))
    except RuntimeError as error:
        raise InputError("unreadable_file", f"The picture '{path}' can't be read.", "Save it again.") from error
    try:
        image.colorspace_settings.name = "sRGB"
        image.alpha_mode = "STRAIGHT"
        if not all(image.size):
            raise InputError("unreadable_file", f"The picture '{path}' can't be read.", "Save it again.")
        yield image
    finally:
        bpy.data.images.remove(image)


def _reduced_size(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Width and height with the longer one at most `size`, in the same proportion."""
    factor = min(1.0, (size or width + height) / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _reduced(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture [H, W, 3 or 4] in 0..1 with straight alpha, smaller; each pixel is the mean of its area."""
    if picture.shape[:2] == (height, width):
        return picture
    if picture.shape[-1] == 3:
        return _means(_means(picture, height).swapaxes(0, 1), width).swapaxes(0, 1)
    premultiplied = np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)
    small = _means(_means(premultiplied, height).swapaxes(0, 1), width).swapaxes(0, 1)
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    return small


def _means(rows: np.ndarray, count: int) -> np.ndarray:
    """Means of rows [H, ...] over `count` equal parts of their length."""
    total = np.concatenate([np.zeros_like(rows[:1], np.float64), rows.cumsum(0, np.float64)])  # [H + 1, ...]
    edges = np.linspace(0, len(rows), count + 1)
    whole = np.minimum(edges.astype(int), len(rows) - 1)
    part = (edges - whole).reshape(-1, *[1] * (rows.ndim - 1))
    return np.diff(total[whole] * (1 - part) + total[whole + 1] * part, axis=0) * (count / len(rows))
