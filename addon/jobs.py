"""Running jobs as Blender's main thread sees them.

`tick` is the only function that runs on its own: a timer calls it, it takes what the client thread has to tell,
photographs one more view, and asks for a redraw. `state` is what the panel draws. It lives in this module and not in
Blender's data, so that nothing about a running job can be saved into a file.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import queue
import time
import uuid
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpy
from track4d_protocol.errors import InputError, Track4DError, error_from_dict

from . import client_thread as link
from . import live_motion, local_setup, marks, previews

if TYPE_CHECKING:
    from track4d_protocol.messages import Job, Request, Result

    from .capture import Snapshot

log = logging.getLogger(__name__)

CAPTURE_TICK, BUSY_TICK, IDLE_TICK = 0.01, 0.1, 0.5  # seconds
SILENT = 1.2  # seconds without a sign of the server after which the tab says so; the connection may still be good


class Phase(str, Enum):
    """What a job waits for."""

    CAPTURING = "Photographing the object"
    SENDING = "Sending"
    QUEUED = "Waiting for its turn"
    RUNNING = "Running"
    FETCHING = "Fetching the result"


@dataclass(frozen=True)
class Order:
    """What the user asked for, as far as the server doesn't tell it with the result.

    Attributes:
        settings: of the panel, as `Track4DSettings.to_dict` gives them; the seed is the job's.
        batch: the same for all jobs of one click.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    batch: str = ""


@dataclass
class ActiveJob:
    """A job that the panel shows with a progress bar."""

    id: str
    prompt: str
    objects: list[str]
    seen: Snapshot | None = None  # the objects as they were captured; None for a job that was found on the server
    phase: Phase = Phase.CAPTURING
    stage: str = ""
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    queue_position: int = 0
    order: Order = Order()


@dataclass
class FinishedJob:
    """A result that waits for the user's click."""

    id: str
    prompt: str
    objects: list[str]
    created: float = 0.0
    result: Result | None = None  # when it is here already
    seen: Snapshot | None = None  # when it was captured in this session
    order: Order = Order()
    away: bool = False  # it ended while no Blender watched


@dataclass
class Capture:
    """A capture under way, for one job or for several that differ in their seeds."""

    steps: Generator[tuple[int, int], None, Request]
    jobs: list[str]


@dataclass(frozen=True)
class Problem:
    """An error as the panel shows it."""

    code: str
    message: str
    action: str
    job_id: str = ""


@dataclass
class State:
    """Everything the panel draws."""

    server: link.Server = link.Server.UNKNOWN
    hello: dict[str, Any] | None = None
    silent: bool = False  # no sign of the server for a moment
    setup: local_setup.Status = local_setup.Status()  # of this computer's server
    server_problem: Problem | None = None
    active: dict[str, ActiveJob] = field(default_factory=dict)
    finished: dict[str, FinishedJob] = field(default_factory=dict)
    problem: Problem | None = None
    warnings: list[Problem] = field(default_factory=list)  # of the last capture or result
    applied: dict[str, Any] | None = None  # what the last result was put on: objects, frame_start, frame_end
    last_report: dict[str, Any] = field(default_factory=dict)


state = State()
_thread: link.ClientThread | None = None
_captures: dict[str, Capture] = {}  # by batch
_dropped: set[str] = set()  # jobs that the user cancelled or dismissed; late news of them is ignored


_looked = 0.0  # when the set-up was looked at


# What the operators call


