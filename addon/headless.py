"""The client without a window: a file in, the same objects moving out. `python -m track4d_addon.headless --help`.

Standard output carries one JSON object a line: {"stage", "step", "total", "seconds"}, {"warning"}, and at the end
{"done"} or {"error"} with exit code 2. Everything that Blender prints goes to standard error. Either all files are
written or none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from track4d_protocol import __version__
from track4d_protocol.client import Client
from track4d_protocol.errors import Cancelled, InputError, Track4DError, TransportError, error_from_dict
from track4d_protocol.local import ensure_server
from track4d_protocol.messages import MODELS, PRESETS, Job, JobState, Request, Result, Settings
from track4d_protocol.space import FRONTS

from .files import SPLATS, Staging, check_readable, check_writable, leave, suffix

if TYPE_CHECKING:
    import bpy
    import numpy as np

    from .capture import Snapshot

CANCEL_PATIENCE = 10.0  # seconds to wait until the server has stopped a job
SWITCHES = ("--quiet", "--morph-normals", "--loop", "--keep-root", "--help")  # options without a value
LOST_TRIES = 3  # times that a server may be lost during one job


class Session:
    """Where the messages go, whether the user wants to stop, and how long each stage took."""

    def __init__(self, out: IO[str], quiet: bool) -> None:
        self._out, self._quiet = out, quiet
        self._start = time.perf_counter()
        self.stopped = False
        self.seconds: dict[str, float] = {}

    def say(self, **message: Any) -> None:
        """One JSON line; nobody to read it means that nobody wants the result."""
        try:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
        except (BrokenPipeError, ValueError):
            self.stopped = True

    def progress(self, stage: str, step: int, total: int) -> None:
        """Progress of a stage.

        Raises:
            Cancelled: the user has asked for it.
        """
        if not self._quiet:
            self.say(stage=stage, step=step, total=total, seconds=round(time.perf_counter() - self._start, 2))
        self.check()

    def check(self) -> None:
        """Raises `Cancelled` when the user has asked for it."""
        if self.stopped:
            raise Cancelled

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the seconds of a stage."""
        self.check()
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the client; returns the exit code."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # Blender prints to file descriptor 1
        session = Session(out, quiet=False)
        try:
            options = _parse(arguments)
            session = Session(out, options.quiet)
            with _stop_signals(session):
                _run(options, session)
        except Track4DError as error:
            session.say(error=error.to_dict())
            return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise InputError("bad_arguments", f"The command can't be understood: {message}.", "See --help.")

    parser = argparse.ArgumentParser(prog="track4d_addon.headless", description=__doc__.splitlines()[0])
    parser.error = refuse  # type: ignore[assignment,method-assign]
    commands = parser.add_subparsers(dest="task", required=True)
    for task, hint in (
        ("animate", "move the objects of a file by a sentence"),
        ("fit", "move them as in a multi-view video"),
    ):
        command = commands.add_parser(task, help=hint)
        command.error = refuse  # type: ignore[assignment,method-assign]
        command.add_argument("file", type=Path, help="the objects")
        if task == "animate":
            command.add_argument("--prompt", required=True, help='what happens, such as "the fox is running"')
            command.add_argument("--model", default="motion", choices=MODELS, help="what imagines the motion")
        else:
            command.add_argument("--video", type=Path, required=True, help="folder with view_0/, view_1/, ... and cameras.json")
        command.add_argument("--out", type=Path, action="append", required=True, help="file to write; may be given several times")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--frames", type=int, default=16 if task == "animate" else None, help="of the result")
        command.add_argument("--preset", default="default", choices=PRESETS)
        command.add_argument("--front", default="-Y", choices=list(FRONTS), help="the axis that the objects face")
        command.add_argument("--strength", type=float, default=1.0, help="how far the motion goes: 0 stands still, 1 as imagined")
        command.add_argument("--loop", action="store_true", help="the last frame is the first one again")
        command.add_argument("--keep-root", action="store_true", help="the objects don't travel, they move on the spot")
        command.add_argument("--pin", default="", metavar="GROUP", help="a vertex group that stays still where its weight is 1")
        command.add_argument("--home", type=Path, help="folder of the server's jobs and keys")
        command.add_argument("--report", type=Path, help="write what was done as .json")
        command.add_argument("--preview", type=Path, help="write the moving views as .webp")
        command.add_argument("--sheet", type=Path, help="write the views over time as .png")
        command.add_argument("--morph-normals", action="store_true", help="normals of the morph targets in .glb and .gltf")
        command.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    check_readable(options.file)
    if options.task == "animate" and not options.prompt.strip():
        raise InputError("empty_prompt", "The prompt is empty.", 'Say what happens, such as "the fox is running".')
    options.out = [check_writable(path) for path in options.out]
    for name, wanted in (("report", ".json"), ("preview", ".webp"), ("sheet", ".png")):
        if getattr(options, name):
            setattr(options, name, check_writable(getattr(options, name), (wanted,)))
    if options.preview or options.sheet:
        _require_pillow()
    return options


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--front -Y` as `--front=-Y`: argparse takes a value with a dash for another option."""
    rest, joined = list(arguments), []
    while rest:
        word = rest.pop(0)
        takes_value = word.startswith("--") and "=" not in word and word not in SWITCHES
        joined.append(f"{word}={rest.pop(0)}" if takes_value and rest else word)
    return joined


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise InputError(
            "pillow_missing", "Previews are written with Pillow, which isn't installed.", "Run: pip install pillow"
        ) from error


@contextmanager
def _stop_signals(session: Session) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop at the next safe place instead of in the middle of something."""

    def stop(*_: object) -> None:
        session.stopped = True

    kept = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace, session: Session) -> None:
    server = _in_background(lambda: ensure_server(options.home))  # warms up while Blender loads
    settings = Settings(
        prompt=getattr(options, "prompt", ""),
        seed=options.seed,
        frames=16 if options.frames is None else options.frames,
        preset=options.preset,
        front=options.front,
        task=options.task,
        model=getattr(options, "model", "motion"),
        strength=options.strength,
        loop=options.loop,
        keep_root=options.keep_root,
    )
    with session.stage("load"):
        session.progress("load", 0, 1)
        import bpy

        from . import apply, capture, scene_io
        from .capture import check_group, pin_weights
        from .slices import finished

        objects, warnings = scene_io.load(options.file)
    with session.stage("capture"):
        if options.pin:
            check_group(objects, options.pin)
        seen = capture.snapshot(objects)
        for warning in (*warnings, *seen.warnings):
            session.say(warning=warning)
        request = (
            _fit_request(seen, settings, options.video, options.frames)
            if options.task == "fit"
            else capture.capture(seen, settings, report=lambda stage, step, total: session.progress(stage, step, total))
        )
        options.frames = request.settings.frames
        if options.pin:
            request.arrays["pin"] = finished(pin_weights(seen, options.pin))
    job_id = uuid.uuid4().hex
    with session.stage("connect"):
        session.progress("connect", 0, 1)
        connection = server()
    with session.stage("submit"), Client(connection) as client:
        client.submit(job_id, request)
    result = _result_of(job_id, options.home, session)
    for warning in result.report.get("warnings", ()):
        session.say(warning=warning)
    with Staging() as staging:
        with session.stage("apply"):
            made = apply.apply(seen, result)
            scene = bpy.context.scene
            scene.frame_start, scene.frame_end = made["frame_start"], int(made["frame_end"])
            scene.frame_set(scene.frame_start)
            _keep_pace(scene, options)
        _write_files(options, session, seen, objects, staging, result, [*warnings, *seen.warnings])
        session.check()
        files = staging.commit()
    with suppress(TransportError), Client(ensure_server(options.home)) as client:  # the files are there in any case
        client.forget(job_id)
    session.say(done={"files": [str(path) for path in files], "seconds": session.seconds})


def _in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Starts a function in a daemon thread; what comes back waits for its value, or raises what it raised."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = function()
        except (Track4DError, OSError) as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]

    return wait


def _fit_request(seen: Snapshot, settings: Settings, folder: Path, frames: int | None) -> Request:
    """A request with the user's video and its cameras instead of pictures of our own; the result has its frames by default."""
    from .slices import finished
    from .sources import from_folder

    request = finished(from_folder(seen, settings, folder))
    if frames is None:
        request.settings = replace(settings, frames=max(2, request.arrays["video"].shape[1]))
    return request


def _keep_pace(scene: bpy.types.Scene, options: argparse.Namespace) -> None:
    """Gives the scene the frame rate with which the result lasts as long as the video, where that is known.

    A .blend keeps its own rate: other things move in it. Whole rates alone, since glTF's exporter takes no others.
    """
    from .image_sequences import duration

    seconds = None if options.task != "fit" or suffix(options.file) == ".blend" else duration(options.video)
    if seconds:
        scene.render.fps, scene.render.fps_base = max(1, round((options.frames - 1) / seconds)), 1.0


def _result_of(job_id: str, home: Path | None, session: Session) -> Result:
    """Follows a job to its end. The job is on the server's disk, so a server that dies is started again and goes on.

    Raises:
        Track4DError: the job failed, was cancelled, or the server was lost too often.
    """
    for left in reversed(range(LOST_TRIES)):
        try:
            with Client(ensure_server(home)) as client:
                try:
                    with session.stage("wait"):  # also who stopped while the request went out takes the job back
                        return _follow(client, job_id, session)
                except Cancelled:
                    _cancel(client, job_id)
                    raise
        except TransportError as error:
            if error.code not in ("server_lost", "server_unreachable") or not left:
                raise
    raise AssertionError("unreachable")


def _follow(client: Client, job_id: str, session: Session) -> Result:
    job = client.watch(job_id)
    shown: tuple[Any, ...] = ()
    while not job.state.final:
        now = (job.stage if job.state is JobState.RUNNING else "queued", job.step, job.total)
        if now[0] and now != shown:
            session.progress(*now)
            shown = now
        session.check()
        job = next((news for news in client.poll(0.2) if news.id == job_id), job)
    if job.state is JobState.DONE:
        return client.fetch(job_id)
    if job.state is JobState.CANCELLED:
        raise Cancelled
    raise error_from_dict(job.error or {})


def _cancel(client: Client, job_id: str) -> None:
    """Stops the job on the server, and waits until it has stopped."""
    job: Job = client.cancel(job_id)
    deadline = time.monotonic() + CANCEL_PATIENCE
    while not job.state.final and time.monotonic() < deadline:
        job = next((news for news in client.poll(0.2) if news.id == job_id), job)


def _write_files(
    options: argparse.Namespace,
    session: Session,
    seen: Snapshot,
    objects: list[bpy.types.Object],
    staging: Staging,
    result: Result,
    warnings: list[dict[str, str]],
) -> None:
    import bpy

    from .apply import placed, splats_of_result
    from .export import write, write_splats

    render = bpy.context.scene.render
    with session.stage("export"):
        for done, path in enumerate(options.out):
            session.progress("export", done, len(options.out))
            if suffix(path) in SPLATS:
                write_splats(placed(splats_of_result(result, render.fps / render.fps_base), seen.to_world), staging.place(path))
            else:
                write(objects, staging.place(path), options.morph_normals)
        session.progress("export", len(options.out), len(options.out))
        if options.preview:
            write_preview(result.arrays["video"], staging.place(options.preview))
        if options.sheet:
            what = result.report.get("prompt") or options.task
            title = f"{what}  -  {options.file.name}, seed {options.seed}, preset {options.preset}"
            write_sheet(result.arrays["video"], title, staging.place(options.sheet))
    if options.report:
        report = result.report | {
            "warnings": [*warnings, *result.report.get("warnings", ())],
            "client_seconds": session.seconds,
            "client_versions": {"bpy": bpy.app.version_string, "track4d": __version__},
            "settings": {
                "file": options.file.name,
                "front": options.front,
                "frames": options.frames,
                "preset": options.preset,
                "seed": options.seed,
                "strength": options.strength,
                "loop": options.loop,
                "keep_root": options.keep_root,
                "pin": options.pin,
            },
            "objects": [obj.name for obj in objects],
        }
        staging.place(options.report).write_text(json.dumps(report, indent=1, default=str))


def write_preview(video: np.ndarray, path: Path) -> None:
    """Four views in a square, moving; `video` is uint8 [V, F, R, R, 3]."""
    import numpy as np
    from PIL import Image

    views = [video[v] if v < len(video) else np.full_like(video[0], 127) for v in range(max(4, len(video)) // 2 * 2)]
    rows = [np.concatenate(views[k : k + 2], axis=2) for k in range(0, len(views), 2)]
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, axis=1)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // 24, loop=0, quality=85)


def write_sheet(video: np.ndarray, title: str, path: Path) -> None:
    """One row per view, about every third frame a column, under a title; `video` is uint8 [V, F, R, R, 3]."""
    import numpy as np
    from PIL import Image, ImageDraw

    bar = 28  # pixels
    picked = video[:, :: max(1, round(video.shape[1] / 6))]  # [V, C, R, R, 3]
    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in picked])
    sheet = Image.new("RGB", (rows.shape[1], rows.shape[0] + bar), (32, 32, 32))
    sheet.paste(Image.fromarray(rows), (0, bar))
    ImageDraw.Draw(sheet).text((8, 7), title[: rows.shape[1] // 7], fill=(230, 230, 230), font_size=14)
    sheet.save(path)


if __name__ == "__main__":
    leave(main())
