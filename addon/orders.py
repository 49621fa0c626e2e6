"""What the user asked for, kept on the disk until a job has ended: another session of Blender may apply its result."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bpy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What the user asked for, as far as the server doesn't tell it with the result.

    Attributes:
        settings: of the panel, as `Track4DSettings.to_dict` gives them; the seed is the job's.
        batch: the same for all jobs of one click.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    batch: str = ""


def folder() -> Path:
    """Where this Blender's user keeps what belongs to jobs that haven't ended: unsent requests and orders."""
    from .preferences import ADDON

    return Path(bpy.utils.extension_path_user(ADDON, path="jobs", create=True))


def keep(job_id: str, order: Order) -> None:
    """The order isn't part of the request, and must be known when another session applies the result."""
    try:
        (folder() / f"{job_id}.json").write_text(json.dumps(asdict(order)), "utf-8")
    except OSError as error:
        log.warning("The order of job %s can't be kept: %s", job_id, error)


def kept(job_id: str) -> Order:
    """The order of a job; an empty one when it was given on another computer or by another user."""
    try:
        return Order(**json.loads((folder() / f"{job_id}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return Order()


def forget(job_id: str) -> None:
    with contextlib.suppress(OSError):
        (folder() / f"{job_id}.json").unlink(missing_ok=True)
