"""A result as a point cache beside the .blend file, played by a Mesh Cache modifier: nothing of it is in the .blend itself.

The modifier comes first, so that the modifiers of the object go on working on top of it; the object's own shape keys stand as
they were when the cache was made.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.messages import Result

from .. import marks
from ..capture.mesh import Snapshot, positions
from ..files import Staging
from ..point_cache import write_pc2
from .shape_keys import switch
from .target import displacements, match

FOLDER = "track4d_cache"


def check_saved() -> None:
    """Raises:
    InputError: unsaved_file.
    """
    if not bpy.data.filepath:
        raise InputError(
            "unsaved_file",
            "The mesh cache is a file beside the .blend file, which has never been saved.",
            "Save it first (Ctrl+S).",
        )


def mesh_cache(
    target: Snapshot | Sequence[bpy.types.Object], result: Result, frame_start: int = 1, step: float = 1.0, take: str = ""
) -> list[str]:
    """Writes a result as PC2 files and lets the objects play them.

    Args:
        target, result, frame_start, step: as in `shape_keys`.
        take: under which name; an earlier cache of this name is replaced.

    Returns:
        Names of the files in the folder `FOLDER` beside the .blend file.

    Raises:
        InputError: unsaved_file, missing_folder, and what `target.match` raises. Nothing is changed then.
        ServerError: bad_result.
    """
    check_saved()
    seen, objects, frames = match(target, result)
    remove_caches(objects, take)
    folder = Path(bpy.data.filepath).parent / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with Staging() as staging:
            paths = []
            for (item, part), obj in zip(seen.slices(), objects):
                if marks.takes(obj.data.shape_keys):
                    switch(obj.data.shape_keys, take)  # the keys of other takes are no part of the base
                moves = displacements(item, frames[:, part] - seen.vertices[part], seen.to_world)
                paths.append(folder / f"{bpy.path.clean_name(obj.name)}_{uuid.uuid4().hex[:8]}.pc2")
                write_pc2(staging.place(paths[-1]), _mixed(obj) + moves, frame_start, step)
            staging.commit()
    except OSError as error:
        raise InputError(
            "missing_folder", f"The folder '{folder}' can't be written to: {error.strerror}.", "Make room, or save elsewhere."
        ) from error
    for path, obj in zip(paths, objects):
        modifier = obj.modifiers.new("Track4D", "MESH_CACHE")
        modifier.cache_format, modifier.filepath = "PC2", f"//{FOLDER}/{path.name}"
        modifier.frame_scale, modifier.frame_start = 1 / step, frame_start / step  # it shows frame * scale - start
        obj.modifiers.move(len(obj.modifiers) - 1, 0)
        record = {
            "modifier": modifier.name,
            "file": path.name,
            "frame_start": frame_start,
            "frame_end": frame_start + (len(frames) - 1) * step,
        }
        obj[marks.CACHE] = json.dumps(marks.caches(obj) | {take: record})
    return [path.name for path in paths]


def remove_caches(objects: Sequence[bpy.types.Object], take: str | None = None) -> None:
    """Removes the modifiers and files of one take, or of all; a file that a copy of the object plays stays."""
    for obj in objects:
        found = marks.caches(obj)
        removed = {name: record for name, record in found.items() if take is None or name == take}
        left = {name: record for name, record in found.items() if name not in removed}
        if left:
            obj[marks.CACHE] = json.dumps(left)
        elif found:
            del obj[marks.CACHE]
        for record in removed.values():
            modifier = obj.modifiers.get(record["modifier"])
            if modifier is not None:
                obj.modifiers.remove(modifier)
            _delete(record["file"])


def _delete(name: str) -> None:
    folder = Path(bpy.path.abspath(f"//{FOLDER}"))
    used = {record["file"] for obj in bpy.data.objects for record in marks.caches(obj).values()}
    if not bpy.data.filepath or name in used:
        return
    (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _mixed(obj: bpy.types.Object) -> np.ndarray:
    """The object's own vertices under its shape keys, before its modifiers; [N, 3] float32."""
    if obj.data.shape_keys is None:
        return positions(obj.data)
    index = obj.active_shape_key_index
    mixed = obj.shape_key_add(name="mix", from_mix=True)
    places = np.empty(len(obj.data.vertices) * 3, np.float32)
    mixed.points.foreach_get("co", places)
    obj.shape_key_remove(mixed)
    obj.active_shape_key_index = index
    return places.reshape(-1, 3)
