"""Animated objects as files, with the settings under which every vertex of every frame comes back exactly.

A file is made in a folder of its own beside its place and moved there when everything is done, so that there is never
half a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import bpy
from track4d_protocol.errors import InputError

from . import actions, marks
from .files import Staging, check_writable


def export(objects: Sequence[bpy.types.Object], path: Path | str) -> Path:
    """Writes objects with their Track4D motion to a file.

    A `.blend` holds the whole open file, the others only the objects and their parents.

    Args:
        objects: mesh objects of the current view layer.
        path: its suffix says the format, one of `files.WRITABLE`.

    Returns:
        The absolute path.

    Raises:
        InputError: unsupported_format, missing_folder, no_mesh_selected, hidden_object, export_failed with Blender's own words.
    """
    path = check_writable(path)
    with Staging() as staging:
        write(objects, staging.place(path))
        staging.commit()
    return path


def write(objects: Sequence[bpy.types.Object], place: Path) -> None:
    """`export` straight to a path of a `Staging`."""
    with _only(objects) as frames:
        try:
            FORMATS[place.suffix.lower()](str(place), frames)
        except RuntimeError as error:
            raise InputError(
                "export_failed", f"Blender can't write '{place.name}': {str(error).strip()}", "Try another format."
            ) from error
    if not place.is_file():
        raise InputError("export_failed", f"Blender wrote no '{place.name}'.", "Try another format.")


@contextmanager
def _only(objects: Sequence[bpy.types.Object]) -> Iterator[tuple[int, int]]:
    """Selects just the objects and their parents, the scene's range is their motion; all as before afterwards."""
    scene, layer = bpy.context.scene, bpy.context.view_layer
    if not objects:
        raise InputError("no_mesh_selected", "No object is selected.", "Select the object to export.")
    for obj in objects:
        if not obj.visible_get():
            raise InputError("hidden_object", f"'{obj.name}' is hidden and can't be exported.", "Show it (Alt+H).")
    wanted = set(objects)
    for obj in objects:
        while obj.parent:
            obj = obj.parent
            wanted.add(obj)
    selected, active = [obj for obj in layer.objects if obj.select_get()], layer.objects.active
    frame, timing = (scene.frame_current, scene.frame_subframe), (scene.frame_start, scene.frame_end)
    first, last = motion_range(objects) or timing
    try:
        for obj in layer.objects:
            obj.select_set(obj in wanted)
        layer.objects.active = objects[0]
        scene.frame_start, scene.frame_end = first, last
        yield first, last
    finally:
        scene.frame_start, scene.frame_end = timing
        scene.frame_set(frame[0], subframe=frame[1])
        for obj in layer.objects:
            obj.select_set(obj in selected)
        layer.objects.active = active


def motion_range(objects: Sequence[bpy.types.Object]) -> tuple[int, int] | None:
    """First and last frame of the scene in which a Track4D result moves the objects; None without one."""
    times = []
    for obj in objects:
        keys = obj.data.shape_keys if obj.type == "MESH" else None
        paths = marks.own_paths(keys)
        for curve in actions.fcurves(keys) if paths else []:
            if curve.data_path in paths:
                times += list(curve.range())
    return (int(min(times)), int(-(-max(times) // 1))) if times else None


def _gltf(path: str, frames: tuple[int, int], form: str) -> None:
    bpy.ops.export_scene.gltf(
        filepath=path,
        export_format=form,
        use_selection=True,
        export_yup=True,
        export_apply=False,
        export_morph=True,
        export_morph_normal=False,  # normals would make the file four to six times as large
        export_morph_tangent=False,
        export_animations=True,
        export_animation_mode="ACTIONS",
        export_force_sampling=True,
        export_anim_slide_to_zero=True,  # else the clip begins with a pause of one frame
    )


def _fbx(path: str, frames: tuple[int, int]) -> None:
    bpy.ops.export_scene.fbx(
        filepath=path,
        use_selection=True,
        path_mode="COPY",
        embed_textures=True,
        bake_anim=True,
        # with the defaults vertices are off by up to half the object's size
        bake_anim_use_all_actions=False,
        bake_anim_use_nla_strips=False,
        bake_anim_simplify_factor=0,
        bake_anim_force_startend_keying=True,
        use_mesh_modifiers=False,
        add_leaf_bones=False,
    )


def _usd(path: str, frames: tuple[int, int]) -> None:
    bpy.ops.wm.usd_export(filepath=path, selected_objects_only=True, export_animation=True, export_shapekeys=False)


def _alembic(path: str, frames: tuple[int, int]) -> None:
    bpy.ops.wm.alembic_export(filepath=path, selected=True, start=frames[0], end=frames[1], uvs=True)


def _blend(path: str, frames: tuple[int, int]) -> None:
    bpy.ops.wm.save_as_mainfile(filepath=path, copy=True, compress=True, check_existing=False)


FORMATS: dict[str, Callable[[str, tuple[int, int]], None]] = {
    ".glb": lambda path, frames: _gltf(path, frames, "GLB"),
    ".gltf": lambda path, frames: _gltf(path, frames, "GLTF_SEPARATE"),
    ".blend": _blend,
    ".fbx": _fbx,
    ".usdc": _usd,
    ".usd": _usd,
    ".abc": _alembic,
}
