"""What Track4D leaves on an object, to be found again, switched, left out of a capture and taken away without trace.

A result that was put onto an object is a take. Two custom properties tell of the takes, both as JSON: on the shape key
datablock which keys belong to which take, and on the object its history, a record per take of what was asked for. An
action that was made for a take carries the take's name, so that it is found when the user has renamed it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import bpy

MARK = "track4d"
CACHE = "track4d_cache"  # of an object: its mesh caches
CLOUD = "track4d_cloud"  # of a Gaussian cloud: {"take", "frame_start", "step"}


@lru_cache(maxsize=64)
def _parse(text: str) -> dict[str, Any]:
    """The mark of this text; shared, so not to be changed. The panel asks at every redraw."""
    return json.loads(text)


def read(owner: bpy.types.ID | None) -> dict[str, Any]:
    """The mark of a key datablock or an object, which must not be changed; empty without one."""
    text = owner.get(MARK) if owner is not None else None
    return _parse(text) if isinstance(text, str) else {}


def write(owner: bpy.types.ID, mark: dict[str, Any]) -> None:
    owner[MARK] = json.dumps(mark)


def erase(owner: bpy.types.ID) -> None:
    if MARK in owner:
        del owner[MARK]


def takes(keys: bpy.types.Key | None) -> dict[str, list[str]]:
    """Names of the shape keys of each take, those that still exist."""
    found = read(keys).get("takes", {})
    blocks = keys.key_blocks if keys else ()
    return {take: [name for name in names if name in blocks] for take, names in found.items()}


def shown(keys: bpy.types.Key | None) -> str:
    """The take that moves the object; "" without one."""
    return read(keys).get("shown", "")


def history(obj: bpy.types.Object | None) -> dict[str, dict[str, Any]]:
    """The object's records by take, the oldest first; not to be changed."""
    return read(obj).get("history", {})


def remember(obj: bpy.types.Object, take: str, **about: Any) -> None:
    """Adds to the record of a take: prompt, seed, preset, settings, model, versions, ..."""
    records = history(obj)
    write(obj, read(obj) | {"history": records | {take: records.get(take, {}) | about}})


def forget(obj: bpy.types.Object, take: str | None = None) -> None:
    """Removes the record of one take, or all records."""
    left = {name: record for name, record in history(obj).items() if name != take and take is not None}
    if left:
        write(obj, read(obj) | {"history": left})
    else:
        erase(obj)


def is_animated(obj: bpy.types.Object | None) -> bool:
    """Whether an object carries a result."""
    return obj is not None and obj.type == "MESH" and (MARK in obj or MARK in (obj.data.shape_keys or ()))


def caches(obj: bpy.types.Object) -> dict[str, dict[str, Any]]:
    """By take, the mesh caches that Track4D gave an object: {"modifier", "file", "frame_start", "frame_end"}."""
    text = obj.get(CACHE)
    return _parse(text) if isinstance(text, str) else {}


def own_keys(keys: bpy.types.Key | None) -> set[str]:
    """Names of the shape keys that Track4D made, of all takes."""
    return {name for names in takes(keys).values() for name in names}


def own_paths(keys: bpy.types.Key | None) -> set[str]:
    """Data paths of the F-curves that Track4D made."""
    return {value_path(name) for name in own_keys(keys)}


def action_of(take: str) -> bpy.types.Action | None:
    """The action that was made for a take; None when its curves went into an action of the user's."""
    return next((action for action in bpy.data.actions if action.get(MARK) == take), None)


def value_path(name: str) -> str:
    """The data path of a shape key's value."""
    return f'key_blocks["{bpy.utils.escape_identifier(name)}"].value'
