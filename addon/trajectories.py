"""The clips of animated files as vertices over time, for training data. `python -m track4d_addon.trajectories --help`.

Standard output carries one JSON object per file: {"file", "arrays": path of an .npz, "clips": [{"name", "loops"}], "bones",
"warnings"} or {"file", "error"}. The .npz has faces [T, 3], uvs [T, 3, 2], materials [T], texture_0, texture_1, ... uint8
[h, w, 3] sRGB, and vertices_0, vertices_1, ... [F, N, 3] float32 in the world, one per clip. A loop's last frame leads to
its first. Everything that Blender prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from track4d_protocol.errors import InputError, Track4DError

from .files import check_readable, leave, unreadable

if TYPE_CHECKING:
    import bpy

RATE = 24  # frames per second at which files without a rate of their own are read
MOST_VERTICES = 200_000
LOOP_GAP = 0.02  # of the size: how far the last pose of a loop may be from its first
LOOP_SHARE = 0.1  # of the clip's motion, likewise
STILL = 0.002  # of the size: a clip that moves no vertex further is none

# What moves during a clip: datablock, its action, the action's slot (None before Blender 4.4).
Parts = list[tuple[Any, Any, Any]]
# Values of what actions set, by name.
Pose = dict[tuple[str, ...], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Extracts the clips of files one after another; a file that can't be read is reported and the next one follows."""
    parser = argparse.ArgumentParser(prog="track4d_addon.trajectories", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .npz files")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--loops", type=Path, help="JSON {file: {clip: true or false}} where it is known")
    options = parser.parse_args(arguments)
    known = json.loads(options.loops.read_text()) if options.loops else {}
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # Blender prints to file descriptor 1
        for index, path in enumerate(options.files):
            try:
                arrays, found = extract(path, options.frames, known.get(str(path), {}))
                found["arrays"] = str(options.out / f"{index}.npz")
                np.savez(found["arrays"], **arrays)
            except Track4DError as error:
                found = {"error": error.to_dict()}
            out.write(json.dumps({"file": str(path)} | found) + "\n")
            out.flush()
    return 0


