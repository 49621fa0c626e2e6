"""`track4d generate`: Stage One alone, from pictures or a mesh and a sentence to a multi-view video."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.text import Text
from track4d_protocol.errors import InputError

if TYPE_CHECKING:
    from ..geometry.mesh import Mesh
    from ..progress import Report
    from ..video.multiview_video import MultiViewVideo

FILMS = (".mp4", ".webm")
RATE = 8.0  # frames per second, of MV-Video's clips as the published model was trained on them
CAPTURE = 512  # pixels of a mesh's pictures

console = Console(stderr=True, highlight=False)


def generate(
    source: Annotated[Path, typer.Argument(help="A mesh (.glb .gltf .obj .ply .stl), or a folder with a picture per view.")],
    prompt: Annotated[str, typer.Option(help='What it does, such as "the fox is running".')],
    out: Annotated[list[Path], typer.Option("-o", "--out", help="A folder for view_0/0000.png, ... and cameras.json, as "
                                            "`track4d fit --video` reads it, or a film (.mp4 .webm); may be repeated.")],
    model: Annotated[str, typer.Option(help="motion moves a mesh; small and published paint a video.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Folder with the published downloads, or the hub's cache; or a file "
                                                    "of the small model.")] = None,
    frames: Annotated[int, typer.Option(help="Of the video.")] = 16,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="How strongly the sentence counts; each model has its default.")] = None,
    freeinit: Annotated[int, typer.Option(help="3 steadies a painted video, in three times the time.")] = 1,
    loop: Annotated[bool, typer.Option(help="Let the first frame of a painted video follow on the last.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed, another motion.")] = 0,
    front: Annotated[str, typer.Option(help="The axis that a mesh faces: -Y, +Y, +X or -X.")] = "-Y",
) -> None:
    """Make a multi-view video of pictures or a mesh by a sentence; no Blender needed."""
    from rich.progress import Progress

    from ..video.multiview_video import check_settings

    out = [check_output(path) for path in out]
    model = model or ("published" if source.is_dir() else "motion")
    if model not in ("motion", "small", "published"):
        raise InputError("unknown_model", f"There is no model '{model}'.", "Use motion, small or published.")
    if model == "motion" and (source.is_dir() or loop or freeinit != 1):
        raise InputError("not_for_motion", "The motion model takes a mesh, and neither --loop nor --freeinit.",
                         "Use --model small or published for pictures, loops and FreeInit.")
    if not prompt.strip():
        raise InputError("empty_prompt", "The prompt is empty.", "Say what happens, such as 'the fox is running'.")
    check_settings(frames, steps, freeinit, loop)
    with Progress(console=console) as progress:
        bar = progress.add_task("generate", total=None)

        def report(stage: str, step: int, total: int, preview: np.ndarray | None = None) -> None:
            progress.update(bar, completed=step, total=total)

        if model == "motion":
            video, viewmats, Ks = of_motion(source, prompt, front, frames, steps, guidance, seed, report)
        else:
            from ..video.sampling import GUIDANCE

            pictures, viewmats, Ks = stills(source, front)
            painter = load_painter(model, weights)
            note(painter.prompt_warnings(prompt))
            strength = GUIDANCE if guidance is None else guidance
            video = painter.generate(pictures, viewmats, prompt, frames, steps, strength, freeinit, loop, seed, report)
            Ks = scaled(Ks, pictures.shape[1:3], video.shape[2:4])
    for path in out:
        if path.suffix:
            write_film(path, video)
        else:
            write_views(path, video, viewmats, Ks)
        console.print(f"wrote {path}")


def check_output(path: Path) -> Path:
    """The path, if it can be written.

    Raises:
        InputError: unsupported_format, missing_folder, folder_not_empty.
    """
    if path.suffix.lower() not in ("", *FILMS):
        raise InputError("unsupported_format", f"Track4D can't write '{path.name}'.",
                         f"Give a folder for pictures, or a film in {' or '.join(FILMS)}.")
    if not path.absolute().parent.is_dir():
        raise InputError("missing_folder", f"The folder '{path.absolute().parent}' isn't there.", "Make it first.")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError("folder_not_empty", f"'{path}' is there and isn't an empty folder.", "Give another name.")
    return path


def note(warnings: list[dict[str, str]]) -> None:
    """Prints what the user should know, though the work goes on."""
    for warning in warnings:
        console.print(Text(f"note: {warning['message']} {warning['action']}", "yellow"))


def of_motion(path: Path, prompt: str, front: str, frames: int, steps: int, guidance: float | None, seed: int,
              report: Report) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The video [V, F, S, S, 4] of a mesh that the shipped generator moves, and its cameras."""
    from ..pipeline import stepped_back, word_warnings
    from ..video.generator import MotionGenerator, decode_video

    mesh, pictures, viewmats, Ks = captured(path, front)
    generator = MotionGenerator.shipped(prompt)
    note(word_warnings(generator, prompt))
    motion = generator.generate(mesh, pictures, viewmats, Ks, prompt, frames, steps, guidance, seed, report)
    filming = stepped_back(viewmats, motion.tracks)
    return decode_video(mesh, motion.tracks, filming, Ks, CAPTURE), filming, Ks


