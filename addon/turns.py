"""What Blender's timer does: it takes the news from the client thread, and advances work by one slice.

`tick` is the only function that runs on its own. Work is a generator: photographing an object view by view, putting a result
onto it. What takes long is one slice a turn, so that the window stays alive.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import bpy
from track4d_protocol.errors import InputError, Track4DError, error_from_dict

from . import client_thread as link
from . import live_motion, local_setup, marks, orders, previews, slices
from .state import ActiveJob, FinishedJob, Phase, complain, problem_of, state, warning_of, worker_error

if TYPE_CHECKING:
    from track4d_protocol.messages import Job, Result

    from .capture import Snapshot
    from .sources import Steps

log = logging.getLogger(__name__)

WORK_TICK, BUSY_TICK, IDLE_TICK = 0.01, 0.1, 0.5  # seconds
SILENT = 1.2  # seconds without a sign of the server after which the tab says so; the connection may still be good
Work = Generator[tuple[int, int] | None, None, None]  # yields steps done and steps in all, where it knows them


@dataclass
class Task:
    """Work of the main thread, for one job or for several that differ in their seeds."""

    work: Work
    jobs: list[str]


thread: link.ClientThread | None = None
tasks: dict[str, Task] = {}  # the first one is worked on; by batch while photographing, else by job
dropped: set[str] = set()  # jobs that the user cancelled or dismissed; late news of them is ignored
looked = 0.0  # when the set-up was looked at


def send(command: link.Command) -> None:
    """Hands the client thread a command; without a thread there is nothing that could be told."""
    if thread is not None:
        thread.commands.put(command)


def timer() -> float:
    """For Blender's timers, which drop a function that raises: the panel would stay as it is for ever."""
    try:
        return tick()
    except Exception:  # noqa: BLE001 - see above
        log.exception("A turn of the timer failed")
        return IDLE_TICK


def tick() -> float:
    """Takes the news, or does a slice of work; returns after how many seconds to come back."""
    changed = _take_news()
    if tasks and not changed:
        _advance()
        changed = True
    if not tasks:
        changed |= live_motion.play()
    changed |= previews.play() | _look_at_server() | _look_at_setup() | _look_at_playback()
    if changed:
        _redraw()
    return WORK_TICK if tasks else BUSY_TICK if state.active else IDLE_TICK


def end_task(job_id: str) -> bool:
    """Takes a job out of the work that is being done for it; True when there was some."""
    for name, task in list(tasks.items()):
        if job_id in task.jobs:
            task.jobs.remove(job_id)
            if not task.jobs:
                del tasks[name]
                task.work.close()  # it removes what it has made on the way out
            return True
    return False


def end_all() -> None:
    for task in tasks.values():
        task.work.close()
    tasks.clear()
    dropped.clear()


def drop(job_id: str) -> None:
    """Nothing of a job is shown or kept any more, and late news of it is ignored."""
    dropped.add(job_id)
    _end_show(job_id)
    orders.forget(job_id)


# Work


def photograph(jobs: list[str], known: Sequence[tuple[int, str]], begin: Callable[[Snapshot], Steps]) -> Work:
    """Looks at objects and photographs them, then sends a request for every job that is still wanted.

    Args:
        jobs: their ids; those that are cancelled meanwhile are taken out of the list.
        known: the objects, as `capture.known_objects` gives them.
        begin: the rest of the work, from `sources.plan`.
    """
    from .capture import snapshot_steps

    seen = yield from snapshot_steps(known)
    for job_id in jobs:
        state.active[job_id].seen = seen
    state.warnings = [warning_of(warning) for warning in seen.warnings]
    request = yield from begin(seen)
    for job_id in jobs:
        job = state.active[job_id]
        job.phase, job.step, job.total = Phase.SENDING, 0, 0
        orders.keep(job_id, job.order)
        settings = replace(request.settings, seed=job.order.settings["seed"])
        send(link.Submit(job_id, replace(request, settings=settings)))


def look_and_fetch(job: ActiveJob, known: Sequence[tuple[int, str]]) -> Work:
    """Looks at the objects of a job whose result is on the server, then asks for the result."""
    from .capture import snapshot_steps

    job.seen = yield from snapshot_steps(known)
    send(link.Fetch(job.id))


def put(job: ActiveJob, result: Result) -> Work:
    """Puts a result onto its objects; where they aren't as they were, it is kept for the user's click."""
    from . import results
    from .capture import known_objects, snapshot_steps

    try:
        if job.seen is None:
            job.seen = yield from snapshot_steps(known_objects(named_objects(job.objects)))
        live_motion.sweep()
        made = yield from results.put(job.id, job.seen, result, job.order, str((state.hello or {}).get("model", "")))
    except Track4DError as error:
        state.active.pop(job.id, None)
        keep_result(job, result)
        complain(error, job.id)
        return
    del state.active[job.id]
    state.applied, state.last_report = made, result.report
    state.warnings = [warning_of(warning) for warning in [*job.seen.warnings, *result.report.get("warnings", [])]]
    orders.forget(job.id)
    yield None
    _push_undo("Track4D animation")


def keep_result(job: ActiveJob, result: Result) -> None:
    """The result waits for a click."""
    state.finished[job.id] = FinishedJob(job.id, job.prompt, job.objects, result=result, seen=job.seen, order=job.order)


