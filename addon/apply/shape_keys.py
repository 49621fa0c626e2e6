"""A result as shape keys: one per frame, faded into each other by one action.

The keys hold displacements on top of the Basis, so whatever the object had before (shape keys, modifiers, animation
added in the meantime) goes on working. Between two frames the vertices move linearly.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Sequence
from typing import Any

import bmesh
import bpy
import numpy as np
from track4d_protocol.messages import Result

from .. import actions, marks, slices
from ..capture import Snapshot, find_objects
from .target import check_count, check_mode, match

LINEAR = 1  # Keyframe.interpolation as foreach_set takes it
UNFINISHED = "unfinished"  # in the mark of keys: the take that is being put onto the object


def shape_keys(
    target: Snapshot | Sequence[bpy.types.Object], result: Result, frame_start: int = 1, step: float = 1.0, take: str = ""
) -> dict[str, Any]:
    """Puts a result onto the objects it was made for.

    Args:
        target: the snapshot that the request was made from; or the objects, if they are still where and as they were.
        result: `vertices` [F, N, 3] in capture space.
        frame_start: of the scene, where the first frame goes.
        step: frames of the scene from one frame of the result to the next.
        take: a name under which the result is kept beside earlier ones, which stay, switched off (see `show`); without a
            name the result replaces all earlier ones.

    Returns:
        {"objects", "keys" (names), "action" (name), "frame_start", "frame_end", "vertices", "take"}.

    Raises:
        InputError: object_missing, in_edit_mode, topology_changed, and what `snapshot` raises. Nothing is changed then.
        ServerError: bad_result, the result doesn't have the size of the objects or isn't finite.
    """
    seen, moves = match(target, result)
    return slices.finished(key_steps(seen, moves, result, frame_start, step, take))


def key_steps(
    seen: Snapshot, moves: list[np.ndarray], result: Result, frame_start: int = 1, step: float = 1.0, take: str = ""
) -> Generator[None, None, dict[str, Any]]:
    """`shape_keys` in slices.

    What is there during a pause moves nothing and is marked as unfinished: `sweep` takes it away before a file is saved and after
    an undo, and then it is begun again; so it is when the user takes keys away. While an object is edited, it is waited for.

    Args:
        moves: as `target.fitted` gives them.

    Raises:
        InputError: object_missing, topology_changed; nothing is left then, nor when the generator is closed.
    """
    remove_keys(find_objects(seen), take or None)
    take = take or uuid.uuid4().hex
    try:
        yield from _add_all(seen, moves, take)
        objects = find_objects(seen)
        prompt = str(result.report.get("prompt", "")) or "motion"
        action = bpy.data.actions.new(f"Track4D: {prompt}"[:63])
        action[marks.MARK] = take
        for obj in objects:
            keys = obj.data.shape_keys
            names = marks.takes(keys)[take]
            _settle(keys)
            switch(keys, take)
            used = _animate(keys, names, action, frame_start, step)
            marks.remember(obj, take, **about(result))
            obj.data.update()
    finally:
        sweep()
    if not action.users:
        bpy.data.actions.remove(action)  # every object has an action of its own that took the curves
        action = used
    return {
        "objects": [obj.name for obj in objects],
        "keys": names,
        "action": action.name,
        "frame_start": frame_start,
        "frame_end": frame_start + (len(moves[0]) - 1) * step,
        "vertices": len(seen.vertices),
        "take": take,
    }


def _add_all(seen: Snapshot, moves: list[np.ndarray], take: str) -> Generator[None, None, None]:
    end = time.perf_counter() + slices.SLICE
    while True:
        objects = find_objects(seen)  # again after each pause
        if any(obj.mode != "OBJECT" for obj in objects):
            yield
            continue
        for item, obj in zip(seen.objects, objects):
            check_count(item, obj)
        missing = next(((obj, own) for obj, own in zip(objects, moves) if len(_unfinished(obj, take)) < len(own)), None)
        if missing is None:
            return
        obj, own = missing
        _add_key(obj, own[len(_unfinished(obj, take))], take)
        if time.perf_counter() > end:
            there = [_unfinished(obj, take) for obj in objects]
            yield
            if [_unfinished(obj, take) for obj in find_objects(seen)] != there:
                sweep()  # by an undo, a save or the user's hand keys are gone: begin again
            end = time.perf_counter() + slices.SLICE


def _unfinished(obj: bpy.types.Object, take: str) -> list[str]:
    """The keys of the take that is being put onto an object."""
    return marks.takes(obj.data.shape_keys).get(take, [])


def _settle(keys: bpy.types.Key) -> None:
    """No take of these keys is unfinished any more."""
    marks.write(keys, {name: value for name, value in marks.read(keys).items() if name != UNFINISHED})


def sweep() -> None:
    """Removes the keys of every unfinished take of the file, also from meshes that were copied meanwhile."""
    for keys in [keys for keys in bpy.data.shape_keys if UNFINISHED in marks.read(keys) and keys.library is None]:
        mesh = keys.user
        users = [obj for obj in bpy.data.objects if obj.data == mesh]
        obj = users[0] if users else bpy.data.objects.new("Track4D", mesh)  # keys are taken from objects only
        try:
            index, take = obj.active_shape_key_index, marks.read(keys)[UNFINISHED]
            drop_layers(mesh, marks.takes(keys)[take])
            _remove_take(obj, take)
            if not marks.takes(keys):
                _end(obj, keys)
            else:
                _settle(keys)
            if obj.data.shape_keys:
                obj.active_shape_key_index = min(index, len(keys.key_blocks) - 1)
            mesh.update()
        finally:
            if not users:
                bpy.data.objects.remove(obj)


def drop_layers(mesh: bpy.types.Mesh, names: Sequence[str]) -> None:
    """Of keys that are to be removed: a mesh that is edited has each as a layer, from which Blender would make it again."""
    if not mesh.is_editmode:
        return
    edited = bmesh.from_edit_mesh(mesh)
    layers = edited.verts.layers.shape
    for name in names:
        if name in layers:
            layers.remove(layers[name])
    bmesh.update_edit_mesh(mesh)


def remove_keys(objects: Sequence[bpy.types.Object], take: str | None = None) -> int:
    """Takes Track4D's keys and their animation away from the objects, as if they had never been there.

    Args:
        objects: of any kind.
        take: only this one; the last of those that are left is shown then.

    Returns:
        How many objects had some.

    Raises:
        InputError: in_edit_mode.
    """
    marked = [obj for obj in objects if obj.type == "MESH" and marks.MARK in (obj.data.shape_keys or ())]
    found = [(obj, marks.takes(obj.data.shape_keys)) for obj in marked]
    found = [(obj, takes) for obj, takes in found if take is None or take in takes]
    for obj, _ in found:
        check_mode(obj)
    for obj, takes in found:
        keys = obj.data.shape_keys
        index = obj.active_shape_key_index
        for name in takes if take is None else [take]:
            _remove_take(obj, name)
        if take is None or len(takes) == 1:
            _end(obj, keys)
        elif marks.shown(keys) == take:
            switch(keys, list(marks.takes(keys))[-1])
        marks.forget(obj, take)
        if obj.data.shape_keys:
            obj.active_shape_key_index = min(index, len(keys.key_blocks) - 1)
        obj.data.update()
    return len(found)


def _end(obj: bpy.types.Object, keys: bpy.types.Key) -> None:
    """The last take is gone: nothing is left of us."""
    made_basis = marks.read(keys)["basis"]
    marks.erase(keys)
    if made_basis and len(keys.key_blocks) == 1:
        obj.shape_key_clear()


def _add_key(obj: bpy.types.Object, move: np.ndarray, take: str) -> None:
    """The next frame's key of an unfinished take; `move` is [N, 3]."""
    index = obj.active_shape_key_index
    added_basis = obj.data.shape_keys is None
    if added_basis:
        obj.shape_key_add(name="Basis", from_mix=False)
    keys = obj.data.shape_keys
    basis = np.empty(move.size, np.float32)
    keys.reference_key.points.foreach_get("co", basis)
    mark = {"basis": added_basis} | marks.read(keys)
    names = mark.get("takes", {}).get(take, [])
    block = obj.shape_key_add(name=f"f{len(names) + 1:04d}", from_mix=False)
    block.relative_key = keys.reference_key
    block.points.foreach_set("co", basis + move.ravel())
    marks.write(keys, mark | {"takes": mark.get("takes", {}) | {take: [*names, block.name]}, UNFINISHED: take})
    obj.active_shape_key_index = index


