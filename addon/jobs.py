"""Jobs as the operators and the panel handle them: start, cancel, apply, dismiss; and the server to look for.

What goes on by itself is in `turns`, what the panel draws in `state`.
"""

from __future__ import annotations

import atexit
import time
import uuid
from collections.abc import Sequence

import bpy

from . import client_thread as link
from . import live_motion, local_setup, previews, turns
from .orders import Order
from .state import ActiveJob, FinishedJob, Phase, Problem, State, complain, reset, state, status
from .turns import Task, named_objects, tick

__all__ = ["ActiveJob", "FinishedJob", "Order", "Phase", "Problem", "State", "apply", "attach", "cancel", "complain", "dismiss",
           "fetch_again", "shut_down", "start", "state", "status", "tick", "wake"]  # fmt: skip


def start(context: bpy.types.Context, objects: list[bpy.types.Object], seeds: Sequence[int]) -> list[str]:
    """Begin an animation: photograph the objects view by view, then hand the request to the server.

    Args:
        context: its scene holds the settings.
        objects: to be animated together.
        seeds: of the results; they share one capture.

    Returns:
        The ids of the jobs.

    Raises:
        InputError: the objects can't be animated; see `capture.known_objects`. What is found out later is shown in the panel.
    """
    from . import sources
    from .capture import known_objects

    chosen = context.scene.track4d
    live_motion.sweep()
    known = known_objects(objects)
    begin, total = sources.plan(chosen, known)
    names, batch, ids = [name for _, name in known], uuid.uuid4().hex, []
    for seed in seeds:
        job = ActiveJob(
            uuid.uuid4().hex, chosen.title(), names, total=total, order=Order(chosen.to_dict() | {"seed": seed}, batch)
        )
        state.active[job.id] = job
        ids.append(job.id)
    state.problem, state.warnings = None, []
    turns.tasks[batch] = Task(turns.photograph(ids, known, begin), ids)
    attach(context, start=True)
    return list(ids)


def cancel(job_id: str) -> None:
    """Stop a job. The panel is idle at once; the server is told as soon as it listens."""
    job = state.active.pop(job_id, None)
    if job is None:
        return
    turns.drop(job_id)
    turns.end_task(job_id)
    if job.phase is not Phase.CAPTURING:
        turns.send(link.Cancel(job_id))


def apply(context: bpy.types.Context, job_id: str) -> None:
    """Put a finished job's motion onto its objects, after fetching it when it is still on the server.

    Raises:
        Track4DError: the objects are gone, or are being edited; what is found out later is shown in the panel.
    """
    from .apply import check_mode
    from .capture import find_objects

    job = state.finished[job_id]
    objects = find_objects(job.seen) if job.seen else named_objects(job.objects)
    for obj in objects:
        check_mode(obj)
    if job.result is None:
        _fetch(context, job_id, job.prompt, objects, job.order)
    else:
        state.active[job_id] = ActiveJob(job_id, job.prompt, job.objects, job.seen, Phase.FETCHING, order=job.order)
        turns.begin_putting(state.active[job_id], job.result)
        attach(context)
    del state.finished[job_id]


def fetch_again(context: bpy.types.Context, job_id: str, objects: list[bpy.types.Object], order: Order) -> None:
    """Put a result into the scene once more, as `order` says; the server keeps it until it is dismissed there.

    Raises:
        InputError: the objects can't be animated; see `capture.known_objects`.
    """
    _fetch(context, job_id, str(order.settings.get("title", "")), objects, order)


def _fetch(context: bpy.types.Context, job_id: str, title: str, objects: list[bpy.types.Object], order: Order) -> None:
    from .capture import known_objects

    live_motion.sweep()
    known = known_objects(objects)
    job = ActiveJob(job_id, title, [name for _, name in known], None, Phase.FETCHING, order=order)
    state.active[job_id] = job
    turns.tasks[job_id] = Task(turns.look_and_fetch(job, known), [job_id])
    attach(context)


def dismiss(job_id: str) -> None:
    """Remove a finished job from the list and from the server."""
    if state.finished.pop(job_id, None) is not None:
        turns.drop(job_id)
        turns.send(link.Forget(job_id))


def attach(context: bpy.types.Context, start: bool = False) -> None:
    """Look for the server that the preferences name; `start` this computer's one when it doesn't run."""
    from .preferences import preferences

    chosen = preferences(context)
    source, state.setup, turns.looked = chosen.source(), local_setup.read_status(chosen.server_home()), time.monotonic()
    if turns.thread is None or not turns.thread.is_alive():
        turns.thread = link.ClientThread()
        turns.thread.start()
        atexit.register(shut_down, closing=True)
    turns.send(link.Attach(source, start))
    if not bpy.app.timers.is_registered(turns.timer):
        bpy.app.timers.register(turns.timer, persistent=True)
    if _file_loaded not in bpy.app.handlers.load_post:
        bpy.app.handlers.load_post.append(_file_loaded)
        live_motion.register()


@bpy.app.handlers.persistent
def _file_loaded(*_: object) -> None:
    """Another file carries other results: ask again which ones wait."""
    state.applied, state.warnings = None, []
    turns.send(link.ListJobs())


def wake(context: bpy.types.Context) -> None:
    """Called by the panel when it is drawn: the first time, look for the server."""
    if turns.thread is None:
        attach(context)


def shut_down(closing: bool = False) -> None:
    """End the timer, the thread and every task; the server keeps what it has.

    Args:
        closing: Blender ends, and its data may be gone already.
    """
    atexit.unregister(shut_down)
    if bpy.app.timers.is_registered(turns.timer):
        bpy.app.timers.unregister(turns.timer)
    if _file_loaded in bpy.app.handlers.load_post:
        bpy.app.handlers.load_post.remove(_file_loaded)
        if not closing:
            live_motion.unregister()
    if not closing:
        turns.end_all()
    if turns.thread is not None:
        turns.send(link.Stop())
        turns.thread.join(timeout=1.0)  # it may be starting a server; being a daemon, it ends with Blender in any case
        turns.thread = None
    previews.clear()
    reset()
