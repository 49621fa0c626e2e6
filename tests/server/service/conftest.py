"""A real server in a process of its own, with a worker that does what the tests ask for."""

import contextlib
import os
import subprocess
import sys
import time
import types
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from track4d_protocol.client import Client
from track4d_protocol.keys import read_connection
from track4d_protocol.messages import Request, Settings
from track4d_protocol.space import intrinsics, orbit_viewmats

PATIENCE = 60.0  # seconds before a test gives up; nothing waits that long on a healthy machine


class Server:
    """A home, and the process that serves it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.marker = home.parent / f"{home.name}-marker"
        self.process: subprocess.Popen | None = None
        self._clients: list[Client] = []

    def start(self, address: str = "tcp://127.0.0.1:*", work: str = "service_work:run", idle: float = 1e9) -> "Server":
        code = f"from track4d.service import serve; serve({str(self.home)!r}, {address!r}, {work!r}, {idle!r})"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "SERVICE_TEST_MARKER": str(self.marker)}
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE,
                                        text=True)
        wait_for(lambda: self.connection_file.exists() or self.process.poll() is not None)
        return self

    @property
    def connection_file(self) -> Path:
        return self.home / "connection.json"

    def client(self) -> Client:
        client = Client(read_connection(self.connection_file), timeout=20.0)
        self._clients.append(client)
        return client

    def worker(self) -> psutil.Process:
        found: list[psutil.Process] = []
        wait_for(lambda: found.extend(psutil.Process(self.process.pid).children()) or found)
        return found[0]

    def runs(self, prompt: str) -> int:
        """How many times a worker began a job with this prompt."""
        return self.marker.read_text().splitlines().count(prompt) if self.marker.exists() else 0

    def open(self, name: str) -> None:
        """Lets jobs with the prompt "until NAME" end."""
        self.marker.with_name(name).touch()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection_file.unlink(missing_ok=True)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            self.process.kill()
            self.process.stderr.close()


def wait_for(condition, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def make_request(prompt: str, **settings) -> Request:
    """One triangle, seen by four small cameras."""
    arrays = {"vertices": np.eye(3, dtype=np.float32), "faces": np.array([[0, 1, 2]], np.int32),
              "views": np.zeros((4, 8, 8, 4), np.uint8), "viewmats": orbit_viewmats(), "Ks": intrinsics(8, 4)}
    return Request(Settings(prompt=prompt, **settings), ["triangle"], arrays)


def finish(client: Client, job_id: str, seen: list | None = None):
    """Watches a job to its end; `seen` collects what arrived."""
    client.watch(job_id)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for job in client.poll(0.5):
            if seen is not None:
                seen.append(job)
            if job.id == job_id and job.state.final:
                return job
    raise AssertionError(f"the job {job_id} doesn't end")


def running(client: Client, job_id: str, stage: str):
    """Waits until a job reports a stage."""
    client.watch(job_id)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for job in client.poll(0.5):
            if job.id == job_id and (job.stage == stage or job.state.final):
                return job
    raise AssertionError(f"the job {job_id} doesn't reach {stage}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server for the tests of one module."""
    server = Server(tmp_path_factory.mktemp("service") / "home").start()
    yield server
    server.close()


@pytest.fixture
def own_server(tmp_path):
    """A server for one test, not started yet."""
    server = Server(tmp_path / "home")
    yield server
    server.close()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def raw(server):
    """A socket with the right keys and no manners."""
    context = zmq.Context()
    connection = read_connection(server.connection_file)
    dealer = context.socket(zmq.DEALER)
    dealer.linger, dealer.rcvtimeo = 0, 20_000
    dealer.curve_serverkey = connection.server_key
    dealer.curve_publickey, dealer.curve_secretkey = connection.public_key, connection.secret_key
    dealer.connect(connection.address)
    yield dealer
    context.destroy(0)


@pytest.fixture
def new_id():
    return uuid.uuid4().hex


@pytest.fixture
def service():
    """The helpers of this module, as the tests are not a package."""
    return types.SimpleNamespace(wait_for=wait_for, make_request=make_request, finish=finish, running=running,
                                 Server=Server,
                                 new_id=lambda: uuid.uuid4().hex)
