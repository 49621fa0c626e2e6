"""The broker: one thread, one socket, one poller. It keeps requests, hands them to the worker and tells who watches.

See docs/protocol.md for what travels. The store is the truth about jobs; the broker adds what changes every moment.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from track4d_protocol import PROTOCOL_VERSION, __version__, codec
from track4d_protocol.errors import InputError, ServerError, Track4DError, error_from_dict
from track4d_protocol.filelock import FileLock
from track4d_protocol.keys import CONNECTION_FILE, Connection, write_connection
from track4d_protocol.limits import LIMITS
from track4d_protocol.local import LOG_FILE, SERVER_LOCK
from track4d_protocol.messages import JobState, Request, Settings, check_request

from .access import LOCAL_CLIENT, Gatekeeper, grant, private_folder, server_keys
from .store import Store, result_path, storing
from .supervisor import Supervisor

_HEARTBEAT = 0.5  # seconds between two signs of life
_TICK = 0.2  # seconds after which the broker looks at the worker's process
_OUTBOX = 64  # answers that wait for a client that doesn't read; one more and it is dropped
_Answer = tuple[str, dict[str, Any], dict[str, np.ndarray]]  # kind, body, arrays
log = logging.getLogger("track4d.service")


@dataclass
class _Peer:
    """A client that has spoken."""

    identity: bytes
    outbox: deque[list[Any]] = field(default_factory=deque)
    watched: dict[str, int] = field(default_factory=dict)  # job -> number of the glimpse it has seen
    news: set[str] = field(default_factory=set)  # jobs that changed since it was told


def serve(home: Path, address: str = "tcp://127.0.0.1:*", work: str = "track4d.pipeline:run",
          idle: float = math.inf) -> None:
    """Runs the server until SIGTERM, SIGINT, a local client's shutdown, or until nobody has needed it for a while.

    Args:
        home: folder of jobs, keys, the connection file and the log.
        address: where to listen; the default is a free port that only this machine reaches.
        work: "module:function" of what the worker process does with a request.
        idle: seconds without a client's word and without a job after which it ends.

    Raises:
        InputError: `bad_address`.
        ServerError: `curve_missing`, `home_unwritable`, `already_running`, `address_in_use`, `store_damaged`,
            `disk_full`.
    """
    if not zmq.has("curve"):
        raise ServerError("curve_missing", "This build of ZeroMQ can't encrypt.", "Install pyzmq from its wheel.")
    home = Path(home).absolute()
    with storing(home):
        private_folder(home)
        lock = FileLock(home / SERVER_LOCK)
        if not lock.acquire():
            raise ServerError("already_running", f"A server runs in '{home}' already.",
                              "Use that one, or stop it first.")
    with lock, _logging_to(home):
        lock.note(str(os.getpid()))
        broker = Broker(home, address, work, idle)
        try:
            broker.run()
        finally:
            broker.close()


class Broker:
    """One server. `serve` makes it; see there for the arguments and what is raised."""

    def __init__(self, home: Path, address: str, work: str, idle: float) -> None:
        self._home, self._work = home, work
        self._idle, self._needed = idle, time.monotonic()  # when a client last spoke or a job last ran
        self._stopping = threading.Event()
        self._peers: dict[bytes, _Peer] = {}
        self._beaten = 0.0
        with contextlib.ExitStack() as cleanup:  # a context that isn't ended properly would hang the interpreter's exit
            self._store = Store(home)
            cleanup.callback(self._store.close)
            self._context = zmq.Context()
            cleanup.callback(self._context.term)
            self._gatekeeper = Gatekeeper(self._context, home)
            cleanup.callback(self._gatekeeper.close)
            with storing(home):
                keys = server_keys(home)
                self._socket = self._listen(address, keys)
                cleanup.callback(self._socket.close, linger=200)
                bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
                self._local = bound.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
                write_connection(home / CONNECTION_FILE, grant(home, LOCAL_CLIENT, self._local))
                cleanup.callback((home / CONNECTION_FILE).unlink, missing_ok=True)
            self._cleanup = cleanup.pop_all()
        self._supervisor = Supervisor(home, work, self._store, replace(keys, address=self._local),
                                      self._gatekeeper.admit, self._to_worker, self._tell_about)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._gatekeeper.socket, zmq.POLLIN)
        self._answers: dict[str, Callable[[_Peer, codec.Message, str], _Answer]] = {
            "hello": self._hello, "submit": self._submit, "watch": self._watch, "jobs": self._jobs,
            "cancel": self._cancel, "fetch": self._fetch, "chunk": self._chunk, "forget": self._forget,
            "shutdown": self._shutdown}
        log.info("server %s listens at %s", __version__, bound)
        if not self._local.startswith(("tcp://127.", "tcp://[::1]")) or self._local != bound:
            log.warning("other machines can reach this server; it lets in the keys in '%s' only", home / "client-keys")

    def run(self) -> None:
        """Serves until it is told to stop."""
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, lambda *_: self._stopping.set())
        while not self._stopping.is_set():
            waiting = any(peer.outbox or peer.news for peer in self._peers.values())
            events = dict(self._poller.poll(int((_TICK / 4 if waiting else _TICK) * 1000)))
            if self._gatekeeper.socket in events:
                self._gatekeeper.answer()
            if self._socket in events:
                self._receive()
            try:
                self._supervisor.tend()
                for peer in list(self._peers.values()):
                    self._deliver(peer)
            except (ServerError, sqlite3.Error):  # a disk that fails now may work again; jobs are not lost meanwhile
                log.exception("the job list can't be used")
                self._stopping.wait(_HEARTBEAT)
            self._beat()
            if time.monotonic() - self._needed > self._idle and not self._at_work():
                log.info("nobody has needed the server for %.0f s", self._idle)
                return

    def _at_work(self) -> bool:
        """Whether a job runs or waits; if so, the time without need begins anew."""
        busy = self._supervisor.about_worker()["worker"] == "busy" or bool(self._store.queue())
        if busy:
            self._needed = time.monotonic()
        return busy

    def close(self) -> None:
        """Ends the worker and the socket, and takes the connection file away. Jobs wait for the next start."""
        self._supervisor.close()
        for peer in list(self._peers.values()):
            self._deliver(peer)
        self._cleanup.close()
        log.info("server ended")

    def _listen(self, address: str, keys: Connection) -> zmq.Socket:
        match = re.fullmatch(r"tcp://[^/]+:(\*|\d{1,5})", address)
        port = match[1] if match else ""
        if port != "*" and not 0 < int(port or 0) < 65536:  # ZeroMQ would take a port modulo 65536
            raise InputError("bad_address", f"'{address}' is not an address.",
                             "Use tcp://host:port, with * for a free port.")
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.ipv6 = "[" in address
        socket.maxmsgsize = LIMITS.frame_bytes + LIMITS.header_bytes
        socket.rcvhwm, socket.sndhwm = 32, 64
        socket.router_mandatory = True  # a peer that left is an error, not silence
        socket.tcp_keepalive, socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl = 1, 30, 10
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = keys.public_key, keys.secret_key
        socket.zap_domain = b"track4d"
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody enters if the gatekeeper were absent
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close(0)
            if error.errno in (zmq.EADDRINUSE, errno.EACCES):
                raise ServerError("address_in_use", f"Something else uses {address}, or its port is reserved.",
                                  "Choose another port, or * for a free one.") from error
            raise InputError("bad_address", f"Can't listen at '{address}': {error.strerror}.",
                             "Use tcp://host:port, with * for a free port.") from error
        return socket

    # Messages in

    def _receive(self) -> None:
        """Takes what is there, but not so much that heartbeats would wait."""
        for _ in range(16):
            try:
                identity, *frames = self._socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            user = _user(frames)
            if user.startswith("worker:"):
                self._supervisor.hear(identity.bytes, user, [frame.buffer for frame in frames])
            else:
                self._from_client(identity.bytes, user, frames)

    def _from_client(self, identity: bytes, user: str, frames: list[zmq.Frame]) -> None:
        self._needed = time.monotonic()
        peer = self._peers.setdefault(identity, _Peer(identity))
        serial: Any = None
        try:
            message = codec.decode([frame.buffer for frame in frames])
            if message.kind == "heartbeat":
                return
            serial = message.body.get("serial")
            if type(serial) is not int or message.kind not in self._answers:
                raise InputError("bad_message", f"The server doesn't know the message '{message.kind}'.",
                                 "Update the add-on and the server.")
            kind, body, arrays = self._answers[message.kind](peer, message, user)
            answer = codec.encode(kind, body | {"serial": serial}, arrays)
        except Track4DError as error:
            answer = codec.encode("error", {"error": error.to_dict(), "serial": serial})
        except Exception as error:  # noqa: BLE001  no message, however odd, ends the server
            log.exception("a message of '%s' failed", user)
            problem = ServerError("internal_error", f"The server failed at a message: {type(error).__name__}: {error}",
                                  f"Report this with the end of '{LOG_FILE}' in the server's folder.")
            answer = codec.encode("error", {"error": problem.to_dict(), "serial": serial})
        peer.outbox.append(answer)
        if len(peer.outbox) > _OUTBOX:
            log.warning("a client of '%s' asks and doesn't read; dropped", user)
            del self._peers[identity]
        else:
            self._deliver(peer)

    def _hello(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        return "hello", {"server_version": __version__, "protocol": PROTOCOL_VERSION, "limits": LIMITS.to_dict(),
                         **self._supervisor.about_worker()}, {}

    def _submit(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        request = Request(Settings.from_dict(message.body.get("settings")), message.body.get("objects", []),
                          message.arrays)
        check_request(request)
        job = self._store.add(message.body.get("job", ""), request, tick=self._beat)
        self._supervisor.try_again()
        return self._about(job.id)

    def _watch(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        job_id = self._store.get(message.body.get("job", "")).id
        arrays, peer.watched[job_id] = self._supervisor.glimpses(job_id)
        peer.news.add(job_id)  # so that whoever only polls learns of a job that ended before it was watched
        return self._about(job_id, arrays)

    def _jobs(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        return "jobs", {"jobs": [self._supervisor.current(job).to_dict() for job in self._store.all()]}, {}

    def _cancel(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        job = self._store.get(message.body.get("job", ""))
        if job.state is JobState.QUEUED:
            self._store.finish(replace(job, state=JobState.CANCELLED))
            self._tell_about(job.id, *self._store.queue())
        elif job.state is JobState.RUNNING:
            self._supervisor.cancel(job.id)
        return self._about(job.id)

    def _fetch(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        return "fetch", {"bytes": self._finished(message).stat().st_size}, {}

    def _chunk(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        start = message.body.get("start")
        if type(start) is not int or start < 0:
            raise InputError("bad_message", f"A part of a result can't start at {start!r}.",
                             "Update the add-on and the server.")
        with open(self._finished(message), "rb") as file:
            file.seek(start)
            return "chunk", {}, {"chunk": np.frombuffer(file.read(LIMITS.chunk_bytes), np.uint8)}

    def _finished(self, message: codec.Message) -> Path:
        job = self._store.get(message.body.get("job", ""))
        if job.error is not None:
            raise error_from_dict(job.error)
        if job.state is not JobState.DONE:
            raise InputError("job_not_done", f"The job '{job.id}' is {job.state.value}.", "Wait until it is done.")
        path = result_path(self._home, job.id)
        if not path.exists():
            raise ServerError("result_lost", f"The result of the job '{job.id}' is not on the disk any more.",
                              "Start it again.")
        return path

    def _forget(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        job = self._store.get(message.body.get("job", ""))
        if not job.state.final:
            raise InputError("job_running", f"The job '{job.id}' is {job.state.value}.", "Cancel it first.")
        self._store.forget(job.id)
        for other in self._peers.values():
            other.watched.pop(job.id, None)
            other.news.discard(job.id)
        return "forget", {}, {}

    def _shutdown(self, peer: _Peer, message: codec.Message, user: str) -> _Answer:
        if user != LOCAL_CLIENT:
            raise InputError("not_local", "Only a client on the server's own machine can end the server.",
                             "Stop it where it runs.")
        log.info("a local client ends the server")
        self._stopping.set()
        return "shutdown", {}, {}

    # Messages out

    def _about(self, job_id: str, glimpses: dict[str, np.ndarray] | None = None) -> _Answer:
        return "job", {"job": self._supervisor.current(self._store.get(job_id)).to_dict()}, glimpses or {}

    def _tell_about(self, *job_ids: str) -> None:
        """Marks jobs as changed for everybody who watches them; what is sent is their state at the time of sending."""
        for peer in self._peers.values():
            peer.news.update(job_id for job_id in job_ids if job_id in peer.watched)

    def _deliver(self, peer: _Peer) -> None:
        """Sends a client what waits for it, as far as it reads."""
        while peer.outbox:
            if not self._send(peer, peer.outbox[0]):
                return
            peer.outbox.popleft()
        for job_id in list(peer.news):
            arrays, number = self._supervisor.glimpses(job_id, since=peer.watched[job_id])
            _, body, arrays = self._about(job_id, arrays)
            if not self._send(peer, codec.encode("progress", body, arrays)):
                return
            peer.watched[job_id] = number
            peer.news.discard(job_id)

    def _to_worker(self, identity: bytes, kind: str, body: dict[str, Any]) -> None:
        self._send(_Peer(identity), codec.encode(kind, body))

    def _beat(self) -> None:
        """A sign of life to every client, twice a second; who has left is forgotten."""
        now = time.monotonic()
        if now - self._beaten < _HEARTBEAT:
            return
        self._beaten = now
        for peer in list(self._peers.values()):
            self._send(peer, codec.encode("heartbeat", {}))

    def _send(self, peer: _Peer, frames: list[Any]) -> bool:
        """False when the client doesn't read now, or has left."""
        try:
            self._socket.send_multipart([peer.identity, *frames], flags=zmq.NOBLOCK)
            return True
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._peers.pop(peer.identity, None)
            return False


def _user(frames: list[zmq.Frame]) -> str:
    """Whose key sent a message, as the gatekeeper named it."""
    return str(frames[0].get("User-Id")) if frames else ""


@contextlib.contextmanager
def _logging_to(home: Path) -> Iterator[None]:
    """Logs of this package go to the home's log, and to the terminal when there is one."""
    root = logging.getLogger("track4d")
    root.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.FileHandler(home / LOG_FILE, encoding="utf-8")]
    if sys.stderr is not None and sys.stderr.isatty():
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    try:
        yield
    except Track4DError as error:
        log.error("%s", error)
        raise
    except Exception:
        log.exception("the server failed")
        raise
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