def switch(keys: bpy.types.Key, take: str) -> None:
    """Mutes the keys of the other takes, and makes the take's action the active one, unless that is the user's own."""
    for other, names in marks.takes(keys).items():
        for name in names:
            keys.key_blocks[name].mute = other != take
            if other != take:
                keys.key_blocks[name].value = 0.0
    data = keys.animation_data
    current, wanted = data.action if data else None, marks.action_of(take)
    if current is not None and current != wanted and current.get(marks.MARK) in marks.takes(keys):
        current.use_fake_user = True  # else Blender drops it when the file is saved
        data.action = None
    if wanted is not None and (data is None or data.action is None):
        actions.assign(keys, wanted)
        wanted.use_fake_user = False
    marks.write(keys, marks.read(keys) | {"shown": take})


def _animate(keys: bpy.types.Key, names: list[str], action: bpy.types.Action, frame_start: int, step: float) -> bpy.types.Action:
    """One F-curve per key: 1 on its own frame, 0 on its neighbours; added to the keys' action if they have one."""
    if keys.animation_data is None or keys.animation_data.action is None:
        actions.assign(keys, action)
    curves = actions.fcurves(keys, create=True)
    for number, name in enumerate(names):
        path = marks.value_path(name)
        if curves.find(path):
            continue  # one action without slots serves all objects alike
        frames = [f for f in (number - 1, number, number + 1) if 0 <= f < len(names)]
        curve = curves.new(path)
        curve.keyframe_points.add(len(frames))
        points = [value for f in frames for value in (frame_start + f * step, float(f == number))]
        curve.keyframe_points.foreach_set("co", points)
        curve.keyframe_points.foreach_set("interpolation", [LINEAR] * len(frames))
        curve.update()
    return keys.animation_data.action


