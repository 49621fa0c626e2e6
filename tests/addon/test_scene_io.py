"""Files as plain meshes in their rest pose."""

import json
import struct

import bpy
import numpy as np
import pytest
from track4d_addon import scene_io
from track4d_protocol.errors import InputError


def glb_tree(path) -> dict:
    data = path.read_bytes()
    return json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])


def triangles(tree: dict) -> int:
    """Of all nodes with a mesh."""
    primitives = [p for node in tree["nodes"] if "mesh" in node for p in tree["meshes"][node["mesh"]]["primitives"]]
    return sum(tree["accessors"][p.get("indices", p["attributes"]["POSITION"])]["count"] // 3 for p in primitives)


@pytest.mark.parametrize("name", ["fox", "shark", "robot_expressive", "milk_truck", "static_spot", "morph_stress_test"])
def test_assets_are_plain_meshes_in_rest_pose(kit, asset, name) -> None:
    tree = glb_tree(asset(f"{name}.glb"))
    objects, warnings = scene_io.load(asset(f"{name}.glb"))
    moving = bool(tree.get("animations") or tree.get("skins"))
    assert [w["code"] for w in warnings] == ["rest_pose_used"] * moving
    assert not bpy.data.actions and not bpy.data.armatures
    assert len({obj.data for obj in objects}) == len(objects)
    for obj in objects:
        assert obj.animation_data is None and not any(m.type == "ARMATURE" for m in obj.modifiers)
    polygons = sum(len(obj.data.polygons) for obj in objects)
    assert 0 <= triangles(tree) - polygons <= 3  # the importer drops triangles that use a vertex twice


def test_rest_pose_is_the_files_own_vertices(kit, asset) -> None:
    """The fox's skin in rest is the mesh as stored: no bone moves it."""
    tree, data = glb_tree(asset("fox.glb")), asset("fox.glb").read_bytes()
    start = 28 + struct.unpack("<I", data[12:16])[0]
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    view = tree["bufferViews"][accessor["bufferView"]]
    stored = np.frombuffer(data, np.float32, accessor["count"] * 3, start + view.get("byteOffset", 0)).reshape(-1, 3)
    (fox,), _ = scene_io.load(asset("fox.glb"))
    np.testing.assert_allclose(kit.world_positions([fox]), stored[:, [0, 2, 1]] * [1, -1, 1], atol=1e-3)  # of 150


def test_rigid_parts_stay_on_their_bones(kit, asset) -> None:
    objects, _ = scene_io.load(asset("robot_expressive.glb"))
    boxes = {obj.name: (p.min(0), p.max(0)) for obj in objects for p in [kit.world_positions([obj])]}
    joined = kit.world_positions(objects)
    assert 3.5 < np.ptp(joined, axis=0)[2] < 6 and len(objects) == 14
    left, right = (
        next(box for name, box in boxes.items() if name.startswith("Hand") and side in name) for side in (".L", ".R")
    )
    np.testing.assert_allclose(left[0][1:], right[0][1:], atol=0.1)  # the hands mirror each other
    np.testing.assert_allclose(left[0][0], -right[1][0], atol=0.1)


def test_gltf_with_its_files(kit, asset, tmp_path) -> None:
    """Read from its own folder although a copy without animations is made."""
    scene_io.load(asset("milk_truck.glb"))
    cone = kit.make_cone("Mover")
    cone.keyframe_insert("location", frame=1)
    cone.location.x = 3
    cone.keyframe_insert("location", frame=9)
    folder = tmp_path / "with space"
    folder.mkdir()
    bpy.ops.export_scene.gltf(filepath=str(folder / "truck.gltf"), export_format="GLTF_SEPARATE")
    assert json.loads((folder / "truck.gltf").read_text())["animations"]
    objects, warnings = scene_io.load(folder / "truck.gltf")
    assert len(objects) == 4 and [w["code"] for w in warnings] == ["rest_pose_used"]
    assert any(image.size[0] == 2048 for image in bpy.data.images)


@pytest.mark.parametrize("suffix", [".obj", ".fbx", ".ply", ".gltf", ".glb", ".blend"])
def test_formats(kit, tmp_path, suffix) -> None:
    cone = kit.make_cone()
    expected = kit.world_positions([cone])
    path = tmp_path / f"cone{suffix}"
    cone.select_set(True)
    {
        ".obj": lambda: bpy.ops.wm.obj_export(filepath=str(path)),
        ".fbx": lambda: bpy.ops.export_scene.fbx(filepath=str(path)),
        ".ply": lambda: bpy.ops.wm.ply_export(filepath=str(path), forward_axis="Y", up_axis="Z"),
        ".glb": lambda: bpy.ops.export_scene.gltf(filepath=str(path)),
        ".gltf": lambda: bpy.ops.export_scene.gltf(filepath=str(path), export_format="GLTF_SEPARATE"),
        ".blend": lambda: bpy.ops.wm.save_as_mainfile(filepath=str(path)),
    }[suffix]()
    (again,), warnings = scene_io.load(path)
    assert warnings == []
    shown = kit.world_positions([again])
    assert np.abs(shown[:, None] - expected).sum(-1).min(0).max() < 1e-5


def test_blend_takes_the_selected_and_leaves_the_rest(kit, tmp_path) -> None:
    cone, other = kit.make_cone("Hero"), kit.make_cone("Extra")
    eye = bpy.data.objects.new("Eye", bpy.data.cameras.new("Eye"))
    bpy.context.scene.collection.objects.link(eye)
    eye.keyframe_insert("location", frame=1)
    other.keyframe_insert("location", frame=1)
    cone.keyframe_insert("location", frame=1)
    cone.select_set(True)
    other.select_set(False)
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "set.blend"))
    objects, warnings = scene_io.load(tmp_path / "set.blend")
    assert [o.name for o in objects] == ["Hero"] and [w["code"] for w in warnings] == ["rest_pose_used"]
    assert bpy.data.objects["Hero"].animation_data is None
    assert bpy.data.objects["Eye"].animation_data.action and bpy.data.objects["Extra"].animation_data.action


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: folder / "absent.glb", "missing_file"),
        (lambda folder: write(folder / "a.stl", b"solid"), "unsupported_format"),
        (lambda folder: write(folder / "a.glb", b""), "unreadable_file"),
        (lambda folder: write(folder / "a.glb", b"glTF" + bytes(400)), "unreadable_file"),
        (lambda folder: write(folder / "a.glb", b'glTF\2\0\0\0\x20\0\0\0\x08\0\0\0JSON{"a":1} '), "unreadable_file"),
        (lambda folder: write(folder / "a.gltf", b'{"animations": [1]'), "unreadable_file"),
        (lambda folder: write(folder / "a.fbx", b"not an fbx"), "unreadable_file"),
        (lambda folder: write(folder / "a.blend", b"not a blend"), "unreadable_file"),
        (lambda folder: write(folder / "a.obj", b"hello\n"), "no_mesh_in_file"),
        (lambda folder: write(folder / "a.ply", b"hello\n"), "unreadable_file"),
    ],
)
def test_files_that_can_not_be_used(make, code, tmp_path) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        scene_io.load(path)
    assert caught.value.code == code and path.name in caught.value.message and caught.value.action
