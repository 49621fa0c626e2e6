"""Animated objects as files, with the settings under which every vertex of every frame comes back exactly.

A file is made in a folder of its own beside its place and moved there when everything is done, so that there is never
half a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.splat_files import write_gltf, write_ply, write_t4d
from track4d_protocol.splats import Splats

from . import actions, marks
from .apply import is_cloud, read_cloud
from .capture import positions
from .files import SPLATS, Staging, check_writable, numbered, suffix
from .point_cache import write_mdd, write_pc2


class Task(NamedTuple):
    """What a format's function gets: where to write, what, which frames of the scene, and whether normals morph too."""

    path: Path
    objects: Sequence[bpy.types.Object]
    frames: tuple[int, int]
    morph_normals: bool


def export(objects: Sequence[bpy.types.Object], path: Path | str, morph_normals: bool = False) -> list[Path]:
    """Writes objects with their Track4D motion to a file, or to one file per frame.

    A `.blend` holds the whole open file, the others only the objects and their parents; those of `files.SPLATS` hold the
    Gaussian cloud that was made with the objects.

    Args:
        objects: mesh objects of the current view layer, or a Gaussian cloud.
        path: its suffix says the format, one of `files.WRITABLE`.
        morph_normals: glTF files also hold each morph target's normals, and are four to six times as large.

    Returns:
        The absolute paths of what was written: one, or a sequence's.

    Raises:
        InputError: unsupported_format, missing_folder, no_mesh_selected, hidden_object, needs_shape_keys, no_gaussians,
            several_clouds, sheared_cloud, vertices_change, export_failed with Blender's own words.
    """
    path = check_writable(path)
    with Staging() as staging:
        write(objects, staging.place(path), morph_normals)
        return staging.commit()


def write(objects: Sequence[bpy.types.Object], place: Path, morph_normals: bool = False) -> None:
    """`export` straight to a path of a `Staging`."""
    if suffix(place) in SPLATS:
        cloud = _cloud_of(objects)
        write_splats(read_cloud(cloud), place, int(cloud[marks.CLOUD]["frame_start"]))
        return
    objects = [obj for obj in objects if not is_cloud(obj)]
    with _only(objects) as frames:
        try:
            FORMATS[suffix(place)](Task(place, objects, frames, morph_normals))
        except RuntimeError as error:
            raise InputError(
                "export_failed", f"Blender can't write '{place.name}': {str(error).strip()}", "Try another format."
            ) from error
    if not any(place.parent.glob(f"*{place.suffix}")):
        raise InputError("export_failed", f"Blender wrote no '{place.name}'.", "Try another format.")


def write_splats(splats: Splats, place: Path, frame_start: int = 1) -> None:
    """Gaussians in the world as a file of `files.SPLATS`; the frames of a sequence are numbered from `frame_start`."""
    if suffix(place) == ".ply":
        for frame in range(splats.frames):
            with numbered(place, frame_start + frame).open("wb") as file:
                write_ply(file, splats, frame)
    else:
        with place.open("wb") as file:
            (write_t4d if suffix(place) == ".t4d" else write_gltf)(file, splats)


