"""What a finished job becomes in the scene, and what the object remembers of it."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import bpy
from track4d_protocol import __version__

from . import marks

if TYPE_CHECKING:
    from track4d_protocol.messages import Result

    from .capture import Snapshot
    from .orders import Order


def put(job_id: str, seen: Snapshot, result: Result, order: Order, model: str) -> Generator[None, None, dict[str, Any]]:
    """Puts a result onto its objects as a take beside the earlier ones, and writes its record. In slices.

    Of several results of one click the first is shown; the others don't push it aside.

    Args:
        job_id: the take's name.
        seen: the objects as they were captured.
        result: of the job.
        order: what was asked for; empty when Blender was closed meanwhile, the server's report tells most of it then.
        model: as the server calls it.

    Returns:
        What `apply.apply` returns.

    Raises:
        Track4DError: the objects are gone or have changed.
    """
    from . import apply
    from .capture import find_objects

    objects = find_objects(seen)
    sibling = _shown_sibling(objects[0], order.batch)
    settings = result.report.get("settings", {}) | order.settings
    scenes = [*objects[0].users_scene, bpy.context.scene]
    kind, start = settings.get("output", "shape_keys"), scenes[0].frame_start
    made = yield from apply.apply_steps(seen, result, kind, start, take=job_id, direction=_direction(seen, settings))
    objects = find_objects(seen)  # again, after the pauses
    record = {
        "prompt": str(result.report.get("prompt", "")),
        "title": str(settings.get("title") or result.report.get("prompt", "")),
        "seed": int(result.report.get("seed", settings.get("seed", 0))),
        "model": str(result.report.get("model", model)),
        "settings": settings,
        "objects": made["objects"],
        "batch": order.batch,
        "made": time.time(),
        "frames": [made["frame_start"], made["frame_end"]],
        "versions": {
            "blender": bpy.app.version_string,
            "add-on": __version__,
            "server": str(result.report.get("version", "")),
            "torch": str(result.report.get("torch", "")),
        },
    }
    for obj in objects:
        marks.remember(obj, job_id, **record)
    if sibling:
        apply.show(objects, sibling)
    return made


def _shown_sibling(obj: bpy.types.Object, batch: str) -> str:
    """The take that the object shows, when it came from the same click; else ""."""
    take = shown_take(obj)
    return take if batch and marks.history(obj).get(take, {}).get("batch") == batch else ""


def _direction(seen: Snapshot, settings: dict[str, Any]) -> list[float] | None:
    """For colours that don't change with the camera: where the scene's camera looks now, in the cloud's own space."""
    camera = bpy.context.scene.camera
    if settings.get("cloud_colors") != "FIXED" or camera is None:
        return None
    x, y, z = camera.matrix_world.to_3x3().col[2]
    return [float(value) for value in seen.to_world[:3, :3].T @ (-x, -y, -z)]


def subject(obj: bpy.types.Object | None) -> bpy.types.Object | None:
    """The object whose history is meant: of a Gaussian cloud, the one it was made for."""
    return obj.parent if obj is not None and marks.CLOUD in obj else obj


def chosen(context: bpy.types.Context) -> list[bpy.types.Object]:
    """The objects that the user means: those selected, each cloud standing for the object it was made for.

    With nothing selected, the active object where its cloud hides it: nobody can click on it then.
    """
    objects = [subject(obj) for obj in context.selected_objects]
    active = context.view_layer.objects.active
    if not objects and active is not None and not active.visible_get() and any(marks.CLOUD in child for child in active.children):
        objects = [active]
    return list(dict.fromkeys(obj for obj in objects if obj is not None))


def shown_take(obj: bpy.types.Object) -> str:
    """The take that moves an object; "" without one."""
    return marks.read(obj).get("shown", "")


def owners(obj: bpy.types.Object, take: str) -> list[bpy.types.Object]:
    """The object and those that a take has animated together with it; a later copy of it isn't one of them."""
    names = marks.history(obj)[take].get("objects", [])
    others = [bpy.data.objects.get(name) for name in names] if obj.name in names else []
    return [obj, *(other for other in others if other not in (None, obj) and take in marks.history(other))]


def next_seed(records: Sequence[dict[str, Any]], like: dict[str, Any]) -> int:
    """A seed that no result of the same prompt has had yet."""
    return 1 + max((record["seed"] for record in records if record.get("title") == like.get("title")), default=-1)