def _advance() -> None:
    name, task = next(iter(tasks.items()))
    try:
        progress = next(task.work)
        if progress is not None:
            for job_id in task.jobs:
                state.active[job_id].step, state.active[job_id].total = progress
    except StopIteration:
        tasks.pop(name, None)
    except Track4DError as error:
        _fail_task(name, error)
    except Exception as error:  # noqa: BLE001 - shown in the panel with everything that is known
        job = state.active.get(task.jobs[0]) if task.jobs else None
        names = ", ".join(job.objects) if job else "the object"
        log.exception("Work on %s failed", names)
        action = "Copy the report and send it to the developers."
        _fail_task(name, InputError("work_failed", f"The work on {names} failed: {error!r}.", action))


def _fail_task(name: str, error: Track4DError) -> None:
    for job_id in tasks.pop(name).jobs:
        _fail(job_id, error)


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


# News


def _take_news() -> bool:
    """What the client thread tells, as much as a turn has time for; True when there was some."""
    end, changed = time.perf_counter() + slices.SLICE, False
    while thread is not None and not (changed and time.perf_counter() > end):
        try:
            event = thread.events.get_nowait()
        except queue.Empty:
            break
        _take(event)
        changed = True
    return changed


def _take(event: link.Event) -> None:
    if isinstance(event, link.ServerChanged):
        state.server = event.server
        state.hello = event.hello or state.hello
        error = event.error or worker_error(event.hello)
        state.server_problem = problem_of(error) if error else None
    elif isinstance(event, link.JobChanged):
        _update(event.job)
    elif isinstance(event, link.JobsListed):
        _offer(event.jobs)
    elif isinstance(event, link.MotionSeen):
        job = state.active.get(event.job_id)
        if job is not None and job.seen is not None:
            live_motion.show(job.id, job.seen, event.moves)
    elif isinstance(event, link.ResultArrived):
        receive(event.job_id, event.result)
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
        drop(job.id)
        del state.active[job.id]
    elif job.phase not in (Phase.FETCHING, Phase.APPLYING):
        job.phase = Phase.QUEUED if state_name == "queued" else Phase.RUNNING
        job.stage, job.step, job.total = news.stage, news.step, news.total
        job.seconds_left, job.queue_position = news.seconds_left, news.queue_position


def _finish(job: ActiveJob, news: Job) -> None:
    """A job of this session is fetched and applied; one that was found on the server is offered."""
    if job.phase in (Phase.FETCHING, Phase.APPLYING):
        return
    if job.seen is None:
        del state.active[job.id]
        state.finished[job.id] = FinishedJob(job.id, job.prompt, job.objects, news.created, order=job.order)
        return
    job.phase = Phase.FETCHING
    send(link.Fetch(job.id))


def _offer(jobs: list[Job]) -> None:
    """The server's list, after connecting: what went on or ended while nobody watched."""
    applied = {take for obj in bpy.data.objects for take in marks.history(obj)}
    for news in sorted(jobs, key=lambda job: -job.created):
        if news.id in state.active:
            _update(news)
        elif news.id in dropped or news.id in state.finished or news.id in applied:
            continue
        elif news.state.value == "done":
            order = orders.kept(news.id)
            title = str(order.settings.get("title") or news.prompt)
            state.finished[news.id] = FinishedJob(news.id, title, list(news.objects), news.created, order=order, away=True)
        elif not news.state.final:
            order = orders.kept(news.id)
            title = str(order.settings.get("title") or news.prompt)
            state.active[news.id] = ActiveJob(news.id, title, list(news.objects), order=order)
            _update(news)


def receive(job_id: str, result: Result) -> None:
    """Apply a result when its objects are as they were, else keep it for the user's click."""
    _end_show(job_id)
    job = state.active.get(job_id)
    if job is None:
        return
    here = {obj.session_uid for obj in bpy.data.objects if obj.mode == "OBJECT"}
    if job.seen is None or not here.issuperset(item.session_uid for item in job.seen.objects):
        del state.active[job_id]
        keep_result(job, result)
        return
    begin_putting(job, result)


def begin_putting(job: ActiveJob, result: Result) -> None:
    job.phase, job.step, job.total = Phase.APPLYING, 0, 0
    tasks[job.id] = Task(put(job, result), [job.id])


def _fail(job_id: str, error: Track4DError) -> None:
    state.active.pop(job_id, None)
    _end_show(job_id)
    orders.forget(job_id)
    complain(error, job_id)


def _end_show(job_id: str) -> None:
    """Takes the picture and the coarse motion of a job away."""
    previews.drop(job_id)
    live_motion.drop(job_id)


def _look_at_server() -> bool:
    """Whether it has become silent, or speaks again; the thread notices only later that it is lost."""
    silent = thread is not None and thread.silence > SILENT
    changed = silent != state.silent
    state.silent = silent
    return changed


def _look_at_setup() -> bool:
    """Twice a second while this computer's server is set up; when it is there, it is started."""
    global looked
    if not state.setup.busy or time.monotonic() - looked < IDLE_TICK:
        return False
    from . import jobs
    from .preferences import preferences

    before, looked = state.setup, time.monotonic()
    state.setup = local_setup.read_status(preferences(bpy.context).server_home())
    if before.state == "installing" and state.setup.state == "ready":
        jobs.attach(bpy.context, start=True)
    return before != state.setup


def _look_at_playback() -> bool:
    """Whether Blender began or ceased to play the scene, for which it doesn't draw the tab anew."""
    playing = any(window.screen.is_animation_playing for window in bpy.context.window_manager.windows)
    changed = playing != state.playing
    state.playing = playing
    return changed


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
