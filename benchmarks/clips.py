"""Ground truth from real animated assets: runs in a process of its own because of bpy.

    python benchmarks/clips.py FILE.glb CLIP OUT.npz

Plays one cycle of the clip (the last, repeated frame is left out) in 16 frames and stores the evaluated vertices in canonical
axes (+Z up, front +X), centred on frame 0 and scaled so that every frame lies within radius 0.95, with the base colour textures.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import tempfile
from pathlib import Path

import bpy
import numpy as np
from PIL import Image

FRAMES = 16
TEXTURE = 512


def load(path: Path) -> None:
    bpy.ops.wm.read_factory_settings(use_empty=True)
    # The default bone heuristic displaces meshes parented to bones when the armature object is scaled (bpy 5.0.1).
    bpy.ops.import_scene.gltf(filepath=str(path), bone_heuristic="TEMPERANCE")


def pose() -> dict:
    """Local transforms of objects and pose bones and shape key values, by name."""
    state: dict = {}
    for item in bpy.data.objects:
        state[item.name] = item.matrix_basis.copy()
        if item.type == "ARMATURE":
            state.update({(item.name, bone.name): bone.matrix_basis.copy() for bone in item.pose.bones})
        if item.type == "MESH" and item.data.shape_keys:
            state.update({(item.name, "key", key.name): key.value for key in item.data.shape_keys.key_blocks})
    return state


def own_pose(path: Path) -> dict:
    """The file's own pose: the importer leaves the first clip evaluated, so a copy without animations is imported."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    document = json.loads(data[20:20 + length])
    document.pop("animations", None)
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    rest = data[20 + length:]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "static.glb"
        copy.write_bytes(struct.pack("<4sII", b"glTF", 2, 20 + len(text) + len(rest)) + struct.pack("<I4s", len(text), b"JSON")
                         + text + rest)
        load(copy)
    return pose()


def set_pose(state: dict) -> None:
    for item in bpy.data.objects:
        if item.name in state:
            item.matrix_basis = state[item.name]
        if item.type == "ARMATURE":
            for bone in item.pose.bones:
                if (item.name, bone.name) in state:
                    bone.matrix_basis = state[item.name, bone.name]
        if item.type == "MESH" and item.data.shape_keys:
            for key in item.data.shape_keys.key_blocks:
                if (item.name, "key", key.name) in state:
                    key.value = state[item.name, "key", key.name]
    bpy.context.view_layer.update()


def play(clip: str, state: dict) -> tuple[float, float]:
    """Activates one glTF animation on everything it drives; its first and last frame."""
    animated = [item for item in bpy.data.objects if item.animation_data]
    animated += [item.data.shape_keys for item in bpy.data.objects
                 if item.type == "MESH" and item.data.shape_keys and item.data.shape_keys.animation_data]
    strips = {}
    for item in animated:
        for track in item.animation_data.nla_tracks:
            if track.name == clip:
                strips[item] = track.strips[0]
        item.animation_data.action = None
        item.animation_data.use_nla = False
    set_pose(state)
    ranges = []
    for item, strip in strips.items():
        item.animation_data.action = strip.action
        if strip.action_slot is not None:
            item.animation_data.action_slot = strip.action_slot
        ranges.append(strip.action.frame_range)
    return min(first for first, _ in ranges), max(last for _, last in ranges)


def mesh_objects() -> list:
    shapes = {bone.custom_shape for item in bpy.data.objects if item.type == "ARMATURE"
              for bone in item.pose.bones if bone.custom_shape}
    return sorted((item for item in bpy.context.view_layer.objects
                   if item.type == "MESH" and item not in shapes and not item.hide_render), key=lambda item: item.name)


