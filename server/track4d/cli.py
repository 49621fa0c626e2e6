"""The command line `track4d`: every command, and the Blender client that `animate` and `fit` start."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from track4d_protocol.errors import Track4DError, TransportError, error_from_dict

from .commands.bake_lighting import bake_lighting
from .commands.dataset import dataset_render
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.probe import probe
from .commands.track import track
from .commands.train_video import train_video

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Animate your own mesh from a sentence.")
train_app = typer.Typer(no_args_is_help=True, help="Train the models that ship.")
app.add_typer(train_app, name="train")
app.command()(track)
app.command()(bake_lighting)
app.command()(evaluate)
app.command()(generate)
app.command()(probe)
train_app.command("video")(train_video)
dataset_app = typer.Typer(no_args_is_help=True, help="Make training data.")
dataset_app.command("render")(dataset_render)
app.add_typer(dataset_app, name="dataset")
console = Console(stderr=True, highlight=False)

Outputs = Annotated[list[Path], typer.Option(
    "-o", "--out", help="File to write; may be repeated. The mesh: .glb .gltf .blend .fbx .usdc .usd .abc .mdd .pc2 .obj (one a "
    "frame). The Gaussians: .splats.glb .ply (one a frame) .t4d.")]
Home = Annotated[Path | None, typer.Option(help="Folder of the server's jobs and keys.")]
Frames = Annotated[int, typer.Option(help="Frames of the result.")]
Seed = Annotated[int, typer.Option(help="Another seed, another motion.")]
PresetName = Annotated[str, typer.Option("--preset", help="fast, default, fine or paper.")]
Front = Annotated[str, typer.Option(help="The axis that the object faces: -Y, +Y, +X or -X.")]
Strength = Annotated[float, typer.Option(min=0.0, help="How far the motion goes: 0 stands still, 1 is as imagined.")]
Loop = Annotated[bool, typer.Option("--loop", help="The last frame is the first one again.")]
KeepRoot = Annotated[bool, typer.Option("--keep-root", help="The object doesn't travel, it moves on the spot.")]
Pin = Annotated[str, typer.Option(metavar="GROUP", help="A vertex group that stays still, fully where its weight is 1.")]
Model = Annotated[str, typer.Option(help="motion, which ships, or published: Animate3D's weights, which you download "
                                         "(docs/multiview_video.md); hours on a CPU.")]
Extra = Annotated[Path | None, typer.Option()]
Normals = Annotated[bool, typer.Option("--morph-normals", help="Normals of the morph targets too, in .glb and .gltf.")]


@app.command()
def animate(mesh: Path, out: Outputs, prompt: Annotated[str, typer.Option(help='What it does, such as "the fox is running".')],
            model: Model = "motion", seed: Seed = 0, frames: Frames = 16, preset: PresetName = "default", front: Front = "-Y",
            strength: Strength = 1.0, loop: Loop = False, keep_root: KeepRoot = False, pin: Pin = "", home: Home = None,
            preview: Extra = None, sheet: Extra = None, report: Extra = None, morph_normals: Normals = False) -> None:
    """Animate the mesh of a file by a sentence."""
    what = ["--prompt", prompt, "--model", model, *direction(strength, loop, keep_root, pin)]
    blender_client("animate", mesh, what, out, (seed, frames, preset, front), home, preview, sheet, report, morph_normals)


@app.command()
def fit(mesh: Path, out: Outputs,
        video: Annotated[Path, typer.Option(help="Folder with view_0/, view_1/, ..., maybe mask_0/, ..., and cameras.json.")],
        frames: Annotated[int | None, typer.Option(help="Frames of the result; the video's own number without it.")] = None,
        seed: Seed = 0, preset: PresetName = "default", front: Front = "-Y", strength: Strength = 1.0,
        loop: Loop = False, keep_root: KeepRoot = False, pin: Pin = "", home: Home = None,
        preview: Extra = None, sheet: Extra = None, report: Extra = None, morph_normals: Normals = False) -> None:
    """Make the mesh of a file move as in a multi-view video."""
    what = ["--video", str(video), *direction(strength, loop, keep_root, pin)]
    blender_client("fit", mesh, what, out, (seed, frames, preset, front), home, preview, sheet, report, morph_normals)


def direction(strength: float, loop: bool, keep_root: bool, pin: str) -> list[str]:
    """What is to be done with the motion, as the client takes it."""
    switches = [name for name, on in (("--loop", loop), ("--keep-root", keep_root)) if on]
    return [f"--strength={strength}", *switches, *([f"--pin={pin}"] if pin else [])]


@app.command()
def serve(home: Home = None, address: Annotated[str, typer.Option(help="Where to listen.")] = "tcp://127.0.0.1:*",
          idle_minutes: Annotated[float, typer.Option(help="End when nobody has needed it for so long.")] = math.inf) -> None:
    """Run the server until it is stopped."""
    from track4d_protocol.keys import default_home

    from .service import serve as run_server

    run_server(home or default_home(), address, idle=idle_minutes * 60)


@app.command()
def grant(name: Annotated[str, typer.Argument(help="Who it is for, such as laptop.")],
          out: Annotated[Path, typer.Option("-o", "--out", help="Connection file to write and to carry there.")],
          address: Annotated[str, typer.Option(help="Where they reach this server, such as tcp://10.0.0.5:7457.")],
          home: Home = None) -> None:
    """Let another machine use this server: writes the connection file with its own key."""
    from track4d_protocol.keys import default_home, write_connection

    from .service import grant as make_key

    write_connection(out, make_key(home or default_home(), name, address))
    console.print(f"wrote {out}: keep it secret, and choose it in the extension's preferences there")


@app.command()
def doctor(self_test: Annotated[bool, typer.Option(help="Animate a tiny mesh, which compiles the kernels once.")] = True,
           plan: Annotated[bool, typer.Option("--plan", help="Say instead what a step of the video diffusion costs.")] = False,
           views: Annotated[int, typer.Option(min=1, help="Views of the planned video.")] = 4,
           frames: Annotated[int, typer.Option(min=1, help="Frames of the planned video.")] = 16,
           resolution: Annotated[int | None, typer.Option(min=1, help="Pixels along its edge.")] = None) -> None:
    """Say what works on this machine, what doesn't, and what to do."""
    if plan:
        from .plan import show

        return show(views, frames, resolution, Console(highlight=False))
    from .doctor import examine

    healthy = examine(self_test, Console(highlight=False))
    raise typer.Exit(0 if healthy else 1)


