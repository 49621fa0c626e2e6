"""Bringing a result back onto the user's own objects, and taking it away again.

A result is a take: shape keys on the objects, a Gaussian cloud as a child of the first one, a mesh cache, or all three. Takes
stay side by side, and one is shown.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix
from track4d_protocol.messages import Result

from .. import marks
from ..capture.mesh import Snapshot
from .gaussian_cloud import check_size, gaussian_cloud, is_cloud, remove_cloud, splats_of_result
from .mesh_cache import check_saved, mesh_cache, remove_caches
from .shape_keys import about, remove_keys, shape_keys, switch
from .target import check_mode, match

__all__ = ["KINDS", "apply", "check_kind", "remove", "shape_keys", "show"]

KINDS = ("shape_keys", "gaussian_cloud", "mesh_cache", "all")


def check_kind(kind: str) -> None:
    """Whether an output is possible in this file; to be asked before a job is started.

    Raises:
        InputError: unsaved_file.
    """
    if kind in ("mesh_cache", "all"):
        check_saved()


def apply(
    target: Snapshot | Sequence[bpy.types.Object],
    result: Result,
    kind: str = "shape_keys",
    frame_start: int = 1,
    step: float = 1.0,
    take: str = "",
    direction: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Puts a result onto the objects it was made for, and shows it.

    Args:
        target: the snapshot that the request was made from; or the objects, if they are still where and as they were.
        result: `vertices` [F, N, 3] in capture space, and the Gaussians.
        kind: one of `KINDS`. Of "all", the shape keys move the mesh, and the mesh cache is switched off.
        frame_start: of the scene, where the first frame goes.
        step: frames of the scene from one frame of the result to the next.
        take: a name under which the result is kept beside earlier ones, which stay, switched off (see `show`); without a
            name the result replaces all earlier ones.
        direction: of the cloud's colours, see `gaussian_cloud`.

    Returns:
        {"objects", "frame_start", "frame_end", "vertices", "take"}, with "keys" and "action", "cloud" (name), "files" as
        they were made.

    Raises:
        InputError: unsaved_file, cloud_too_large, and what `target.match` raises. Nothing is changed then.
        ServerError: bad_result, no_gaussians.
    """
    check_kind(kind)
    seen, objects, frames = match(target, result)
    wanted = KINDS[:-1] if kind == "all" else (kind,)
    splats = splats_of_result(result) if "gaussian_cloud" in wanted else None
    if splats is not None:
        check_size(splats)
    remove(objects, take or None)
    take = take or uuid.uuid4().hex
    made: dict[str, Any] = {
        "objects": [obj.name for obj in objects],
        "frame_start": frame_start,
        "frame_end": frame_start + (len(frames) - 1) * step,
        "vertices": len(seen.vertices),
        "take": take,
    }
    if "mesh_cache" in wanted:
        made["files"] = mesh_cache(seen, result, frame_start, step, take)
    if "shape_keys" in wanted:
        made |= shape_keys(seen, result, frame_start, step, take)
    if splats is not None:
        cloud = gaussian_cloud(splats, f"{objects[0].name} Gaussians", frame_start, step, seen.to_world, direction)
        cloud[marks.CLOUD]["take"] = take
        cloud.parent = objects[0]  # it goes where the object goes, also where it went while the job ran
        cloud.matrix_parent_inverse = Matrix(np.linalg.inv(seen.objects[0].matrix_world).tolist())
        made["cloud"] = cloud.name
    for obj in objects:
        marks.remember(obj, take, **about(result))
    show(objects, take)
    return made


def show(objects: Sequence[bpy.types.Object], take: str) -> None:
    """Lets one of the objects' takes move them: its keys, cloud and cache are switched on, those of the others off.

    Raises:
        InputError: in_edit_mode.
    """
    found = [obj for obj in objects if take in marks.history(obj)]
    for obj in found:
        check_mode(obj)
    for obj in found:
        keys = obj.data.shape_keys
        by_keys = take in marks.takes(keys)
        if marks.takes(keys):
            switch(keys, take)
        for name, record in marks.caches(obj).items():
            modifier = obj.modifiers.get(record["modifier"])
            if modifier is not None:
                modifier.show_viewport = modifier.show_render = name == take and not by_keys
        for cloud in _clouds(obj):
            cloud.hide_viewport = cloud.hide_render = cloud[marks.CLOUD]["take"] != take
        marks.write(obj, marks.read(obj) | {"shown": take})
        obj.data.update()


def remove(objects: Sequence[bpy.types.Object], take: str | None = None) -> int:
    """Takes Track4D's keys, animation, cloud and cache away from the objects, as if they had never been there.

    Args:
        objects: of any kind; a cloud among them is removed itself.
        take: only this one; the last of those that are left is shown then.

    Returns:
        How many objects had some.

    Raises:
        InputError: in_edit_mode.
    """
    chosen = [obj for obj in objects if is_cloud(obj)]
    objects = [obj for obj in objects if obj.type == "MESH" and not is_cloud(obj)]
    found = [obj for obj in objects if marks.is_animated(obj) and (take is None or take in marks.history(obj))]
    for obj in found:
        check_mode(obj)
    clouds = {cloud for obj in found for cloud in _clouds(obj) if take in (None, cloud[marks.CLOUD]["take"])}
    for cloud in clouds.union(chosen):
        remove_cloud(cloud)
    remove_caches(found, take)
    remove_keys(found, take)
    for obj in found:
        shown = marks.read(obj).get("shown")
        marks.forget(obj, take)
        left = list(marks.history(obj))
        if left and shown not in left:
            show([obj], left[-1])
    return len(found) + len(chosen)


def _clouds(obj: bpy.types.Object) -> list[bpy.types.Object]:
    return [child for child in obj.children if is_cloud(child)]
