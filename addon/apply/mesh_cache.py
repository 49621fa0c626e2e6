"""A result as a point cache beside the .blend file, played by a Mesh Cache modifier: nothing of it is in the .blend itself.

The modifier comes first, so that the modifiers of the object go on working on top of it; the object's own shape keys stand as
they were when the cache was made.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path

import bpy
import numpy as np
from track4d_protocol.errors import InputError

from .. import marks
from ..capture import Snapshot, find_objects, positions
from ..files import Staging
from ..point_cache import write_pc2
from ..slices import in_background

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


def cache_steps(
    seen: Snapshot, moves: list[np.ndarray], frame_start: int = 1, step: float = 1.0, take: str = ""
) -> Generator[None, None, list[str]]:
    """Writes a result as PC2 files, in slices; `play_caches` lets the objects play them.

    Args:
        seen: the objects.
        moves: as `target.fitted` gives them.
        frame_start, step: as in `shape_keys`.
        take: keys of other takes are no part of what is written.

    Returns:
        Names of the files in the folder `FOLDER` beside the .blend file, in the order of the objects.

    Raises:
        InputError: unsaved_file, missing_folder, object_missing.
    """
    check_saved()
    folder = Path(bpy.data.filepath).parent / FOLDER
    bases = [_mixed(obj, take) for obj in find_objects(seen)]
    paths = [folder / f"{bpy.path.clean_name(item.name)}_{uuid.uuid4().hex[:8]}.pc2" for item in seen.objects]
    yield from in_background(_write, paths, bases, moves, frame_start, step)
    return [path.name for path in paths]


def _write(paths: list[Path], bases: list[np.ndarray], moves: list[np.ndarray], frame_start: int, step: float) -> None:
    try:
        paths[0].parent.mkdir(exist_ok=True)
        with Staging() as staging:
            for path, base, own in zip(paths, bases, moves):
                write_pc2(staging.place(path), base + own, frame_start, step)
            staging.commit()
    except OSError as error:
        raise InputError(
            "missing_folder",
            f"The folder '{paths[0].parent}' can't be written to: {error.strerror}.",
            "Make room, or save elsewhere.",
        ) from error


def play_caches(
    objects: Sequence[bpy.types.Object], files: Sequence[str], frames: int, frame_start: int, step: float, take: str
) -> None:
    """Lets objects play the files of a take; an earlier cache of this name is replaced."""
    remove_caches(objects, take)
    for name, obj in zip(files, objects):
        modifier = obj.modifiers.new("Track4D", "MESH_CACHE")
        modifier.cache_format, modifier.filepath = "PC2", f"//{FOLDER}/{name}"
        modifier.frame_scale, modifier.frame_start = 1 / step, frame_start / step  # it shows frame * scale - start
        obj.modifiers.move(len(obj.modifiers) - 1, 0)
        record = {
            "modifier": modifier.name,
            "file": name,
            "frame_start": frame_start,
            "frame_end": frame_start + (frames - 1) * step,
        }
        obj[marks.CACHE] = json.dumps(marks.caches(obj) | {take: record})


def delete_files(files: Sequence[str]) -> None:
    """Deletes files that no object plays."""
    for name in files:
        _delete(name)


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


def _mixed(obj: bpy.types.Object, take: str) -> np.ndarray:
    """The object's own vertices under its shape keys but those of other takes, before its modifiers; [N, 3] float32."""
    keys = obj.data.shape_keys
    if keys is None:
        return positions(obj.data)
    others = [keys.key_blocks[name] for other, names in marks.takes(keys).items() if other != take for name in names]
    muted = [block.mute for block in others]
    for block in others:
        block.mute = True
    index = obj.active_shape_key_index
    mixed = obj.shape_key_add(name="mix", from_mix=True)
    places = np.empty(len(obj.data.vertices) * 3, np.float32)
    mixed.points.foreach_get("co", places)
    obj.shape_key_remove(mixed)
    obj.active_shape_key_index = index
    for block, mute in zip(others, muted):
        block.mute = mute
    return places.reshape(-1, 3)
