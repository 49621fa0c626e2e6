"""The worker: one process that imports the pipeline, does one job at a time, and may die without harm to the server.

It talks to the broker over the same encrypted socket as clients do, with a key pair of its own; requests and results
stay on disk. The broker holds the other end of its standard input: when that closes, the server is gone and the worker
ends too.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq
from track4d_protocol import codec
from track4d_protocol.errors import Cancelled, ServerError, Track4DError
from track4d_protocol.local import LOG_FILE
from track4d_protocol.messages import Result

from .store import checkpoint_path, load_request, result_path, storing

_INTERVAL = 0.1  # seconds between two messages about progress
_PREVIEW_SIDE = 512  # pixels; larger pictures are thinned out
_FILM_SIDE, _FILM_FRAMES = 256, 24  # the same for films
_MOTION_POINTS = 2000  # of a motion that is shown while the job runs
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "allocate memory")  # torch says so in a plain RuntimeError, the latter on the CPU
log = logging.getLogger("track4d.worker")


class _Link:
    """The worker's side of the connection to the broker."""

    def __init__(self, setup: dict[str, str]) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_serverkey = setup["server"].encode()
        self._socket.curve_publickey, self._socket.curve_secretkey = setup["public"].encode(), setup["secret"].encode()
        self._socket.connect(setup["address"])
        self._lock = threading.Lock()  # the pipeline may report from a thread of its own

    def say(self, kind: str, body: dict[str, Any], arrays: dict[str, np.ndarray] | None = None,
            wait: bool = True) -> None:
        frames = codec.encode(kind, body, arrays)
        with self._lock:
            try:
                self._socket.send_multipart(frames, flags=0 if wait else zmq.NOBLOCK)
            except zmq.Again:
                return  # progress that nobody can read now

    def listen(self, wait: bool) -> codec.Message | None:
        with self._lock:
            try:
                return codec.decode(self._socket.recv_multipart(flags=0 if wait else zmq.NOBLOCK))
            except zmq.Again:
                return None

    def close(self) -> None:
        """Ends the connection after what was said has left."""
        self._context.destroy(linger=2000)


class _JobReport:
    """The `Report` of one job: sends progress ten times a second, and raises `Cancelled` when the broker asks."""

    def __init__(self, link: _Link, job_id: str) -> None:
        self._link, self._job_id = link, job_id
        self._stage = ""
        self._stage_start = (0, 0.0)  # step, time
        self._sent = 0.0
        self._glimpses: dict[str, np.ndarray] = {}
        self._cancelled = False

    def __call__(self, stage: str, step: int, total: int, preview: np.ndarray | None = None,
                 motion: np.ndarray | None = None) -> None:
        self._look_for_cancel()
        now = time.monotonic()
        new_stage = stage != self._stage
        if new_stage or step < self._stage_start[0]:
            self._stage, self._stage_start = stage, (step, now)
        if preview is not None:
            self._glimpses["preview"] = _thinned(preview)
        if motion is not None:
            points = spread_points(motion[0])
            self._glimpses |= {"motion": motion[:, points].astype(np.float32), "motion_points": points}
        if not new_stage and step < total and now - self._sent < _INTERVAL:
            return
        body = {"job": self._job_id, "stage": str(stage), "step": int(step), "total": int(total),
                "seconds_left": self._seconds_left(step, total, now)}
        self._link.say("worker_progress", body, self._glimpses, wait=False)
        self._sent, self._glimpses = now, {}

    def _seconds_left(self, step: int, total: int, now: float) -> float | None:
        first_step, begun = self._stage_start
        if step <= first_step or now - begun < 0.5:
            return None
        return round((now - begun) / (step - first_step) * max(0, total - step), 1)

    def _look_for_cancel(self) -> None:
        message = self._link.listen(wait=False)
        if message is not None and message.kind == "cancel" and message.body.get("job") == self._job_id:
            self._cancelled = True
        if self._cancelled:
            raise Cancelled()