@train_app.command("motion")
def train_motion(out: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")] = Path("runs/motion"),
                 steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 12_000,
                 batch: Annotated[int, typer.Option(help="Clips per step, a multiple of 4.")] = 16, seed: Seed = 0,
                 clips: Annotated[Path | None, typer.Option(help="Folder of real clips, made by tools/extract_clips.py.")] = None,
                 start: Annotated[Path | None, typer.Option(help="Weights to begin with, such as the shipped ones.")] = None,
                 grid: Annotated[int | None, typer.Option(help="Pixels along a side of the latent; 64 refines --start.")] = None,
                 rate: Annotated[float, typer.Option(help="Factor on the learning rates; less than 1 to refine weights.")] = 1.0,
                 natural: Annotated[bool, typer.Option(help="Weights for motions as real clips have them.")] = False,
                 resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False) -> None:
    """Train the motion generator on procedural objects, and on real clips where there are some."""
    from .training.motion import TrainingSettings, train

    settings = TrainingSettings(steps, batch, seed)
    settings = replace(settings, learning_rate=rate * settings.learning_rate, muon_rate=rate * settings.muon_rate,
                       natural=natural)
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=steps)
        train(out, settings, resume, start, clips, grid=grid,
              report=lambda stage, step, total, preview=None: progress.update(bar, completed=step, total=total))


def blender_client(task: str, mesh: Path, what: list[str], out: list[Path], settings: tuple[int, int | None, str, str],
                   home: Path | None, preview: Path | None, sheet: Path | None, report: Path | None,
                   morph_normals: bool = False) -> None:
    """Runs the client in its own process, where bpy lives, and draws its progress.

    Raises:
        Track4DError: what the client reported.
    """
    require_bpy()
    seed, frames, preset, front = settings
    command = [sys.executable, "-m", "track4d_addon.headless", task, str(mesh), *what,
               f"--seed={seed}", f"--preset={preset}", f"--front={front}", *([] if frames is None else [f"--frames={frames}"])]
    for path in out:
        command += ["--out", str(path)]
    for flag, value in (("--home", home), ("--preview", preview), ("--sheet", sheet), ("--report", report)):
        command += [flag, str(value)] if value else []
    command += ["--morph-normals"] if morph_normals else []
    from .footprint import Footprint

    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(client.stderr or ()), daemon=True)
    reader.start()
    with Footprint(client.pid, home) as footprint:
        try:
            error, done = draw(client)
        except KeyboardInterrupt:  # the client takes the job back from the server and says so
            client.terminate()
            error, done = draw(client)
        client.wait()
    reader.join(timeout=5)
    if error:
        raise error_from_dict(error)
    if client.returncode:
        end = "".join(log[-3:]).strip()
        raise TransportError("client_failed", f"The Blender client ended with code {client.returncode}: {end}",
                             "Run track4d doctor; the lines above name the place.")
    if report and report.exists():
        content = json.loads(report.read_text())
        content["peak_memory_bytes"] = footprint.peak
        report.write_text(json.dumps(content, indent=1))
    for path in done.get("files", out):
        console.print(f"wrote {path}")


def require_bpy() -> None:
    """Raises:
        TransportError: no_bpy.
    """
    if find_spec("bpy") is None:
        raise TransportError("no_bpy", "Files are read and written by Blender's Python module, which is not installed here.",
                             "Run: pip install bpy (Python 3.11 for 4.2 to 5.0, Python 3.13 for 5.1 and later).")


def draw(client: subprocess.Popen) -> tuple[dict | None, dict]:
    """Shows the client's JSON lines as progress; returns its error, if it reported one, and what it has "done"."""
    error, done = None, {}
    columns = (TextColumn("{task.description:>12}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}
        for line in client.stdout or ():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # Blender itself prints here too
                continue
            if not isinstance(event, dict):
                continue
            if "error" in event:
                error = event["error"]
            elif "done" in event:
                done = event["done"]
            elif "warning" in event:
                warning = event["warning"]
                progress.console.print(Text(f"note: {warning['message']} {warning.get('action', '')}", "yellow"))
            elif "stage" in event:
                stage = event["stage"]
                total = max(1, event.get("total", 1))
                if stage not in tasks:
                    finish(progress)
                    tasks[stage] = progress.add_task(stage, total=total)
                progress.update(tasks[stage], completed=event.get("step", 0), total=total)
        if error is None:
            finish(progress)
    return error, done


def finish(progress: Progress) -> None:
    """Fills the bars of all stages so far: a stage is over when the next one begins."""
    for task in progress.tasks:
        progress.update(task.id, completed=task.total)


def main() -> None:
    """The entry point: a `Track4DError` becomes two lines and exit code 2."""
    try:
        app()
    except Track4DError as error:
        console.print(Text(error.message, "bold red"), Text(f"[{error.code}]"), soft_wrap=True)
        console.print(Text(error.action), soft_wrap=True)
        sys.exit(2)