def extract(path: Path, frames: int, known: dict[str, bool]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All clips of a file.

    Args:
        path: .glb, .gltf, .fbx or .blend.
        frames: of each clip, evenly over its length.
        known: by the name of a clip, whether it loops; the others are measured.

    Returns:
        The arrays of the .npz, and what is said about them.

    Raises:
        InputError: missing_file, unsupported_format, unreadable_file, no_mesh_in_file, too_many_vertices, no_clips.
    """
    import bpy

    default = open_animated(check_readable(path))
    meshes = _visible_meshes()
    if not meshes:
        raise InputError("no_mesh_in_file", f"'{path.name}' has no mesh.", "Choose a file with a mesh in it.")
    clips = _clips()
    owners = {owner for parts in clips.values() for owner, _, _ in parts}
    for owner in owners:
        owner.animation_data.use_nla = False
    surface = _surface(meshes)
    vertices: list[np.ndarray] = []
    about: list[dict[str, Any]] = []
    warnings: list[dict[str, str]] = []
    for name, parts in sorted(clips.items()):
        play(owners, parts, default)
        starts, ends = zip(*(action.frame_range for _, action, _ in parts))
        first, last = min(starts), max(ends)
        poses = _poses(meshes, np.linspace(first, last, frames))
        fault = _fault(poses, len(surface["count"]))
        if fault:
            warnings.append(
                {
                    "code": "clip_skipped",
                    "message": f"The clip '{name}' of '{path.name}' is left out: {fault}.",
                    "action": "Nothing to do, if it isn't needed.",
                }
            )
            continue
        trajectory = np.stack(poses)
        loops = known.get(name, _loops(trajectory))
        if loops:
            trajectory = np.stack(_poses(meshes, np.linspace(first, last, frames, endpoint=False)))
        vertices.append(trajectory)
        about.append({"name": name, "loops": bool(loops)})
    if not about:
        raise InputError("no_clips", f"'{path.name}' has no animation that moves its mesh.", "Choose a file with clips in it.")
    bones = sorted({bone.name for obj in bpy.data.objects if obj.type == "ARMATURE" for bone in obj.data.bones})
    del surface["count"]
    arrays = surface | {f"vertices_{k}": trajectory for k, trajectory in enumerate(vertices)}
    return arrays, {"clips": about, "bones": bones, "warnings": warnings}


def open_animated(path: Path) -> Pose:
    """Replaces the open scene by a file with its animations; the pose that holds for whatever a clip doesn't set.

    An importer leaves a clip's first frame behind, so that pose is read from the file without its animations.

    Raises:
        InputError: unsupported_format, unreadable_file.
    """
    import bpy

    from .scene_io import still_gltf

    def start() -> None:
        bpy.ops.wm.read_factory_settings(use_empty=True)
        bpy.context.scene.render.fps = RATE

    suffix = path.suffix.lower()
    try:
        start()
        if suffix in (".glb", ".gltf"):
            # The default heuristic, 'BLENDER', displaces meshes on bones of a scaled armature.
            with still_gltf(path) as (still, _):
                bpy.ops.import_scene.gltf(filepath=str(still), bone_heuristic="TEMPERANCE")
            pose = _pose()
            start()
            bpy.ops.import_scene.gltf(filepath=str(path), bone_heuristic="TEMPERANCE")
        elif suffix == ".fbx":
            bpy.ops.import_scene.fbx(filepath=str(path), ignore_leaf_bones=True, use_anim=False)
            pose = _pose()
            start()
            bpy.ops.import_scene.fbx(filepath=str(path), ignore_leaf_bones=True)
        elif suffix == ".blend":
            bpy.ops.wm.open_mainfile(filepath=str(path), load_ui=False, use_scripts=False)
            pose = _pose()
        else:
            raise InputError("unsupported_format", f"'{path.name}' can't hold clips.", "Use .glb, .gltf, .fbx or .blend.")
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, OSError) as error:
        raise unreadable(path, error) from error
    return pose


def _movers() -> dict[tuple[str, ...], tuple[Any, str]]:
    """What actions set, by name: the owner and the attribute that holds it."""
    import bpy

    objects = bpy.data.objects
    return (
        {("object", obj.name): (obj, "matrix_basis") for obj in objects}
        | {("bone", obj.name, bone.name): (bone, "matrix_basis") for obj in objects if obj.pose for bone in obj.pose.bones}
        | {("key", key.name, block.name): (block, "value") for key in bpy.data.shape_keys for block in key.key_blocks}
    )


def _pose() -> Pose:
    return {name: copy(getattr(mover, attribute)) for name, (mover, attribute) in _movers().items()}


def _visible_meshes() -> list[bpy.types.Object]:
    """What a render would show; not the shapes that stand for bones."""
    import bpy

    shapes = {bone.custom_shape for obj in bpy.data.objects if obj.type == "ARMATURE" for bone in obj.pose.bones}
    meshes = (obj for obj in bpy.context.view_layer.objects if obj.type == "MESH" and obj not in shapes)
    seen = [obj for obj in meshes if obj.data.polygons and obj.visible_get() and not obj.hide_render]
    return sorted(seen, key=lambda obj: obj.name)


# Clips


def _clips() -> dict[str, Parts]:
    """Clips by name: tracks of the NLA editor, active actions, and actions that only lie in the file."""
    import bpy

    owners = [*bpy.data.objects, *bpy.data.shape_keys, *bpy.data.armatures]
    clips: dict[str, Parts] = {}
    used = set()
    for owner in owners:
        data = owner.animation_data
        if data is None:
            continue
        for track in data.nla_tracks:
            for strip in (strip for strip in track.strips if strip.action):
                clips.setdefault(track.name, []).append((owner, strip.action, getattr(strip, "action_slot", None)))
                used.add(strip.action)
        if data.action and data.action not in used:
            clips.setdefault(_short(data.action.name), []).append((owner, data.action, getattr(data, "action_slot", None)))
    used |= {action for parts in clips.values() for _, action, _ in parts}
    for action in bpy.data.actions:
        if action not in used and (parts := _owners(action, owners)):
            clips.setdefault(_short(action.name), []).extend(parts)
    return clips


def _short(name: str) -> str:
    """FBX calls an action object|clip or object|clip|layer."""
    return name.split("|")[1] if "|" in name else name


def _owners(action: bpy.types.Action, owners: list) -> Parts:
    """Which datablocks an action that nobody uses was made for: those of its name, else the only armature."""
    rigs = [owner for owner in owners if getattr(owner, "type", "") == "ARMATURE"]
    found: Parts = []
    for slot in getattr(action, "slots", (None,)):
        kind = slot.target_id_type if slot else action.id_root
        named = slot.name_display if slot else action.name.split("|")[0]
        fitting = [owner for owner in owners if owner.id_type == kind]
        chosen = [owner for owner in fitting if owner.name == named] or (rigs if len(rigs) == 1 and kind == "OBJECT" else [])
        found += [(owner, action, slot) for owner in chosen]
    return found


def play(owners: set, parts: Parts, default: Pose) -> None:
    """Makes these actions the active ones; what they don't set goes back to the `default` pose."""
    for owner in owners:
        owner.animation_data.action = None
    for name, (mover, attribute) in _movers().items():
        if name in default:
            setattr(mover, attribute, default[name])
    for owner, action, slot in parts:
        data = owner.animation_data or owner.animation_data_create()
        data.action = action
        if slot is not None:
            data.action_slot = slot


def _loops(trajectory: np.ndarray) -> bool:
    """Whether the last pose of [F, N, 3] leads to the first: it is the same, but for where the whole object is."""
    centred = trajectory - trajectory.mean(1, keepdims=True)
    size = float(np.linalg.norm(np.ptp(trajectory[0], axis=0)))
    gap = float(np.linalg.norm(centred[-1] - centred[0], axis=1).mean())
    motion = float(np.linalg.norm(centred - centred[0], axis=2).mean(1).max())
    return gap <= LOOP_GAP * size and gap <= LOOP_SHARE * motion


def _fault(poses: list[np.ndarray], count: int) -> str:
    """Why poses, each [N, 3], are no clip; empty when they are one."""
    if any(len(pose) != count for pose in poses):
        return "its number of vertices changes"
    if not all(np.isfinite(pose).all() for pose in poses):
        return "it has coordinates that are not finite"
    size = float(np.linalg.norm(np.ptp(poses[0], axis=0)))
    if max(float(np.abs(pose - poses[0]).max()) for pose in poses) <= STILL * size:
        return "nothing moves"
    return ""


# Geometry


def _poses(meshes: list[bpy.types.Object], times: np.ndarray) -> list[np.ndarray]:
    """World positions after all modifiers at frames `times`; each [N, 3] float32."""
    import bpy

    poses = []
    for time in times:
        bpy.context.scene.frame_set(int(time // 1), subframe=float(time % 1))
        graph = bpy.context.evaluated_depsgraph_get()
        parts = []
        for obj in meshes:
            evaluated = obj.evaluated_get(graph)
            flat = np.empty(len(evaluated.data.vertices) * 3, np.float32)
            evaluated.data.vertices.foreach_get("co", flat)
            matrix = np.array(evaluated.matrix_world)
            parts.append((flat.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32))
        poses.append(np.concatenate(parts))
    return poses


def _surface(meshes: list[bpy.types.Object]) -> dict[str, np.ndarray]:
    """Triangles, UVs and textures of all meshes as one, and "count", an array as long as there are vertices.

    Raises:
        InputError: too_many_vertices.
    """
    import bpy

    from .capture import BaseColors, positions, read_pixels, read_surface

    surfaces, faces, uvs, materials, count = [], [], [], [], 0
    graph = bpy.context.evaluated_depsgraph_get()
    for obj in meshes:
        mesh = bpy.data.meshes.new_from_object(obj.evaluated_get(graph), preserve_all_data_layers=True, depsgraph=graph)
        for index, slot in enumerate(obj.material_slots):  # also those that are linked to the object instead of its mesh
            if index < len(mesh.materials):
                mesh.materials[index] = slot.material
        surfaces.append(read_surface(mesh).cut(positions(mesh)))
        faces.append(surfaces[-1].triangles + count)
        count += len(mesh.vertices)
        bpy.data.meshes.remove(mesh)
    if count > MOST_VERTICES:
        raise InputError(
            "too_many_vertices",
            f"The file's meshes have {count} vertices; clips are taken from at most {MOST_VERTICES}.",
            "Use Blender's Decimate modifier.",
        )
    images = {coat.image for surface in surfaces for coat in surface.coats.values() if coat.image}
    colors = BaseColors({image.session_uid: read_pixels(image) for image in images})
    for obj, surface in zip(meshes, surfaces):
        corner_uvs, material = colors.paint(surface, obj.name)
        uvs.append(corner_uvs)
        materials.append(material)
    return {
        "count": np.empty(count, bool),
        "faces": np.concatenate(faces).astype(np.int32),
        "uvs": np.concatenate(uvs).astype(np.float32),
        "materials": np.concatenate(materials).astype(np.int32),
    } | {f"texture_{k}": texture for k, texture in enumerate(colors.textures)}


if __name__ == "__main__":
    leave(main())
