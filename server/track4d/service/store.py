"""Jobs on disk: what was acknowledged survives every end of the server.

One SQLite file holds the states; requests and results are files beside it, written under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from track4d_protocol import __version__, codec
from track4d_protocol.errors import InputError, ServerError
from track4d_protocol.limits import LIMITS, Limits
from track4d_protocol.messages import Job, JobState, Request, Settings

MAX_CRASHES = 2  # of a worker under one job, then the job fails
MAX_RESTARTS = 5  # of the server under one job
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT UNIQUE NOT NULL,
    state TEXT NOT NULL,
    stage TEXT NOT NULL DEFAULT '',
    step INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    objects TEXT NOT NULL,
    prompt TEXT NOT NULL,
    created REAL NOT NULL,
    cancelling INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0
);
"""


def request_path(home: Path, job_id: str) -> Path:
    """Where a job's request lies; the name is a digest, so that no text from the wire becomes a path."""
    return _file(home, job_id, "request")


def result_path(home: Path, job_id: str) -> Path:
    """Where a job's result lies once it is done."""
    return _file(home, job_id, "result")


def checkpoint_path(home: Path, job_id: str) -> Path:
    """Where a running job keeps its state, for the next worker of the same version if this one dies."""
    return _file(home, job_id, f"{__version__}.checkpoint")


def _file(home: Path, job_id: str, kind: str) -> Path:
    return home / "jobs" / f"{hashlib.sha256(job_id.encode()).hexdigest()[:32]}.{kind}"


