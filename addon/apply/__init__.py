"""Bringing a result back onto the user's own objects, and taking it away again.

A result is a take: shape keys on the objects, a Gaussian cloud as a child of the first one, a mesh cache, or all three. Takes
stay side by side, and one is shown.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix
from track4d_protocol.messages import Result

from .. import marks
from ..capture import Snapshot, find_objects, snapshot
from ..slices import finished, in_background
from .gaussian_cloud import Look, build_cloud, check_size, is_cloud, look, placed, read_cloud, remove_cloud, splats_of_result
from .mesh_cache import cache_steps, check_saved, delete_files, play_caches, remove_caches
from .shape_keys import about, drop_layers, key_steps, remove_keys, shape_keys, sweep, switch
from .target import check_mode, check_unchanged, displacements, fitted

__all__ = ["KINDS", "apply", "apply_steps", "check_kind", "check_mode", "displacements", "drop_layers", "is_cloud", "placed",
           "read_cloud", "remove", "shape_keys", "show", "splats_of_result", "sweep"]  # fmt: skip

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
    seen = target if isinstance(target, Snapshot) else snapshot(target)
    find_objects(seen)
    ready = _prepare(seen, result, kind, direction)
    return finished(_put(seen, result, ready, kind, frame_start, step, take))


def apply_steps(
    seen: Snapshot,
    result: Result,
    kind: str = "shape_keys",
    frame_start: int = 1,
    step: float = 1.0,
    take: str = "",
    direction: Sequence[float] | None = None,
) -> Generator[None, None, dict[str, Any]]:
    """`apply` in slices; see `shape_keys.key_steps` for what the user may do meanwhile.

    Raises:
        Track4DError: as in `apply`, and nothing is left then, nor when the generator is closed.
    """
    check_kind(kind)
    check_unchanged(seen)
    ready = yield from in_background(_prepare, seen, result, kind, direction)
    return (yield from _put(seen, result, ready, kind, frame_start, step, take))


@dataclass(frozen=True)
class _Ready:
    """A result as it goes into the scene: what is left to do is to hand it to Blender."""

    moves: list[np.ndarray]  # of each object, [F, n, 3]
    look: Look | None  # of the cloud


def _prepare(seen: Snapshot, result: Result, kind: str, direction: Sequence[float] | None) -> _Ready:
    """Touches no `bpy`."""
    moves = fitted(seen, result)
    if kind not in ("gaussian_cloud", "all"):
        return _Ready(moves, None)
    splats = splats_of_result(result)
    check_size(splats)
    return _Ready(moves, look(splats, direction))


def _put(
    seen: Snapshot, result: Result, ready: _Ready, kind: str, frame_start: int, step: float, take: str
) -> Generator[None, None, dict[str, Any]]:
    check_unchanged(seen)
    wanted = KINDS[:-1] if kind == "all" else (kind,)
    remove(find_objects(seen), take or None)
    take = take or uuid.uuid4().hex
    frames = len(ready.moves[0])
    made: dict[str, Any] = {
        "objects": [item.name for item in seen.objects],
        "frame_start": frame_start,
        "frame_end": frame_start + (frames - 1) * step,
        "vertices": len(seen.vertices),
        "take": take,
    }
    files: list[str] = []
    try:
        if "mesh_cache" in wanted:
            files = made["files"] = yield from cache_steps(seen, ready.moves, frame_start, step, take)
        if "shape_keys" in wanted:
            made |= yield from key_steps(seen, ready.moves, result, frame_start, step, take)
        objects = check_unchanged(seen)
    except BaseException:
        delete_files(files)
        raise
    made["objects"] = [obj.name for obj in objects]
    play_caches(objects, files, frames, frame_start, step, take)
    if ready.look is not None:
        cloud = build_cloud(ready.look, f"{objects[0].name} Gaussians", frame_start, step, seen.to_world)
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