def about(result: Result) -> dict[str, Any]:
    """What an object remembers of a result."""
    return {
        name: result.report[name]
        for name in ("prompt", "seed", "preset", "model")
        if isinstance(result.report.get(name), str | int)
    }


def _remove_take(obj: bpy.types.Object, take: str) -> None:
    keys = obj.data.shape_keys
    names = marks.takes(keys)[take]
    _remove_curves(keys, {marks.value_path(name) for name in names}, take)
    for name in names:
        obj.shape_key_remove(keys.key_blocks[name])
    mark = marks.read(keys)
    marks.write(keys, mark | {"takes": {name: own for name, own in mark["takes"].items() if name != take}})


def _remove_curves(keys: bpy.types.Key, paths: set[str], take: str) -> None:
    """Removes our F-curves, also from an action that was pushed into an NLA track, and what is empty after that."""
    data = keys.animation_data
    ours = marks.action_of(take)
    if data is not None:
        for track in list(data.nla_tracks):
            if ours and track.strips and all(strip.action == ours for strip in track.strips):
                data.nla_tracks.remove(track)
        action = data.action
        if action is not None:
            curves = actions.fcurves(keys)
            shared = not hasattr(action, "slots") and action.users > 1  # other objects still use the curves
            for curve in [] if shared else [curve for curve in curves if curve.data_path in paths]:
                curves.remove(curve)
            if (shared and action == ours) or not len(actions.fcurves(keys)):
                slot = getattr(data, "action_slot", None)
                data.action = None
                if slot is not None and not slot.users():
                    action.slots.remove(slot)
        if not data.action and not data.nla_tracks and not data.drivers:
            keys.animation_data_clear()
    elsewhere = any(take in marks.takes(other) for other in bpy.data.shape_keys if other != keys)
    if ours and not elsewhere and ours.users == int(ours.use_fake_user):
        bpy.data.actions.remove(ours)