class Store:
    """The jobs of one home. It belongs to one process and one thread.

    Args:
        home: the folder; made when absent.

    Raises:
        ServerError: `home_unwritable`, `disk_full` or `store_damaged`.
    """

    def __init__(self, home: Path, limits: Limits = LIMITS) -> None:
        self.home, self._limits = home, limits
        with storing(home):
            (home / "jobs").mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(home / "jobs.sqlite3", os.O_CREAT | os.O_RDWR, 0o600))  # prompts are private
            self._database = sqlite3.connect(home / "jobs.sqlite3", isolation_level=None)
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
            self._recover()

    def close(self) -> None:
        self._database.close()

    def add(self, job_id: str, request: Request, tick: Callable[[], object] = lambda: None) -> Job:
        """Keeps a new job; when this returns, it is on disk. An id that is known returns its job unchanged.

        Args:
            tick: called now and then during a long write.

        Raises:
            InputError: `bad_job_id`.
            ServerError: `queue_full`, `disk_full`, `home_unwritable`.
        """
        if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
            raise InputError("bad_job_id", f"The job id {job_id!r:.80} is malformed.",
                             "Use 1 to 64 letters, digits, - and _.")
        with contextlib.suppress(InputError):
            return self.get(job_id)
        waiting = len(self.queue())
        if waiting >= self._limits.queued:
            raise ServerError("queue_full", f"{waiting} jobs wait already.", "Cancel some, or wait until one is done.")
        with storing(self.home):
            size = sum(array.nbytes for array in request.arrays.values())
            free = shutil.disk_usage(self.home).free
            if free < size + self._limits.free_disk_bytes:
                raise ServerError("disk_full", f"{free >> 20} MiB are free in '{self.home}'.",
                                  "Free disk space, or remove finished jobs.")
            body = {"settings": request.settings.to_dict(), "objects": request.objects}
            codec.write_file(request_path(self.home, job_id), body, request.arrays, tick=tick)
            self._database.execute(
                "INSERT INTO jobs (id, state, objects, prompt, created) VALUES (?, ?, ?, ?, ?)",
                (job_id, JobState.QUEUED.value, json.dumps(request.objects), request.settings.prompt, time.time()))
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """
        Raises:
            InputError: `unknown_job`.
        """
        row = self._database.execute("SELECT * FROM jobs WHERE id = ?", (str(job_id),)).fetchone()
        if row is None:
            raise InputError("unknown_job", f"The server has no job '{job_id!s:.80}'.",
                             "It may have been removed; start it again.")
        return _job(row)

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        return [_job(row) for row in self._database.execute("SELECT * FROM jobs ORDER BY number")]

    def queue(self) -> list[str]:
        """Ids of the jobs that wait, the next one first."""
        rows = self._database.execute("SELECT id FROM jobs WHERE state = ? ORDER BY number", (JobState.QUEUED.value,))
        return [row["id"] for row in rows]

    def start(self, job_id: str) -> None:
        """The job is with the worker now."""
        self._update(job_id, state=JobState.RUNNING.value)

    def cancelling(self, job_id: str) -> None:
        """The user wants the running job to stop; this survives a restart."""
        self._update(job_id, cancelling=1)

    def interrupted(self, job_id: str) -> None:
        """The server ends in good order: the running job waits for the next start, or is cancelled if asked."""
        with storing(self.home):
            self._database.execute("UPDATE jobs SET state = CASE cancelling WHEN 1 THEN ? ELSE ? END WHERE id = ?",
                                   (JobState.CANCELLED.value, JobState.QUEUED.value, job_id))

    def crashed(self, job_id: str) -> bool:
        """Counts a worker's end under a job and puts the job back into the queue; False when that was too often."""
        self._update(job_id, counting="crashes", state=JobState.QUEUED.value)
        row = self._database.execute("SELECT crashes FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row["crashes"] < MAX_CRASHES

    def finish(self, job: Job) -> None:
        """Keeps a final state, and removes the files that it doesn't need."""
        self._update(job.id, state=job.state.value, stage=job.stage, step=job.step, total=job.total,
                     error=json.dumps(job.error) if job.error else None)
        self._remove_files(job.id, keep_result=job.state is JobState.DONE)

    def forget(self, job_id: str) -> None:
        """Removes a job and its files."""
        with storing(self.home):
            self._database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        self._remove_files(job_id)

    def _update(self, job_id: str, counting: str | None = None, **values: Any) -> None:
        columns = ", ".join([f"{name} = ?" for name in values] + ([f"{counting} = {counting} + 1"] if counting else []))
        with storing(self.home):
            self._database.execute(f"UPDATE jobs SET {columns} WHERE id = ?", (*values.values(), job_id))

    def _remove_files(self, job_id: str, keep_result: bool = False) -> None:
        with contextlib.suppress(OSError):  # a file that is open on Windows goes with the next start
            request_path(self.home, job_id).unlink(missing_ok=True)
            checkpoint_path(self.home, job_id).unlink(missing_ok=True)
            if not keep_result:
                result_path(self.home, job_id).unlink(missing_ok=True)

    def _recover(self) -> None:
        """After a server that ended in the middle: jobs that ran wait again, files that belong to nothing go."""
        for job in self.all():
            if job.state is not JobState.RUNNING:
                continue
            row = self._database.execute("SELECT cancelling, restarts FROM jobs WHERE id = ?", (job.id,)).fetchone()
            if result_path(self.home, job.id).exists() and not row["cancelling"]:
                self._update(job.id, state=JobState.DONE.value)
            elif row["cancelling"]:
                self._update(job.id, state=JobState.CANCELLED.value)
            elif row["restarts"] + 1 >= MAX_RESTARTS:
                error = ServerError("worker_died",
                                    f"The server ended {MAX_RESTARTS} times while it worked on this job.",
                                    "Use a smaller object or the preset 'fast'.")
                self._update(job.id, state=JobState.FAILED.value, error=json.dumps(error.to_dict()))
            else:
                self._update(job.id, counting="restarts", state=JobState.QUEUED.value)
        unfinished = [job.id for job in self.all() if not job.state.final]
        needed = {path(self.home, job_id) for job_id in unfinished for path in (request_path, checkpoint_path)}
        needed |= {result_path(self.home, job.id) for job in self.all() if job.state is JobState.DONE}
        for path in (self.home / "jobs").iterdir():
            if path not in needed and path.suffix in (".request", ".result", ".checkpoint", ".tmp"):
                path.unlink(missing_ok=True)


def load_request(home: Path, job_id: str) -> Request:
    """Reads a job's request, for the worker.

    Raises:
        Track4DError: the file is damaged.
    """
    content = codec.read_file(bytearray(request_path(home, job_id).read_bytes()))
    return Request(Settings.from_dict(content.body["settings"]), content.body["objects"], content.arrays)


@contextlib.contextmanager
def storing(home: Path) -> Iterator[None]:
    """Turns what a disk can do wrong into a `ServerError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "full" in str(error):
            raise _disk_full(home) from error
        if isinstance(error, sqlite3.OperationalError):
            raise _unwritable(home, str(error)) from error
        raise ServerError("store_damaged", f"The job list in '{home}' can't be read: {error}.",
                          "Move 'jobs.sqlite3' away; the results in 'jobs' stay.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC):
            raise _disk_full(home) from error
        raise _unwritable(home, error.strerror or str(error)) from error


def _disk_full(home: Path) -> ServerError:
    return ServerError("disk_full", f"The disk of '{home}' is full.", "Free disk space, or remove finished jobs.")


def _unwritable(home: Path, reason: str) -> ServerError:
    return ServerError("home_unwritable", f"The folder '{home}' can't be written: {reason}.", "Choose another folder.")


def _job(row: sqlite3.Row) -> Job:
    return Job(row["id"], JobState(row["state"]), row["stage"], row["step"], row["total"],
               error=json.loads(row["error"]) if row["error"] else None, objects=json.loads(row["objects"]),
               prompt=row["prompt"], created=row["created"])
