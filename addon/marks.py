"""What Track4D leaves on an object, to be found again, replaced, left out of a capture and taken away without trace.

The mark is one custom property on the shape key datablock (`bpy.types.Key`), which exists as long as our keys do.
"""

from __future__ import annotations

from typing import Any

import bpy

MARK = "track4d"


def read(keys: bpy.types.Key | None) -> dict[str, Any]:
    """The mark: names of our keys, "basis" (whether we added it), action, prompt, seed, ...; empty without a result."""
    if keys is None or MARK not in keys:
        return {}
    mark = keys[MARK].to_dict()
    return mark | {"keys": [name for name in mark.get("keys", []) if name in keys.key_blocks]}


def is_animated(obj: bpy.types.Object | None) -> bool:
    """Whether an object carries a result."""
    return obj is not None and obj.type == "MESH" and MARK in (obj.data.shape_keys or ())


def own_keys(keys: bpy.types.Key | None) -> set[str]:
    """Names of the shape keys that Track4D made."""
    return set(read(keys).get("keys", []))


def own_paths(keys: bpy.types.Key | None) -> set[str]:
    """Data paths of the F-curves that Track4D made."""
    return {value_path(name) for name in own_keys(keys)}


def value_path(name: str) -> str:
    """The data path of a shape key's value."""
    return f'key_blocks["{bpy.utils.escape_identifier(name)}"].value'