def _thinned(preview: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] or a film [T, H, W, 3], small enough to be sent now and then."""
    stride = -(-max(preview.shape[-3:-1]) // (_PREVIEW_SIDE if preview.ndim == 3 else _FILM_SIDE))
    if preview.ndim == 4:
        preview = preview[::-(-len(preview) // _FILM_FRAMES)]
    return np.ascontiguousarray(preview[..., ::stride, ::stride, :3], np.uint8)


def spread_points(vertices: np.ndarray, most: int = _MOTION_POINTS) -> np.ndarray:
    """Indices [M <= most] int32 of vertices [N, 3] that lie spread over the object: one per cell of a grid."""
    size = float(np.ptp(vertices, axis=0).max())
    cells = 64
    chosen = np.arange(len(vertices))
    while len(chosen) > most:
        cell = ((vertices - vertices.min(0)) * (cells / (size or 1.0))).astype(np.int64)  # [N, 3]
        _, chosen = np.unique(cell @ np.array([1 << 40, 1 << 20, 1]), return_index=True)
        cells = cells * 3 // 4
    return np.sort(chosen).astype(np.int32)


def perform(home: Path, job_id: str, work: Callable[..., Result], report: Any, queued: float) -> None:
    """Does one job: request file in, result file out. It goes on from where an earlier worker of the same job ended.

    Args:
        queued: seconds that the job waited, for the report.

    Raises:
        Track4DError: what the pipeline raised, or what the disk did.
    """
    start = time.monotonic()
    request = load_request(home, job_id)
    loaded = time.monotonic()
    _forget_peak()
    result = work(request, report, checkpoint_path(home, job_id))
    figures = {"settings": request.settings.to_dict(), "queued_seconds": round(queued, 4),
               "load_seconds": round(loaded - start, 4), "run_seconds": round(time.monotonic() - loaded, 4),
               "peak_memory_bytes": peak_memory()}
    with storing(home):
        codec.write_file(result_path(home, job_id), {"report": result.report | figures}, result.arrays)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, since the job began (on Linux) or the process (elsewhere)."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:  # the peak of the whole process then
            log.info("the memory peak can't be reset: %s", error)


def error_of(exception: Exception, job_id: str) -> ServerError:
    """What the user is told about an exception of the pipeline: that memory is short, or that there is a bug."""
    name = type(exception).__name__
    if isinstance(exception, MemoryError) or "OutOfMemory" in name or any(words in str(exception) for words in _NO_MEMORY):
        return ServerError("out_of_memory", "The memory was not enough for this job.",
                           "Use the preset 'fast', smaller textures or a simpler object.")
    return ServerError("internal_error", f"The server failed at the job {job_id}: {name}: {str(exception)[:300]}",
                       f"Report this with the part of '{LOG_FILE}' in the server's folder that names the job.")


def load(work: str) -> tuple[Callable[..., Result], dict[str, str]]:
    """Imports "module:function"; a function `describe()` beside it, -> {"device", "model", "licence"}, says what it runs on.

    Raises:
        ServerError: `worker_unusable`.
    """
    try:
        module_name, _, function = work.partition(":")
        module = importlib.import_module(module_name)
        info = module.describe() if hasattr(module, "describe") else {}
        return getattr(module, function), {name: str(info.get(name, "")) for name in ("device", "model", "licence")}
    except Exception as error:
        log.exception("'%s' can't be loaded", work)
        raise ServerError("worker_unusable",
                          f"The server can't load its pipeline: {type(error).__name__}: {str(error)[:300]}",
                          f"Run track4d doctor; '{LOG_FILE}' has the details.") from error


def main() -> None:
    """What the worker process runs."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the server decides
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stderr)
    setup = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_server, daemon=True).start()
    home, link = Path(setup["home"]), _Link(setup)
    try:
        work, info = load(setup["work"])
    except ServerError as error:
        link.say("worker_broken", {"error": error.to_dict()})
        link.close()
        sys.exit(1)
    link.say("worker_ready", info)
    while True:
        message = link.listen(wait=True)
        if message is not None and message.kind == "work":
            _one_job(home, link, work, str(message.body["job"]), float(message.body["queued_seconds"]))


def _one_job(home: Path, link: _Link, work: Callable[..., Result], job_id: str, queued: float) -> None:
    try:
        perform(home, job_id, work, _JobReport(link, job_id), queued)
        link.say("worker_done", {"job": job_id})
    except Cancelled:
        link.say("worker_cancelled", {"job": job_id})
    except Track4DError as error:
        log.warning("job %s: %s", job_id, error)
        link.say("worker_failed", {"job": job_id, "error": error.to_dict()})
    except Exception as exception:  # noqa: BLE001  whatever the pipeline does, the next job gets its chance
        log.exception("job %s failed", job_id)
        link.say("worker_failed", {"job": job_id, "error": error_of(exception, job_id).to_dict()})


def _end_with_server() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # past Python's buffer, whose lock would hinder the interpreter's own end
        pass
    os._exit(0)  # not sys.exit: the pipeline may be in the middle of a kernel


if __name__ == "__main__":
    main()
