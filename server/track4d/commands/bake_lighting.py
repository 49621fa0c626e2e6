"""`track4d bake-lighting`: models as an evaluation set with baked light."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Strength = Annotated[float | None, typer.Option(help="Strength of this light; 1 makes a white surface that faces it white.")]


def bake_lighting(
    folder: Annotated[Path, typer.Argument(help="A model, or a folder of models, with assets.json where there is one.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the set; one that was begun is gone on with.")],
    samples: Annotated[int, typer.Option(help="Of Cycles, per vertex.", min=1)] = 64,
    front: Annotated[str, typer.Option(help="The axis that models face whose entry doesn't say it.")] = "-Y",
    key: Strength = None,
    fill: Strength = None,
    back: Strength = None,
    background: Strength = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try those files once more that failed before.")] = False,
) -> None:
    """Bake four-point light into vertex colours and write each model as mesh, Gaussians and manifest."""
    import subprocess
    import sys

    from rich.text import Text
    from track4d_protocol.errors import InputError, TransportError, error_from_dict
    from track4d_protocol.space import FRONTS

    from ..cli import console, draw, require_bpy

    require_bpy()
    if front not in FRONTS:
        raise InputError("bad_front", f"The front axis '{front}' is not known.", f"Use one of {', '.join(FRONTS)}.")
    command = [sys.executable, "-m", "track4d_addon.bake_lighting", str(folder), f"--out={out}", f"--samples={samples}",
               f"--front={front}"]
    for name, strength in (("key", key), ("fill", fill), ("back", back), ("background", background)):
        command += [f"--{name}={strength}"] if strength is not None else []
    command += ["--retry"] if retry else []
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    error, made = draw(client)
    if client.wait() and not error:
        raise TransportError("client_failed", f"The Blender client ended with code {client.returncode}.", "Run track4d doctor.")
    if error:
        raise error_from_dict(error)
    console.print(f"{out}: {made['baked']} baked, {made['kept']} were there, {made['failed']} failed")
    if made["failed"]:
        console.print(Text(f"{out / 'log.jsonl'} says what was wrong with those; --retry tries them once more", "yellow"))
