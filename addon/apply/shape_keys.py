"""A result as shape keys: one per frame, faded into each other by one action.

The keys hold displacements on top of the Basis, so whatever the object had before (shape keys, modifiers, animation
added in the meantime) goes on working. Between two frames the vertices move linearly.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import bpy
import numpy as np
from track4d_protocol.messages import Result

from .. import actions, marks
from ..capture.mesh import Snapshot
from .target import check_mode, displacements, match

LINEAR = 1  # Keyframe.interpolation as foreach_set takes it


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
    seen, objects, frames = match(target, result)
    remove_keys(objects, take or None)
    take = take or uuid.uuid4().hex
    prompt = str(result.report.get("prompt", "")) or "motion"
    action = bpy.data.actions.new(f"Track4D: {prompt}"[:63])
    action[marks.MARK] = take
    names: list[str] = []
    for (item, part), obj in zip(seen.slices(), objects):
        moves = displacements(item, frames[:, part] - seen.vertices[part], seen.to_world)
        names = _add_keys(obj, moves, take)
        switch(obj.data.shape_keys, take)
        used = _animate(obj.data.shape_keys, names, action, frame_start, step)
        marks.remember(obj, take, **about(result))
    if not action.users:
        bpy.data.actions.remove(action)  # every object has an action of its own that took the curves
        action = used
    return {
        "objects": [obj.name for obj in objects],
        "keys": names,
        "action": action.name,
        "frame_start": frame_start,
        "frame_end": frame_start + (len(frames) - 1) * step,
        "vertices": len(seen.vertices),
        "take": take,
    }


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
            if marks.read(keys)["basis"] and len(keys.key_blocks) == 1:
                obj.shape_key_clear()
            else:
                marks.erase(keys)
        elif marks.shown(keys) == take:
            switch(keys, list(marks.takes(keys))[-1])
        marks.forget(obj, take)
        if obj.data.shape_keys:
            obj.active_shape_key_index = min(index, len(keys.key_blocks) - 1)
        obj.data.update()
    return len(found)


def _add_keys(obj: bpy.types.Object, moves: np.ndarray, take: str) -> list[str]:
    index = obj.active_shape_key_index
    added_basis = obj.data.shape_keys is None
    if added_basis:
        obj.shape_key_add(name="Basis", from_mix=False)
    keys = obj.data.shape_keys
    basis = np.empty(moves.shape[1] * 3, np.float32)
    keys.reference_key.points.foreach_get("co", basis)
    names = []
    for number, move in enumerate(moves, 1):
        block = obj.shape_key_add(name=f"f{number:04d}", from_mix=False)
        block.relative_key = keys.reference_key
        block.points.foreach_set("co", basis + move.ravel())
        names.append(block.name)
    mark = {"basis": added_basis} | marks.read(keys)
    marks.write(keys, mark | {"takes": mark.get("takes", {}) | {take: names}})
    obj.active_shape_key_index = index
    obj.data.update()
    return names


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
