"""What every kind of output asks first: does the result fit the objects it was made for?"""

from __future__ import annotations

from collections.abc import Sequence

import bpy
import numpy as np
from track4d_protocol.errors import InputError, ServerError
from track4d_protocol.messages import Result

from ..capture import ObjectSnapshot, Snapshot, find_objects, snapshot, topology_hash


def match(target: Snapshot | Sequence[bpy.types.Object], result: Result) -> tuple[Snapshot, list[np.ndarray]]:
    """The snapshot, and each object's displacements as `fitted` gives them; all is checked.

    Raises:
        InputError: object_missing, in_edit_mode, topology_changed, and what `snapshot` raises.
        ServerError: bad_result, the result doesn't have the size of the objects or isn't finite.
    """
    seen = target if isinstance(target, Snapshot) else snapshot(target)
    find_objects(seen)
    moves = fitted(seen, result)
    check_unchanged(seen)
    return seen, moves


def fitted(seen: Snapshot, result: Result) -> list[np.ndarray]:
    """The result's displacements [F, n, 3] float32 of each object's own vertices, before its modifiers; touches no `bpy`.

    Raises:
        ServerError: bad_result, the result doesn't have the size of the objects or isn't finite.
    """
    frames = np.asarray(result.arrays["vertices"], np.float32)  # [F, N, 3]
    if frames.ndim != 3 or frames.shape[1:] != seen.vertices.shape:
        raise ServerError(
            "bad_result",
            f"The result has vertices of shape {list(frames.shape)} for {len(seen.vertices)} vertices.",
            "Animate again; if it happens again, please report it.",
        )
    if not np.isfinite(frames).all():
        raise ServerError("bad_result", "The result has coordinates that are not finite.", "Animate again with another seed.")
    return [displacements(item, frames[:, part] - seen.vertices[part], seen.to_world) for item, part in seen.slices()]


def check_unchanged(seen: Snapshot) -> list[bpy.types.Object]:
    """The objects of a snapshot as they are now, whose faces are those that were captured.

    Raises:
        InputError: object_missing, in_edit_mode, topology_changed.
    """
    objects = find_objects(seen)
    for item, obj in zip(seen.objects, objects):
        _check_faces(item, obj)
    return objects


def check_mode(obj: bpy.types.Object) -> None:
    """Raises:
    InputError: in_edit_mode.
    """
    if obj.mode != "OBJECT":
        raise InputError(
            "in_edit_mode",
            f"'{obj.name}' is in {obj.mode.replace('_', ' ').lower()} mode.",
            "Switch to object mode (Tab).",
        )


def check_count(item: ObjectSnapshot, obj: bpy.types.Object) -> None:
    """Raises:
    InputError: topology_changed.
    """
    if len(obj.data.vertices) != item.count:
        raise InputError(
            "topology_changed",
            f"'{obj.name}' has {len(obj.data.vertices)} vertices; it had {item.count} when it was captured.",
            "Undo the change, or animate it again.",
        )


def _check_faces(item: ObjectSnapshot, obj: bpy.types.Object) -> None:
    check_mode(obj)
    check_count(item, obj)
    if topology_hash(obj.data) != item.topology:
        raise InputError(
            "topology_changed",
            f"The faces of '{obj.name}' are not those that were captured.",
            "Undo the change, or animate it again.",
        )


def displacements(item: ObjectSnapshot, moves: np.ndarray, to_world: np.ndarray) -> np.ndarray:
    """From displacements in capture space [F, N, 3] to those of the object's own vertices, before its modifiers."""
    linear = np.linalg.inv(item.matrix_world[:3, :3]) @ to_world[:3, :3]
    moves = moves @ linear.T.astype(np.float32)
    return moves if item.unbend is None else np.einsum("nij,fnj->fni", item.unbend, moves)
