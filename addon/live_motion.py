"""The coarse motion of running jobs, played on the objects themselves: a temporary shape key that nobody ever saves.

The key is taken away before a file is saved, and after a file was loaded or something was undone, whoever put it there; the
next `play` puts it back while the job runs. So neither a file, nor an undo step, nor a duplicated object can keep one.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import bpy
from track4d_protocol.errors import InputError

from . import marks

if TYPE_CHECKING:
    import numpy as np

    from .capture import Snapshot

log = logging.getLogger(__name__)

NAME = "Track4D (working)"
MARK = "track4d_live"  # custom property of shape keys that carry ours; its value says whether we made their Basis
FRAMES_PER_SECOND = 8


@dataclass
class _Live:
    seen: Snapshot
    moves: np.ndarray  # [F, N, 3] in capture space
    frame: int = -1  # that the objects show
    local: dict[int, list[np.ndarray]] = field(default_factory=dict)  # frame: displacements [n, 3] of each object's own vertices


_live: dict[str, _Live] = {}  # by job, the newest last
_rendering = False


def show(job_id: str, seen: Snapshot, moves: np.ndarray) -> None:
    """Plays a motion on the captured objects until `drop`.

    Args:
        seen: what the job was made from.
        moves: [F, N, 3] displacements in capture space.
    """
    if moves.shape[1:] == seen.vertices.shape:
        _live[job_id] = _Live(seen, moves)


def drop(job_id: str) -> None:
    """Ends a job's motion: the objects stand as before."""
    if _live.pop(job_id, None) is not None:
        sweep()


def clear() -> None:
    """Ends all motions."""
    _live.clear()
    sweep()


def play() -> bool:
    """Puts every motion where it is now; True when an object has moved. Objects that can't take it stay as they are."""
    if _rendering or not _live:
        return False
    from .apply import displacements  # late: registering the extension shall be quick
    from .capture import find_objects

    changed = False
    for job_id, live in list(_live.items()):
        frame = int(time.monotonic() * FRAMES_PER_SECOND) % len(live.moves)
        try:
            objects = find_objects(live.seen)
        except InputError:  # another file, or removed
            drop(job_id)
            continue
        if frame == live.frame and all(_block(obj.data.shape_keys) for obj in objects if _can_play(obj)):
            continue
        if frame not in live.local:
            live.local[frame] = [
                displacements(item, live.moves[frame : frame + 1, part], live.seen.to_world)[0]
                for item, part in live.seen.slices()
            ]
        for obj, moves in zip(objects, live.local[frame]):
            if _can_play(obj) and len(obj.data.vertices) == len(moves):
                _place(obj, moves)
        live.frame, changed = frame, True
    return changed


def sweep() -> None:
    """Removes every temporary key of the file, also from meshes that were copied meanwhile."""
    for keys in [keys for keys in bpy.data.shape_keys if MARK in keys and keys.library is None]:
        mesh = keys.user
        users = [obj for obj in bpy.data.objects if obj.data == mesh]
        obj = users[0] if users else bpy.data.objects.new(NAME, mesh)
        try:
            _take_off(obj, keys)
        finally:
            if not users:
                bpy.data.objects.remove(obj)
    for live in _live.values():
        live.frame = -1


def _can_play(obj: bpy.types.Object) -> bool:
    """Not while it is edited or linked, and not on top of another result's motion."""
    keys = obj.data.shape_keys
    free = obj.mode == "OBJECT" and obj.data.library is None and not marks.takes(keys)
    return free and (keys is None or keys.use_relative)


def _block(keys: bpy.types.Key | None) -> bpy.types.ShapeKey | None:
    return keys.key_blocks.get(NAME) if keys is not None and MARK in keys else None


def _place(obj: bpy.types.Object, moves: np.ndarray) -> None:
    import numpy as np  # late: Blender 4.2 doesn't have it loaded, and registering shall be quick

    keys = obj.data.shape_keys
    block = _block(keys)
    if block is None:
        index = obj.active_shape_key_index
        made_basis = keys is None
        if made_basis:
            obj.shape_key_add(name="Basis", from_mix=False)
        block = obj.shape_key_add(name=NAME, from_mix=False)
        keys = obj.data.shape_keys
        keys[MARK] = made_basis
        block.relative_key = keys.reference_key
        obj.active_shape_key_index = index
    block.value = 1.0
    rest = np.empty(moves.size, np.float32)
    keys.reference_key.points.foreach_get("co", rest)
    block.points.foreach_set("co", rest + moves.astype(np.float32).ravel())
    obj.data.update()


def _take_off(obj: bpy.types.Object, keys: bpy.types.Key) -> None:
    from .apply import drop_layers  # late: registering the extension shall be quick

    made_basis = bool(keys[MARK])
    index = obj.active_shape_key_index
    block = keys.key_blocks.get(NAME)
    if block is not None:
        drop_layers(obj.data, [NAME])
        obj.shape_key_remove(block)
    del keys[MARK]
    if made_basis and len(keys.key_blocks) == 1:
        obj.shape_key_clear()
    else:
        obj.active_shape_key_index = min(index, len(keys.key_blocks) - 1)
    obj.data.update()


# Blender's events


@bpy.app.handlers.persistent
def _sweep(*_: object) -> None:
    sweep()
    if any("unfinished" in marks.read(keys) for keys in bpy.data.shape_keys):
        from .apply import sweep as sweep_unfinished  # late, as above

        sweep_unfinished()


@bpy.app.handlers.persistent
def _render_begins(*_: object) -> None:
    """In a render the objects stand as the user left them. This may run beside the main thread: no key is added or removed."""
    global _rendering
    _rendering = True
    for keys in bpy.data.shape_keys:
        block = _block(keys)
        if block is not None:
            block.value = 0.0


@bpy.app.handlers.persistent
def _render_ends(*_: object) -> None:
    global _rendering
    _rendering = False
    for live in _live.values():
        live.frame = -1


HANDLERS = (
    ("save_pre", _sweep),
    ("load_post", _sweep),
    ("undo_post", _sweep),
    ("redo_post", _sweep),
    ("render_init", _render_begins),
    ("render_complete", _render_ends),
    ("render_cancel", _render_ends),
)


def register() -> None:
    for name, handler in HANDLERS:
        getattr(bpy.app.handlers, name).append(handler)


def unregister() -> None:
    for name, handler in HANDLERS:
        handlers = getattr(bpy.app.handlers, name)
        if handler in handlers:
            handlers.remove(handler)
    clear()