def start(context: bpy.types.Context, objects: list[bpy.types.Object], variations: int = 1) -> list[str]:
    """Begin an animation: photograph the objects view by view, then hand the request to the server.

    Args:
        context: its scene holds the settings.
        objects: to be animated together.
        variations: how many results, with seeds that follow each other; they share one capture.

    Returns:
        The ids of the jobs.

    Raises:
        InputError: the objects can't be animated; see `capture.snapshot`.
    """
    from . import sources
    from .capture import snapshot

    chosen = context.scene.track4d
    live_motion.sweep()
    seen = snapshot(objects)
    steps, total = sources.steps(seen, chosen)
    names, batch = [item.name for item in seen.objects], uuid.uuid4().hex
    for seed in range(chosen.seed, chosen.seed + variations):
        order = Order(chosen.to_dict() | {"seed": seed}, batch)
        job = ActiveJob(uuid.uuid4().hex, chosen.title(), names, seen, total=total, order=order)
        state.active[job.id] = job
    ids = [job.id for job in state.active.values() if job.order.batch == batch]
    state.problem, state.warnings = None, [_warning(w) for w in seen.warnings]
    _captures[batch] = Capture(steps, ids)
    attach(context, start=True)
    return list(ids)


def cancel(job_id: str) -> None:
    """Stop a job. The panel is idle at once; the server is told as soon as it listens."""
    job = state.active.pop(job_id, None)
    if job is None:
        return
    _drop(job_id)
    capture = _captures.get(job.order.batch)
    if capture is None:
        if _thread is not None:
            _thread.commands.put(link.Cancel(job_id))
        return
    capture.jobs.remove(job_id)
    if not capture.jobs:
        del _captures[job.order.batch]
        capture.steps.close()  # the capture removes its cameras and copies on the way out


def apply(context: bpy.types.Context, job_id: str) -> None:
    """Put a finished job's motion onto its objects, after fetching it when it is still on the server.

    Raises:
        Track4DError: the objects are gone or have changed.
    """
    from .capture import snapshot

    job = state.finished[job_id]
    live_motion.sweep()
    if job.result is not None:
        _apply(job.id, job.seen or snapshot(named_objects(job.objects)), job.result, job.order)
        del state.finished[job_id]
        return
    seen = snapshot(named_objects(job.objects))
    del state.finished[job_id]
    state.active[job_id] = ActiveJob(job_id, job.prompt, job.objects, seen, Phase.FETCHING, order=job.order)
    attach(context)
    assert _thread is not None
    _thread.commands.put(link.Fetch(job_id))


def fetch_again(context: bpy.types.Context, job_id: str, objects: list[bpy.types.Object], order: Order) -> None:
    """Put a result into the scene once more, as `order` says; the server keeps it until it is dismissed there.

    Raises:
        InputError: the objects can't be animated; see `capture.snapshot`.
    """
    from .capture import snapshot

    live_motion.sweep()
    seen = snapshot(objects)
    names = [item.name for item in seen.objects]
    title = str(order.settings.get("title", ""))
    state.active[job_id] = ActiveJob(job_id, title, names, seen, Phase.FETCHING, order=order)
    attach(context)
    assert _thread is not None
    _thread.commands.put(link.Fetch(job_id))


def dismiss(job_id: str) -> None:
    """Remove a finished job from the list and from the server."""
    if state.finished.pop(job_id, None) is not None:
        _drop(job_id)
        if _thread is not None:
            _thread.commands.put(link.Forget(job_id))


def complain(error: Track4DError) -> None:
    """Show an error in the panel."""
    state.problem = _problem(error)


def attach(context: bpy.types.Context, start: bool = False) -> None:
    """Look for the server that the preferences name; `start` this computer's one when it doesn't run."""
    global _thread
    from .preferences import preferences

    global _looked
    chosen = preferences(context)
    source, state.setup, _looked = chosen.source(), local_setup.read_status(chosen.server_home()), time.monotonic()
    if _thread is None or not _thread.is_alive():
        _thread = link.ClientThread()
        _thread.start()
        atexit.register(shut_down, closing=True)
    _thread.commands.put(link.Attach(source, start))
    if not bpy.app.timers.is_registered(_timer):
        bpy.app.timers.register(_timer, persistent=True)
    if _file_loaded not in bpy.app.handlers.load_post:
        bpy.app.handlers.load_post.append(_file_loaded)
        live_motion.register()


def wake(context: bpy.types.Context) -> None:
    """Called by the panel when it is drawn: the first time, look for the server."""
    if _thread is None:
        attach(context)