def captured(path: Path, front: str) -> tuple[Mesh, np.ndarray, np.ndarray, np.ndarray]:
    """A mesh in canonical space, its four pictures [V, S, S, 4] uint8 with straight alpha, and their cameras."""
    from track4d_protocol.space import canonical_similarity, intrinsics, orbit_viewmats

    from ..geometry.mesh_file import read_mesh
    from ..geometry.zbuffer import render, straight

    mesh = read_mesh(path)
    mesh.vertices = canonical_similarity(mesh.vertices, front).apply(mesh.vertices)
    viewmats = orbit_viewmats()
    Ks = intrinsics(CAPTURE, len(viewmats))
    pictures = render(mesh, mesh.vertices[None], viewmats, Ks, CAPTURE)[0]  # [V, S, S, 4]
    return mesh, (straight(pictures).clip(0, 1) * 255 + 0.5).astype(np.uint8), viewmats, Ks


def stills(source: Path, front: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures [V, H, W, 4] uint8 and cameras: of a mesh, or as they lie in a folder in the order of their names.

    The folder may have a cameras.json with "viewmats", canonical world-to-camera, and "Ks" in pixels.

    Raises:
        InputError: no pictures, pictures of several sizes, no cameras for other than four views, or cameras that can't be read.
    """
    from track4d_protocol.space import AZIMUTHS, intrinsics, orbit_viewmats

    from .track import read_video

    if not source.is_dir():
        return captured(source, front)[1:]
    pictures, _ = read_video(source)
    height, width = pictures.shape[1:3]
    cameras = source / "cameras.json"
    if not cameras.is_file():
        if len(pictures) != len(AZIMUTHS):
            raise InputError("missing_cameras", f"'{source}' has {len(pictures)} pictures and no cameras.json.",
                             f"Add it, or give {len(AZIMUTHS)} views at {', '.join(f'{a:.0f}' for a in AZIMUTHS)} degrees.")
        Ks = intrinsics(max(height, width), len(pictures))
        Ks[:, :2, 2] = width / 2, height / 2
        return pictures, orbit_viewmats(), Ks
    try:
        data = json.loads(cameras.read_text())
        viewmats, Ks = np.array(data["viewmats"], np.float32), np.array(data["Ks"], np.float32)
        if viewmats.shape != (len(pictures), 4, 4) or Ks.shape != (len(pictures), 3, 3):
            raise ValueError(f"viewmats {list(viewmats.shape)} and Ks {list(Ks.shape)} for {len(pictures)} pictures")
        if data.get("space", "canonical") != "canonical":
            raise ValueError(f"the space {data['space']}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError("bad_cameras", f"'{cameras}' can't be read: {error!r}.",
                         "Give canonical viewmats and a 3x3 matrix in Ks for each picture.") from error
    return pictures, viewmats, Ks


def scaled(Ks: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    """Pinhole matrices [V, 3, 3] of pictures of (height, width) `old` for the same pictures at `new`."""
    factors = np.array([new[1] / old[1], new[0] / old[0], 1], np.float32)
    return Ks * factors[:, None]


def load_painter(model: str, weights: Path | None) -> MultiViewVideo:
    """The small multi-view video model, or the published one, converted at its first use.

    Raises:
        InputError: the weights are absent, damaged, of another model, or too large for this machine.
    """
    if model == "small":
        from ..video.features import load_small

        return load_small(weights)
    from ..video.checkpoints import open_published

    painter, licences = open_published(weights)
    for line in licences:
        console.print(Text(f"licence of {line}"))
    return painter


def write_views(folder: Path, video: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray) -> None:
    """Writes a folder of pictures with cameras; it appears when it is whole.

    Args:
        video: [V, F, H, W, 4] uint8 sRGB, straight alpha.
        viewmats: [V, 4, 4] canonical; Ks: [V, 3, 3] in pixels of the video.
    """
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix=".track4d-", dir=folder.absolute().parent) as temporary:
        part = Path(temporary) / folder.name
        for v, view in enumerate(video):
            (part / f"view_{v}").mkdir(parents=True)
            for f, picture in enumerate(view):
                Image.fromarray(picture).save(part / f"view_{v}" / f"{f:04d}.png")
        cameras = {"viewmats": np.asarray(viewmats).tolist(), "Ks": np.asarray(Ks).tolist(), "space": "canonical",
                   "fps": RATE}
        (part / "cameras.json").write_text(json.dumps(cameras))
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)


def write_film(path: Path, video: np.ndarray) -> None:
    """Writes all views [V, F, H, W, 4] side by side on grey as one film."""
    from ..pipeline import on_grey
    from .track import write_video

    row = np.concatenate(list(video), 2)  # [F, H, V W, 4]
    write_video(path, (on_grey(row) * 255 + 0.5).astype(np.uint8), RATE)
