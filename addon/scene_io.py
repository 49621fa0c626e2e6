"""A 3D file as an empty scene with plain mesh objects in it, in their rest pose, ready to be captured."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bpy
from mathutils import Matrix
from track4d_protocol.errors import InputError

from .files import check_readable, unreadable


def load(path: Path | str) -> tuple[list[bpy.types.Object], list[dict[str, str]]]:
    """Replaces the open scene by the contents of a file.

    Armatures, animations and shape key values are taken back to the rest pose; what remains are meshes with their own
    names, vertices, UVs and materials. Of a .blend these are the selected meshes, or all visible ones if none is
    selected; everything else in it stays as it is.

    Args:
        path: .glb, .gltf, .obj, .fbx, .blend or .ply.

    Returns:
        The mesh objects in the order of their names, and warnings ({"code", "message", "action"}).

    Raises:
        InputError: missing_file, unsupported_format, unreadable_file, no_mesh_in_file.
    """
    path = check_readable(path)
    try:
        bpy.ops.wm.read_factory_settings(use_empty=True)
        had_motion = FORMATS[path.suffix.lower()](path)
    except (RuntimeError, ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise unreadable(path, error) from error
    if bpy.context.object and bpy.context.object.mode != "OBJECT":
        bpy.ops.object.mode_set(mode="OBJECT")
    had_motion |= _to_rest_pose()
    objects = _mesh_objects()
    if not objects:
        raise InputError("no_mesh_in_file", f"'{path.name}' has no mesh.", "Choose a file with a mesh in it.")
    for obj in objects:
        if obj.data.users > 1:
            obj.data = obj.data.copy()  # each object gets a motion of its own
    warnings = (
        [
            {
                "code": "rest_pose_used",
                "message": f"'{path.name}' has a rig or an animation; its rest pose is used.",
                "action": "Nothing to do, if that is the pose you want to start from.",
            }
        ]
        if had_motion
        else []
    )
    return objects, warnings


def _mesh_objects() -> list[bpy.types.Object]:
    """What is to be animated: visible meshes with faces; not the shapes that stand for bones."""
    shapes = {bone.custom_shape for obj in bpy.data.objects if obj.type == "ARMATURE" for bone in obj.pose.bones}
    meshes = [obj for obj in bpy.context.view_layer.objects if obj.type == "MESH" and obj not in shapes and obj.data.polygons]
    visible = [obj for obj in meshes if obj.visible_get() and not obj.hide_render]
    selected = [obj for obj in visible if bpy.data.filepath and obj.select_get()]
    return sorted(selected or visible, key=lambda obj: obj.name)


# The rest pose


def _to_rest_pose() -> bool:
    """Takes every animation and rig off the meshes; whether there was any."""
    meshes = _mesh_objects()
    rigs = {modifier.object for obj in meshes for modifier in obj.modifiers if modifier.type == "ARMATURE" and modifier.object}
    movers = {*meshes, *rigs, *(parent for obj in (*meshes, *rigs) for parent in _ancestors(obj))}
    rigs |= {obj for obj in movers if obj.type == "ARMATURE"}
    still = [_stop(owner) for obj in movers for owner in (obj, obj.data, getattr(obj.data, "shape_keys", None)) if owner]
    shaped = [_clear_values(obj.data.shape_keys) for obj in meshes if obj.data.shape_keys]
    posed = {rig.data: rig.data.pose_position for rig in rigs}
    for armature in posed:
        armature.pose_position = "REST"
    bpy.context.view_layer.update()
    worlds = {obj: obj.matrix_world.copy() for obj in meshes}
    for obj in meshes:
        for modifier in [modifier for modifier in obj.modifiers if modifier.type == "ARMATURE"]:
            obj.modifiers.remove(modifier)
        if rigs.intersection(_ancestors(obj)):
            obj.parent = None
            _place(obj, worlds[obj])
    if bpy.data.filepath:  # a .blend: its other contents belong to the user
        for armature, position in posed.items():
            armature.pose_position = position
    else:
        bpy.data.batch_remove(rigs)
        bpy.data.orphans_purge(do_recursive=True)
    bpy.context.view_layer.update()
    return any(still) or any(shaped) or bool(rigs)


def _stop(owner: bpy.types.ID) -> bool:
    data = owner.animation_data
    moved = data is not None and bool(data.action or data.nla_tracks)
    owner.animation_data_clear()
    return moved


def _clear_values(keys: bpy.types.Key) -> bool:
    shaped = [block for block in keys.key_blocks if block != keys.reference_key and block.value]
    for block in shaped:
        block.value = 0.0
    return bool(shaped)


def _ancestors(obj: bpy.types.Object) -> Iterator[bpy.types.Object]:
    while obj.parent:
        obj = obj.parent
        yield obj


def _place(obj: bpy.types.Object, world: Matrix) -> None:
    """Sets an object's matrix; a shear, which location, rotation and scale can't hold, goes into its mesh."""
    obj.matrix_world = world
    plain = Matrix.LocRotScale(*world.decompose())
    rest = plain.inverted_safe() @ world
    if max(abs(a - b) for row, unit in zip(rest, Matrix.Identity(4)) for a, b in zip(row, unit)) > 1e-5:
        if obj.data.users > 1:
            obj.data = obj.data.copy()
        obj.data.transform(rest, shape_keys=True)


# Formats: each returns whether it has left an animation out


def _gltf(path: Path) -> bool:
    """The importer leaves the first frame of the first clip behind, so it reads a copy without animations."""
    with still_gltf(path) as (still, had_animation):
        # The default, 'BLENDER', displaces meshes on bones of a scaled armature.
        bpy.ops.import_scene.gltf(filepath=str(still), bone_heuristic="TEMPERANCE")
    return had_animation


@contextmanager
def still_gltf(path: Path) -> Iterator[tuple[Path, bool]]:
    """A copy of a .glb or .gltf without animations, for as long as the block runs, and whether there were any."""
    binary = path.suffix.lower() == ".glb"
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0] if binary else len(data)
    tree = json.loads(data[20 : 20 + length] if binary else data)
    if not tree.pop("animations", None):
        yield path, False
        return
    with tempfile.TemporaryDirectory() as folder:
        still = Path(folder) / path.name
        if binary:
            text = json.dumps(tree, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 4)
            rest = data[20 + length :]
            header = struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A)
            still.write_bytes(header + text + rest)
        else:
            _make_absolute(tree, path.parent)
            still.write_text(json.dumps(tree))
        yield still, True


def _make_absolute(tree: dict[str, Any], folder: Path) -> None:
    for entry in (*tree.get("buffers", ()), *tree.get("images", ())):
        if "uri" in entry and not entry["uri"].startswith("data:"):
            entry["uri"] = f"{quote(folder.as_posix())}/{entry['uri']}"


def _fbx(path: Path) -> bool:
    bpy.ops.import_scene.fbx(filepath=str(path), use_anim=False)
    return False


def _blend(path: Path) -> bool:
    bpy.ops.wm.open_mainfile(filepath=str(path), load_ui=False, use_scripts=False)
    return False


def _obj(path: Path) -> bool:
    bpy.ops.wm.obj_import(filepath=str(path))
    return False


def _ply(path: Path) -> bool:
    bpy.ops.wm.ply_import(filepath=str(path))
    return False


FORMATS: dict[str, Callable[[Path], bool]] = {
    ".glb": _gltf,
    ".gltf": _gltf,
    ".obj": _obj,
    ".fbx": _fbx,
    ".blend": _blend,
    ".ply": _ply,
}