def shut_down(closing: bool = False) -> None:
    """End the timer, the thread and every capture; the server keeps what it has.

    Args:
        closing: Blender ends, and its data may be gone already.
    """
    global _thread, state
    atexit.unregister(shut_down)
    if bpy.app.timers.is_registered(_timer):
        bpy.app.timers.unregister(_timer)
    if _file_loaded in bpy.app.handlers.load_post:
        bpy.app.handlers.load_post.remove(_file_loaded)
        if not closing:
            live_motion.unregister()
    for capture in _captures.values():
        capture.steps.close()
    _captures.clear()
    _dropped.clear()
    if _thread is not None:
        _thread.commands.put(link.Stop())
        _thread.join(timeout=1.0)  # it may be starting a server; being a daemon, it ends with Blender in any case
        _thread = None
    previews.clear()
    state = State()


# What the timer does


def _timer() -> float:
    try:
        return tick()
    except Exception:  # noqa: BLE001 - Blender drops a timer that raises, and the panel would stay as it is for ever
        log.exception("A timer tick failed")
        return IDLE_TICK


@bpy.app.handlers.persistent
def _file_loaded(*_: object) -> None:
    """Another file carries other results: ask again which ones wait."""
    state.applied, state.warnings = None, []
    if _thread is not None:
        _thread.commands.put(link.ListJobs())


def tick() -> float:
    """Take the news and photograph one view; returns after how many seconds to come back."""
    changed = False
    while _thread is not None:
        try:
            event = _thread.events.get_nowait()
        except queue.Empty:
            break
        _take(event)
        changed = True
    if _captures:
        _advance_capture()
        changed = True
    else:
        changed |= live_motion.play()
    changed |= previews.play() | _look_at_server() | _look_at_setup()
    if changed:
        _redraw()
    return CAPTURE_TICK if _captures else BUSY_TICK if state.active else IDLE_TICK


def _look_at_server() -> bool:
    """Whether it has become silent, or speaks again; the thread notices only later that it is lost."""
    silent = _thread is not None and _thread.silence > SILENT
    changed = silent != state.silent
    state.silent = silent
    return changed


def _look_at_setup() -> bool:
    """Twice a second while this computer's server is set up; when it is there, it is started."""
    global _looked
    if not state.setup.busy or time.monotonic() - _looked < IDLE_TICK:
        return False
    from .preferences import preferences

    before, _looked = state.setup, time.monotonic()
    state.setup = local_setup.read_status(preferences(bpy.context).server_home())
    if before.state == "installing" and state.setup.state == "ready":
        attach(bpy.context, start=True)
    return before != state.setup


def _advance_capture() -> None:
    batch, capture = next(iter(_captures.items()))
    jobs = [state.active[job_id] for job_id in capture.jobs]
    try:
        done, total = next(capture.steps)
        for job in jobs:
            job.step, job.total = done, total
    except StopIteration as finished:
        del _captures[batch]
        assert _thread is not None
        for job in jobs:
            job.phase, job.step, job.total = Phase.SENDING, 0, 0
            request: Request = finished.value
            settings = replace(request.settings, seed=job.order.settings["seed"])
            _keep_order(job)
            _thread.commands.put(link.Submit(job.id, replace(request, settings=settings)))
    except Track4DError as error:
        _fail_capture(batch, error)
    except Exception as error:  # noqa: BLE001 - shown in the panel with everything that is known
        names = ", ".join(jobs[0].objects)
        log.exception("The capture of %s failed", names)
        _fail_capture(
            batch,
            InputError(
                "capture_failed", f"Photographing {names} failed: {error!r}.", "Copy the report and send it to the developers."
            ),
        )


def _fail_capture(batch: str, error: Track4DError) -> None:
    for job_id in _captures.pop(batch).jobs:
        _fail(job_id, error)