def _cloud_of(objects: Sequence[bpy.types.Object]) -> bpy.types.Object:
    """The cloud among the objects, or the visible one that belongs to them."""
    if not objects:
        raise InputError("no_mesh_selected", "No object is selected.", "Select the object to export.")
    clouds = {obj for obj in objects if is_cloud(obj)}
    clouds = clouds or {child for obj in objects for child in obj.children if is_cloud(child) and child.visible_get()}
    if not clouds:
        raise InputError(
            "no_gaussians",
            f"'{objects[0].name}' has no Gaussian cloud.",
            "Animate it with the output 'Gaussian cloud' or 'all'.",
        )
    if len(clouds) > 1:
        names = ", ".join(sorted(f"'{cloud.name}'" for cloud in clouds))
        raise InputError("several_clouds", f"There are {len(clouds)} Gaussian clouds: {names}.", "Select one of them.")
    return clouds.pop()


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
    for obj in wanted.copy():
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
    """First and last frame of the scene in which the shown Track4D result moves the objects; None without one."""
    times = []
    for obj in objects:
        for record in marks.caches(obj).values():
            if record["modifier"] in obj.modifiers and obj.modifiers[record["modifier"]].show_viewport:
                times += [record["frame_start"], record["frame_end"]]
        keys = obj.data.shape_keys if obj.type == "MESH" else None
        paths = marks.own_paths(keys)
        for curve in actions.fcurves(keys) if paths else []:
            if curve.data_path in paths:
                times += list(curve.range())
    return (int(min(times)), int(-(-max(times) // 1))) if times else None


def _gltf(task: Task, form: str) -> None:
    _refuse_caches(task)
    bpy.ops.export_scene.gltf(
        filepath=str(task.path),
        export_format=form,
        use_selection=True,
        export_yup=True,
        export_apply=False,
        export_morph=True,
        export_morph_normal=task.morph_normals,
        export_morph_tangent=False,
        export_animations=True,
        **_one_clip(task),
        export_force_sampling=True,
        export_anim_slide_to_zero=True,  # else the clip begins with a pause of one frame
    )


def _one_clip(task: Task) -> dict[str, str]:
    """Options under which the action that several objects share becomes one clip with its name.

    Before actions had slots (4.4) the exporter made a clip per object of it.
    """
    if bpy.app.version >= (4, 4, 0):
        return {"export_animation_mode": "ACTIONS"}
    keys = [obj.data.shape_keys for obj in task.objects if obj.data.shape_keys]
    names = [one.animation_data.action.name for one in keys if one.animation_data and one.animation_data.action]
    return {
        "export_animation_mode": "ACTIVE_ACTIONS",
        "export_nla_strips_merged_animation_name": next(iter(names), "Animation"),
    }


def _fbx(task: Task) -> None:
    _refuse_caches(task)
    bpy.ops.export_scene.fbx(
        filepath=str(task.path),
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


def _refuse_caches(task: Task) -> None:
    """glTF and FBX hold shape keys alone; a file in which nothing moves must not pass for a success."""
    for obj in task.objects:
        caches = [modifier for modifier in obj.modifiers if modifier.type == "MESH_CACHE" and modifier.show_viewport]
        if caches and obj.data.shape_keys is None:
            raise InputError(
                "needs_shape_keys",
                f"'{obj.name}' moves by the modifier '{caches[0].name}', which '{task.path.suffix}' can't hold.",
                "Animate it with the output 'shape keys', or export .usdc, .abc, .pc2, .mdd or .obj.",
            )


def _usd(task: Task) -> None:
    bpy.ops.wm.usd_export(filepath=str(task.path), selected_objects_only=True, export_animation=True, export_shapekeys=False)


def _alembic(task: Task) -> None:
    start, end = task.frames
    bpy.ops.wm.alembic_export(filepath=str(task.path), selected=True, start=start, end=end, uvs=True, vcolors=True)


def _blend(task: Task) -> None:
    bpy.ops.wm.save_as_mainfile(filepath=str(task.path), copy=True, compress=True, check_existing=False)


def _obj(task: Task) -> None:
    start, end = task.frames
    path = task.path.with_name(f"{task.path.stem}_.obj")  # the exporter adds four digits
    bpy.ops.wm.obj_export(
        filepath=str(path),
        export_animation=True,
        start_frame=start,
        end_frame=end,
        export_selected_objects=True,
        path_mode="COPY",
    )


def _point_cache(task: Task) -> None:
    """One object is fox.pc2; of several, each is fox_NAME.pc2."""
    scene = bpy.context.scene
    for obj, frames in zip(task.objects, _own_vertices(task.objects, task.frames)):
        name = bpy.path.clean_name(obj.name)
        path = task.path if len(task.objects) == 1 else task.path.with_name(f"{task.path.stem}_{name}{task.path.suffix}")
        if suffix(path) == ".pc2":
            write_pc2(path, frames, task.frames[0])
        else:
            write_mdd(path, frames, scene.render.fps / scene.render.fps_base)


def _own_vertices(objects: Sequence[bpy.types.Object], frames: tuple[int, int]) -> list[np.ndarray]:
    """Each object's own vertices over the scene's frames, in its own space, [F, N, 3].

    Modifiers count up to the first that changes the number of vertices: a cache goes onto the mesh as its artist has it.
    """
    scene, shown = bpy.context.scene, []
    try:
        for obj in objects:
            stack = [modifier for modifier in obj.modifiers if modifier.show_viewport]
            while stack and len(_evaluated(obj).vertices) != len(obj.data.vertices):
                shown.append(stack.pop())
                shown[-1].show_viewport = False
        moving: list[list[np.ndarray]] = [[] for _ in objects]
        for frame in range(frames[0], frames[1] + 1):
            scene.frame_set(frame)
            for obj, places in zip(objects, moving):
                mesh = _evaluated(obj)
                if len(mesh.vertices) != len(obj.data.vertices):
                    raise InputError(
                        "vertices_change",
                        f"'{obj.name}' has {len(obj.data.vertices)} vertices, and {len(mesh.vertices)} at frame {frame}.",
                        "Export .abc or .usdc, or switch that modifier off.",
                    )
                places.append(positions(mesh))
        return [np.stack(places) for places in moving]
    finally:
        for modifier in shown:
            modifier.show_viewport = True


def _evaluated(obj: bpy.types.Object) -> bpy.types.Mesh:
    return obj.evaluated_get(bpy.context.evaluated_depsgraph_get()).data


FORMATS: dict[str, Callable[[Task], None]] = {
    ".glb": lambda task: _gltf(task, "GLB"),
    ".gltf": lambda task: _gltf(task, "GLTF_SEPARATE"),
    ".blend": _blend,
    ".fbx": _fbx,
    ".usdc": _usd,
    ".usd": _usd,
    ".abc": _alembic,
    ".mdd": _point_cache,
    ".pc2": _point_cache,
    ".obj": _obj,
}
