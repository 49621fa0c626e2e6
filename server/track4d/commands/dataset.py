"""`track4d dataset render`: animated models as training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def dataset_render(
    folder: Annotated[Path, typer.Argument(help="Animated models (.glb .fbx .blend), with captions.json where there is one.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the shards; one that was begun is gone on with.")],
    views: Annotated[int, typer.Option(help="Cameras of a clip.", min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Frames of a clip.", min=2)] = 16,
    size: Annotated[int, typer.Option(help="Width and height in pixels.", min=16)] = 128,
    renders: Annotated[int, typer.Option(help="Renders of every clip, each with its own cameras and light.", min=1)] = 4,
    cameras: Annotated[str, typer.Option(help="random or orbit.")] = "random",
    front: Annotated[str, typer.Option(help="The axis that models face whose captions don't say it.")] = "-Y",
    surface: Annotated[bool, typer.Option(help="Also write which place on the object each pixel shows.")] = False,
    seed: Annotated[int, typer.Option(help="Other cameras, other light.")] = 0,
) -> None:
    """Render animated models as shards of multi-view clips with captions, cameras and exact tracks."""
    from rich.progress import Progress
    from track4d_protocol.errors import InputError
    from track4d_protocol.space import FRONTS

    from ..cli import console, require_bpy

    require_bpy()
    if cameras not in ("random", "orbit"):
        raise InputError("bad_cameras_name", f"There are no '{cameras}' cameras.", "Use random or orbit.")
    if front not in FRONTS:
        raise InputError("bad_front", f"The front axis '{front}' is not known.", f"Use one of {', '.join(FRONTS)}.")
    from ..training.asset_clips import LOG, RenderSettings, render_folder

    settings = RenderSettings(views, frames, size, renders, cameras, front, seed, surface)
    with Progress(console=console) as progress:
        bar = progress.add_task("files", total=None)
        made = render_folder(folder, out, settings, lambda stage, step, total, preview=None:
                             progress.update(bar, completed=step, total=total))
    console.print(f"{out}: {made['samples']} samples of {made['clips']} clips from {made['files']} files")
    if made["failed"]:
        console.print(f"{made['failed']} files were skipped; {out / LOG} says why", style="yellow")
