"""`track4d track`: points followed through videos, as numbers and as a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text
from track4d_protocol.errors import InputError

if TYPE_CHECKING:
    from ..tracking import Tracks

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TRAIL = 8  # frames of its way that a point draws behind it

console = Console(stderr=True, highlight=False)


def track(videos: Annotated[list[Path], typer.Argument(help="Video files, or folders of pictures in the order of their names.")],
          out: Annotated[Path, typer.Option("-o", "--out", help="Folder for NAME.npz and NAME.mp4 of each video.")],
          grid: Annotated[int, typer.Option(min=1, max=100, help="Query points along each side of the picture.")] = 15,
          frame: Annotated[int, typer.Option(min=0, help="The frame that the query points lie in.")] = 0,
          mask: Annotated[Path | None, typer.Option(help="Picture, white on the object: only its points are tracked. Without "
                                                    "it transparency says where the object is.")] = None,
          weights: Annotated[Path | None, typer.Option(help="CoTracker3 checkpoint (.pth); without it, optical flow.")] = None,
          ) -> None:
    """Follow a grid of points through videos: tracks as .npz, drawn onto the video as .mp4."""
    from ..tracking import query_grid
    from ..tracking import track as follow

    model = None
    if weights is not None:
        import torch

        from ..tracking.predictor import NOTICE, load_cotracker

        model = load_cotracker(weights, "cuda" if torch.cuda.is_available() else "cpu")
        console.print(Text(f"note: {NOTICE}", "yellow"))
    names = [video.name if video.is_dir() else video.stem for video in videos]
    if len(set(names)) < len(names):
        raise InputError("same_names", "Two of the videos have the same name, and would write the same file.", "Rename one.")
    out.mkdir(parents=True, exist_ok=True)
    for path, name in zip(videos, names):
        video, rate = read_video(path)
        height, width = video.shape[1], video.shape[2]
        on = read_mask(mask, height, width) if mask else video[min(frame, len(video) - 1), ..., 3] > 127
        queries = query_grid(grid, height, width, frame, on)
        if not len(queries):
            raise InputError("empty_mask", f"None of the {grid} x {grid} query points of '{name}' lies on the object.",
                             "Give a finer --grid, or another mask.")
        tracks = follow(video[None], queries[None], model)
        arrays = {"points": tracks.points[0], "visibility": tracks.visibility[0], "confidence": tracks.confidence[0],
                  "queries": queries, "size": np.array([height, width])}
        partial = out / f".{name}.npz"
        np.savez_compressed(partial, **arrays)
        partial.replace(out / f"{name}.npz")
        write_video(out / f"{name}.mp4", overlay(video, tracks), rate)
        seen = tracks.visibility[0].mean()
        console.print(f"wrote {out / name}.npz and .mp4: {len(queries)} points, {len(video)} frames, {seen:.0%} seen")


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Frames of a video file or a folder of pictures.

    Returns:
        [F, H, W, 4] uint8 sRGB with straight alpha, and frames per second (16 for pictures).

    Raises:
        InputError: nothing there, nothing readable in it, or pictures of different sizes.
    """
    import av
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise InputError("no_video", f"There is no video '{path}'.", "Check its name and folder.")
    rate = 16.0
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
            frames = [np.asarray(Image.open(file).convert("RGBA")) for file in files]
        else:
            with av.open(str(path)) as container:
                rate = float(container.streams.video[0].average_rate or rate)
                frames = [picture.to_ndarray(format="rgba") for picture in container.decode(video=0)]
    except (av.FFmpegError, UnidentifiedImageError, IndexError, OSError) as error:
        raise InputError("unreadable_video", f"'{path.name}' can't be read: {error}.",
                         "Give a video file or a folder of pictures.") from error
    if not frames:
        raise InputError("unreadable_video", f"'{path.name}' has no pictures.", "Give a video file or a folder of pictures.")
    sizes = {picture.shape for picture in frames}
    if len(sizes) > 1:
        raise InputError("uneven_pictures", f"The pictures of '{path.name}' have {len(sizes)} different sizes.",
                         "Give pictures of one size.")
    return np.stack(frames), rate


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """Where a picture is lighter than half; [H, W] bool.

    Raises:
        InputError: no picture, or one of another size than the video's.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        mask = np.asarray(Image.open(path).convert("L")) > 127
    except (OSError, UnidentifiedImageError) as error:
        raise InputError("unreadable_mask", f"The mask '{path}' can't be read: {error}.", "Give a picture file.") from error
    if mask.shape != (height, width):
        raise InputError("mask_size", f"The mask is {mask.shape[1]} x {mask.shape[0]} pixels, the video {width} x {height}.",
                         "Give a mask of the video's size.")
    return mask


def overlay(video: np.ndarray, tracks: Tracks) -> np.ndarray:
    """The first view's points and the way they came, drawn onto its pictures; hidden points are rings.

    Args:
        video: [F, H, W, 4] uint8.

    Returns:
        [F, H, W, 3] uint8; small pictures are enlarged.
    """
    import cv2

    points, visibility = tracks.points[0], tracks.visibility[0]
    factor = max(1, round(512 / max(video.shape[1:3])))
    alpha = video[..., 3:].astype(np.float32) / 255
    pictures = (video[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    hues = np.argsort(np.argsort(points[0, :, 1])) * 170 // max(points.shape[1], 1)  # by height in the first frame
    hsv = np.stack([hues, np.full_like(hues, 230), np.full_like(hues, 255)], -1).astype(np.uint8)
    colors = [tuple(int(c) for c in color) for color in cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]]
    fixed = np.round(points.clip(-1e4, 1e4) * factor * 16 - 8).astype(np.int32)  # 1/16 pixel, centres at integers
    drawn = []
    for f, picture in enumerate(pictures):
        canvas = np.ascontiguousarray(picture.repeat(factor, 0).repeat(factor, 1))
        for n, color in enumerate(colors):
            trail = fixed[max(0, f - TRAIL):f + 1, n]
            cv2.polylines(canvas, [trail[:, None]], False, color, 1, cv2.LINE_AA, shift=4)
            x, y = (int(c) for c in fixed[f, n])
            cv2.circle(canvas, (x, y), 3 * 16, color, -1 if visibility[f, n] else 1, cv2.LINE_AA, shift=4)
        drawn.append(canvas)
    return np.stack(drawn)


def write_video(path: Path, pictures: np.ndarray, rate: float) -> None:
    """Writes pictures [F, H, W, 3] uint8 as H.264, or VP9 for .webm.

    An odd last row or column is repeated, as the formats need even sizes.
    """
    from fractions import Fraction

    import av

    frames, height, width, _ = pictures.shape
    pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    partial = path.with_name(f".{path.name}")
    with av.open(str(partial), "w") as container:
        codec = "libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264"
        stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    partial.replace(path)
