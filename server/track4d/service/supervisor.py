"""The worker's supervisor: starts it, gives it one job at a time, and copes with whatever becomes of it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from track4d_protocol import codec
from track4d_protocol.errors import ServerError
from track4d_protocol.keys import Connection
from track4d_protocol.local import LOG_FILE
from track4d_protocol.messages import GLIMPSES, Job, JobState

from .process import WorkerProcess
from .store import Store

_GRACE = 3.0  # seconds that a worker has to stop a cancelled job before it is killed
_LAST_WORDS = 0.1  # seconds that the last message of a worker that ended may take
log = logging.getLogger("track4d.service")


@dataclass
class _Running:
    """The worker's job, and what is known about it beyond the store."""

    job_id: str
    stage: str = ""
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    glimpses: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)  # name: number, array
    kill_at: float | None = None  # set by a cancel


class Supervisor:
    """One worker process and the job it has. It lives in the broker's thread.

    Args:
        home: the server's folder.
        work: "module:function" of what the worker does.
        store: the jobs.
        server: address and public key under which the worker reaches the broker.
        admit: lets a key in under a name.
        send: sends the worker's socket a message.
        tell: says which jobs have changed.
    """

    def __init__(self, home: Path, work: str, store: Store, server: Connection, admit: Callable[[bytes, str], None],
                 send: Callable[[bytes, str, dict[str, Any]], None], tell: Callable[..., None]) -> None:
        self._home, self._work, self._store, self._server = home, work, store, server
        self._admit, self._send, self._tell = admit, send, tell
        self._worker: WorkerProcess | None = None
        self._worker_numbers = itertools.count(1)
        self._glimpse_numbers = itertools.count(1)
        self._early_ends = 0  # of workers that never were ready, in a row
        self._broken: dict[str, str] | None = None  # why no worker can start
        self._ended_at = 0.0  # when the worker's end was noticed
        self._info = {"device": "", "model": "", "licence": ""}
        self._running: _Running | None = None
        self._unsaved: list[Job] = []  # final states that the disk hasn't taken yet
        self._save_error = ""
        self._events: dict[str, Callable[[codec.Message], None]] = {
            "worker_ready": self._ready, "worker_broken": self._no_start, "worker_progress": self._progress,
            "worker_done": self._done, "worker_failed": self._failed, "worker_cancelled": self._cancelled}

    def about_worker(self) -> dict[str, Any]:
        """For a hello: "worker" (starting, ready, busy, failed), "worker_error", "waiting" jobs, "device", "model", "licence"."""
        state = "failed" if self._broken else "starting" if self._worker is None else self._worker.state
        return {"worker": state, "worker_error": self._broken, "waiting": len(self._store.queue()), **self._info}

    def current(self, job: Job) -> Job:
        """A job of the store with what is known beyond it."""
        running = self._running
        if running is not None and running.job_id == job.id:
            stage = running.stage if running.kill_at is None else "cancelling"
            return replace(job, state=JobState.RUNNING, stage=stage, step=running.step, total=running.total,
                           seconds_left=running.seconds_left)
        if job.state is JobState.QUEUED:
            queue = self._store.queue()
            return replace(job, queue_position=queue.index(job.id) + 1 if job.id in queue else 0)
        return job

    def glimpses(self, job_id: str, since: int = 0) -> tuple[dict[str, np.ndarray], int]:
        """What the running job shows that is newer than number `since`, and the newest number; nothing for other jobs."""
        running = self._running
        if running is None or running.job_id != job_id:
            return {}, since
        newer = {name: array for name, (number, array) in running.glimpses.items() if number > since}
        return newer, max([since, *(number for number, _ in running.glimpses.values())])

    def try_again(self) -> None:
        """A new request is a reason to start a worker even if that failed before."""
        self._broken = None

    def cancel(self, job_id: str) -> None:
        """Asks the worker to stop the job it has; kills it when it doesn't."""
        running = self._running
        if running is None or running.job_id != job_id or running.kill_at is not None:
            return
        running.kill_at = time.monotonic() + _GRACE
        if self._worker is not None and self._worker.identity is not None:
            self._send(self._worker.identity, "cancel", {"job": job_id})
        self._tell(job_id)
        self._store.cancelling(job_id)  # last: a disk that is full doesn't keep a job from being stopped

    def tend(self) -> None:
        """One turn: watch the process, keep what ended, start what waits."""
        self._watch_process()
        if self._worker is None and self._broken is None:
            self._start()
        self._save()
        self._dispatch()

    def hear(self, identity: bytes, user: str, frames: list[Any]) -> None:
        """Takes a message that came with a worker's key."""
        if self._worker is None or user != self._worker.name:
            return  # the last words of one that was killed
        self._worker.identity = identity
        try:
            message = codec.decode(frames)
            about = message.body.get("job")
            if about is None or (self._running is not None and self._running.job_id == about):
                self._events[message.kind](message)
        except Exception:  # noqa: BLE001  the worker runs code of others; whatever it says, the server goes on
            log.exception("a message of %s failed", user)

    def close(self) -> None:
        """Ends the worker; its job waits for the next start."""
        if self._worker is not None:
            self._worker.close()
        if self._running is not None:
            with contextlib.suppress(ServerError):  # the next start does the same
                self._store.interrupted(self._running.job_id)

    def _start(self) -> None:
        name = f"worker:{next(self._worker_numbers)}"
        public, secret = zmq.curve_keypair()
        self._admit(public, name)
        connection = replace(self._server, public_key=public, secret_key=secret)
        self._worker = WorkerProcess(self._home, self._work, connection, name)
        log.info("%s started as process %d", name, self._worker.pid)

    def _ready(self, message: codec.Message) -> None:
        assert self._worker is not None
        self._worker.state = "ready"
        self._early_ends = 0
        self._info = {name: message.body[name] for name in self._info}
        log.info("%s is ready", self._worker.name)

    def _no_start(self, message: codec.Message) -> None:
        self._give_up(message.body["error"])

    def _progress(self, message: codec.Message) -> None:
        running, body = self._running, message.body
        assert running is not None
        running.stage, running.step, running.total = body["stage"], body["step"], body["total"]
        running.seconds_left = body["seconds_left"]
        number = next(self._glimpse_numbers)
        running.glimpses |= {name: (number, array.copy()) for name, array in message.arrays.items() if name in GLIMPSES}
        self._tell(running.job_id)

    def _done(self, message: codec.Message) -> None:
        cancelled = self._running is not None and self._running.kill_at is not None
        self._end_job(JobState.CANCELLED if cancelled else JobState.DONE)

    def _failed(self, message: codec.Message) -> None:
        cancelled = self._running is not None and self._running.kill_at is not None
        self._end_job(JobState.CANCELLED if cancelled else JobState.FAILED, message.body["error"])

    def _cancelled(self, message: codec.Message) -> None:
        self._end_job(JobState.CANCELLED)

    def _watch_process(self) -> None:
        """Kills a worker that ignores a cancel, and notices one that ended."""
        worker, running = self._worker, self._running
        if worker is None:
            return
        if running is not None and running.kill_at is not None and time.monotonic() > running.kill_at:
            log.warning("%s ignores a cancel; killed", worker.name)
            worker.kill()
            running.kill_at = math.inf
        code = worker.ended()
        if code is None:
            return
        self._ended_at = self._ended_at or time.monotonic()
        if time.monotonic() - self._ended_at < _LAST_WORDS:
            return
        self._ended_at = 0.0
        log.log(logging.INFO if self._broken else logging.WARNING, "%s ended with code %d", worker.name, code)
        worker.close()
        self._worker = None
        if running is not None:
            self._job_crashed(running, code)
        elif worker.state == "starting" and self._broken is None:
            self._early_ends += 1
            if self._early_ends >= 2:
                self._give_up(_died(code).to_dict())

    def _job_crashed(self, running: _Running, code: int) -> None:
        if running.kill_at is not None:
            self._end_job(JobState.CANCELLED)
            return
        try:
            once_more = self._store.crashed(running.job_id)
        except ServerError as error:  # what can't be counted isn't tried again
            log.error("the end of a worker can't be kept: %s", error)
            once_more = False
        if once_more:
            self._running = None
            log.warning("job %s waits for another worker", running.job_id)
            self._tell(*self._store.queue())
        else:
            self._end_job(JobState.FAILED, _died(code).to_dict())

    def _give_up(self, error: dict[str, str]) -> None:
        """No worker can start: jobs that wait fail with the reason, and the next request tries again."""
        self._broken = error
        for job_id in self._store.queue():
            job = replace(self._store.get(job_id), state=JobState.FAILED, error=error)
            self._unsaved.append(job)

    def _dispatch(self) -> None:
        worker = self._worker
        if self._running is not None or worker is None or worker.state != "ready" or self._ended_at:
            return
        queue = self._store.queue()
        if not queue:
            return
        job = self._store.get(queue[0])
        try:
            self._store.start(job.id)
        except ServerError as error:
            log.error("job %s can't start: %s", job.id, error)
            return
        worker.state = "busy"
        self._running = _Running(job.id)
        assert worker.identity is not None  # a worker that is ready has spoken
        self._send(worker.identity, "work", {"job": job.id, "queued_seconds": max(0.0, time.time() - job.created)})
        self._tell(*queue)

    def _end_job(self, state: JobState, error: dict[str, str] | None = None) -> None:
        running = self._running
        assert running is not None
        job = replace(self._store.get(running.job_id), state=state, stage=running.stage, step=running.step,
                      total=running.total, error=error if state is JobState.FAILED else None)
        log.info("job %s is %s%s", job.id, state.value, f": {job.error}" if job.error else "")
        self._running = None
        if self._worker is not None:
            self._worker.state = "ready"
        self._unsaved.append(job)
        self._save()

    def _save(self) -> None:
        """Keeps final states; while the disk refuses, they wait here."""
        while self._unsaved:
            job = self._unsaved[0]
            try:
                self._store.finish(job)
            except ServerError as error:
                if self._save_error != str(error):
                    log.error("the end of job %s can't be kept yet: %s", job.id, error)
                self._save_error = str(error)
                return
            self._unsaved.pop(0)
            self._tell(job.id, *self._store.queue())


def _died(code: int) -> ServerError:
    how = f"signal {-code}" if code < 0 else f"code {code}"
    return ServerError("worker_died", f"The worker process ended in the middle ({how}), probably for lack of memory.",
                       f"Use the preset 'fast' or a simpler object; '{LOG_FILE}' has the details.")