def evaluated(objects: list) -> np.ndarray:
    """World positions of all vertices after skinning and shape keys; [N, 3] float64."""
    graph = bpy.context.evaluated_depsgraph_get()
    positions = []
    for item in objects:
        posed = item.evaluated_get(graph)
        mesh = posed.to_mesh()
        local = np.empty(len(mesh.vertices) * 3, np.float32)
        mesh.vertices.foreach_get("co", local)
        matrix = np.array(posed.matrix_world, np.float64)
        positions.append(local.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
        posed.to_mesh_clear()
    return np.concatenate(positions)


def base_color(material) -> np.ndarray:
    """Base colour, factor times picture; [TEXTURE, TEXTURE, 3] float32 sRGB, top row first."""
    factor, image = np.ones(4), None
    for node in material.node_tree.nodes if material and material.node_tree else []:
        if node.type != "BSDF_PRINCIPLED":
            continue
        socket = node.inputs["Base Color"]
        if not socket.is_linked:
            factor = np.array(socket.default_value)
        pending = [socket.links[0].from_node] if socket.is_linked else []
        while pending:
            source = pending.pop()
            if source.type == "TEX_IMAGE" and source.image:
                image = source.image
                break
            for value in source.inputs:
                if value.is_linked:
                    pending.append(value.links[0].from_node)
                elif value.type == "RGBA" and source.type in ("MIX", "MIX_RGB"):
                    factor = np.array(value.default_value)
    linear = factor[:3]
    color = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    if image is None:
        return np.broadcast_to(color, (TEXTURE, TEXTURE, 3)).astype(np.float32)
    width, height = image.size
    pixels = np.empty(width * height * 4, np.float32)
    image.pixels.foreach_get(pixels)
    picture = Image.fromarray((pixels.reshape(height, width, 4)[::-1, :, :3].clip(0, 1) * 255).astype(np.uint8))
    picture = picture.resize((TEXTURE, TEXTURE), Image.BOX if width > TEXTURE else Image.BILINEAR)
    return (np.asarray(picture, np.float32) / 255 * color).astype(np.float32)


def surface(objects: list) -> dict[str, np.ndarray]:
    """Triangles, corner uvs, materials and textures of all objects as one mesh."""
    faces, uvs, materials, names, textures, offset = [], [], [], [], [], 0
    for item in objects:
        mesh = item.data
        mesh.calc_loop_triangles()
        count = len(mesh.loop_triangles)
        corners, loops, slots = np.empty(count * 3, np.int32), np.empty(count * 3, np.int32), np.empty(count, np.int32)
        mesh.loop_triangles.foreach_get("vertices", corners)
        mesh.loop_triangles.foreach_get("loops", loops)
        mesh.loop_triangles.foreach_get("material_index", slots)
        uv = np.zeros((len(mesh.loops), 2), np.float32)
        if mesh.uv_layers:
            flat = np.empty(len(mesh.loops) * 2, np.float32)
            mesh.uv_layers.active.data.foreach_get("uv", flat)
            uv = flat.reshape(-1, 2)
        for slot in item.material_slots or [None]:
            name = slot.material.name if slot and slot.material else None
            if name not in names:
                names.append(name)
                textures.append(base_color(slot.material if slot else None))
        index = np.array([names.index(slot.material.name if slot.material else None) for slot in item.material_slots] or [0])
        faces.append(corners.reshape(-1, 3) + offset)
        uvs.append(uv[loops].reshape(-1, 3, 2))
        materials.append(index[slots])
        offset += len(mesh.vertices)
    return {"faces": np.concatenate(faces), "uvs": np.concatenate(uvs), "materials": np.concatenate(materials).astype(np.int32),
            "textures": np.stack(textures)}


def main(path: Path, clip: str, out: Path) -> None:
    state = own_pose(path)
    load(path)
    objects = mesh_objects()
    first, last = play(clip, state)
    vertices = []
    for k in range(FRAMES):
        moment = first + (last - first) * k / FRAMES
        bpy.context.scene.frame_set(math.floor(moment), subframe=moment - math.floor(moment))
        vertices.append(evaluated(objects))
    world = np.stack(vertices)  # [F, N, 3]
    canonical = np.stack([-world[..., 1], world[..., 0], world[..., 2]], -1)  # Blender's front -Y becomes +X
    canonical -= (canonical[0].min(0) + canonical[0].max(0)) / 2
    canonical *= 0.95 / np.linalg.norm(canonical, axis=2).max()
    np.savez(out, vertices=canonical.astype(np.float32), **surface(objects))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
