"""What is known of the server and of running jobs: what the panel draws.

It lives here and not in Blender's data, so that nothing about a running job can be saved into a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from track4d_protocol.errors import Track4DError, error_from_dict

from . import client_thread as link
from . import local_setup
from .orders import Order

if TYPE_CHECKING:
    from track4d_protocol.messages import Result

    from .capture import Snapshot


class Phase(str, Enum):
    """What a job waits for."""

    CAPTURING = "Photographing the object"
    SENDING = "Sending"
    QUEUED = "Waiting for its turn"
    RUNNING = "Running"
    FETCHING = "Fetching the result"
    APPLYING = "Putting it onto the object"


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
    playing: bool = False  # Blender plays the scene


state = State()


def reset() -> None:
    """Forgets everything, as at the start."""
    state.__dict__.update(State().__dict__)


def complain(error: Track4DError, job_id: str = "") -> None:
    """Show an error in the panel."""
    state.problem = problem_of(error, job_id)


def problem_of(error: Track4DError, job_id: str = "") -> Problem:
    return Problem(error.code, error.message, error.action, job_id)


def warning_of(warning: dict[str, str]) -> Problem:
    return Problem(warning["code"], warning["message"], warning["action"])


def worker_error(hello: dict[str, Any] | None) -> Track4DError | None:
    """Why a server that answers can't work, from its hello."""
    told = (hello or {}).get("worker_error")
    return error_from_dict(told) if isinstance(told, dict) else None


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
        lines.append((f"Your next: {min(places)} of {max(waiting, *places)} in the queue", "BLANK1"))
    elif waiting:
        lines.append((f"{waiting} jobs of others wait", "BLANK1"))
    return lines