def _take(event: link.Event) -> None:
    if isinstance(event, link.ServerChanged):
        state.server = event.server
        state.hello = event.hello or state.hello
        error = event.error or worker_error(event.hello)
        state.server_problem = _problem(error) if error else None
    elif isinstance(event, link.JobChanged):
        _update(event.job)
    elif isinstance(event, link.JobsListed):
        _offer(event.jobs)
    elif isinstance(event, link.MotionSeen):
        job = state.active.get(event.job_id)
        if job is not None and job.seen is not None:
            live_motion.show(job.id, job.seen, event.moves)
    elif isinstance(event, link.ResultArrived):
        _receive(event.job_id, event.result)
    elif isinstance(event, link.JobFailed):
        _fail(event.job_id, event.error)


def _update(news: Job) -> None:
    """What the server says about one job."""
    job = state.active.get(news.id)
    if job is None:
        return
    if news.preview is not None:
        previews.show(news.id, news.preview)
    state_name = news.state.value
    if state_name == "done":
        _finish(job, news)
    elif state_name == "failed":
        _fail(job.id, error_from_dict(news.error or {}))
    elif state_name == "cancelled":
        _drop(job.id)
        del state.active[job.id]
    elif job.phase is not Phase.FETCHING:
        job.phase = Phase.QUEUED if state_name == "queued" else Phase.RUNNING
        job.stage, job.step, job.total = news.stage, news.step, news.total
        job.seconds_left, job.queue_position = news.seconds_left, news.queue_position


def _finish(job: ActiveJob, news: Job) -> None:
    """A job of this session is fetched and applied; one that was found on the server is offered."""
    if job.phase is Phase.FETCHING:
        return
    if job.seen is None:
        del state.active[job.id]
        state.finished[job.id] = FinishedJob(job.id, job.prompt, job.objects, news.created, order=job.order)
        return
    job.phase = Phase.FETCHING
    assert _thread is not None
    _thread.commands.put(link.Fetch(job.id))


def _offer(jobs: list[Job]) -> None:
    """The server's list, after connecting: what went on or ended while nobody watched."""
    applied = {take for obj in bpy.data.objects for take in marks.history(obj)}
    for news in sorted(jobs, key=lambda job: -job.created):
        if news.id in state.active:
            _update(news)
        elif news.id in _dropped or news.id in state.finished or news.id in applied:
            continue
        elif news.state.value == "done":
            order = _kept_order(news.id)
            title = str(order.settings.get("title") or news.prompt)
            state.finished[news.id] = FinishedJob(news.id, title, list(news.objects), news.created, order=order, away=True)
        elif not news.state.final:
            order = _kept_order(news.id)
            title = str(order.settings.get("title") or news.prompt)
            state.active[news.id] = ActiveJob(news.id, title, list(news.objects), order=order)
            _update(news)


def _receive(job_id: str, result: Result) -> None:
    """Apply a result when its objects are as they were, else keep it for the user's click."""
    job = state.active.pop(job_id, None)
    _end_show(job_id)
    if job is None:
        return
    assert job.seen is not None
    here = {obj.session_uid for obj in bpy.data.objects if obj.mode == "OBJECT"}
    if here.issuperset(item.session_uid for item in job.seen.objects):
        try:
            _apply(job_id, job.seen, result, job.order)
            return
        except Track4DError as error:
            state.problem = _problem(error, job_id)
    state.finished[job_id] = FinishedJob(job_id, job.prompt, job.objects, result=result, seen=job.seen, order=job.order)


def _apply(job_id: str, seen: Snapshot, result: Result, order: Order) -> None:
    from . import results

    live_motion.sweep()
    state.applied = results.put(job_id, seen, result, order, str((state.hello or {}).get("model", "")))
    state.last_report = result.report
    state.warnings = [_warning(warning) for warning in [*seen.warnings, *result.report.get("warnings", [])]]
    _push_undo("Track4D animation")
    _forget_order(job_id)


def _fail(job_id: str, error: Track4DError) -> None:
    state.active.pop(job_id, None)
    _end_show(job_id)
    _forget_order(job_id)
    state.problem = _problem(error, job_id)


def _drop(job_id: str) -> None:
    _dropped.add(job_id)
    _end_show(job_id)
    _forget_order(job_id)


def _end_show(job_id: str) -> None:
    """Takes the picture and the coarse motion of a job away."""
    previews.drop(job_id)
    live_motion.drop(job_id)


def folder() -> Path:
    """Where this Blender's user keeps what belongs to jobs that haven't ended: unsent requests and orders."""
    from .preferences import ADDON

    return Path(bpy.utils.extension_path_user(ADDON, path="jobs", create=True))


def _keep_order(job: ActiveJob) -> None:
    """The order isn't part of the request, and must be known when another session applies the result."""
    try:
        (folder() / f"{job.id}.json").write_text(json.dumps(asdict(job.order)), "utf-8")
    except OSError as error:
        log.warning("The order of job %s can't be kept: %s", job.id, error)


def _kept_order(job_id: str) -> Order:
    try:
        return Order(**json.loads((folder() / f"{job_id}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # of another computer or user
        return Order()


def _forget_order(job_id: str) -> None:
    with contextlib.suppress(OSError):
        (folder() / f"{job_id}.json").unlink(missing_ok=True)


def worker_error(hello: dict[str, Any] | None) -> Track4DError | None:
    """Why a server that answers can't work, from its hello."""
    told = (hello or {}).get("worker_error")
    return error_from_dict(told) if isinstance(told, dict) else None


def _warning(warning: dict[str, str]) -> Problem:
    return Problem(warning["code"], warning["message"], warning["action"])


def _problem(error: Track4DError, job_id: str = "") -> Problem:
    return Problem(error.code, error.message, error.action, job_id)


def named_objects(names: list[str]) -> list[bpy.types.Object]:
    """The objects of a result by name.

    Raises:
        InputError: `object_missing`, one of them is not in this file.
    """
    missing = [name for name in names if name not in bpy.data.objects]
    if missing:
        raise InputError(
            "object_missing",
            f"This file has no object called '{missing[0]}'.",
            "Open the file that the animation was made in.",
        )
    return [bpy.data.objects[name] for name in names]


def status(state: State) -> list[tuple[str, str]]:
    """What the tab says of the server: lines of text, each with the name of an icon."""
    hello, server = state.hello or {}, state.server
    if state.setup.busy:
        percent = f", {state.setup.fraction:.0%}" if state.setup.fraction else ""
        return [(f"{state.setup.text}{percent} ({state.setup.step} of {state.setup.total})", "IMPORT")]
    if server is link.Server.STARTING:
        return [("Starting the server", "SORTTIME")]
    if server is link.Server.LOST:
        return [("Lost the server, looking for it", "UNLINKED")]
    if server is link.Server.ABSENT or state.silent:
        return [("No sign of the server" if state.silent else "No server", "UNLINKED")]
    if server is not link.Server.CONNECTED:
        return [("Looking for the server", "SORTTIME")]
    if hello.get("worker") == "failed":
        return [("The server can't work", "ERROR")]
    if hello.get("worker") == "starting":
        return [("The server warms up", "SORTTIME")]
    device, model, licence = (str(hello.get(name, "")) for name in ("device", "model", "licence"))
    lines = [(f"Server on {device}" if device else "Server ready", "CHECKMARK")]
    if model:
        lines.append((f"{model} ({licence})" if licence else model, "BLANK1"))
    places = [job.queue_position for job in state.active.values() if job.phase is Phase.QUEUED and job.queue_position]
    waiting = hello.get("waiting", 0)
    if places:
        lines.append((f"Next of yours: number {min(places)} of {max(waiting, *places)} in the queue", "BLANK1"))
    elif waiting:
        lines.append((f"{waiting} jobs of others wait", "BLANK1"))
    return lines


def _push_undo(message: str) -> None:
    """A timer's changes are not undoable by themselves."""
    windows = bpy.context.window_manager.windows
    if not bpy.app.background and len(windows):
        with bpy.context.temp_override(window=windows[0]):
            bpy.ops.ed.undo_push(message=message)


def _redraw() -> None:
    for window in bpy.context.window_manager.windows:
        for area in window.screen.areas:
            if area.type in ("VIEW_3D", "PREFERENCES"):
                area.tag_redraw()
